"""Tokenizers: there and back, in one go and token by token."""

import json
import lzma

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anymamba.data import ByteTokenizer, JsonTokenizer, StreamDecoder, documents, load_tokenizer, train_bpe
from anymamba.errors import AnymambaError
from shared_data import shared

SAMPLE = "Mamba: naïve 状態空間 🐍\r\n\tdef f(x):  return x"
lenient = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def neox(tmp_path_factory) -> JsonTokenizer:
    """The GPT-NeoX tokenizer, which the published Mamba checkpoints use."""
    packed = shared("tokenizers/gpt_neox_20B_tokenizer.json.xz")
    path = tmp_path_factory.mktemp("neox") / "tokenizer.json"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> JsonTokenizer:
    """A BPE of 400 tokens, trained on the first 100 modules of the standard library."""
    texts = (document.text for document, _ in zip(documents(None), range(100), strict=False))
    return train_bpe(texts, 400, tmp_path_factory.mktemp("bpe"))


def stream(tokenizer, ids) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(id) for id in ids), decoder.flush()]


# Bytes.


def test_bytes_there_and_back():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(SAMPLE)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(SAMPLE.encode())
    assert tokenizer.decode(ids) == tokenizer.decode(torch.from_numpy(ids.astype(np.int64))) == SAMPLE
    assert tokenizer.encode(SAMPLE.encode()).tolist() == ids.tolist()
    assert tokenizer.encode("").shape == (0,)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.name) == (257, 256, "bytes")


def test_bytes_drop_eos_and_mark_what_is_not_utf8():
    assert ByteTokenizer().decode([104, 256, 105, 256]) == "hi"
    assert ByteTokenizer().decode([104, 0xFF]) == "h\N{REPLACEMENT CHARACTER}"


def test_bytes_take_an_undecodable_command_line_argument():
    assert ByteTokenizer().encode("caf\udce9").tolist() == list(b"caf\xe9")


def test_bytes_refuse_what_is_no_character_and_no_id():
    with pytest.raises(AnymambaError, match=r"'\\ud800' at character 1 is half of a surrogate pair.*replace it"):
        ByteTokenizer().encode("a\ud800")
    with pytest.raises(AnymambaError, match=r"token id 260 is outside 0\.\.256 of the tokenizer 'bytes'; are the ids"):
        ByteTokenizer().decode([1, 260])


@lenient
@given(st.lists(st.integers(0, 256)))
def test_bytes_streamed_are_bytes_decoded(ids):
    assert "".join(stream(ByteTokenizer(), ids)) == ByteTokenizer().decode(ids)


def test_an_incomplete_character_is_held_back():
    assert stream(ByteTokenizer(), "é€".encode()) == ["", "é", "", "", "€", ""]
    assert stream(ByteTokenizer(), b"a\xe2\x82") == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


# tokenizer.json.


def test_neox_is_the_published_tokenizer(neox):
    assert (neox.vocab_size, neox.eos_id) == (50277, 0)
    assert neox.encode("My name is Mamba").tolist() == [3220, 1416, 310, 353, 31834]
    assert neox.encode(SAMPLE).dtype == np.uint16
    assert neox.decode(neox.encode(SAMPLE)) == SAMPLE
    assert neox.decode([neox.eos_id, *neox.encode("hi"), neox.eos_id]) == "hi"


@lenient
@given(st.data())
def test_json_streamed_is_json_decoded(neox, data):
    ids = data.draw(st.lists(st.integers(0, neox.vocab_size - 1), max_size=40))
    assert "".join(stream(neox, ids)) == neox.decode(ids)


@lenient
@given(st.text())
def test_text_comes_back_from_a_stream(bpe, text):
    assert "".join(stream(bpe, bpe.encode(text))) == bpe.decode(bpe.encode(text)) == text


def test_spaces_by_context_survive_streaming():
    """Tokenizers of the SentencePiece family drop the first space of whatever they decode."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"▁big": 0, "▁snake": 1, "</s>": 2}, unk_token="▁big"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["</s>"])
    tokenizer = JsonTokenizer(inner)
    assert tokenizer.eos_id == 2
    assert stream(tokenizer, [0, 1, 2, 1]) == ["big", " snake", "", " snake", ""]


def test_truncation_and_padding_settings_do_not_touch_a_corpus(bpe, tmp_path):
    bpe.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert len(load_tokenizer(tmp_path).encode("x" * 100)) > 4


def test_json_refuses_bytes_that_are_not_text_and_unknown_ids(bpe):
    with pytest.raises(AnymambaError, match=r"byte 0xff at offset 2 is not UTF-8.*use the 'bytes' tokenizer"):
        bpe.encode(b"ab\xff")
    with pytest.raises(AnymambaError, match=r"token id 400 is outside 0\.\.399 .* trained with another tokenizer\?"):
        bpe.decode([400])


# Loading and saving.


def test_save_and_load(bpe, tmp_path):
    for tokenizer in (bpe, ByteTokenizer(), bpe):  # whatever a folder held before
        tokenizer.save(tmp_path / "run")
        for spec in (tmp_path / "run", str(tmp_path / "run"), tmp_path / "run" / "tokenizer.json"):
            loaded = load_tokenizer(spec)
            assert type(loaded) is type(tokenizer)
            assert loaded.fingerprint == tokenizer.fingerprint
            assert loaded.encode(SAMPLE).tolist() == tokenizer.encode(SAMPLE).tolist()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer.json"]
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)


def test_loading_what_is_not_there_or_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 1}', encoding="utf-8")
    with pytest.raises(AnymambaError, match=r"not a tokenizer\.json of the `tokenizers` library.*Hugging Face"):
        load_tokenizer(tmp_path)
    with pytest.raises(AnymambaError, match=r"no tokenizer at .*tokenzer\.json \(did you mean .*tokenizer\.json\?\)"):
        load_tokenizer(tmp_path / "tokenzer.json")
    with pytest.raises(AnymambaError, match=r"no tokenizer at gpt-neox; give 'bytes', the path"):
        load_tokenizer("gpt-neox")


# Training.


def test_bpe_learns_the_corpus(bpe, tmp_path):
    assert bpe.vocab_size == 400
    text = "def __init__(self):\n    return self"
    assert len(bpe.encode(text)) < len(text) / 2
    assert bpe.decode([bpe.eos_id]) == ""
    path = tmp_path / "tiny.json"
    with pytest.warns(UserWarning, match=r"holds pairs for \d+ tokens only, not for 5000"):
        train_bpe(["too short"], 5000, path)
    assert load_tokenizer(path).decode(load_tokenizer(path).encode(SAMPLE)) == SAMPLE


def test_bpe_needs_room_and_text(tmp_path):
    with pytest.raises(AnymambaError, match=r"vocab_size=100, but the 256 bytes and <\|endoftext\|> alone are 257"):
        train_bpe(["text"], 100, tmp_path)
    with pytest.raises(AnymambaError, match="the documents hold no text"):
        train_bpe([""], 300, tmp_path)
    assert not list(tmp_path.iterdir())
