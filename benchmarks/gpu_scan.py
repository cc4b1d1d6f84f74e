"""Selective scan on the GPU: bf16 in and out, D, z, dt_bias, softplus, variable B and C; forward, forward + backward.

    python benchmarks/gpu_scan.py [--backends cuda triton] [--strided] [--quick] [--save]

Floors: bytes = x, dt, z read and y written over the measured copy bandwidth (with backward 11 such tensors);
exponentials = b·t·d·n over multiprocessors × 16 a clock (with backward twice that).
Peer: mamba-ssm's CUDA kernel, in this run if it is installed, else EARLIER: mamba-ssm 2.3.2, measured in the same way
(graph replays, cold L2, random inputs) on one NVIDIA H200 with torch 2.11+cu130: a comparison only on such a GPU.
The gate: a row whose error against float64 is far beyond that of plain torch says WRONG.
"""

import math

import torch

from anymamba.ops import selective_scan
from common import median
from gpu_common import GpuReport, graph_times, options, verdict
from gpu_exact import scan_errors, summary

EARLIER = {  # (b, d, t, n): ms of mamba-ssm 2.3.2 on an H200: forward, forward + backward
    (8, 2048, 2048, 16): (0.592, 2.88),
    (1, 5120, 2048, 16): (0.197, 1.00),
    (1, 2048, 32768, 16): (1.463, 6.90),
    (1, 2048, 262144, 16): (11.84, 57.7),
    (64, 1536, 512, 16): (0.796, 3.92),
    (8, 2048, 2048, 64): (1.98, 10.7),
    (16, 5120, 2048, 16): (2.88, None),
}
QUICK = list(EARLIER)[:2]
TARGET = 0.40  # of mamba-ssm's time


def inputs(b, d, t, n, strided, rank=None):
    """As a layer has them. strided: x and z are halves of one tensor, B and C slices of another, as in the mixer."""
    rank = rank or d // 32
    kw = {"device": "cuda", "dtype": torch.bfloat16}
    x, z = torch.randn(b, t, 2 * d, **kw).chunk(2, -1)
    _, B, C = torch.randn(b, t, rank + 2 * n, **kw).split([rank, n, n], -1)
    if not strided:
        x, z, B, C = (v.contiguous() for v in (x, z, B, C))
    steps = torch.exp(torch.rand(d, device="cuda") * math.log(100) + math.log(1e-3))  # 0.001 … 0.1
    return {"x": x, "dt": torch.randn(b, t, d, **kw), "A": -torch.arange(1.0, n + 1, device="cuda").repeat(d, 1),
            "B": B, "C": C, "D": torch.ones(d, device="cuda"), "z": z,
            "dt_bias": steps + torch.log(-torch.expm1(-steps))}  # fmt: skip


def ours(backend):
    def scan(**v):
        return selective_scan(**v, dt_softplus=True, backend=backend)[0]

    return scan


def mamba_ssm():
    """Its scan in our argument names, and a function that lays the arguments out as it wants them; None without it."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None

    def scan(x, dt, A, B, C, D, z, dt_bias):
        return selective_scan_fn(x, dt, A, B, C, D, z, dt_bias, delta_softplus=True)

    def lay_out(v):
        return {k: u.transpose(1, 2).contiguous() if u.dim() == 3 else u for k, u in v.items()}

    return scan, lay_out


def measure(scan, arguments):
    """Seconds of replays: forward, forward + backward."""
    leaves = {k: v.detach().requires_grad_() for k, v in arguments.items()}
    wanted = list(leaves.values())
    dy = torch.randn_like(leaves["x"])

    def forward():
        with torch.no_grad():
            return scan(**leaves)

    return graph_times(forward), graph_times(lambda: torch.autograd.grad(scan(**leaves), wanted, dy))


def floors(report, shape, passes):
    b, d, t, n = shape
    tensors, rounds = ((4, 1), (11, 2))[passes]
    return tensors * b * t * d * 2 / report.bandwidth, rounds * b * t * d * n / report.exponentials


def peers(report, shape, strided, peer):
    """ms of mamba-ssm, forward and forward + backward, and where they come from."""
    if peer is None:
        return EARLIER[shape], "mamba-ssm as measured earlier"
    scan, lay_out = peer
    both = measure(scan, lay_out(inputs(*shape, strided)))
    for name, times in zip(NAMES, both, strict=True):
        report.timed(f"{shape} mamba_ssm {name}", times)
    return [median(times) * 1e3 for times in both], "mamba-ssm in this run"


NAMES = ("fwd", "fwd+bwd")


def row(report, shape, backend, theirs, source, strided):
    arguments = inputs(*shape, strided)
    accuracy = summary(scan_errors(ours(backend), arguments))
    for i, times in enumerate(measure(ours(backend), arguments)):
        middle, (moved, exp) = median(times), floors(report, shape, i)
        text = f"{middle / moved:5.1f}× bytes {middle / exp:5.1f}× exp"
        values = {"over_bytes": middle / moved, "over_exp": middle / exp, "accuracy": accuracy}
        if theirs[i]:
            values |= {"peer_ms": theirs[i], "peer": source, "of_peer": middle * 1e3 / theirs[i]}
            text += f"  {values['of_peer']:5.2f}× {source} {verdict(values['of_peer'], TARGET)}"
        report.timed(f"{shape} {backend} {NAMES[i]}", times, text, **values)
    print(f"{'':46} {accuracy}", flush=True)


def main() -> int:
    args = options(__doc__, backends={"nargs": "+", "default": ["cuda", "triton"], "choices": ["cuda", "triton"]},
                   strided={"action": "store_true", "help": "x, z, B, C as views of projections"})  # fmt: skip
    torch.manual_seed(0)
    report, peer = GpuReport("gpu_scan" + ("_strided" if args.strided else "")), mamba_ssm()
    for shape in QUICK if args.quick else EARLIER:
        theirs, source = EARLIER[shape], "mamba-ssm as measured earlier"
        with report.row(f"{shape} mamba_ssm"):
            theirs, source = peers(report, shape, args.strided, peer)
        for backend in args.backends:
            with report.row(f"{shape} {backend}"):
                row(report, shape, backend, theirs, source, args.strided)
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
