"""`anymamba doctor`: what is installed, which backend each op uses here and why, and a self-test of every kernel."""

import importlib.metadata
import importlib.util
import platform
import sys
import time

import torch
from torch import Tensor

from anymamba import __version__, ops

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
    for name in ("numba", "llvmlite", "numpy", "triton"):
        if importlib.util.find_spec(name):
            console.print(f"  {name:<12} {importlib.metadata.version(name)}")
    console.print(f"  {'processor':<12} {_processor()}, {torch.get_num_threads()} threads")
    console.print(f"  {'features':<12} {torch.backends.cpu.get_cpu_capability()}; {_features() or 'not known'}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    console.print(f"  {'GPU':<12} {gpu}")


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
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for dtype in (*DTYPES, torch.float64):
            backend, reason = ops.explain(device, dtype)
            label = f"{device} {str(dtype).removeprefix('torch.')}"
            console.print(f"  {label:<14} [cyan]{backend:<10}[/] {reason}")
    console.print("  for selective_scan, causal_conv1d, add_rms_norm and the two *_step_ functions alike")


def _self_test(console) -> bool:
    console.print("\n[bold]Self-test against the float64 reference[/] (forward, and backward through every input)")
    failed = False
    for dtype in DTYPES:
        backend, _ = ops.explain("cpu", dtype)
        for name, case in CASES.items():
            start = time.perf_counter()
            try:
                error = _error(case, dtype, backend)
                verdict = "[green]ok[/]" if error <= LIMIT[dtype] else "[red]WRONG[/]"
            except Exception as problem:  # whatever a broken install does, the others are still tested
                error, verdict = float("nan"), f"[red]{type(problem).__name__}: {problem}[/]"
            failed |= "green" not in verdict
            took = time.perf_counter() - start
            console.print(f"  {name:<16} {str(dtype)[6:]:<9} {backend:<10} error {error:.0e}  {took:5.1f} s  {verdict}")
    return failed


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


def _conv(v, backend):
    x, weight, bias, h0 = v
    return ops.causal_conv1d(x, weight, bias, activation="silu", initial_state=h0, backend=backend)


def _norm(v, backend):
    x, residual, weight = v
    return ops.add_rms_norm(x, residual, weight, backend=backend)


B, T, D, N = 2, 67, 37, 16
SCAN = [(B, T, D), (B, T, D), (D, N), (B, T, N), (B, T, N), (D,), (B, T, D), (D,), (B, D, N)]
CASES = {  # function, shapes of its inputs, which of them are activations (the others stay float32)
    "selective_scan": (_scan, SCAN, {0, 1, 6}),
    "causal_conv1d": (_conv, [(B, T, D), (D, 4), (D,), (B, D, 3)], {0}),
    "add_rms_norm": (_norm, [(B, T, D), (B, T, D), (D,)], {0}),
}


def _error(case, dtype, backend) -> float:
    """Largest relative error of outputs and gradients against the reference in float64, on the same rounded inputs."""
    function, shapes, activations = case
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    low = [v.to(dtype if i in activations else torch.float32) for i, v in enumerate(exact)]
    results = []
    for inputs, run in ((low, backend), ([v.double() for v in low], "reference")):
        inputs = [v.requires_grad_() for v in inputs]
        outputs = function(inputs, run)
        loss = sum((y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    return max(_relative(got, want) for got, want in zip(*results, strict=True))


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
