"""What several test files share: the tolerance law, poisoned memory, a record of kernel launches."""

import functools
import io
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

# where there is no GPU, Triton's interpreter runs the GPU kernels on CPU tensors; Triton reads this when it is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
GPU_OR_CPU = "cuda" if torch.cuda.is_available() else "cpu"  # where the Triton kernels run

REPO = Path(__file__).resolve().parents[1]

# the same examples in every run; HYPOTHESIS_PROFILE=explore looks for new ones
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=20, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=200, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture
def poison():
    """NaN in every torch.empty: an output that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched during a test, in order."""
    from anymamba.kernels import numba_launch

    seen, real = [], numba_launch.launch

    def spy(kernel, *args, **options):
        seen.append(kernel.name)
        return real(kernel, *args, **options)

    monkeypatch.setattr(numba_launch, "launch", spy)
    return seen


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command in this process: (exit code, output, errors)."""
    from anymamba.cli import main

    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as exit:  # of the option parser
            code = exit.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def two_threads():
    """At least two threads, so that work is split even where the machine has one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def default_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_law(got, plain, exact, what="", slack=4):
    """|got - exact| ≤ 2 |plain - exact| in the maximum norm, down to `slack` units in the last place of the largest."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == plain.dtype, f"{what}: dtype {got.dtype}, expected {plain.dtype}"
    if got.numel() == 0:
        return
    assert got.isfinite().all(), f"{what}: not finite"
    floor = slack * torch.finfo(got.dtype).eps * float(exact.abs().max())
    error, allowed = (float((v.double() - exact).abs().max()) for v in (got, plain))
    assert error <= 2 * allowed + floor, f"{what}: error {error:.3g}, plain {got.dtype} has {allowed:.3g}"


def map_tensors(f, arguments):
    """f on every tensor of a dict of keyword arguments."""
    return {k: f(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def to_double(arguments):
    return map_tensors(lambda v: v.detach().double() if v.is_floating_point() else v, arguments)


def cotangents(*outputs):
    """A fixed gradient for each output, in float64."""
    values = [torch.arange(1, v.numel() + 1, dtype=torch.float64).mul(1.618).cos() for v in outputs]
    return [c.view(v.shape).to(v.device) for c, v in zip(values, outputs, strict=True)]


def outputs_and_gradients(op, arguments, cotangents=cotangents, **options):
    """`op(**arguments)` → {"y", "final_state", "d" + name of each tensor argument}, for a fixed gradient of both."""
    leaves = map_tensors(lambda v: v.detach().clone().requires_grad_() if v.is_floating_point() else v, arguments)
    y, final_state = op(**leaves, **options)
    total = sum((c * v.double()).sum() for c, v in zip(cotangents(y, final_state), (y, final_state), strict=True))
    names = [k for k, v in leaves.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    gradients = torch.autograd.grad(total, [leaves[k] for k in names], materialize_grads=True)
    out = {"y": y.detach(), "final_state": final_state.detach()}
    return out | {"d" + k: g for k, g in zip(names, gradients, strict=True)}


def run_python(code, **environment):
    """Run code in a fresh interpreter that finds the package; returns the finished process."""
    env = os.environ | {"PYTHONPATH": str(REPO / "src")} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)


@functools.cache
def scan_shapes(b=2, t=5, d=6, n=3, groups=None):
    """Shape of each argument of selective_scan. groups: None for (b,t,n), 0 for constant, else their number."""
    bc = {None: (b, t, n), 0: (d, n)}.get(groups, (b, t, groups, n))
    return {"x": (b, t, d), "dt": (b, t, d), "A": (d, n), "B": bc, "C": bc, "D": (d,), "z": (b, t, d),
            "dt_bias": (d,), "initial_state": (b, d, n)}  # fmt: skip


OPTIONAL = ("D", "z", "dt_bias", "initial_state")
REAL = ("A", "D", "dt_bias", "initial_state")  # float32 whatever the activations are


def scan_arguments(b=2, t=5, d=6, n=3, groups=None, dtype=torch.float32, seed=0, rows=None, without=()):
    """Random arguments of selective_scan as a trained layer has them: A < 0, raw step sizes around softplus⁻¹(0.05)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = scan_shapes(b, t, d, n, groups)
    if rows is not None:  # of packed sequences
        shapes = shapes | {"initial_state": (rows, d, n)}
    real = torch.float64 if dtype == torch.float64 else torch.float32
    values = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    values["A"] = -torch.exp(values["A"])
    values["dt_bias"] = values["dt_bias"] - 3
    return {k: v.to(real if k in REAL else dtype) for k, v in values.items() if k not in without} | {
        "dt_softplus": True
    }


def conv_arguments(b=2, t=5, d=6, w=4, dtype=torch.float32, seed=0, rows=None, activation="silu", without=()):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (b, t, d), "weight": (d, w), "bias": (d,), "initial_state": (rows or b, d, w - 1)}
    values = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    return {k: v.to(dtype) for k, v in values.items() if k not in without} | {"activation": activation}
