"""Checkpoints of others: read from and written for transformers and mamba-ssm, in little memory, or refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anymamba import AnymambaError, MambaConfig, MambaLM, checkpoint
from anymamba.checkpoint import folder as folders
from anymamba.checkpoint.state_spaces import SSM_DEFAULTS
from anymamba.cli.generate import DEFAULT_MODEL
from anymamba.data import ByteTokenizer, load_tokenizer
from anymamba.generate import SamplingConfig, generate
from conftest import run_python
from test_model import CONFIGS, their_model

SMALL = MambaConfig(vocab_size=23, d_model=32, n_layer=2, d_state=4)
IDS = torch.randint(23, (2, 37), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:.*falling back to its reference.*", "ignore::DeprecationWarning")


def random_model(seed=0, dtype=torch.float32, **changes):
    """Larger weights than at the start, so that every part matters."""
    torch.manual_seed(seed)
    model = MambaLM(SMALL.replace(**changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("A_log"):
                p.add_(0.2 * torch.randn(p.shape))
    return model.to(dtype)


def from_transformers(path, changes, **options):
    """A model of theirs that they saved."""
    theirs = their_model(random_model(**changes).config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if not name.endswith("A_log"):
                p.add_(0.2 * torch.randn(p.shape))
    theirs.save_pretrained(path, **options)
    return theirs


def from_files(path):
    return {name: v for file in sorted(path.glob("*.safetensors")) for name, v in load_file(file).items()}


def same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, v in one.items():
        assert v.dtype == other[name].dtype, name
        assert torch.equal(v, other[name]), name


@torch.no_grad()
def logits(model):
    return model(IDS).logits


# ---- transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_theirs_to_ours_and_back(changes, tmp_path):
    """Logits, 64 greedy tokens, and every bit of every tensor."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    theirs = from_transformers(tmp_path / "theirs", changes)
    ours = MambaLM.from_pretrained(tmp_path / "theirs")
    assert float(logits(theirs).abs().max()) > 1
    assert float((logits(ours) - logits(theirs)).abs().max()) <= 1e-4
    prompt = IDS[:1, :5]
    done = generate(ours, prompt.tolist(), max_new_tokens=64, sampling=SamplingConfig(temperature=0))
    with torch.no_grad():  # they would choose each of our tokens after those before it
        chosen = theirs(torch.tensor([prompt.tolist()[0] + list(done[0].ids)])).logits[0].argmax(-1)
    assert chosen[4:-1].tolist() == list(done[0].ids)

    ours.save_pretrained(tmp_path / "back", "hf")
    same_tensors(from_files(tmp_path / "back"), from_files(tmp_path / "theirs"))
    with safe_open(tmp_path / "back" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(again) is type(theirs)
    assert torch.equal(logits(again), logits(theirs))
    config = again.config.to_dict()
    for key, value in theirs.config.to_dict().items():
        if key not in ("transformers_version", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id"):
            assert config[key] == value, key


@pytest.mark.parametrize("changes", [{}, {"dt_rank": 5, "dt_min": 1e-2}, {"inner_norm_eps": 1e-6, "expand": 3}])
@pytest.mark.parametrize("form", sorted({*checkpoint.FORMATS} - {"gguf"}))  # for which see test_gguf.py
def test_ours_through_every_format(form, changes, tmp_path):
    if form == "state-spaces" and "inner_norm_eps" in changes:
        return  # which refuses them, see below
    model = random_model(**changes)
    model.save_pretrained(tmp_path, form)
    again = MambaLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.fingerprint() == model.fingerprint()
    same_tensors(again.state_dict(), model.state_dict())
    assert again.lm_head.weight is again.backbone.embedding.weight
    assert all(v.is_contiguous() and v.requires_grad for v in again.parameters())
    assert checkpoint.load_config(tmp_path / "config.json") == model.config
    assert [form for form, module in checkpoint.FORMATS.items() if module.matches(tmp_path)] == [form]


def test_both_kinds_of_keys_are_hugging_faces(tmp_path):
    """The published mamba-130m-hf keeps the old keys beside the new, and Falcon-Mamba says expand=16 for 2."""
    from_transformers(tmp_path, {})
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings |= {"d_model": 32, "n_layer": 2, "ssm_cfg": {}, "rms_norm": True, "pad_vocab_size_multiple": 8}
    settings |= {"expand": 16, "time_step_rank": "auto", "torch_dtype": "float32"}
    path.write_text(json.dumps(settings))
    assert MambaLM.from_pretrained(tmp_path).config == SMALL.replace(vocab_size=24, initializer_range=0.1)
    del settings["intermediate_size"]
    path.write_text(json.dumps(settings | {"expand": 2}))
    assert checkpoint.load_config(tmp_path).expand == 2


def test_files_of_16_bits(tmp_path):
    """What sets the memory is float32 even where a file has it in 16 bits; norms follow the matrices."""
    theirs = from_transformers(tmp_path, {})
    theirs.bfloat16()
    theirs.backbone.norm_f.float()
    theirs.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["backbone.layers.0.mixer.A_log"].dtype == torch.bfloat16
    ours = MambaLM.from_pretrained(tmp_path)
    assert {k for k, v in ours.named_parameters() if v.dtype == torch.float32} == {
        f"backbone.layers.{i}.mixer.{k}" for i in range(2) for k in ("A_log", "D", "dt_proj.bias")
    }
    assert torch.equal(ours.backbone.layers[1].mixer.D, theirs.backbone.layers[1].mixer.D.float())
    assert {v.dtype for v in MambaLM.from_pretrained(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}
    got, want = logits(ours).float(), logits(MambaLM.from_pretrained(tmp_path, dtype=torch.float32))
    assert float((got - want).abs().max() / want.abs().max()) < 0.05


@pytest.mark.parametrize("form", ["native", "hf"])
def test_shards(form, tmp_path, monkeypatch):
    """Written above a limit, read by transformers and by us; what the folder held before is gone."""
    transformers = pytest.importorskip("transformers")
    model = random_model(tie_embeddings=False)
    model.save_pretrained(tmp_path, form)
    monkeypatch.setattr(folders.write_safetensors, "__defaults__", (12_000,))
    model.save_pretrained(tmp_path, form)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:2] == ["config.json", f"model-00001-of-{len(names) - 2:05d}.safetensors"]
    assert names[-1] == "model.safetensors.index.json"
    assert len(names) > 4
    same_tensors(MambaLM.from_pretrained(tmp_path).state_dict(), model.state_dict())
    if form == "hf":
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert float((logits(again) - logits(model)).abs().max()) <= 1e-4
    monkeypatch.undo()
    model.save_pretrained(tmp_path, "state-spaces")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_their_shards(tmp_path):
    theirs = from_transformers(tmp_path, {"tie_embeddings": False}, max_shard_size="12KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert float((logits(MambaLM.from_pretrained(tmp_path)) - logits(theirs)).abs().max()) <= 1e-4


def test_their_bin_in_shards(tmp_path):
    theirs = from_transformers(tmp_path, {})
    state = theirs.state_dict()
    parts = {f"pytorch_model-0000{i}-of-00002.bin": dict(list(state.items())[i - 1 :: 2]) for i in (1, 2)}
    for name, part in parts.items():
        torch.save(part, tmp_path / name)
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    assert float((logits(MambaLM.from_pretrained(tmp_path)) - logits(theirs)).abs().max()) <= 1e-4


# ---- state-spaces ----------------------------------------------------------------------------------------------

PUBLISHED = {"d_model": 32, "n_layer": 2, "vocab_size": 23, "ssm_cfg": {"d_state": 4}, "rms_norm": True,
             "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}  # fmt: skip


def published(path, model, **settings):
    """As mamba-ssm writes it: a tied head is in the file, with the same storage."""
    path.mkdir(exist_ok=True)
    state = dict(model.state_dict())
    assert {"backbone.embedding.weight", "lm_head.weight", "backbone.layers.1.mixer.dt_proj.bias"} <= state.keys()
    torch.save(state, path / "pytorch_model.bin")
    (path / "config.json").write_text(json.dumps(PUBLISHED | settings))
    return path


def test_published_layout(tmp_path):
    model = random_model()
    again = MambaLM.from_pretrained(published(tmp_path, model))
    assert again.config == model.config
    assert again.config.padded_vocab_size == 24
    same_tensors(again.state_dict(), model.state_dict())
    for settings in ({"tie_embeddings": True, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}},
                     {"ssm_cfg": {"d_state": 4, "layer": "Mamba1", "dt_rank": "auto", "dt_init": "random",
                                  "use_fast_path": False, "conv_bias": True}}):  # fmt: skip
        assert MambaLM.from_pretrained(published(tmp_path, model, **settings)).config == model.config
    other = random_model(tie_embeddings=False, bias=True, dt_rank=3)
    settings = {"tie_embeddings": False, "ssm_cfg": {"d_state": 4, "bias": True, "dt_rank": 3}}
    same_tensors(MambaLM.from_pretrained(published(tmp_path, other, **settings)).state_dict(), other.state_dict())
    save_file({k: v.clone() for k, v in other.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").unlink()
    same_tensors(MambaLM.from_pretrained(tmp_path).state_dict(), other.state_dict())


def test_what_mamba_ssm_is_given(tmp_path):
    """Keys of its `MambaConfig` and `Mamba` only, the tied head stored once, nothing that needs code."""
    model = random_model()
    model.save_pretrained(tmp_path, "state-spaces")
    assert json.loads((tmp_path / "config.json").read_text()) == PUBLISHED
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert list(state) == list(model.state_dict())
    assert state["lm_head.weight"].data_ptr() == state["backbone.embedding.weight"].data_ptr()
    random_model(d_conv=3, conv_bias=False, dt_rank=3, dt_max=0.5).save_pretrained(tmp_path, "state-spaces")
    ssm = json.loads((tmp_path / "config.json").read_text())["ssm_cfg"]
    assert ssm == {"d_state": 4, "d_conv": 3, "conv_bias": False, "dt_rank": 3, "dt_max": 0.5}
    assert ssm.keys() <= SSM_DEFAULTS.keys()
    for changes in ({"norm_eps": 1e-3}, {"inner_norm_eps": 1e-6}, {"vocab_size": None}):
        with pytest.raises(AnymambaError, match=r"the format state-spaces has no key for .*: save as native or hf"):
            random_model(**changes).save_pretrained(tmp_path, "state-spaces")


# ---- memory, devices, integers ---------------------------------------------------------------------------------

PEAK = """
import re, torch
from anymamba import MambaLM
def memory(name): return 1024 * int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
MambaLM.from_pretrained({tiny!r})
before = memory("VmRSS")
model = MambaLM.from_pretrained({path!r}, dtype=torch.bfloat16)
print((memory("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif("not __import__('os').path.exists('/proc/self/status')", reason="needs Linux to see its memory")
def test_loading_takes_the_memory_of_the_weights(tmp_path):
    """Half the precision of the file, so that every tensor is converted."""
    random_model().save_pretrained(tmp_path / "tiny")
    model = MambaLM(MambaConfig(vocab_size=10_000, d_model=768, n_layer=10))  # 180 MB
    for form in ("hf", "state-spaces"):
        model.save_pretrained(tmp_path / form, form)
        done = run_python(PEAK.format(tiny=str(tmp_path / "tiny"), path=str(tmp_path / form)))
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) <= 1.15, form
        shutil.rmtree(tmp_path / form)


def test_quantised_while_loading(tmp_path):
    random_model().save_pretrained(tmp_path, "hf")
    model = MambaLM.from_pretrained(tmp_path, quantize="int8")
    assert model.lm_head.weight.dtype == torch.int8
    assert float((logits(model) - logits(random_model())).abs().max()) < 0.5
    with pytest.raises(AnymambaError, match="quantize='int3' does not exist: choose one of int8, int4"):
        MambaLM.from_pretrained(tmp_path, quantize="int3")
    with pytest.raises(AnymambaError, match=r"a quantised model cannot be saved: .*quantize='int8'"):
        model.save_pretrained(tmp_path / "other", "hf")
    with pytest.raises(AnymambaError, match=r"dtype=torch.int8, but it must be one of torch.float32"):
        MambaLM.from_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(AnymambaError, match="format='onnx' does not exist: choose one of native, state-spaces, hf"):
        random_model().save_pretrained(tmp_path / "other", "onnx")
    assert not (tmp_path / "other").exists()


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.fixture
def hf(tmp_path):
    random_model().save_pretrained(tmp_path / "hf", "hf")
    return tmp_path / "hf"


def refuses(path, *words, **options):
    with pytest.raises(AnymambaError) as error:
        MambaLM.from_pretrained(path, **options)
    for word in words:
        assert word in str(error.value)
    return str(error.value)


def setting(path, **changes):
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in (settings | changes).items() if v != "gone"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba2"}, "not supported yet: Mamba-2 ('mamba2'); anymamba runs Mamba-1 language models:"),
        ({"model_type": "llama"}, "not supported yet: model_type ('llama')"),
        ({"model_type": "gone"}, 'is of no format that anymamba knows: it has no "format" (ours), no "model_type"'),
        ({"hidden_act": "relu"}, "not supported yet: hidden_act='relu', only 'silu'"),
        ({"intermediate_size": 65}, "intermediate_size=65, which is no multiple of hidden_size=32"),
        ({"intermediate_size": "64"}, "intermediate_size='64', but it must be a whole number of at least 1"),
        ({"hidden_size": "gone"}, "config.json does not say 'hidden_size', without which the model has no size"),
        ({"vocab_size": "gone", "num_hidden_layers": "gone"}, "does not say 'vocab_size', 'num_hidden_layers', with"),
        ({"hidden_size": None, "time_step_rank": "auto"}, "hidden_size=None, but it must be a whole number"),
        ({"hidden_size": None}, "hidden_size=None, but it must be a whole number of at least 1"),
        ({"quantization_config": {"bits": 4}}, "not supported yet: weights quantised by others (quantization_config)"),
        ({"num_hidden_layers": 0}, "config: n_layer=0, but it must be a whole number of at least 1"),
        ({"use_bias": True}, "missing     backbone.layers.0.mixer.in_proj.bias (128,)"),
        ({"state_size": 5}, "misshapen   backbone.layers.0.mixer.x_proj.weight (10, 64), the config says (12, 64)"),
        ({"tie_word_embeddings": False}, "missing     lm_head.weight (24, 32)"),
    ],
    ids=str,
)  # fmt: skip
def test_hugging_face_configs(hf, changes, words):
    setting(hf, **changes)
    refuses(hf, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "not supported yet: layers of kind Mamba2; anymamba runs Mamba-1"),
        ({"attn_layer_idx": [1], "d_intermediate": 9}, "a hybrid with attention layers, a hybrid with MLP layers"),
        ({"rms_norm": False}, "not supported yet: LayerNorm in place of RMSNorm"),
        ({"ssm_cfg": {"d_stat": 4}}, "the config has d_stat, which mamba-ssm does not know"),
        ({"n_layr": 4}, "the config has n_layr, which mamba-ssm does not know"),
        ({"ssm_cfg": {"d_state": 4, "expand": 1.5}}, "config: expand=1.5, but it must be a whole number"),
        ({"n_layer": 3}, "missing     backbone.layers.2.norm.weight (32,)"),
    ],
    ids=str,
)
def test_state_spaces_configs(tmp_path, changes, words):
    refuses(published(tmp_path, random_model(), **changes), words)


def test_weights_that_are_not_all_there(hf, monkeypatch):
    monkeypatch.setattr(folders.write_safetensors, "__defaults__", (12_000,))
    random_model().save_pretrained(hf, "hf")
    shard = sorted(hf.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refuses(hf, f"{shard} is damaged or cut short", "copy or save it again")
    shard.unlink()
    refuses(hf, f"lacks {shard.name}, of", "files that model.safetensors.index.json names: copy or download the rest")
    index = hf / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret"}}))
    refuses(hf, "names '../../secret', which is no shard such as")
    index.write_text("{}")
    refuses(hf, "has no weight_map")
    index.write_text("{")
    refuses(hf, "model.safetensors.index.json is not JSON")
    index.unlink()
    refuses(hf, "no model.safetensors in")


class Code:
    """Runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_bin_is_never_executed(tmp_path):
    path, model = tmp_path / "pytorch_model.bin", random_model()
    published(tmp_path, model)
    whole = path.read_bytes()
    torch.save({"code": Code(str(tmp_path / "executed"))}, path)
    refuses(tmp_path, "holds more than tensors, and Python code in a file is not executed here", "as safetensors")
    assert not (tmp_path / "executed").exists()
    path.write_bytes(whole[:-300])
    refuses(tmp_path, "is cut short, or is not what torch.save writes since torch 1.6")
    path.write_bytes(b"")
    refuses(tmp_path, "is cut short, or is not")
    path.write_bytes(whole[:1000] + whole[9000:])
    refuses(tmp_path, "is damaged or cut short")
    for other in ({"model": model.state_dict()}, [torch.ones(3)]):
        torch.save(other, path)
        refuses(tmp_path, "is not a dictionary of tensors: save model.state_dict() alone")


def test_tensors_that_contradict_the_config(hf):
    path = hf / "model.safetensors"
    whole = load_file(path)
    embedding = whole["backbone.embeddings.weight"]
    for changes, words in [
        ({"lm_head.weight": embedding + 1}, "untied      lm_head.weight is not backbone.embedding.weight, but the"),
        ({"backbone.embedding.weight": embedding.clone()}, "twice       backbone.embedding.weight"),
        ({"backbone.norm_f.weight": torch.ones(32).char()}, "not real    backbone.norm_f.weight is torch.int8"),
        ({"extra": torch.ones(2)}, "unexpected  extra (2,)"),
    ]:  # fmt: skip
        save_file(whole | changes, path)
        refuses(hf, f"the weights in {hf} are not those of the model that its config describes", words)
    save_file(whole | {"lm_head.weight": embedding.clone()}, path)  # says the same twice
    assert torch.equal(MambaLM.from_pretrained(hf).lm_head.weight, embedding)
    head = {"lm_head.weight": whole.pop("backbone.embeddings.weight")}  # or under the other name
    save_file(whole | head, path)
    assert torch.equal(MambaLM.from_pretrained(hf).backbone.embedding.weight, embedding)


def test_paths(hf, tmp_path):
    want = MambaLM.from_pretrained(hf).state_dict()
    same_tensors(MambaLM.from_pretrained(hf / "model.safetensors").state_dict(), want)
    same_tensors(MambaLM.from_pretrained(str(hf)).state_dict(), want)
    (tmp_path / "notes.txt").write_text("text")
    refuses(tmp_path / "notes.txt", "notes.txt is no model file that anymamba knows")
    refuses(tmp_path / "nowhere", "no config.json in", "nowhere: a model folder holds config.json")
    refuses(hf, f"revision='main' goes with a name on the hub, and {hf} is a path: drop it", revision="main")
    (tmp_path / "codestral").mkdir()
    (tmp_path / "codestral" / "params.json").write_text("{}")
    for name, words in {"ssm": "ssm_cfg is [1], but it must be an object", "kind": "not supported yet"}.items():
        (tmp_path / name).mkdir()
        settings = {"ssm": {"d_model": 8, "n_layer": 1, "ssm_cfg": [1]}, "kind": {"model_type": ["mamba"]}}[name]
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        refuses(tmp_path / name, words)
    for device, words in {"foo": "device='foo' is none", "cuda": "torch sees no GPU here"}.items():
        if device == "foo" or not torch.cuda.is_available():
            with pytest.raises(AnymambaError, match=words):
                MambaLM.from_pretrained(tmp_path, device=device)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refuses(tmp_path / "adapter", "holds an adapter, not a model: anymamba.lora.load puts it on its model")
    refuses(tmp_path / "codestral", "has a params.json, as Codestral Mamba has: not supported yet: Mamba-2")


# ---- the command -----------------------------------------------------------------------------------------------


def test_convert(tmp_path, command, hf):
    """The tokenizer travels along, generate and eval take what comes out."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {chr(97 + i): i for i in range(22)} | {"<|endoftext|>": 22}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(hf / "tokenizer.json"))
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    text = tmp_path / "text.txt"
    text.write_text("abcabcabc" * 9)
    says = [command("eval", hf, text, "--json")]
    source = hf
    for i, form in enumerate(("state-spaces", "native", "hf")):
        out = tmp_path / str(i)
        code, said, errors = command("convert", source, out, "--to", form)
        assert (code, errors) == (0, "")
        assert "tokenizer   tokenizer.json, chat_template.jinja" in said
        assert re.search(r"[\d,]+ parameters, 0\.\d MB in .*\ntime +read in \d", said)
        says.append(command("eval", out, text, "--json"))
        assert command("generate", out, "--prompt", "abc", "--max-new-tokens", 3)[0] == 0
        assert command("state", "read", out, text, "-o", tmp_path / f"{i}.state")[0] == 0
        source = out
    losses = {json.loads(said)["nats_per_token"] for code, said, _ in says}
    assert len(losses) == 1
    same_tensors(from_files(out), from_files(hf))
    assert json.loads((source / "config.json").read_text())["eos_token_id"] == 22
    assert command("warmup", "--config", source, "--device", "cpu", "--dtype", "fp32")[0] == 0


def test_a_model_of_bytes_for_transformers(tmp_path, command):
    """The model of the package: transformers reads and writes the same bytes, and goes on as we do."""
    transformers = pytest.importorskip("transformers")
    assert command("convert", DEFAULT_MODEL, tmp_path, "--to", "hf", "--dtype", "float32")[0] == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("It was état 日本 🎉\r\n\t \0\x7f\xa0\xad don't  stop", "".join(map(chr, range(1, 300)))):
        ids = ByteTokenizer().encode(text).tolist()
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids) == text
        assert load_tokenizer(tmp_path).encode(text).tolist() == ids
    assert load_tokenizer(tmp_path).decode([97, 256]) == "a"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == 256
    ids = tokenizer("It was a dark", return_tensors="pt").input_ids
    ours = MambaLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)
    with torch.no_grad():
        assert float((theirs(ids).logits - ours(ids).logits).abs().max()) <= 1e-3


def test_convert_refuses(tmp_path, command, hf):
    for arguments, words in [
        ((hf, hf, "--to", "native"), "is the model itself: choose another folder to write"),
        (("nowhere", tmp_path / "out", "--to", "native"), "no config.json in nowhere"),
        ((hf, tmp_path, "--to", "native"), "is not empty: choose another folder, or --force"),
    ]:
        code, said, errors = command("convert", *arguments)
        assert (code, said) == (2, "")
        assert words in errors
    assert command("convert", hf, tmp_path / "out", "--to", "hf", "--dtype", "bfloat16")[0] == 0
    assert command("convert", hf, tmp_path / "out", "--to", "native", "--force")[0] == 0
    assert MambaLM.from_pretrained(tmp_path / "out").lm_head.weight.dtype == torch.float32
