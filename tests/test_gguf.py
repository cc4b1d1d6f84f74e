"""GGUF files: what is written is read again, llama.cpp says what we say, and damaged files are refused by name."""

import importlib.util
import json
import random
import re
import struct

import numpy as np
import pytest
import torch

from anymamba import MambaConfig, MambaLM, quantize
from anymamba.checkpoint import gguf
from anymamba.checkpoint.gguf_file import GgufFile
from anymamba.data import ByteTokenizer, JsonTokenizer, documents, load_tokenizer, train_bpe
from anymamba.data.special import Special
from anymamba.errors import AnymambaError
from gguf_cases import CASES, GOLDEN, TOLERANCE, Llama, assemble, logits, models, odd_model, prompts, written

package = pytest.importorskip("gguf", reason="writing GGUF needs the gguf package: pip install gguf")
SAMPLE = "It's 12345 naïve 状態空間 🐍!!\r\n\tdef f(x):  return 'x'... <|endoftext|>"


@pytest.fixture(scope="module")
def loaded():
    return models()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    texts = (document.text for document, _ in zip(documents(None), range(40), strict=False))
    return train_bpe(texts, 400, tmp_path_factory.mktemp("bpe"))


@pytest.fixture
def saved(tmp_path):
    gguf.save(odd_model(), tmp_path / "odd.gguf")
    return tmp_path / "odd.gguf"


def rewritten(path, out, *, fields=(), drop=(), tensors=()):
    """A copy of a file with other metadata (None takes a key out) and other float32 tensors, by the gguf package."""
    source = GgufFile(path)
    metadata = source.fields | dict(fields)
    writer = package.GGUFWriter(out, metadata.pop("general.architecture"))
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}  # fmt: skip
    for key, value in metadata.items():
        if value is not None:
            add[type(value)](key, value)
    kept = {name: source.read(name).float().numpy() for name in source.tensors if name not in drop}
    for name, value in (kept | dict(tensors)).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


FOREIGN = {"anymamba.config": None, "tokenizer.huggingface.json": None}  # without what only we write


# ---- there and back ----


@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_what_a_kind_can_hold_comes_back_to_the_bit(loaded, kind, tmp_path):
    for name, model in loaded.items():
        model = MambaLM(model.config).float()
        model.load_state_dict(loaded[name].state_dict())
        model = model.to(gguf.PLAIN[kind])
        gguf.save(model, tmp_path / "m.gguf")  # its own dtype
        again = assemble(tmp_path / "m.gguf")
        assert again.config == model.config
        for (key, want), got in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            assert got.dtype == want.dtype
            if key.endswith("A_log"):
                assert torch.equal(torch.exp(got), torch.exp(want))
            else:
                assert torch.equal(got, want), key


def test_a_log_is_recovered():
    """A to the bit; A_log itself to the bit at initialisation and from 1 on, else to one unit in the last place."""
    initial = torch.log(torch.arange(1, 257, dtype=torch.float32))
    assert torch.equal(gguf.logarithm(-torch.exp(initial)), initial)
    A_log = torch.empty(100_000).uniform_(-5, 5, generator=torch.Generator().manual_seed(0))
    found = gguf.logarithm(-torch.exp(A_log))
    assert torch.equal(torch.exp(found), torch.exp(A_log))
    assert torch.equal(found[A_log.abs() >= 1], A_log[A_log.abs() >= 1])
    assert (found - A_log).abs().max() <= 2**-23
    foreign = -torch.empty(100_000).uniform_(1e-3, 100, generator=torch.Generator().manual_seed(1))
    assert ((-torch.exp(gguf.logarithm(foreign)) / foreign) - 1).abs().max() < 6e-7


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_tensors_are_those_that_the_gguf_package_reads(loaded, kind, tmp_path):
    gguf.save(loaded["books"], tmp_path / "m.gguf", dtype=kind)
    file, seen = GgufFile(tmp_path / "m.gguf"), set()
    for tensor in package.GGUFReader(tmp_path / "m.gguf").tensors:
        want = package.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(file.read(tensor.name).float().numpy(), want), tensor.name
        seen.add(tensor.tensor_type.name)
    assert seen == {"F32", kind} | ({"F16"} if kind[0] == "Q" else set())  # dt_proj's rows of 20 are no whole blocks
    assert assemble(tmp_path / "m.gguf", torch.bfloat16).backbone.layers[0].mixer.A_log.dtype == torch.float32


def test_files_of_others(bpe, loaded, tmp_path):
    """Their metadata alone give the config: sizes, padding, eps, and that the head is tied."""
    model = MambaLM(MambaConfig(vocab_size=400, d_model=40, n_layer=2, norm_eps=1e-6, pad_vocab_size_multiple=128))
    gguf.save(model, tmp_path / "ours.gguf", tokenizer=bpe)
    path = rewritten(tmp_path / "ours.gguf", tmp_path / "theirs.gguf", fields=FOREIGN)
    config = gguf.read_config(path)
    assert config == model.config.replace(dt_rank=3)
    assert (config.padded_vocab_size, config.tie_embeddings) == (512, True)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (400, bpe.eos_id)
    assert tokenizer.encode(SAMPLE).tolist() == bpe.encode(SAMPLE).tolist()
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == bpe.decode(bpe.encode(SAMPLE))
    falcon = {"mamba.ssm.dt_b_c_rms": True}
    path = rewritten(tmp_path / "ours.gguf", tmp_path / "falcon.gguf", fields=FOREIGN | falcon)
    if "inner_norm_eps" in config.to_dict():
        assert gguf.read_config(path).inner_norm_eps == 1e-6
    else:
        with pytest.raises(AnymambaError, match="inner_norm_eps"):
            gguf.read_config(path)


def test_a_convolution_without_bias_gets_zeros(tmp_path):
    model = MambaLM(MambaConfig(vocab_size=61, d_model=24, n_layer=1, conv_bias=False))
    gguf.save(model, tmp_path / "m.gguf")
    again, ids = assemble(tmp_path / "m.gguf"), torch.tensor([[1, 2, 3, 60]])
    assert torch.equal(again.backbone.layers[0].mixer.conv1d.bias, torch.zeros(48))
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-6)


# ---- llama.cpp ----


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_llama_cpp_said_what_we_say(loaded, name, kind, tmp_path):
    """With the same files, by values that golden/llama.py recorded."""
    golden = json.loads(GOLDEN.read_text())[f"{name} {kind}"]
    gguf.save(loaded[name], tmp_path / "m.gguf", dtype=kind)
    model, want = assemble(tmp_path / "m.gguf", torch.float32), torch.tensor(golden["logits"])
    bound = TOLERANCE[kind] * want.abs().max()
    assert (logits(model, prompts(name)[0]) - want).abs().max() <= bound
    assert written(model, prompts(name)) == golden["written"]
    if kind == "Q8_0":  # 8 bits in blocks, and then again in rows
        assert (logits(quantize(model, "int8"), prompts(name)[0]) - want).abs().max() <= bound


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_llama_cpp_says_what_we_say(loaded, name, kind, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; its recorded values are tested above")
    size = loaded[name].config.vocab_size
    gguf.save(loaded[name], tmp_path / "m.gguf", dtype=kind, tokenizer=ByteTokenizer() if name == "books" else None)
    llama, model = Llama(tmp_path / "m.gguf"), assemble(tmp_path / "m.gguf", torch.float32)
    want = llama.step(prompts(name)[0])
    assert (logits(model, prompts(name)[0]) - want).abs().max() <= TOLERANCE[kind] * want.abs().max()
    assert [llama.written(prompts(name)[1], size)] == written(model, prompts(name)[1:])
    if name == "books":
        assert llama.tokenize("é\n <|endoftext|>") == [*"é\n ".encode(), 256]
    llama.close()


# ---- tokenizers ----


def tiny_model(vocab_size):
    return MambaLM(MambaConfig(vocab_size=vocab_size, d_model=8, n_layer=1))


def falcon_like(bpe):
    content = json.loads(bpe.to_json())
    from anymamba.checkpoint.gguf_vocabulary import PRE_TOKENIZERS

    content["pre_tokenizer"] = PRE_TOKENIZERS["falcon"]
    content["added_tokens"].append({**content["added_tokens"][0], "id": 405, "content": "<|im_end|>"})
    content["model"]["vocab"]["<|im_end|>"] = 405  # with a gap before it
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    special = Special({"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}, (405, 0), template)
    return JsonTokenizer.from_json(json.dumps(content), "falcon-like", special)


@pytest.mark.parametrize("kind", ["bpe", "falcon", "bytes"])
@pytest.mark.parametrize("whole", [True, False])
def test_tokenizers_travel_along(bpe, kind, whole, tmp_path):
    tokenizer = {"bpe": bpe, "falcon": falcon_like(bpe), "bytes": ByteTokenizer()}[kind]
    gguf.save(tiny_model(tokenizer.vocab_size), tmp_path / "m.gguf", tokenizer=tokenizer)
    path = tmp_path / "m.gguf"
    if not whole:
        path = rewritten(path, tmp_path / "lists.gguf", fields=FOREIGN)
    again = load_tokenizer(path)
    assert type(again) is type(tokenizer)
    assert (again.vocab_size, again.eos_ids) == (tokenizer.vocab_size, tokenizer.eos_ids)
    assert again.special.chat_template == tokenizer.special.chat_template
    assert again.encode(SAMPLE).tolist() == tokenizer.encode(SAMPLE).tolist()
    if whole:
        assert again.fingerprint == tokenizer.fingerprint
    if importlib.util.find_spec("llama_cpp"):
        llama = Llama(path)
        text = SAMPLE if kind != "bytes" else SAMPLE.removesuffix("<|endoftext|>")
        assert llama.tokenize(text) == tokenizer.encode(text).tolist()
        llama.close()


def test_gpt_neox_in_llama_cpp(tmp_path):
    """The tokenizer of the published models, with its runs of spaces."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    import lzma

    from shared_data import shared

    packed = shared("tokenizers/gpt_neox_20B_tokenizer.json.xz")
    (tmp_path / "tokenizer.json").write_bytes(lzma.decompress(packed.read_bytes()))
    neox = load_tokenizer(tmp_path)
    gguf.save(tiny_model(50277), tmp_path / "m.gguf", tokenizer=neox)
    llama = Llama(tmp_path / "m.gguf")
    for text in (SAMPLE, "def f():\n        return  1", "My name is Mamba"):
        assert llama.tokenize(text) == neox.encode(text).tolist()
    llama.close()
    again = load_tokenizer(rewritten(tmp_path / "m.gguf", tmp_path / "lists.gguf", fields=FOREIGN))
    assert (again.vocab_size, again.eos_id) == (50277, 0)
    assert again.encode(SAMPLE).tolist() == neox.encode(SAMPLE).tolist()
    assert gguf.read_config(tmp_path / "lists.gguf").vocab_size == 50277


def test_tokenizers_that_do_not_fit(bpe, saved, tmp_path):
    from tokenizers import Tokenizer, models

    with pytest.raises(AnymambaError, match="has ids up to 399, the model only 64: give the tokenizer that it was"):
        gguf.save(odd_model(), tmp_path / "m.gguf", tokenizer=bpe)
    other = JsonTokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "words")
    with pytest.raises(
        AnymambaError, match=r"'words' cannot go into a GGUF file: it is WordLevel with .*convert --no-tokenizer"
    ):
        gguf.save(odd_model(), tmp_path / "m.gguf", tokenizer=other)
    with pytest.raises(AnymambaError, match="holds no tokenizer: give the model's own with --tokenizer"):
        load_tokenizer(saved)
    gguf.save(tiny_model(400), tmp_path / "m.gguf", tokenizer=bpe)
    for key, value, why in (("model", "llama", "of the kind 'llama', and only 'gpt2' is read"),
                            ("pre", "qwen2", "the pre-tokenizer 'qwen2', and only gpt-2, falcon, mpt"),
                            ("pre", None, "the pre-tokenizer None, and only"),
                            ("merges", None, "without merges or types")):  # fmt: skip
        path = rewritten(tmp_path / "m.gguf", tmp_path / "b.gguf", fields=FOREIGN | {f"tokenizer.ggml.{key}": value})
        with pytest.raises(AnymambaError, match=why):
            load_tokenizer(path)


# ---- bad input ----


def refused(path, why):
    with pytest.raises(AnymambaError, match=re.escape(why)):
        next(gguf.tensors(path))


def test_a_file_cut_short_anywhere(saved, tmp_path):
    whole = saved.read_bytes()
    rng, path = random.Random(0), tmp_path / "cut.gguf"
    for length in [*range(4, 200, 3), *(rng.randrange(200, len(whole)) for _ in range(60)), len(whole) - 33]:
        path.write_bytes(whole[:length])
        with pytest.raises(AnymambaError, match=r"cut.gguf is damaged or cut short \(.* of \d+( bytes)?\): ") as told:
            next(gguf.tensors(path))
        assert "unpack" not in str(told.value)
    path.write_bytes(b"")
    refused(path, "cannot be read")
    refused(tmp_path / "none.gguf", "cannot be read")


def test_damaged_headers_are_refused_and_nothing_else_happens(saved, tmp_path):
    whole, rng, path, survived = saved.read_bytes(), random.Random(1), tmp_path / "damaged.gguf", 0
    end = whole.index(b"blk.2.ssm_out.weight") + 60
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 8))):
            damaged[rng.randrange(end)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            dict(gguf.tensors(path))
            survived += 1
        except AnymambaError:
            pass
    assert survived < 200


def test_other_files_are_refused_by_name(saved, tmp_path):
    whole, path = saved.read_bytes(), tmp_path / "other.gguf"
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    refused(path, "is no GGUF file: it begins with b'PK")
    assert not gguf.matches(path)
    assert gguf.matches(saved)
    assert not gguf.matches(tmp_path)
    path.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    refused(path, "is big-endian")
    path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    refused(path, "has version 1")
    at = whole.index(b"blk.0.ssm_in.weight") + len("blk.0.ssm_in.weight") + 4 + 16
    for number, name in ((12, "Q4_K"), (77, "type 77")):
        path.write_bytes(whole[:at] + struct.pack("<I", number) + whole[at + 4 :])
        refused(path, f"blk.0.ssm_in.weight is stored as {name}, which is not read here, only F32, F16, BF16, Q8_0")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"fields": {"general.architecture": "mamba2"}}, "the architecture 'mamba2', which is not supported yet"),
        ({"fields": {"general.architecture": "llama"}}, "the architecture 'llama'"),
        ({"fields": {"mamba.ssm.state_size": None}}, "mamba.ssm.state_size is None, but must be a int"),
        ({"fields": {"mamba.ssm.inner_size": 81}}, "ssm.inner_size=81, but it must be a multiple of the width"),
        ({"fields": {"mamba.ssm.state_size": 8}}, "contradicts itself: d_state is 7 by anymamba.config and 8"),
        ({"fields": FOREIGN | {"mamba.ssm.state_size": 8}}, "misshapen   blk.0.ssm_a (80, 7), its metadata say"),
        ({"fields": {"anymamba.config": "{"}}, "anymamba.config is no config"),
        ({"fields": FOREIGN | {"mamba.block_count": 10**9}}, "has no blk.999999999.attn_norm.weight"),
        ({"drop": ["blk.1.ssm_d"]}, "missing     blk.1.ssm_d (80,)"),
        ({"drop": ["token_embd.weight"]}, "has no token_embd.weight"),
        ({"tensors": {"blk.0.ssm_in.bias": np.zeros(160, np.float32)}}, "unexpected  blk.0.ssm_in.bias (160,)"),
        ({"tensors": {"blk.2.ssm_d": np.zeros(79, np.float32)}}, "misshapen   blk.2.ssm_d (79,), its metadata say"),
    ],
)  # fmt: skip
def test_files_that_contradict_themselves(saved, tmp_path, changes, why):
    refused(rewritten(saved, tmp_path / "changed.gguf", **changes), why)


def test_models_that_llama_cpp_cannot_run(tmp_path, monkeypatch):
    path, small = tmp_path / "m.gguf", {"vocab_size": 61, "d_model": 24, "n_layer": 1}
    for change in ({"expand": 3}, {"bias": True}, {"vocab_size": None}):
        with pytest.raises(AnymambaError, match=r'llama.cpp runs Mamba with .*: save it with format="native"'):
            gguf.save(MambaLM(MambaConfig(**small | change)), path)
    model = MambaLM(MambaConfig(**small))
    with pytest.raises(AnymambaError, match="dtype='Q4_K', but GGUF is written in F32, F16, BF16, Q8_0, Q4_0"):
        gguf.save(model, path, dtype="Q4_K")
    with pytest.raises(AnymambaError, match=r"dtype='torch\.float64'"):
        gguf.save(model, path, dtype=torch.float64)
    with pytest.raises(AnymambaError, match="a quantised model cannot be saved"):
        gguf.save(quantize(MambaLM(MambaConfig(**small)), "int8"), path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(AnymambaError, match=r"needs the gguf package: pip install 'anymamba\[gguf\]'"):
        gguf.save(model, path)
    assert not list(tmp_path.iterdir())
