"""The commands, and what they say to bad input. Where the process itself matters they run as one."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anymamba import MambaConfig, checkpoint, explain
from anymamba.cli import doctor, warmup
from anymamba.cli.generate import DEFAULT_MODEL, Options
from anymamba.cli.talk import _answer
from anymamba.data import load_tokenizer
from anymamba.generate import SamplingConfig, generate
from anymamba.train import evaluate, load_run

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
SIZES = ["--d-model", "32", "--n-layer", "2", "--seqlen", "64", "--eval-tokens", "512", "--final-tokens", "512",
         "--precision", "fp32"]  # fmt: skip
TEXT = "".join(f"{i % 10} and {i * 3 % 10} are {i % 10 + i * 3 % 10}.\n" for i in range(2000))


def run(*arguments, stdin=None):
    return subprocess.run([sys.executable, "-m", "anymamba", *map(str, arguments)], env=ENV, input=stdin,
                          capture_output=True, text=True, timeout=120)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """A run that has learned the text, and what the command printed."""
    done = run("train", "--data", folder / "text.txt", "--steps", 120, "--lr", "0.01", "--out", folder / "run", *SIZES)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


# ---- what they do ----


def test_train_tells_what_a_person_wants_to_know(trained):
    path, out = trained
    assert re.search(r"^step 120  100%  loss \d", out, re.M)
    assert re.search(r"held-out \d\.\d+ nats/token  \d\.\d+ bits/byte  \(512 tokens\)", out)
    assert f"model       {path / 'model.safetensors'} after 120 steps" in out
    assert "sample:" in out
    more = re.search(r"^  anymamba (generate .* --prompt .*)$", out, re.M)
    again = run(*shlex.split(more[1]))
    assert again.returncode == 0
    assert again.stdout.startswith(shlex.split(more[1])[-1])


def test_generate_streams_and_repeats_itself(trained, command):
    arguments = ("generate", trained[0], "--prompt", "3 and", "--max-new-tokens", 40)
    code, out, _ = command(*arguments)
    assert code == 0
    assert out.startswith("3 and")
    assert "are" in out
    assert command(*arguments) == (0, out, "")
    assert command(*arguments, "--seed", 1)[1] != out
    assert command(*arguments, "--no-echo")[1] == out.removeprefix("3 and")
    assert command("generate", trained[0], "--prompt", "-", "--max-new-tokens", 40, stdin="3 and")[1] == out


def test_generate_options(trained, command):
    path = trained[0]
    model, tokenizer = checkpoint.load(path), load_tokenizer(path)
    prompt = tokenizer.encode("3 and").astype(int).tolist()
    greedy = generate(model, [prompt], max_new_tokens=40, sampling=SamplingConfig(temperature=0), tokenizer=tokenizer)
    base = ("generate", path, "--prompt", "3 and", "--no-echo")
    assert command(*base, "--greedy", "--max-new-tokens", 40)[1] == greedy[0].text + "\n"
    assert command(*base, "--greedy", "--stop", ".", "--max-new-tokens", 40)[1] == greedy[0].text.split(".")[0] + "\n"
    many = command(*base, "--n", 3, "--max-new-tokens", 9)[1]
    assert [line for line in many.splitlines() if line.startswith("---")] == ["--- 1", "--- 2", "--- 3"]
    assert len(command("generate", path, "--max-new-tokens", 5)[1]) == 5 + 1  # without a prompt


def test_generate_without_a_run_takes_the_model_of_the_package(trained, command):
    arguments = ("--prompt", "It was", "--max-new-tokens", 20)
    command("generate", *arguments)  # the first may compile kernels, and says so
    code, out, errors = command("generate", *arguments)
    assert (code, errors) == (0, "")
    assert out.startswith("It was")
    assert len(out) > len("It was\n")
    assert command("generate", DEFAULT_MODEL, *arguments)[1] == out
    assert command("generate", trained[0], *arguments)[1] != out
    assert "a small one if none" in " ".join(command("generate", "--help")[1].replace("│", " ").split())


def test_the_model_of_the_package_is_in_the_wheel():
    wheel = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(Path(__file__).parents[1]))
    shipped = {file.distribution_path for file in wheel.recurse_included_files()}
    names = ("model.safetensors", "config.json", "tokenizer.json", "README.md")
    assert shipped >= {f"anymamba/models/books/{name}" for name in names}


def test_the_model_of_the_package_knows_english():
    model, tokenizer = load_run(DEFAULT_MODEL)
    text = "He was the first to come into the room, and when he had taken a chair he looked at her without a word."
    assert evaluate(model, tokenizer.encode(text)).bits_per_byte < 2.2
    assert (DEFAULT_MODEL / "model.safetensors").stat().st_size <= 16 << 20


def test_interactive_keeps_the_state(trained, command):
    path = trained[0]
    code, out, _ = command(
        "generate", path, "--interactive", "--greedy", "--max-new-tokens", 12, stdin="1 and\n2 and\n"
    )
    assert code == 0
    model, tokenizer = checkpoint.load(path), load_tokenizer(path)

    def write(ids):
        done = generate(model, [ids], max_new_tokens=12, sampling=SamplingConfig(temperature=0), tokenizer=tokenizer)
        return done[0]

    encode = lambda text: tokenizer.encode(text).astype(int).tolist()  # noqa: E731
    one = write(encode("1 and\n"))
    two = write(encode("1 and\n") + one.ids + encode("2 and\n"))
    assert out == f"> {one.text}\n> {two.text}\n> \n"


def test_interrupted_answer_leaves_a_state_that_has_read_it(trained, capsys):
    model = checkpoint.load(trained[0])

    class Event:
        id, text, completion = 65, "A", None

    def events():
        yield Event
        raise KeyboardInterrupt

    ids, text, state = _answer(model, [66, 67], events(), None)
    assert (ids, text) == ([65], "A")
    with torch.no_grad():
        want = model(torch.tensor([[66, 67, 65]])).state
    assert torch.equal(state.layers[1].ssm, want.layers[1].ssm)
    assert capsys.readouterr().out == "A …\n"


def test_eval(trained, folder, command):
    path = trained[0]
    code, out, _ = command("eval", path, folder / "text.txt", "--json")
    assert code == 0
    result = json.loads(out)
    assert set(result) == {"nats_per_token", "perplexity", "bits_per_byte", "tokens", "context", "carry"}
    assert result["tokens"] == len(TEXT) - 1
    assert result["perplexity"] == pytest.approx(math.exp(result["nats_per_token"]))
    assert result["bits_per_byte"] == pytest.approx(result["nats_per_token"] / math.log(2))
    other = json.loads(command("eval", path, folder / "text.txt", "--json", "--context", 37)[1])
    assert other["nats_per_token"] == pytest.approx(result["nats_per_token"], rel=1e-4)
    alone = json.loads(command("eval", path, folder / "text.txt", "--json", "--context", 16, "--no-carry")[1])
    assert alone["nats_per_token"] > result["nats_per_token"]
    shown = command("eval", path, folder / "text.txt", "--max-tokens", 100)[1]
    assert re.search(
        r"loss +\d\.\d{4} nats/token\nperplexity .*\nbits per byte .*\ntokens +100, in contexts of 1024", shown
    )


def test_tokenizer_and_a_run_with_it(folder, command):
    out = folder / "tokenizer.json"
    code, said, _ = command("tokenizer", "train", folder / "text.txt", "--vocab-size", 300, "-o", out)
    assert code == 0
    assert f"in {out}\n" in said
    code, said, errors = command("train", "--data", folder / "text.txt", "--tokenizer", out, "--steps", 3,
                                 "--out", folder / "bpe", *SIZES)  # fmt: skip
    assert code == 0, errors
    nats, bits = map(float, re.search(r"held-out ([\d.]+) nats/token  ([\d.]+) bits/byte  \(", said).groups())
    assert bits < nats / math.log(2)  # a token is more than a byte
    code, said, errors = command("eval", folder / "bpe", folder / "text.txt", "--json")
    assert json.loads(said)["tokens"] < len(TEXT) - 1


def test_parts_are_left_out(folder, command):
    code, _, errors = command("train", "--data", folder / "text.txt", "--steps", 2, "--no-gate", "--no-use-conv",
                              "--out", folder / "bare", *SIZES)  # fmt: skip
    assert code == 0, errors
    config = checkpoint.load_config(folder / "bare")
    assert (config.gate, config.use_conv, config.mixer) == (False, False, "mamba")
    assert "training: gate with init=" in refused(command, "train", "--init", folder / "bare", "--no-gate")
    assert "s4d_init='legs' with mixer='mamba'" in refused(command, "train", "--s4d-init", "legs")


def test_train_help_tells_of_every_option(command):
    out = command("train", "--help")[1]
    assert all(name in out for name in ("--resume RUN ", "--config FILE ", "--gate, --no-gate", "--s4d-init"))


def test_config_file_with_changes(trained, folder, command):
    config = trained[0] / "train.json"
    code, _, errors = command("train", "--config", config, "--steps", 2, "--out", folder / "again")
    assert code == 0, errors
    again = json.loads((folder / "again" / "train.json").read_text())
    assert again == json.loads(config.read_text()) | {"steps": 2}


@pytest.mark.parametrize("name", [["train"], ["generate"], ["eval"], ["tokenizer"], ["tokenizer", "train"]])
def test_help_has_examples(command, name):
    code, out, _ = command(*name, "--help")
    assert code == 0
    assert f"anymamba {name[0]}" in out
    assert all(len(line) <= 120 for line in out.splitlines())


# ---- bad input ----


def refused(command, *arguments, stdin=""):
    """The message of a command that must refuse: exit code 2, one screen, no traceback, nothing on stdout."""
    code, out, errors = command(*arguments, stdin=stdin)
    assert code == 2
    assert out == ""
    assert "Traceback" not in errors
    assert 1 <= len(errors.splitlines()) <= 24
    return " ".join(errors.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", "-1"], "lr=-1.0, but it must be a finite number above 0"),
        (["--lr", "fast"], "Error parsing --lr"),
        (["--step", "3"], "Unrecognized options: --step, 3"),
        (["--steps", "3", "--minutes", "1"], "a run has one length, give one of them"),
        (["--preset", "huge"], "unknown preset 'huge': known presets are tiny, small"),
        (["--data", "{folder}/tex.txt"], "tex.txt: no such file or folder; did you mean"),
        (["--data", "{folder}/empty.txt"], "empty.txt: the file is empty; give a file with text"),
        (["--data", "{folder}/binary.txt"], "so this is no UTF-8 text"),
        (["--data", "{folder}/short.txt"], "needs at least"),
        (["--data", "{folder}/records.jsonl"], "no field 'text'; the fields are 'body'"),
        (["--data", "{folder}/text.txt", "--tokenizer", "{folder}/text.txt"], "not a tokenizer.json"),
        (["--config", "{folder}/unknown.json"], "unknown key 'learning_rate': known keys are data,"),
        (["--config", "nowhere.json"], "no training config at nowhere.json"),
        (["--resume", "{folder}"], "it has no train.json"),
        (["--resume", "{folder}", "--lr", "1"], "Unrecognized options: --lr, 1"),
    ],
)
def test_train_refuses(folder, command, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\x7fELF\x00\x01")
    (folder / "short.txt").write_text("short")
    (folder / "records.jsonl").write_text('{"body": "text"}\n')
    (folder / "unknown.json").write_text('{"learning_rate": 1}')
    options = [option.replace("{folder}", str(folder)) for option in options]
    assert words in refused(command, "train", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def damaged(trained, tmp_path):
    """A copy of the trained model whose files can be spoiled."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (copy / name).write_bytes((trained[0] / name).read_bytes())
    return copy


def test_generate_and_eval_refuse(trained, folder, command, tmp_path):
    path = trained[0]
    for name in (["generate"], ["eval", folder / "text.txt"]):
        assert "no config.json in nowhere" in refused(command, name[0], "nowhere", *name[1:])
    base = ("generate", path, "--prompt", "a")
    assert "temperature=-1.0" in refused(command, *base, "--temperature", -1)
    assert "top_p=1.5, but it must be in (0, 1]" in refused(command, *base, "--top-p", 1.5)
    assert "max_new_tokens=0" in refused(command, *base, "--max-new-tokens", 0)
    assert "seed=-1" in refused(command, *base, "--seed", -1)
    assert "--interactive takes its prompts from the keyboard" in refused(command, *base, "--interactive")
    assert "context=0, but it must be at least 1" in refused(command, "eval", path, folder / "text.txt", "--context", 0)
    assert "no text to measure on" in refused(command, "eval", path)
    assert "no such file" in refused(command, "eval", path, "nowhere.txt")
    (tmp_path / "one.txt").write_text("a")
    assert "a text of 1 tokens" in refused(command, "eval", path, tmp_path / "one.txt")


def test_spoiled_models_are_refused(damaged, folder, command):
    weights, config = damaged / "model.safetensors", damaged / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "damaged or cut short" in refused(command, "generate", damaged, "--prompt", "a")
    weights.write_bytes(whole)
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"model": values["model"] | {"d_modle": 3}}))
    assert "unknown config key 'd_modle': did you mean 'd_model'?" in refused(command, "eval", damaged, folder)
    config.write_text(json.dumps(values | {"model": values["model"] | {"n_layer": 3}}))
    assert "missing backbone.layers.2" in refused(command, "generate", damaged, "--prompt", "a")
    config.write_text(json.dumps(values))
    (damaged / "tokenizer.json").unlink()
    assert "no tokenizer at" in refused(command, "generate", damaged, "--prompt", "a")


def test_tokenizer_refuses(folder, command, tmp_path):
    assert "there is no tokenizer 'make'" in refused(command, "tokenizer", "make")
    out = tmp_path / "t.json"
    said = refused(command, "tokenizer", "train", folder / "text.txt", "--vocab-size", 10, "-o", out)
    assert "vocab_size=10, but the 256 bytes" in said
    assert "no such file" in refused(command, "tokenizer", "train", tmp_path / "nowhere", "-o", out)
    assert not out.exists()


def test_tokens_of_another_tokenizer(trained, folder, command, tmp_path):
    """More tokens than the model knows."""
    assert command("tokenizer", "train", folder / "text.txt", "--vocab-size", 290, "-o", tmp_path / "big.json")[0] == 0
    arguments = (trained[0], "--tokenizer", tmp_path / "big.json")
    assert "give the model's own with --tokenizer" in refused(command, "generate", *arguments, "--prompt", "a")
    assert "give the model's own with --tokenizer" in refused(command, "eval", *arguments, folder / "text.txt")


def test_debug_shows_the_traceback():
    plain, debug = run("generate", "nowhere"), run("generate", "nowhere", "--debug")
    assert plain.returncode == 2
    assert (
        plain.stderr
        == "anymamba generate: no config.json in nowhere: a model folder holds config.json and model.safetensors\n"
    )
    assert "Traceback" in debug.stderr


def test_options_of_generate_are_those_of_the_samplers():
    assert Options(run="r", greedy=True).sampling().is_greedy
    assert Options(run="r", top_k=3).sampling() == SamplingConfig(temperature=0.8, top_p=0.95, top_k=3)


# ---- doctor and warmup ----


def test_doctor_tests_every_kernel(command):
    code, out, _ = command("doctor")
    assert code == 0, out
    backend, reason = explain()
    assert re.search(rf"^  cpu float32 +{backend} +every op: {re.escape(reason)}$", out, re.M)
    tested = re.findall(
        r"^  (\w+) +cpu +(\w+) +(\w+) +error \de-\d\d  first +[\d.]+ s, then +[\d.]+ ms  ok$", out, re.M
    )
    ops = ("selective_scan", "discretized_scan", "causal_conv1d", "add_rms_norm", "decode")
    assert tested == [(op, dtype, backend) for dtype in ("float32", "bfloat16", "float16") for op in ops]


def test_doctor_tells_which_op_runs_where(command, monkeypatch):
    answers = {"selective_scan": ("cuda", "the fastest"), "causal_conv1d": ("triton", "good")}
    monkeypatch.setattr(doctor.ops, "explain", lambda device, dtype, op: answers.get(op, ("triton", "good")))
    monkeypatch.setattr(doctor, "_self_test", lambda console: False)
    out = command("doctor")[1]
    assert re.search(r"^  cpu float32 +cuda +selective_scan: the fastest$", out, re.M)
    assert re.search(r"^  cpu float32 +triton +discretized_scan, causal_conv1d, add_rms_norm, decode: good$", out, re.M)


def test_doctor_finds_a_wrong_kernel(command, monkeypatch):
    right = doctor.ops.causal_conv1d

    def wrong(*args, backend, **options):
        y, state = right(*args, backend=backend, **options)
        return (y if backend == "reference" else y * 1.01), state

    monkeypatch.setattr(doctor.ops, "causal_conv1d", wrong)
    code, out, _ = command("doctor")
    assert code == 1
    assert re.search(r"^  causal_conv1d .* error 1e-02 .* WRONG$", out, re.M)
    assert len(re.findall(r"ok$", out, re.M)) == 12


def test_doctor_on_a_backend_that_cannot_run_and_one_that_breaks(command, monkeypatch):
    backend = explain()[0]
    monkeypatch.setattr(doctor, "kernels", lambda device, dtype, op: [backend, "cuda"])
    monkeypatch.setattr(doctor.ops, "add_rms_norm", lambda *args, **options: 1 / 0)
    code, out, _ = command("doctor")
    assert code == 1
    assert "cuda       not tested: backend='cuda' cannot run here: " in out
    assert "ZeroDivisionError: division by zero" in out
    assert len(re.findall(r"ok$", out, re.M)) == 15


def test_doctor_finds_one_wrong_rule(monkeypatch):
    """The last of the three."""
    right = doctor.ops.selective_scan

    def wrong(*args, backend, **options):
        y, state = right(*args, backend=backend, **options)
        return (y * 1.01 if backend != "reference" and options.get("discretization") == "euler" else y), state

    monkeypatch.setattr(doctor.ops, "selective_scan", wrong)
    for name, well in (("discretized_scan", False), ("selective_scan", True)):
        assert doctor._test(name, torch.float32, explain()[0], "cpu")[1] == well


def test_the_long_case_and_the_loss_that_doctor_tests_on_gpus():
    for dtype in doctor.DTYPES:
        for name in doctor.GPU_CASES:
            said, good = doctor._test(name, dtype, explain("cpu", dtype)[0], "cpu")
            assert good, f"{name} {said}"


def test_warmup(command, trained):
    for extra in (["--preset", "tiny"], ["--config", trained[0]], ["--config", trained[0] / "config.json"]):
        code, out, errors = command("warmup", "--device", "cpu", "--dtype", "bf16", *extra)
        assert code == 0, out + errors
        lines = [line.split() for line in out.splitlines()]
        backend = explain()[0]
        assert [line[:4] for line in lines[:3]] == [
            [op, "cpu", "bf16", backend] for op in ("selective_scan", "causal_conv1d", "add_rms_norm")
        ]
        assert lines[3][:2] == ["two", "layers"]
        assert lines[4][:2] == ["done", "in"]


def test_warmup_of_a_model_of_features_and_of_a_backend_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(warmup, "kernels", lambda device, dtype, op: ["cuda"])
    config = MambaConfig(vocab_size=None, d_model=32, n_layer=1, conv_bias=False)
    assert not warmup.warm(config, torch.device("cpu"), "fp16", 2, 9)
    assert capsys.readouterr().out.count("skipped: backend='cuda' cannot run here") == 3
    monkeypatch.setattr(warmup.ops, "selective_scan", lambda *args, **options: 1 / 0)
    assert warmup.warm(config, torch.device("cpu"), "fp32", 1, 5)
    assert "FAILED ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_warmup_help_and_refusals(command):
    code, out, _ = command("warmup", "--help")
    assert code == 0
    assert "anymamba warmup --preset 2.8b" in out
    assert all(len(line) <= 120 for line in out.splitlines())
    assert "unknown preset 'huge'" in refused(command, "warmup", "--preset", "huge")
    assert "--seqlen 0, but it must be at least 1" in refused(command, "warmup", "--seqlen", 0)
    assert "invalid choice 'fp64'" in refused(command, "warmup", "--dtype", "fp64")
    assert "no config.json in nowhere" in refused(command, "warmup", "--config", "nowhere")
    assert "device='tpu' cannot be used here" in refused(command, "warmup", "--device", "tpu")
