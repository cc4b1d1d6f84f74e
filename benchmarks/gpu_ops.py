"""Convolution with silu, and residual add with RMS norm, on the GPU, against the bytes that they must move.

    python benchmarks/gpu_ops.py [--quick] [--save]

Floors, over the measured copy bandwidth: convolution forward x, y; with backward x, dy, dx more. Norm (x and the output
bf16, residual stream float32): forward x, residual, total, output; with backward dy, dtotal, total, dx, dresidual more.
Beside them a plain copy of as many bytes: kernels that short do not reach the bandwidth, which is that of 2 GiB.
Earlier, measured in the same way on one NVIDIA H200: causal-conv1d 1.7.0 with (b,t,d) 1.5 and 2.0 times the floor,
mamba-ssm's Triton norm 1.1 and 2.2.
"""

import torch

from anymamba import ops, reference
from common import median
from gpu_common import GpuReport, copy_times, graph_times, options, verdict
from gpu_exact import relative

CUDA = {"device": "cuda"}
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def conv(module):
    return lambda x, weight, bias: module.causal_conv1d(x, weight, bias, activation="silu")[:1]


def norm(module):
    return lambda x, residual, weight: module.add_rms_norm(x, residual, weight)


def conv_case(b, t, d, w, strided=False):
    """(function, arguments, bytes forward, bytes with backward)"""
    x = torch.randn(b, t, 2 * d, **BF16).chunk(2, -1)[0] if strided else torch.randn(b, t, d, **BF16)
    tensor = b * t * d * 2
    return conv, {"x": x, "weight": torch.randn(d, w, **CUDA), "bias": torch.randn(d, **CUDA)}, 2 * tensor, 5 * tensor


def norm_case(rows, m):
    arguments = {"x": torch.randn(rows, m, **BF16), "residual": torch.randn(rows, m, **CUDA)}
    low, high = rows * m * 2, rows * m * 4  # bytes of a bf16 and of a float32 tensor
    return norm, arguments | {"weight": torch.randn(m, **CUDA)}, 2 * low + 2 * high, 4 * low + 5 * high


CASES = {  # name: (case, target over the floor: forward, forward + backward)
    "conv (8,2048,2048)": (lambda: conv_case(8, 2048, 2048, 4), (1.3, 1.6)),
    "conv (8,2048,2048) half of a projection": (lambda: conv_case(8, 2048, 2048, 4, strided=True), (1.3, 1.6)),
    "conv (1,131072,2048)": (lambda: conv_case(1, 131072, 2048, 4), (1.3, 1.6)),
    "norm 16384×1024": (lambda: norm_case(16384, 1024), (1.1, 1.6)),
    "norm 16384×768": (lambda: norm_case(16384, 768), (1.1, 1.6)),
    "norm 16384×2560": (lambda: norm_case(16384, 2560), (1.1, 1.6)),
}
QUICK = ("conv (8,2048,2048)", "norm 16384×1024")


def outputs_and_gradients(function, arguments, cotangents):
    leaves = [v.detach().requires_grad_() for v in arguments.values()]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, [c.to(v.dtype) for c, v in zip(cotangents, out, strict=True)])
    return [*(v.detach() for v in out), *gradients]


def accuracy(make, arguments, cotangents):
    """Largest error against float64, and plain torch's there, over outputs and gradients, of the default backend."""
    exact = outputs_and_gradients(make(reference), {k: v.double() for k, v in arguments.items()}, cotangents)
    plain = outputs_and_gradients(make(reference), arguments, cotangents)
    got = outputs_and_gradients(make(ops), arguments, cotangents)
    pairs = [(relative(g, e), relative(p, e)) for g, p, e in zip(got, plain, exact, strict=True)]
    worst = max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-9))
    wrong = any(not error <= 2 * plain_error + 2e-6 for error, plain_error in pairs)
    return f"worst error {worst[0]:.1e} (plain {worst[1]:.1e})" + (" WRONG" if wrong else "")


def row(report, name):
    case, targets = CASES[name]
    make, arguments, *moved = case()
    function = make(ops)
    cotangents = [torch.randn_like(v) for v in function(*arguments.values())]
    cut = lambda v: v[:2, :8192] if v.dim() == 3 else v  # noqa: E731  float64 takes room
    said = accuracy(make, {k: cut(v) for k, v in arguments.items()}, [cut(v) for v in cotangents])
    leaves = [v.detach().requires_grad_() for v in arguments.values()]

    def forward():
        with torch.no_grad():
            return function(*leaves)

    def both():
        return torch.autograd.grad(function(*leaves), leaves, cotangents)

    for what, call, size, target in zip(("fwd", "fwd+bwd"), (forward, both), moved, targets, strict=True):
        times = graph_times(call, 0.2)
        over, copy = median(times) * report.bandwidth / size, median(times) / median(copy_times(size))
        text = f"{over:5.2f}× bytes {verdict(over, target)}, {copy:5.2f}× a copy  {said}"
        report.timed(f"{name} {what}", times, text, over_bytes=over, over_copy=copy, target=target, accuracy=said)


def main() -> int:
    args = options(__doc__)
    torch.manual_seed(0)
    report = GpuReport("gpu_ops")
    for name in QUICK if args.quick else CASES:
        with report.row(name):
            row(report, name)
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
