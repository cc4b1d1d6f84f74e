"""`anymamba doctor`: what is installed, which backend each op uses here and why, and a self-test of every kernel."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import platform
import sys
import time

import torch
from torch import Tensor

from anymamba import __version__, ops
from anymamba.config import DISCRETIZATIONS, MambaConfig
from anymamba.errors import AnymambaError
from anymamba.generate.decode import Decoder
from anymamba.layers import linear_cross_entropy
from anymamba.model import MambaLM

HELP = """usage: anymamba doctor

Versions, processor, GPU; which backend runs each op and why; a self-test of every kernel against the float64
reference; what is missing and the command that adds it. Exit code 1 if a kernel fails its test.
"""
OPTIONAL = {  # package: what it adds, and the extra that installs it
    "numba": ("the CPU kernels; without it the slow torch loop runs", "numba"),
    "matplotlib": ("loss curves as pictures", "anymamba[plot]"),
    "pyarrow": ("training on Parquet files", "anymamba[data]"),
    "tensorboard": ("anymamba train --tensorboard", "anymamba[log]"),
    "transformers": ("comparison with other implementations in the tests", "anymamba[test]"),
}
RULES = [rule for rule in DISCRETIZATIONS if rule != "mamba"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Errors relative to the float64 reference that a right kernel stays well under: rounding of the output, no more.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def main(argv: list[str]) -> int:
    if argv:
        print(HELP, file=sys.stdout if argv[0] in ("-h", "--help") else sys.stderr)
        return 0 if argv[0] in ("-h", "--help") else 2
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    _machine(console)
    _backends(console)
    failed = _self_test(console)
    _missing(console)
    return 1 if failed else 0


def _machine(console):
    console.print(f"[bold]anymamba {__version__}[/]  Python {platform.python_version()}  torch {torch.__version__}")
    for name in ("numba", "llvmlite", "numpy", "triton", "cuda-core"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            console.print(f"  {name:<12} {importlib.metadata.version(name)}")
    console.print(f"  {'processor':<12} {_processor()}, {torch.get_num_threads()} threads")
    console.print(f"  {'features':<12} {torch.backends.cpu.get_cpu_capability()}; {_features() or 'not known'}")
    for line in _gpus() or ["none that torch can use"]:
        console.print(f"  {'GPU':<12} {line}")


def _gpus() -> list[str]:
    lines = []
    for device in devices()[1:]:
        module = torch.get_device_module(device)
        for i in range(module.device_count()):
            p = module.get_device_properties(i)
            capability = (
                f", compute capability {p.major}.{p.minor}" if device == "cuda" and not torch.version.hip else ""
            )
            toolkit = torch.version.hip or torch.version.cuda if device == "cuda" else torch.version.xpu
            lines.append(f"{device}:{i} {p.name}, {p.total_memory / 2**30:.0f} GiB{capability}, toolkit {toolkit}")
    return lines


def devices() -> list[str]:
    """Device types that have kernels and are here: the CPU, then GPUs."""
    return ["cpu"] + [name for name in ("cuda", "xpu") if torch.get_device_module(name).is_available()]


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _features():
    """Vector and matrix instructions that matter here, as LLVM names them."""
    if not importlib.util.find_spec("llvmlite"):
        return ""
    from llvmlite import binding

    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512bf16", "amx-bf16", "neon", "sve", "bf16")
    have = binding.get_host_cpu_features()
    return " ".join(name for name in wanted if have.get(name))


def _backends(console):
    console.print("\n[bold]Which backend runs[/]")
    for device in devices():
        for dtype in (*DTYPES, torch.float64):
            answers: dict[tuple[str, str], list[str]] = {}
            for op in OPS:
                answers.setdefault(ops.explain(device, dtype, op=op), []).append(op)
            for (backend, reason), names in answers.items():
                label = f"{device} {str(dtype).removeprefix('torch.')}"
                which = "every op" if len(answers) == 1 else ", ".join(names)
                console.print(f"  {label:<14} [cyan]{backend:<10}[/] {which}: {reason}")
    console.print("  the two *_step_ functions run what the ops without _step_ do")


def kernels(device: str, dtype: torch.dtype, op: str) -> list[str]:
    """The backends with a kernel of `op` for a device type; a GPU's are listed although some cannot run here."""
    if device == "cpu" or op == "decode":
        return [ops.explain(device, dtype, op=op)[0]]
    return ["cuda", "triton"] if device == "cuda" and op == "selective_scan" else ["triton"]


def _self_test(console) -> bool:
    console.print("\n[bold]Self-test against the float64 reference[/] (forward, and backward through every input)")
    failed = False
    for device in devices():
        for dtype in DTYPES:
            for name in [*(CASES if device == "cpu" else GPU_CASES), "decode"]:
                op = name.split(",")[0]
                for backend in kernels(device, dtype, op):
                    said, good = _test(name, dtype, backend, device)
                    failed |= not good
                    label = f"{name:<22} {device:<5} {str(dtype)[6:]:<9} {backend:<10}"
                    console.print(f"  {label} {said}", soft_wrap=True)
    return failed


def _test(name, dtype, backend, device) -> tuple[str, bool]:
    """What a kernel did, and whether that is well. A backend that cannot run here is well unless it is the default."""
    from rich.markup import escape

    chosen = ops.explain(device, dtype, op=name.split(",")[0])[0]
    start = time.perf_counter()
    try:
        got = _results(name, dtype, backend, device)
        first = time.perf_counter() - start
        start = time.perf_counter()
        _results(name, dtype, backend, device)
        again = time.perf_counter() - start
        error = max(_relative(v, want) for v, want in zip(got, _exact(name, dtype), strict=True))
    except AnymambaError as problem:
        if backend != chosen and "cannot run here" in str(problem):
            return f"[yellow]not tested: {escape(str(problem))}[/]", True
        return f"[red]{escape(str(problem))}[/]", False
    except Exception as problem:  # whatever a broken install does, the others are still tested
        return f"[red]{type(problem).__name__}: {escape(str(problem))}[/]", False
    good = error <= LIMIT[dtype]  # not so for NaN
    verdict = "[green]ok[/]" if good else "[red]WRONG[/]"
    return f"error {error:.0e}  first {first:5.1f} s, then {1e3 * again:6.1f} ms  {verdict}", good


def _missing(console):
    absent = {k: v for k, v in OPTIONAL.items() if not importlib.util.find_spec(k)}
    console.print("\n[bold]Missing[/]" if absent else "\nNothing is missing.")
    for package, (adds, install) in absent.items():
        console.print(f"  {package:<12} {adds}:  pip install '{install}'", markup=False)


# ---- self-test cases: functions of random inputs ---------------------------------------------------------------


def _scan(v, backend):
    x, dt, A, B, C, D, z, bias, h0 = v
    return ops.selective_scan(x, dt, -A.exp(), B, C, D, z, dt_bias=bias, dt_softplus=True, initial_state=h0,
                              backend=backend)  # fmt: skip


def _rules(v, backend):
    """The scan with each other discretisation that has kernels, on an A that Euler's rule does not blow up."""
    x, dt, A, B, C, D, z, bias, h0 = v
    out = [ops.selective_scan(x, dt, -A.sigmoid() / 4, B, C, D, z, dt_bias=bias, dt_softplus=True, initial_state=h0,
                              backend=backend, discretization=rule) for rule in RULES]  # fmt: skip
    return [tensor for pair in out for tensor in pair]


def _conv(v, backend):
    x, weight, bias, h0 = v
    return ops.causal_conv1d(x, weight, bias, activation="silu", initial_state=h0, backend=backend)


def _norm(v, backend):
    x, residual, weight = v
    return ops.add_rms_norm(x, residual, weight, backend=backend)


def _loss(v, backend):  # which chooses by itself
    hidden, weight = v[0], v[1] / 8
    return [linear_cross_entropy(hidden, weight, torch.arange(len(hidden), device=hidden.device) % len(weight))]


def _scan_shapes(b, t, d, n):
    return [(b, t, d), (b, t, d), (d, n), (b, t, n), (b, t, n), (d,), (b, t, d), (d,), (b, d, n)]


B, T, D, N = 2, 67, 37, 16
CASES = {  # function, shapes of its inputs, which of them are activations (the others stay float32)
    "selective_scan": (_scan, _scan_shapes(B, T, D, N), {0, 1, 6}),
    "discretized_scan": (_rules, _scan_shapes(B, T, D, N), {0, 1, 6}),
    "causal_conv1d": (_conv, [(B, T, D), (D, 4), (D,), (B, D, 3)], {0}),
    "add_rms_norm": (_norm, [(B, T, D), (B, T, D), (D,)], {0}),
}
GPU_CASES = CASES | {
    "selective_scan, long": (_scan, _scan_shapes(1, 1501, D, N), {0, 1, 6}),  # time goes in chunks
    "cross_entropy": (_loss, [(T, D), (50, D)], {0, 1}),
}
OPS = (*CASES, "decode")


def _decoded(dtype, device, real) -> list[Tensor]:
    """Logits and states of a few steps of a small model, which goes through `linear` for the text before them."""
    config = MambaConfig(vocab_size=50, d_model=37, n_layer=2, d_state=N)
    ids = torch.arange(7 * B, device=device).view(7, B)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = MambaLM(config).to(dtype).to(device, real)
        decoder, state = Decoder(model), model(ids[:1].T).state
        for token in ids[1:]:
            logits, state = decoder.step(token, state)
        layers = [v.double().cpu() for layer in state.layers for v in layer]
        return [logits[:, : config.vocab_size].double().cpu(), *layers]


def _results(name, dtype, backend, device, real=None) -> list[Tensor]:
    """Outputs and gradients on the CPU; `real` to compute with, dtype if None, on inputs that dtype has rounded."""
    if name == "decode":
        return _decoded(dtype, device, real)
    function, shapes, activations = GPU_CASES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    inputs = [v.to(dtype if i in activations else torch.float32) for i, v in enumerate(inputs)]
    inputs = [v.to(device, real).requires_grad_() for v in inputs]
    outputs = function(inputs, backend)
    ends = [y.to("cpu", torch.float64) for y in outputs]
    loss = sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in ends)
    return [v.detach().cpu() for v in (*outputs, *torch.autograd.grad(loss, inputs))]


@functools.cache
def _exact(name, dtype) -> list[Tensor]:
    return _results(name, dtype, "reference", "cpu", torch.float64)


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
