"""anymamba state, and generate with --state and --save-state, on a tiny model and Python's own library."""

import json
import re
import shlex
import signal
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from anymamba import MambaConfig, MambaLM, MambaState
from anymamba.cli import state as command_state
from anymamba.cli.eval import read_tokens
from anymamba.data import ByteTokenizer
from anymamba.generate import Reading, SamplingConfig, generate, read
from anymamba.state import state_info
from conftest import run_python

GREEDY = SamplingConfig(temperature=0)


def make_model(seed=0):
    torch.manual_seed(seed)
    model = MambaLM(MambaConfig(d_model=16, n_layer=2, d_state=4, tie_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.3)
        model.lm_head.weight[128:].zero_()  # it writes ASCII, so that texts can be compared
        model.lm_head.weight[:32].zero_()
        for layer in model.backbone.layers:
            layer.mixer.out_proj.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, another one, and a book in two halves."""
    folder = tmp_path_factory.mktemp("state")
    for seed, name in enumerate(("run", "other")):
        make_model(seed).save_pretrained(folder / name)
        ByteTokenizer().save(folder / name)
    book = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()[:6000]
    for name, part in {"book": book, "one": book[:2500], "two": book[2500:]}.items():
        (folder / f"{name}.txt").write_bytes(part)
    return folder


@pytest.fixture(scope="module")
def book(folder):
    return ByteTokenizer().encode((folder / "book.txt").read_bytes()).tolist()


@pytest.fixture
def command(command, monkeypatch, folder):
    monkeypatch.chdir(folder)
    return command


@pytest.fixture(scope="module")
def saved(model, book, folder):
    path = folder / "saved.state"
    read(model, book).save(path, model)
    return path


def assert_same(path, model, ids):
    got, want = Reading.load(path, model), read(model, ids)
    assert got.state.seen.tolist() == [len(ids)]
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    for layer, expected in zip(got.state.layers, want.state.layers, strict=True):
        torch.testing.assert_close(layer, expected, atol=1e-4, rtol=1e-4)


# ---- read ----


def test_read_saves_what_the_model_has_read(model, book, command, tmp_path):
    out = tmp_path / "book.state"
    code, said, errors = command("state", "read", "run", "book.txt", "-o", out)
    assert (code, errors) == (0, "")
    assert re.match(rf"6,000 tokens read, [\d,]+/s; [\d.]+ kB in {out}\ngo on with it:\n  anymamba generate run", said)
    assert_same(out, model, book)
    code, text, errors = command(*shlex.split(said.splitlines()[-1])[1:], "--max-new-tokens", 5, "--greedy")
    assert (code, errors) == (0, "")
    assert len(text) == 6


@pytest.mark.parametrize("chunk", [64, 999, 10_000])
def test_chunks_change_nothing(model, book, command, tmp_path, chunk):
    assert command("state", "read", "run", "book.txt", "-o", tmp_path / "s", "--chunk", chunk)[0] == 0
    assert_same(tmp_path / "s", model, book)


def test_going_on_from_a_state(model, book, command, tmp_path):
    first, both = tmp_path / "first", tmp_path / "both"
    assert command("state", "read", "run", "one.txt", "-o", first)[0] == 0
    code, said, _ = command("state", "read", "run", "two.txt", "--state", first, "-o", both)
    assert code == 0
    assert said.startswith("3,500 tokens read")
    assert_same(both, model, book)
    code, *_ = command("state", "read", "run", "two.txt", "--state", first, "-o", first, "--force")  # onto itself
    assert code == 0
    assert_same(first, model, book)


def test_many_documents_are_those_of_eval(model, folder, command, tmp_path, monkeypatch):
    lines = (folder / "book.txt").read_text().splitlines()[:40]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    want, _ = read_tokens((tmp_path / "lines.jsonl", folder / "two.txt"), "body", ByteTokenizer())
    monkeypatch.setattr(command_state, "TOGETHER", 100)  # else all is gathered before it is read
    paths = (tmp_path / "lines.jsonl", "two.txt")
    assert command("state", "read", "run", *paths, "--field", "body", "-o", tmp_path / "s")[0] == 0
    assert (want == 256).sum() == len([line for line in lines if line]) + 1
    assert_same(tmp_path / "s", model, want)


def test_the_text_is_not_in_memory_at_once(monkeypatch, book):
    monkeypatch.setattr(command_state, "TOGETHER", 100)
    taken = []

    def pieces():
        for start in range(0, 6000, 30):
            taken.append(start)
            yield np.array(book[start : start + 30]), 30

    gathered = command_state._gathered(pieces(), skip=50)
    for i, (ids, _) in enumerate(gathered):
        assert len(ids) <= 130
        assert 30 * len(taken) - 50 <= 130 * (i + 1)
    assert len(taken) == 200


@pytest.mark.parametrize("together", [100, 1 << 16])
def test_progress_goes_forward_to_the_size_of_the_text(model, book, monkeypatch, together):
    monkeypatch.setattr(command_state, "TOGETHER", together)
    steps, options = [], command_state.ReadOptions("run", ("book.txt",), "out", chunk=70)
    pieces = ((np.array(book[i : i + 1000]), 3000) for i in range(0, 6000, 1000))  # of three bytes a token
    assert len(list(command_state._readings(model, pieces, None, options, steps.append))) == len(steps) > 80
    assert all(0 < step <= 210 for step in steps)
    assert sum(steps) == 18_000


# ---- Ctrl-C ----


def interrupted_at(monkeypatch, step, signum=signal.SIGINT):
    """The process gets a real signal in the middle of the model's pass number `step`."""
    load_run, calls = command_state.load_run, []

    def load(*args):
        model, tokenizer = load_run(*args)

        def interrupt(*_):
            calls.append(1)
            if len(calls) == step:
                signal.raise_signal(signum)

        model.backbone.layers[1].register_forward_pre_hook(interrupt)
        return model, tokenizer

    monkeypatch.setattr(command_state, "load_run", load)


def test_ctrl_c_saves_what_was_read_and_tells_how_to_read_the_rest(model, book, command, tmp_path, monkeypatch):
    out = tmp_path / "book.state"
    interrupted_at(monkeypatch, 4)
    code, said, errors = command("state", "read", "run", "book.txt", "-o", out, "--chunk", 700)
    assert (code, said) == (130, "")
    assert f"interrupted: 2,100 tokens are read, and their state is in {out}" in errors
    assert_same(out, model, book[:2100])
    interrupted_at(monkeypatch, 2)  # once more, so that what is skipped adds up
    code, _, errors = command(*shlex.split(errors.splitlines()[-1])[1:])
    assert code == 130
    assert_same(out, model, book[:2800])
    assert "--skip 2800" in errors


def test_the_rest_after_ctrl_c(model, book, command, tmp_path, monkeypatch):
    out = tmp_path / "book.state"
    with monkeypatch.context() as patch:
        interrupted_at(patch, 4)
        _, _, errors = command("state", "read", "run", "book.txt", "-o", out, "--chunk", 700)
    code, _, errors = command(*shlex.split(errors.splitlines()[-1])[1:])
    assert (code, errors) == (0, "")
    assert_same(out, model, book)


def test_sigterm_saves_as_ctrl_c_does(model, book, command, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupted_at(patch, 4, signal.SIGTERM)
        code, said, errors = command("state", "read", "run", "book.txt", "-o", tmp_path / "s", "--chunk", 700)
    assert (code, said) == (128 + signal.SIGTERM, "")
    assert "interrupted: 2,100 tokens are read" in errors
    assert_same(tmp_path / "s", model, book[:2100])
    assert signal.getsignal(signal.SIGTERM) is before
    assert command(*shlex.split(errors.splitlines()[-1])[1:])[0] == 0
    assert_same(tmp_path / "s", model, book)


def test_ctrl_c_before_anything_was_read_writes_nothing(command, tmp_path, monkeypatch):
    interrupted_at(monkeypatch, 1)
    code, _, errors = command("state", "read", "run", "book.txt", "-o", tmp_path / "s")
    assert (code, errors) == (130, "\ninterrupted\n")
    assert list(tmp_path.iterdir()) == []


# ---- info ----


def test_info_needs_no_model(model, saved, command):
    code, said, errors = command("state", "info", saved)
    assert (code, errors) == (0, "")
    assert said == (
        f"file    {saved}, {saved.stat().st_size / 1e3:.1f} kB\n"
        f"model   {model.fingerprint()}\n"
        "read    6,000 tokens\n"
        "layers  2: conv (1, 32, 3) float32, ssm (1, 32, 4) float32\n"
        "next    goes on by itself\n"
    )


def test_info_of_several_texts_in_other_dtypes(model, tmp_path, command):
    with torch.no_grad():
        state = model(torch.ones(2, 3, dtype=torch.int64)).state.to(dtype=torch.bfloat16)
    state.save(tmp_path / "s", model)
    assert state_info(tmp_path / "s").seen == [3, 3]
    said = command("state", "info", tmp_path / "s")[1]
    assert "read    3, 3 tokens\n" in said
    assert "conv (2, 32, 3) bfloat16, ssm (2, 32, 4) float32\nnext    needs a prompt to go on" in said


def test_info_makes_no_model(saved):
    code = f"""
from anymamba.cli import main
import anymamba.model
anymamba.model.MambaLM.__init__ = None
assert main(["state", "info", {str(saved)!r}]) == 0
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


# ---- generate ----


def text_of(model, ids, **options):
    options = {"max_new_tokens": 15, "sampling": GREEDY, "tokenizer": ByteTokenizer()} | options
    return generate(model, [ids], **options)[0]


def test_generate_goes_on_with_what_was_read(model, book, saved, command):
    base = ("generate", "run", "--state", saved, "--greedy", "--max-new-tokens", 15)
    at_once = text_of(model, book)
    assert at_once.text != text_of(model, [10]).text
    assert command(*base) == (0, at_once.text + "\n", "")
    prompted = text_of(model, [*book, *b"x = "])
    assert prompted.text != at_once.text
    assert command(*base, "--prompt", "x = ") == (0, f"x = {prompted.text}\n", "")
    assert command(*base, "--n", 2)[1] == f"--- 1\n{at_once.text}\n--- 2\n{at_once.text}\n"
    turn = text_of(model, [*book, *b"hi\n"])
    assert command(*base, "--interactive", stdin="hi\n")[1] == f"> {turn.text}\n> \n"


def test_save_state_and_go_on(model, book, saved, command, tmp_path):
    """Twice 15 tokens are 30."""
    base = ("generate", "run", "--greedy", "--max-new-tokens", 15)
    first = command(*base, "--state", saved, "--save-state", tmp_path / "a")[1]
    second = command(*base, "--state", tmp_path / "a", "--save-state", tmp_path / "b")[1]
    whole = text_of(model, book, max_new_tokens=30)
    assert first[:-1] + second[:-1] == whole.text
    assert_same(tmp_path / "b", model, [*book, *whole.ids])
    assert command(*base, "--prompt", "def", "--save-state", tmp_path / "c")[0] == 0
    assert_same(tmp_path / "c", model, [*b"def", *text_of(model, list(b"def")).ids])


def test_a_conversation_is_saved_and_taken_up_again(model, command, tmp_path):
    base = ("generate", "run", "--greedy", "--max-new-tokens", 9, "--interactive")
    out = tmp_path / "talk"
    one = command(*base, "--save-state", out, stdin="1\n")[1]
    assert MambaState.load(out, model).seen.tolist() == [2 + 9]
    two = command(*base, "--state", out, "--save-state", out, "--force", stdin="2\n")[1]
    whole = command(*base, stdin="1\n2\n")[1]
    assert one.removesuffix("> \n") + two == whole
    assert "does not say what comes next, only what was read: give a --prompt" in refused(
        command, "generate", "run", "--state", out
    )


def test_ctrl_c_while_it_writes_saves_what_it_has_written(model, command, tmp_path, monkeypatch):
    def two_tokens(*args, **options):
        events = stream(*args, **options)
        yield next(events)
        yield next(events)
        raise KeyboardInterrupt

    from anymamba.cli import generate as command_generate

    stream = command_generate.stream
    monkeypatch.setattr(command_generate, "stream", two_tokens)
    code, *_ = command("generate", "run", "--greedy", "--prompt", "def", "--save-state", tmp_path / "s")
    assert code == 130
    assert_same(tmp_path / "s", model, [*b"def", *text_of(model, list(b"def"), max_new_tokens=2).ids])


# ---- help and bad input ----


@pytest.mark.parametrize("name", [["state", "read"], ["state", "info"], ["generate"]])
def test_help_has_examples(command, name):
    code, said, _ = command(*name, "--help")
    assert code == 0
    assert f"examples:\n  anymamba {' '.join(name)}" in said
    assert all(len(line) <= 120 for line in said.splitlines())
    assert "anymamba state read RUN FILE" in command("state")[1]
    assert "  state      read text" in command("--help")[1]


def refused(command, *arguments):
    code, said, errors = command(*arguments)
    assert (code, said) == (2, "")
    assert "Traceback" not in errors
    return " ".join(errors.replace("│", " ").split())


@pytest.fixture
def spoiled(saved, model, tmp_path):
    """State files that are not what they should be."""
    (tmp_path / "short").write_bytes(saved.read_bytes()[:-9])
    (tmp_path / "text").write_text("once upon a time")
    (tmp_path / "full").write_text("")
    other = make_model(1)
    read(other, [1, 2]).save(tmp_path / "other", other)
    read(model, [1, 2]).state.fork(2).save(tmp_path / "two", model)
    return tmp_path


@pytest.mark.parametrize("arguments", [["generate", "run", "--state"], ["state", "info"],
                                       ["state", "read", "run", "book.txt", "-o", "new", "--state"]])  # fmt: skip
def test_bad_state_files(command, spoiled, folder, arguments):
    assert "no state file at nowhere" in refused(command, *arguments, "nowhere")
    assert "is not a readable state file" in refused(command, *arguments, spoiled / "short")
    assert "is not a readable state file" in refused(command, *arguments, spoiled / "text")
    weights = "run/model.safetensors"
    assert "is not an anymamba state: it says 'pt', expected" in refused(command, *arguments, weights)
    if arguments[-1] != "info":
        assert "is the state of another model" in refused(command, *arguments, spoiled / "other")
        assert "holds the states of 2 texts; save one of them" in refused(command, *arguments, spoiled / "two")
    assert not (folder / "new").exists()


def test_bad_output_paths(command, spoiled, monkeypatch):
    for arguments in (["state", "read", "run", "book.txt", "-o"], ["generate", "run", "--save-state"]):
        assert "exists; choose another name, or --force to overwrite it" in refused(
            command, *arguments, spoiled / "text"
        )
        assert "is a folder; name a file in it, such as" in refused(command, *arguments, spoiled)
        assert "is not a folder to write in" in refused(command, *arguments, spoiled / "text" / "s")
    assert (spoiled / "text").read_text() == "once upon a time"


def test_bad_texts_and_numbers(command, tmp_path, folder):
    (tmp_path / "empty.txt").write_text("")
    base, out = ("state", "read", "run"), ("-o", tmp_path / "s")
    assert "no such file or folder; did you mean book.txt?" in refused(command, *base, "boko.txt", *out)
    assert "the file is empty" in refused(command, *base, tmp_path / "empty.txt", *out)
    assert "no text to read" in refused(command, *base, *out)
    assert "no config.json in nowhere" in refused(command, "state", "read", "nowhere", "book.txt", *out)
    assert "chunk=0, but it must be" in refused(command, *base, "book.txt", *out, "--chunk", 0)
    assert "--skip -1, but it must be" in refused(command, *base, "book.txt", *out, "--skip", -1)
    assert "passes over the whole text" in refused(command, *base, "book.txt", *out, "--skip", 6000)
    assert "required" in refused(command, *base, "book.txt")
    assert "there is no state 'write'" in refused(command, "state", "write")
    assert "--save-state with --n 2" in refused(command, "generate", "run", "--n", 2, "--save-state", tmp_path / "s")
    assert not (tmp_path / "s").exists()
