"""Selective scan on the CPU: b=1 t=2048 d=1536 n=16 (one layer of mamba-130m), float32, against its peers.

    python benchmarks/cpu_scan.py [--save]

Peers: the loop in torch that transformers runs without CUDA kernels, our own reference loop (which never builds a
(b,t,d,n) tensor and is therefore faster), and mambapy's parallel scan (pip install mambapy).
The gate: every peer's output agrees with ours, else nothing is timed.
"""

import torch

from anymamba import reference
from anymamba.ops import selective_scan
from common import Report, measure, median, quiet, spread

b, t, d, n = 1, 2048, 1536, 16


def inputs():
    torch.manual_seed(0)
    x, z = torch.randn(b, t, d), torch.randn(b, t, d)
    dt = torch.randn(b, t, d) - 4
    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    return [v.requires_grad_() for v in (x, dt, A, torch.randn(b, t, n), torch.randn(b, t, n), torch.ones(d), z)]


def ours(x, dt, A, B, C, D, z):
    return selective_scan(x, dt, A, B, C, D, z, dt_softplus=True, backend="numba")[0]


def reference_loop(x, dt, A, B, C, D, z):
    return reference.selective_scan(x, dt, A, B, C, D, z, dt_softplus=True)[0]


def transformers_loop(x, dt, A, B, C, D, z):
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    x, dt, B, C, z = (v.transpose(1, 2) for v in (x, dt, B, C, z))
    return mamba_selective_scan(x, dt, A, B, C, D, z, delta_softplus=True).transpose(1, 2)


def mambapy(x, dt, A, B, C, D, z):
    from mambapy.pscan import pscan

    dt = torch.nn.functional.softplus(dt)
    h = pscan(torch.exp(dt.unsqueeze(-1) * A), (dt * x).unsqueeze(-1) * B.unsqueeze(2))
    return ((h @ C.unsqueeze(-1)).squeeze(3) + D * x) * torch.nn.functional.silu(z)


def forward(f, args):
    def run():
        with torch.no_grad():
            f(*args)

    return run


def both(f, args, dy):
    return lambda: torch.autograd.grad(f(*args), args, dy)


def main():
    quiet()
    report = Report("cpu_scan")
    rate, bandwidth = report.roofline()
    elements, moved = b * t * d * n, 4 * b * t * d * 4
    floor = max(elements / rate, moved / bandwidth)
    report.add("floor, forward", f"{floor * 1e3:9.2f} ms: {elements / 1e6:.0f} M exponentials, {moved / 1e6:.0f} MB",
               floor=floor)  # fmt: skip
    args = inputs()
    dy = torch.randn(b, t, d)
    with torch.no_grad():
        want = ours(*args)
        for peer in (transformers_loop, reference_loop, mambapy):
            error = ((peer(*args) - want).norm() / want.norm()).item()
            assert error < 1e-5, f"{peer.__name__} disagrees: {error}"

    fwd = measure({f.__name__: forward(f, args) for f in (ours, transformers_loop, reference_loop, mambapy)}, rounds=9)
    for name, times in fwd.items():
        report.add(f"forward {name}, ms", spread(times), median=median(times), over_floor=median(times) / floor)
    bwd = measure({f.__name__: both(f, args, dy) for f in (ours, mambapy)}, rounds=5)
    for name, times in bwd.items():
        report.add(f"forward + backward {name}, ms", spread(times), median=median(times))
    report.compare("forward vs transformers' torch loop", fwd, "ours", "transformers_loop", "≥ 50")
    report.compare("forward vs our reference loop", fwd, "ours", "reference_loop", "≥ 50")
    report.compare("forward vs mambapy", fwd, "ours", "mambapy", "≥ 10")
    report.compare("forward + backward vs mambapy", bwd, "ours", "mambapy", "≥ 10")
    report.add("forward over the floor", f"{median(fwd['ours']) / floor:8.2f} ×", ratio=median(fwd["ours"]) / floor)
    report.close()


if __name__ == "__main__":
    main()
