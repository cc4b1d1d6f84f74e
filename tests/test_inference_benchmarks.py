"""The GPU benchmarks of inference at toy size on the CPU: they run, and say what is so. Only timing and the GPU's
memory are stood in for; models, decoders, texts and files are real."""

import contextlib
import importlib
import io
import json
import math
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from anymamba import MambaLM
from anymamba.config import PRESETS
from anymamba.generate.rows import read
from conftest import REPO

TOY = {"d_model": 32, "n_layer": 2, "vocab_size": 97, "d_state": 4}
SCRIPTS = ("gpu_common", "decoding", "real_text", "gpu_decode", "gpu_transformer", "gpu_prefill")


class StandIn:
    """What `Decoder` promises, by the model's own forward pass."""

    def __init__(self, model, *, state_dtype=torch.float32):
        self.model, self.state_dtype = model, state_dtype

    @torch.no_grad()
    def step(self, ids, state):
        logits, state = read(self.model, ids[:, None], state.to(ssm_dtype=torch.float32))
        return logits, state.to(ssm_dtype=self.state_dtype)


class OnCpu(ModuleType):
    """torch, but for what asks the GPU."""

    def __init__(self):
        super().__init__("torch")
        nothing = lambda *_: None  # noqa: E731
        self.cuda = SimpleNamespace(
            is_available=lambda: True, synchronize=nothing, empty_cache=nothing, reset_peak_memory_stats=nothing,
            memory_allocated=lambda: 1 << 30, max_memory_allocated=lambda: 3 << 29, current_device=lambda: 0,
            mem_get_info=lambda: (4 << 30, 8 << 30), version=None,
        )  # fmt: skip

    def __getattr__(self, name):
        return getattr(torch, name)


def use(decoder, monkeypatch):
    module = ModuleType("anymamba.generate.decode")
    module.Decoder = decoder
    monkeypatch.setitem(sys.modules, "anymamba.generate.decode", module)


def event_times(call, rounds):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


@pytest.fixture
def script(monkeypatch):
    """A script, loaded so that it runs here: (name, its constants) → the module."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    for name in SCRIPTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    if importlib.util.find_spec("anymamba.generate.decode") is None:
        use(StandIn, monkeypatch)
    for preset in ("130m", "1.4b", "2.8b"):
        monkeypatch.setitem(PRESETS, preset, TOY)
    common, fake = importlib.import_module("gpu_common"), OnCpu()
    gpu = {"name": "none", "multiprocessors": 1, "driver": "", "max_sm_clock": "1000", "cuda": None}
    monkeypatch.setattr(common, "torch", fake)
    monkeypatch.setattr(common, "gpu_card", lambda: {"gpu": dict(gpu), "versions": {}})
    monkeypatch.setattr(common, "_smi", lambda *fields: [""] * len(fields))
    monkeypatch.setattr(common, "event_times", event_times)
    monkeypatch.setattr(common, "rounds_for", lambda *_, **__: 2)
    monkeypatch.setattr(common, "capture", lambda call: SimpleNamespace(replay=call))
    monkeypatch.setattr(common, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(common, "matmul_rate", lambda: 1e9)

    def load(name, **constants):
        decoding = importlib.import_module("decoding")
        monkeypatch.setattr(decoding, "DEVICE", "cpu")
        monkeypatch.setattr(decoding, "TOKENS", 2)
        monkeypatch.setattr(decoding.greedy_times, "__defaults__", (2, 1.0))
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "torch", fake)
        for key, value in constants.items():
            monkeypatch.setattr(module, key, value)
        return module

    return load


@pytest.fixture
def rows(monkeypatch, capsys):
    """Run a script's main with arguments: (exit code, the rows of its last line, all that it printed)."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        code = module.main()
        out = capsys.readouterr().out
        return code, json.loads(out.splitlines()[-1])["rows"], out

    return run


def test_decoding(script, rows, monkeypatch):
    module = script("gpu_decode", READ=(1, 4), BATCHES={"2.8b": (1, 64), "130m": (16,)})
    use(StandIn, monkeypatch)  # keeps states in the type asked for on every device
    code, found, out = rows(module)
    assert (code, "FAILED" in out, "WRONG" in out) == (0, False, False)
    speeds = {key: row for key, row in found.items() if " b=" in key}
    assert sorted(speeds) == ["130m b=16, state fp32", "2.8b b=1, state fp32", "2.8b b=64, state bf16",
                              "2.8b b=64, state fp32"]  # fmt: skip
    for row in speeds.values():
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
        assert 0 <= row["error"] < 0.1
    wide, narrow = (found[f"2.8b b=64, state {dtype}"]["floor"] for dtype in ("fp32", "bf16"))
    state = 64 * 2 * 64 * 4  # rows, layers, d_inner, d_state
    assert wide - narrow == pytest.approx(2 * 2 * state / 1e9)  # two bytes less, read and written
    exact, low = (found[f"weights fp32, state {dtype}"] for dtype in ("fp32", "bf16"))
    assert (exact["kl"], exact["more"]) == (0, 0)
    assert 0 < low["kl"] < 1e-2
    ids = torch.tensor([list(module.real_text(5)[0])])
    model = MambaLM.from_pretrained(REPO / "src/anymamba/models/books", dtype=torch.float32)
    nats = model(ids[:, :-1], labels=ids[:, 1:]).loss
    assert exact["bits"] == pytest.approx(nats.item() / math.log(2), rel=1e-4)


def test_a_decoder_that_is_wrong_shows(script, rows, monkeypatch):
    module = script("gpu_decode")
    monkeypatch.setattr(module.Loop, "step", lambda self, ids: torch.ones(len(ids), 104))
    _, found, out = rows(module, "130m", "--quick")
    assert "WRONG" in out
    assert found["130m b=1, state fp32"]["error"] > 0.5


def test_states_that_are_not_kept_as_asked_show(script, rows, monkeypatch):
    class Stubborn(StandIn):
        def __init__(self, model, *, state_dtype):
            super().__init__(model)

    module = script("gpu_decode", BATCHES={"130m": (64,)})
    use(Stubborn, monkeypatch)
    assert rows(module, "130m")[2].count("WRONG: states are kept in fp32") == 1


def test_a_row_that_fails_leaves_the_others(script, rows, monkeypatch):
    module = script("gpu_decode", READ=(1, 3), BATCHES={"1.4b": (1, 128)})
    real = module.state_of
    monkeypatch.setattr(module, "state_of", lambda model, b: real(model, b) if b < 128 else 1 / 0)
    code, found, out = rows(module, "1.4b", "accuracy")
    assert (code, out.count("FAILED ZeroDivisionError")) == (1, 2)
    assert "tokens_per_s" in found["1.4b b=1, state fp32"]
    assert "weights bf16, state fp16" in found


def test_unknown_rows_are_refused(script, rows):
    with pytest.raises(SystemExit, match=r"no row 3b: rows are 2.8b"):
        rows(script("gpu_decode"), "3b")
    with pytest.raises(SystemExit, match="no row reed: rows are read, position, prefix"):
        rows(script("gpu_prefill"), "reed")


# ---- the Transformer ----


SIZES = {"layers": 2, "width": 32, "heads": 4, "hidden": 48, "vocabulary": 61}


def whole(model, ids):
    """The logits (b,t,v) of all positions at once, written a second time: complex rotation, a causal mask."""
    x, (b, t) = model.embedding[ids], ids.shape
    p = model.head_width
    angle = torch.arange(t)[:, None] * 1e4 ** -(torch.arange(p // 2) / (p // 2))
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotated(v):
        a, b = v.chunk(2, -1)
        v = torch.complex(a, b) * turn
        return torch.cat([v.real, v.imag], -1)

    for w in model.layers:
        y = F.rms_norm(x, (32,), w["norm_1"], 1e-5) @ w["qkv"].T
        q, k, v = y.view(b, t, 3, 4, p).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2) @ w["out"].T
        y = F.rms_norm(x, (32,), w["norm_2"], 1e-5) @ w["gate_up"].T
        x = x + (F.silu(y[..., :48]) * y[..., 48:]) @ w["down"].T
    return F.rms_norm(x, (32,), model.norm, 1e-5) @ model.embedding.T


@pytest.mark.parametrize("b", [1, 3])
def test_the_transformer_decodes_what_it_reads_at_once(script, b):
    module = script("gpu_transformer")
    torch.manual_seed(0)
    model = module.Transformer(**SIZES, device="cpu", dtype=torch.float32)
    for layer in model.layers:
        layer["norm_1"].uniform_(0.5, 1.5)
        layer["norm_2"].uniform_(0.5, 1.5)
    ids = torch.randint(0, 61, (b, 9))
    want = whole(model, ids)
    for attend in (module.products, module.sdpa(torch.nn.attention.SDPBackend.MATH)):
        model.allocate(b, 12)
        for t in range(9):
            following, logits = model.step(ids[:, t], t, attend)
            torch.testing.assert_close(logits, want[:, t], atol=2e-5, rtol=1e-4)
            assert following.equal(want[:, t].argmax(-1))


def test_the_transformer_is_of_mambas_size(script, monkeypatch):
    module = script("gpu_transformer")
    monkeypatch.undo()  # the real preset
    from anymamba import MambaConfig, MambaLM

    with torch.device("meta"):
        model, mamba = module.Transformer(**module.SIZES, device="meta"), MambaLM(MambaConfig.preset("2.8b"))
    assert model.num_params() == pytest.approx(mamba.num_params(), rel=0.005)
    assert model.cache_bytes(1, 2048) == 671_088_640


def test_the_transformer_beside_mamba(script, rows, monkeypatch):
    contexts = {1: (8, 16), 2: (16, 1 << 30)}
    attention = {"products": None, "missing": None}
    constants = {"CONTEXT": 16, "CONTEXTS": contexts, "EARLIER": {1: 9, 2: 9}, "TARGET": (2, 8.0)}
    module = script("gpu_transformer", SIZES=SIZES, ATTENTION=attention, **constants)
    attention["products"] = module.products

    def missing(*_):
        raise RuntimeError("No available kernel")

    attention["missing"] = missing
    monkeypatch.setattr(module.Transformer, "compile", lambda self: None)
    code, found, out = rows(module)
    assert (code, "FAILED" in out) == (0, False)
    assert out.count("missing attention does not run: No available kernel") == 3
    for b, t in ((1, 8), (1, 16), (2, 16)):
        row = found[f"transformer b={b} t={t}"]
        assert row["attention"] == "products"
        assert row["tokens_per_s"] == pytest.approx(b / row["ms"] * 1e3)
    ratio = found["mamba b=2"]["tokens_per_s"] / found["transformer b=2 t=16"]["tokens_per_s"]
    assert found["mamba over transformer b=2 t=16"]["ratio"] == pytest.approx(ratio)
    assert "left out: a cache of" in out
    assert found["transformer b=2 t=1073741824"]["missing"] == 2 * 2 * 2 * 32 * (1 << 30) * 2
    cache, state = (found["memory of a row, t=16"][key] for key in ("cache", "state"))
    assert (cache, state) == (2 * 2 * 32 * 16 * 2, 2 * 64 * (4 * 4 + 3 * 2) + 8)


# ---- long prompts ----


def in_process(module):
    """In place of `subprocess.run`: the script's main with the command's arguments."""

    def run(command, **_):
        before, out = sys.argv, io.StringIO()
        sys.argv = command[1:]
        try:
            with contextlib.redirect_stdout(out):
                code = module.main()
        finally:
            sys.argv = before
        return subprocess.CompletedProcess(command, code, out.getvalue(), "")

    return run


def test_long_prompts(script, rows, monkeypatch):
    module = script(
        "gpu_prefill", LENGTHS=[64, 256, 1024], SHORT=256, LONG=1024, POSITIONS=(16, 512), PREFIX=1100, MORE=5
    )
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=in_process(module)))
    code, found, out = rows(module)
    assert (code, "FAILED" in out, "WRONG" in out) == (0, False, False)
    assert [found[f"read t={t}"]["t"] for t in (64, 256, 1024)] == [64, 256, 1024]
    assert found["read: worst peak"]["gib"] == 0.5
    short, long = (found[f"read t={t}"]["tokens_per_s"] for t in (256, 1024))
    assert found["read: 1024 tokens"]["ratio"] == pytest.approx(long / short)
    assert found["decode at 512 over 16"]["ratio"] == pytest.approx(
        found["decode at 512"]["ms"] / found["decode at 16"]["ms"]
    )
    first = [key for key in found if key.startswith("first token")]
    assert [key.removeprefix("first token: ") for key in first] == [
        "miss", "hit, in memory", "miss, and to disk", "hit, on disk", "hit, on disk, a fresh process's first act",
        "hit, on disk, a fresh process, warmed"]  # fmt: skip
    assert found["first token: hit, in memory"]["rounds"] == 5


def test_a_hit_that_is_none_shows(script, rows, monkeypatch):
    module = script("gpu_prefill", PREFIX=300, MORE=5)  # shorter than a checkpoint
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=in_process(module)))
    _, _, out = rows(module, "prefix")
    assert out.count("WRONG: a miss") == 4
