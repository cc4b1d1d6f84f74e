"""Training: it learns, the golden curve, resuming bit by bit, crashes, NaN, a full disk."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anymamba import AnymambaError, MambaConfig, MambaLM, checkpoint
from anymamba.data import load_tokenizer
from anymamba.train import TrainConfig, checkpointing, evaluate, hardware, log, resume, train
from anymamba.train.diagnose import first_nonfinite
from anymamba.train.display import Silent
from anymamba.train.interrupt import Interrupt
from anymamba.train.passes import Passes
from anymamba.train.runs import typical_start
from anymamba.train.schedule import Every, learning_rate
from anymamba.train.trainer import Trainer

GOLDEN = Path(__file__).parent / "golden" / "loss.json"
TINY = {"d_model": 32, "n_layer": 2, "seqlen": 64, "batch_size": 4, "eval_tokens": 512, "final_tokens": 1024,
        "sample_tokens": 4, "precision": "fp32", "carry": False,
        "lr": 3e-3, "min_lr": 1e-5, "weight_decay": 0.1}  # fmt: skip
ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def sums(count=1500):
    """The same text on every machine: sums in words that a tiny model can learn."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    pairs = ((i * 7 % 11, i * i % 11) for i in range(count))
    return "".join(f"{names[a]} and {names[b]} are {a + b}.\n" for a, b in pairs)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sums.txt"
    path.write_text(sums())
    return str(path)


class StopAfter(Silent):
    """Presses Ctrl-C after a step, and keeps the notes."""

    def __init__(self, step=None):
        self.at, self.notes = step, []

    def step(self, record, progress, eta):
        if record["step"] == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def note(self, text):
        self.notes.append(text)


def config(text, tmp_path, **changes):
    return TrainConfig(**(TINY | {"data": (text,), "out": str(tmp_path / "run")} | changes))


def timeless(run):
    """The log without what depends on the clock."""
    clock = ("seconds", "tokens_per_second")
    return [{k: v for k, v in record.items() if k not in clock} for record in log.read(Path(run))]


def all_tensors(run, step):
    folder = Path(run) / "checkpoints" / f"step-{step:08d}"
    tensors = load_file(folder / "model.safetensors") | load_file(folder / "training.safetensors")
    root = load_file(Path(run) / "model.safetensors")
    assert all(torch.equal(v, tensors[k]) for k, v in root.items())
    return tensors


def assert_same_run(a, b, step):
    one, other = all_tensors(a, step), all_tensors(b, step)
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
    assert timeless(a) == timeless(b)


# ---- it learns ----


def test_golden_curve(text, tmp_path):
    """A change that is meant to change nothing must not change the losses. To record anew: RECORD=1."""
    train(config(text, tmp_path, steps=60, lr=1e-2, eval_every=20))
    records = log.read(tmp_path / "run")
    got = {
        "loss": [r["loss"] for r in records if "loss" in r],
        "heldout_nats": [r["heldout_nats"] for r in records if "heldout_nats" in r],
    }
    if os.environ.get("RECORD"):
        GOLDEN.write_text(json.dumps(got, indent=0) + "\n")
    want = json.loads(GOLDEN.read_text())
    for key, values in want.items():
        assert got[key] == pytest.approx(values, rel=1e-3), key
    assert got["loss"][0] == pytest.approx(math.log(264), rel=0.02)  # knows nothing
    assert got["heldout_nats"][-1] < 2.2


def test_log_and_run_folder(text, tmp_path):
    result = train(config(text, tmp_path, steps=10, save_every=2, keep=2, eval_every=5, sample_every=5))
    run = result.run
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]
    steps = [r for r in log.read(run) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 11))
    assert set(steps[0]) == {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"}
    assert steps[-1]["tokens"] == 10 * 4 * 64
    assert steps[0]["lr"] == pytest.approx(3e-3)
    assert steps[-1]["lr"] == pytest.approx(1e-5)
    measured = [r for r in log.read(run) if "heldout_nats" in r]
    assert [r["step"] for r in measured] == [5, 10]
    assert measured[0]["heldout_bits_per_byte"] == pytest.approx(measured[0]["heldout_nats"] / math.log(2))
    assert [r["step"] for r in log.read(run) if "sample" in r] == [5, 10, 10]
    final = log.read(run)[-1]
    assert final["final_nats"] == result.evaluation.nats
    assert TrainConfig.from_file(run / "train.json").steps == 10
    assert (run / "tokenizer.json").exists()
    assert torch.equal(checkpoint.load(run).backbone.norm_f.weight, result.model.backbone.norm_f.weight)
    assert not list(run.rglob("*.pt")) + list(run.rglob("*.pkl"))
    if "loss curve" in result.plot:
        assert (run / "loss.png").stat().st_size > 1000


def test_minutes_end_in_time_with_a_low_learning_rate(text, tmp_path):
    begin = time.monotonic()
    result = train(config(text, tmp_path, minutes=0.03))
    assert time.monotonic() - begin < 30
    rates = [r["lr"] for r in log.read(result.run) if "loss" in r]
    assert result.step > 2
    assert rates[-1] < 0.3 * max(rates)


def test_defaults_need_no_data():
    assert TrainConfig().data is None
    assert TrainConfig().seconds == 180


def test_packed_keeps_documents_apart(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in sums(300).splitlines()))
    run = config(str(tmp_path / "text.jsonl"), tmp_path, steps=3, packed=True)
    packed = train(run)
    assert packed.evaluation.nats < math.log(264)
    other = train(run.replace(packed=False, out=str(tmp_path / "other")))
    assert timeless(packed.run)[0]["loss"] != timeless(other.run)[0]["loss"]


def test_recompute_changes_nothing(text, tmp_path):
    train(config(text, tmp_path, steps=4))
    train(config(text, tmp_path, steps=4, recompute=True, out=str(tmp_path / "recompute")))
    losses = [[r["loss"] for r in timeless(tmp_path / name) if "loss" in r] for name in ("run", "recompute")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_dropout(text, tmp_path):
    """Random in training, absent from measurements and samples."""
    losses = {}
    for dropout in (0.0, 0.3):
        done = train(
            config(text, tmp_path, steps=2, lr=1e-9, min_lr=0.0, dropout=dropout, out=str(tmp_path / f"run{dropout}"))
        )
        losses[dropout] = [r["loss"] for r in timeless(done.run) if "loss" in r], done.evaluation.nats
    assert losses[0.0][0] != losses[0.3][0]
    assert losses[0.0][1] == pytest.approx(losses[0.3][1], rel=1e-6)
    model, ids = done.model, torch.randint(256, (1, 50))
    assert model.training
    with torch.no_grad():
        assert not torch.equal(model(ids).hidden, model(ids).hidden)
        model.eval()
        assert torch.equal(model(ids).hidden, model(ids).hidden)


TWO_PROCESSES = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from anymamba import MambaConfig, MambaLM

def read(model, ids, state):
    out = model(ids[:, :-1], state=state, labels=ids[:, 1:])
    out.loss.backward()
    return out.state.detach()

def work(rank, store, backend):
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    ids = torch.randint(50, (3, 4, 14)).to(device)
    for tied in (True, False):
        alone = MambaLM(MambaConfig(vocab_size=50, d_model=16, n_layer=2, tie_embeddings=tied)).to(device)
        shared = MambaLM(alone.config).to(device)
        shared.load_state_dict(alone.state_dict())
        shared.recompute = tied
        wrapped = DistributedDataParallel(shared)
        states = [None, None]
        for batch in ids:  # gradients add up, and the state is carried
            mine = batch[2 * rank : 2 * rank + 2]
            states = [read(alone, batch, states[0]), read(wrapped, mine, states[1])]
        for p, q in zip(alone.parameters(), shared.parameters()):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()

children = []
for rank in range(2):
    pid = os.fork()
    if pid == 0:
        try:
            work(rank, *sys.argv[1:])
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(pid)
sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the two processes are forks")
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_data_parallel_is_a_larger_batch(backend, tmp_path):
    """Two processes with half of the rows each have the gradients of one with all, also through a carried state."""
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "store"), backend]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_accumulation_is_a_larger_batch(text, tmp_path):
    train(config(text, tmp_path, steps=5, batch_size=8))
    train(config(text, tmp_path, steps=5, batch_size=4, accumulate=2, out=str(tmp_path / "other")))
    losses = [[r["loss"] for r in timeless(tmp_path / name) if "loss" in r] for name in ("run", "other")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bf16_learns(text, tmp_path):
    result = train(config(text, tmp_path, steps=30, lr=1e-2, precision="bf16"))
    assert result.evaluation.nats < 3.5


def test_the_callers_random_numbers_stay(text, tmp_path):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    train(config(text, tmp_path, steps=1, precision="auto"))
    assert torch.equal(torch.rand(3), want)


def test_tensorboard(text, tmp_path):
    pytest.importorskip("tensorboard")
    train(config(text, tmp_path, steps=2, tensorboard=True))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


# ---- schedule ----


def test_learning_rate():
    rate = lambda p: learning_rate(p, lr=1.0, min_lr=0.1, warmup=0.1)  # noqa: E731
    assert [rate(p) for p in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx([0, 0.5, 1, 0.55, 0.1])
    assert learning_rate(0, lr=1.0, min_lr=0.1, warmup=0) == 1


def test_every():
    assert [s for s in range(1, 10) if Every(3).is_due(s, 0)] == [3, 6, 9]
    shares = Every(None, share=0.25)
    assert [s for s in range(1, 9) if shares.is_due(s, s / 8)] == [2, 4, 6, 8]
    now = [0.0]
    seconds = Every(None, seconds=10, clock=lambda: now[0])
    due = []
    for now[0] in range(31):
        due += [now[0]] * seconds.is_due(1, 0)
    assert due == [10, 20, 30]


def test_samples_start_with_a_line_of_the_text():
    tokenizer = load_tokenizer("bytes")
    start = lambda text: typical_start(tokenizer.encode(text), tokenizer)  # noqa: E731
    assert start("rest of a line\n    indented and long enough\n\nshort\nThis line is long enough.\n") == (
        "This line is long enough."
    )
    assert start("x\n" + "A line of many words that go on and on and on\n") == "A line of many words that go on and on"
    assert start("x\nshort\n\n") == "short"
    assert start("one line") == start("") == ""


# ---- evaluation ----


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MambaLM(MambaConfig(d_model=16, n_layer=2))


def test_evaluation_does_not_depend_on_the_context_with_carry(model):
    tokens = np.frombuffer(sums(20).encode(), np.uint8).astype(np.uint16)
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    want = model(ids[:, :-1], labels=ids[:, 1:]).loss.item()
    for context in (1, 7, 100, 10**6):
        result = evaluate(model, tokens, context=context)
        assert result.nats == pytest.approx(want, rel=1e-5)
        assert result.tokens == len(tokens) - 1
    assert result.perplexity == pytest.approx(math.exp(want), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(want / math.log(2), rel=1e-5)
    assert evaluate(model, tokens, context=7, carry=False).nats != pytest.approx(want, rel=1e-5)
    assert evaluate(model, tokens, max_tokens=50).tokens == 50


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        (1, {}, "text of 1 tokens, but a prediction needs at least 2"),
        (9, {"context": 0}, "context=0, but it must be at least 1"),
        (9, {"batch_size": -1}, "batch_size=-1"),
    ],
)
def test_evaluation_refuses(model, tokens, options, words):
    with pytest.raises(AnymambaError, match=words):
        evaluate(model, np.zeros(tokens, np.uint16), **options)


# ---- resuming ----


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"carry": True, "accumulate": 2}, {"carry": True},
                                     {"dropout": 0.2, "recompute": True}],
                         ids=["plain", "accumulate", "carry+accumulate", "carry", "dropout"])  # fmt: skip
def test_resumed_is_never_stopped(text, tmp_path, options):
    options |= {"steps": 12, "eval_every": 4}
    whole = train(config(text, tmp_path, out=str(tmp_path / "whole"), **options))
    stopped = train(config(text, tmp_path, **options), StopAfter(5))
    assert (stopped.interrupted, stopped.step) == (signal.SIGINT, 5)
    assert torch.equal(load_file(stopped.run / "model.safetensors")["backbone.norm_f.weight"],
                       stopped.model.backbone.norm_f.weight)  # fmt: skip
    assert resume(stopped.run, StopAfter(8)).step == 8
    done = resume(stopped.run)
    assert done.evaluation == whole.evaluation
    assert done.sample == whole.sample
    assert_same_run(whole.run, done.run, 12)


def test_log_beyond_the_checkpoint_comes_again(text, tmp_path):
    whole = train(config(text, tmp_path, steps=8, out=str(tmp_path / "whole")))
    run = train(config(text, tmp_path, steps=8), StopAfter(4)).run
    with open(run / "log.jsonl", "a") as file:  # as a process that was killed at step 6 leaves it
        file.write('{"step": 5, "loss": 99.0}\n{"step": 6, "loss": 99.0}\n{"step": 7, "lo')
    resume(run)
    assert_same_run(whole.run, run, 8)


def test_resume_of_a_finished_run_says_so(text, tmp_path):
    done = train(config(text, tmp_path, steps=3))
    display = StopAfter()
    again = resume(done.run, display)
    assert "has done all of its 3 steps" in " ".join(display.notes)
    assert again.evaluation == done.evaluation
    assert sum("final_nats" in r for r in log.read(done.run)) == 1


def test_resume_without_checkpoint_begins_again(text, tmp_path):
    done = train(config(text, tmp_path, steps=3))
    want = all_tensors(done.run, 3)
    (done.run / "checkpoints" / "step-00000003").rename(tmp_path / "elsewhere")
    display = StopAfter()
    resume(done.run, display)
    assert "no checkpoint yet: beginning again" in " ".join(display.notes)
    assert all(torch.equal(v, want[k]) for k, v in all_tensors(done.run, 3).items())


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "meta"])
def test_damaged_checkpoint_is_skipped(text, tmp_path, damage):
    whole = train(config(text, tmp_path, steps=6, save_every=2, out=str(tmp_path / "whole")))
    run = train(config(text, tmp_path, steps=6, save_every=2), StopAfter(4)).run
    newest = run / "checkpoints" / "step-00000004"
    target = newest / ("trainer.json" if damage == "meta" else "training.safetensors")
    data = bytearray(target.read_bytes())
    if damage == "missing":
        target.unlink()
    else:
        data[-5] ^= 1
        target.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    display = StopAfter()
    resume(run, display)
    assert "skipped damaged checkpoints: step-00000004" in display.notes
    assert_same_run(whole.run, run, 6)


def test_all_checkpoints_damaged(text, tmp_path):
    run = train(config(text, tmp_path, steps=2)).run
    (run / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(AnymambaError, match=r"all checkpoints of .* are damaged \(step-00000002\).*--config"):
        resume(run)


def test_resume_refuses_other_text(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(sums())
    run = train(config(str(path), tmp_path, steps=4), StopAfter(2)).run
    path.write_text(sums()[::-1])
    with pytest.raises(AnymambaError, match=r"text of .* has changed since the run began .*put it back"):
        resume(run)


def test_resume_refuses_what_is_no_run(tmp_path):
    with pytest.raises(AnymambaError, match=r"no run to resume in .*no train\.json"):
        resume(tmp_path)


# ---- signals and crashes of a real process ----


def start(text, run, *options):
    sizes = "--d-model 32 --n-layer 2 --seqlen 64 --batch-size 4 --eval-tokens 512 --final-tokens 512 --sample-tokens 4"
    command = ["train", "--data", text, "--out", str(run), "--precision", "fp32", *sizes.split(), *options]
    return process(*command)


def process(*arguments):
    return subprocess.Popen([sys.executable, "-m", "anymamba", *arguments], env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def wait_for_step(run, step, child):
    path = Path(run) / "log.jsonl"
    for _ in range(3000):
        if path.exists() and path.read_bytes().count(b'"loss"') >= step:
            return
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    raise AssertionError("the run did not begin")


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    child = start(text, run, "--steps", "150")
    out, error = child.communicate(timeout=120)
    assert child.returncode == 0, error
    assert "more of it:" in out
    return run


def test_signals_then_resume(text, tmp_path, uninterrupted):
    run = tmp_path / "run"
    child = start(text, run, "--steps", "150")
    wait_for_step(run, 3, child)
    child.send_signal(signal.SIGINT)
    out, error = child.communicate(timeout=60)
    assert child.returncode == 130, error
    assert f"anymamba train --resume {run}" in out
    assert "stopped by SIGINT" in out
    assert error.strip() == "" or "compiling" in error

    before = checkpointing.newest_meta(run)["step"]
    child = process("train", "--resume", str(run))
    wait_for_step(run, before + 3, child)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 143
    assert "stopped by SIGTERM" in out

    resume(run) if torch.get_num_threads() == 1 else process("train", "--resume", str(run)).communicate(timeout=120)
    assert_same_run(uninterrupted, run, 150)


def test_kill_at_any_moment_then_resume(text, tmp_path, uninterrupted):
    run = tmp_path / "run"
    child = start(text, run, "--steps", "150", "--save-every", "1")
    random = np.random.default_rng(1)
    for _ in range(2):  # saving all the time, it is mostly hit in the middle of a checkpoint
        wait_for_step(run, (before := (checkpointing.newest_meta(run) or {"step": 0})["step"]) + 2, child)
        time.sleep(random.uniform(0, 0.1))
        child.kill()
        child.communicate()
        meta = checkpointing.newest_meta(run)
        assert meta is not None
        assert meta["step"] >= before
        child = process("train", "--resume", str(run))
    _, error = child.communicate(timeout=120)
    assert child.returncode == 0, error
    assert not list(run.rglob(".unfinished*"))
    assert_same_run(uninterrupted, run, 150)


def test_the_second_signal_stops_at_once():
    with Interrupt() as noted:
        signal.raise_signal(signal.SIGTERM)
        assert noted.signum == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- NaN ----


def poison_at(monkeypatch, step, poison):
    real = Trainer._train_step

    def poisoned(self):
        if self.step == step - 1:
            with torch.no_grad():
                poison(self.model)
        real(self)

    monkeypatch.setattr(Trainer, "_train_step", poisoned)


def test_nan_names_the_parameter(text, tmp_path, monkeypatch):
    poison_at(monkeypatch, 3, lambda model: model.backbone.layers[1].mixer.x_proj.weight[0].fill_(math.nan))
    with pytest.raises(AnymambaError) as error:
        train(config(text, tmp_path, steps=5, save_every=2))
    message = str(error.value)
    assert "step 3: the loss is nan" in message
    assert (
        "parameter backbone.layers.1.mixer.x_proj.weight is not finite; it shows first in backbone.layers.1." in message
    )
    assert "lower --lr" in message
    assert f"go on from step 2 with  anymamba train --resume {tmp_path / 'run'}" in message
    for weights in (tmp_path / "run").rglob("model.safetensors"):
        assert all(v.isfinite().all() for v in load_file(weights).values())
    monkeypatch.undo()
    assert resume(tmp_path / "run").step == 5


def test_nan_that_is_found_late_has_changed_nothing(text, tmp_path, monkeypatch):
    """As on a GPU, whose next step is under way before the loss of the last one is known."""
    real, begin, trainers = Passes.loss, Trainer._begin, []

    def loss(self, index, *rest):
        value, state = real(self, index, *rest)
        return value * (math.nan if index == 2 else 1), state

    monkeypatch.setattr(Trainer, "_begin", lambda self: (begin(self), setattr(self, "ahead", 2), trainers.append(self)))
    monkeypatch.setattr(Passes, "loss", loss)
    with pytest.raises(AnymambaError, match=r"step 3: the loss is nan(.|\n)*no checkpoint yet"):
        train(config(text, tmp_path, steps=9, eval_every=100, sample_every=100))
    assert (trainers[0].step, [r["step"] for r in log.read(tmp_path / "run")]) == (5, [1, 2])
    monkeypatch.undo()
    stopped = train(config(text, tmp_path, steps=9, out=str(tmp_path / "other")), StopAfter(2))
    for late, good in zip(trainers[0].model.parameters(), stopped.model.parameters(), strict=True):
        assert torch.equal(late, good)


def test_losses_are_looked_at_a_step_later(text, tmp_path, monkeypatch):
    """The log is the same, in the same order."""
    options = {"steps": 6, "eval_every": 2, "sample_every": 3, "save_every": 4, "carry": True}
    train(config(text, tmp_path, **options))
    real = Trainer._begin
    monkeypatch.setattr(Trainer, "_begin", lambda self: (real(self), setattr(self, "ahead", 1)))
    train(config(text, tmp_path, out=str(tmp_path / "later"), **options))
    assert_same_run(tmp_path / "run", tmp_path / "later", 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"carry": True, "accumulate": 2}, {"packed": True}], ids=str)
def test_a_step_on_a_gpu_does_not_wait(text, tmp_path, options):
    path = tmp_path / "run"
    path.mkdir()
    run = config(text, tmp_path, steps=9, device="cuda", **options | {"precision": "bf16"})
    trainer = Trainer(path, run, load_tokenizer("bytes"), Silent())
    trainer._begin()
    trainer._train_step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        trainer._train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.log.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"carry": True}], ids=str)
def test_a_cuda_graph_changes_nothing(text, tmp_path, options):
    options = {"steps": 9, "device": "cuda", "precision": "bf16", "save_every": 5} | options
    train(config(text, tmp_path, graph=False, out=str(tmp_path / "issued"), **options))
    train(config(text, tmp_path, **options))
    assert_same_run(tmp_path / "issued", tmp_path / "run", 9)
    assert train(config(text, tmp_path, out=str(tmp_path / "again"), **options), StopAfter(6)).interrupted
    resume(tmp_path / "again")
    assert_same_run(tmp_path / "run", tmp_path / "again", 9)


def test_inf_names_the_layer(text, tmp_path, monkeypatch):
    # finite weights whose product is not
    poison_at(monkeypatch, 2, lambda model: model.backbone.layers[1].mixer.out_proj.weight.fill_(3e38))
    with pytest.raises(
        AnymambaError, match=r"first output that is not finite is that of backbone\.layers\.1\.mixer"
    ) as e:
        train(config(text, tmp_path, steps=3))
    assert "there is no checkpoint yet" in str(e.value)


def test_gradient_that_is_not_finite():
    linear = torch.nn.Linear(2, 1)
    with torch.no_grad():
        linear.weight.fill_(0)
        linear.bias.fill_(0)
    message = first_nonfinite(linear, lambda: linear(torch.ones(1, 2)).sqrt().sum())  # infinite slope at 0
    assert "first gradient that is not is that of" in message


# ---- precision ----


def test_precision_is_tried_out_and_kept(text, tmp_path, monkeypatch):
    times = {"fp32": 2.0, "bf16": 1.0}
    monkeypatch.setattr(hardware, "_fastest", lambda forward_backward, name: times[name])
    run = train(config(text, tmp_path, steps=6, precision="auto"), StopAfter(2)).run
    assert checkpointing.newest_meta(run)["precision"] == "bf16"
    times["bf16"] = 9.0
    resume(run)
    assert checkpointing.newest_meta(run)["precision"] == "bf16"
    assert hardware.choose_precision("auto", torch.device("cpu"), None)[0] == "fp32"


def test_trying_precisions_changes_nothing(text, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "WORTH", 0)  # fp32 whatever the clock says
    train(config(text, tmp_path, steps=3, precision="auto"))
    train(config(text, tmp_path, steps=3, precision="fp32", out=str(tmp_path / "other")))
    assert_same_run(tmp_path / "run", tmp_path / "other", 3)


# ---- a full disk ----


def test_full_disk_keeps_the_checkpoints(text, tmp_path, monkeypatch):
    whole = train(config(text, tmp_path, steps=4, out=str(tmp_path / "whole")))
    real = checkpointing._write

    def full(folder, model, tensors, meta):
        if meta["step"] >= 4:
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, model, tensors, meta)

    monkeypatch.setattr(checkpointing, "_write", full)
    with pytest.raises(AnymambaError, match=r"No space left(.|\n)*checkpoints before it are whole(.|\n)*--resume"):
        train(config(text, tmp_path, steps=4, save_every=2))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert_same_run(whole.run, tmp_path / "run", 4)


@pytest.mark.skipif(os.name == "nt", reason="no such limit")
def test_file_size_limit_of_a_real_process(text, tmp_path):
    """A limit on the size of files stands for a full disk: writing fails in the middle of the weights."""
    code = ("import resource, sys; from anymamba.cli import main\n"
            "import anymamba.train.trainer as t; real = t.checkpointing.save\n"
            "def save(*a):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); return real(*a)\n"
            "t.checkpointing.save = save; sys.exit(main(sys.argv[1:]))")  # fmt: skip
    sizes = ["--d-model", "32", "--n-layer", "2", "--seqlen", "64", "--precision", "fp32", "--steps", "2"]
    command = [sys.executable, "-c", code, "train", "--data", text, "--out", str(tmp_path / "run"), *sizes]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "cannot save a checkpoint" in done.stderr
    assert "free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert not list((tmp_path / "run").rglob("model.safetensors"))


# ---- what cannot be meant ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": -1}, r"lr=-1, but it must be a finite number above 0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"min_lr": 1.0}, r"min_lr=1.0, but it must be at most lr=0.006"),
        ({"batch_size": 0}, "batch_size=0, but it must be a whole number of at least 1"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"steps": 5, "minutes": 1}, "steps=5 and minutes=1: a run has one length"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"holdout": 1.0}, "holdout=1.0"),
        ({"warmup": 1}, "warmup=1"),
        ({"seed": -1}, "seed=-1"),
        ({"dropout": 1.0}, "dropout=1.0, but it must be a share from 0 to below 1"),
        ({"carry": True, "packed": True}, "with --packed give --no-carry"),
        ({"preset": "huge"}, "unknown preset 'huge': known presets are tiny"),
        ({"d_model": 0}, "d_model=0"),
        ({"precision": "fp8"}, "precision='fp8'"),
    ],
)
def test_config_refuses(changes, words):
    with pytest.raises(AnymambaError, match=words):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"batchsize": 3}', "unknown key 'batchsize': did you mean 'batch_size'"),
        ("[1]", "holds a list"),
        ("{", "is not JSON"),
        ('{"lr": "fast"}', "lr='fast'"),
    ],
)
def test_config_file_refuses(tmp_path, content, words):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(AnymambaError, match=words):
        TrainConfig.from_file(tmp_path / "train.json")


def test_config_file_round_trip(tmp_path):
    some = TrainConfig(data=("a", "b"), steps=3, betas=(0.8, 0.9), d_state=8)
    (tmp_path / "train.json").write_text(some.to_json())
    assert TrainConfig.from_file(tmp_path / "train.json") == some


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": ("nowhere.txt",)}, "nowhere.txt: no such file"),
        ({"tokenizer": "nowhere"}, "no tokenizer at nowhere"),
        ({"seqlen": 10**6}, "needs at least 1000001"),
        ({"device": "gpu9"}, "device='gpu9' cannot be used here"),
    ],
)
def test_nothing_is_left_of_a_run_that_could_not_begin(text, tmp_path, changes, words):
    with pytest.raises(AnymambaError, match=words):
        train(config(text, tmp_path, steps=1, out=str(tmp_path / "runs" / "new"), **changes))
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_overwritten(text, tmp_path):
    train(config(text, tmp_path, steps=1))
    with pytest.raises(AnymambaError, match="holds a run already: go on with it by  anymamba train --resume"):
        train(config(text, tmp_path, steps=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(AnymambaError, match="is a file, but a run is a folder"):
        train(config(text, tmp_path, out=str(tmp_path / "file")))
