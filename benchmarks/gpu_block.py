"""One Mamba layer on the GPU: 8×2048 tokens, bf16 autocast, float32 parameters; forward, forward + backward.

    python benchmarks/gpu_block.py [--widths 768 1024 2560] [--profile] [--quick] [--save]

`mixer` is what mamba_ssm.Mamba is; `block` adds the residual stream and its norm. Times are of CUDA-graph replays;
`eager` is wall-clock time a call as Python issues it, and beside it the time that issuing alone takes.
EARLIER: mamba_ssm.Mamba 2.3.2 (its fused inner function), measured in the same way on one NVIDIA H200.
--profile prints, in place of the eager rows, the kernels of one forward + backward of the mixer by their time.
"""

import time

import torch

from anymamba.config import MambaConfig
from anymamba.layers import Block, MambaMixer
from common import median
from gpu_common import GpuReport, graph_times, options, verdict

TOKENS = (8, 2048)
EARLIER = {768: (0.703, 3.01), 1024: (0.984, 4.10), 2560: (3.46, 13.2)}  # ms: forward, forward + backward
TARGET = {768: 1.75, 1024: 2.5, 2560: 9.8}  # ms of forward + backward of the mixer
MATMUL = 790e12  # operations a second of the floor


def floor(config, rate):
    """Seconds: matrix products at MATMUL and exponentials, forward and with backward."""
    c, tokens = config, TOKENS[0] * TOKENS[1]
    d, m = c.d_inner, c.d_model
    matrices = m * 2 * d + d * (c.rank + 2 * c.d_state) + c.rank * d + d * m
    products, exponentials = 2 * tokens * matrices / MATMUL, tokens * d * c.d_state / rate
    return products + exponentials, 3 * products + 2 * exponentials


def autocast():
    # a captured call must not find weights that an earlier one has cast
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)


def calls(layer, x, residual):
    """Functions that run forward, and forward + backward to the inputs and every parameter."""
    inputs = [v for v in (x, residual) if v is not None]
    wanted = [*(v.requires_grad_() for v in inputs), *layer.parameters()]

    def run():
        with autocast():
            if residual is None:
                return [layer(x)[0]]
            return list(layer(x, residual, None, None)[:2])

    def forward():
        with torch.no_grad():
            return run()

    cotangents = [torch.randn_like(v) for v in forward()]

    def both():
        return torch.autograd.grad(run(), wanted, cotangents)

    return forward, both


def layers(width):
    """name: (forward, forward + backward)"""
    config = MambaConfig(d_model=width)
    x = torch.randn(*TOKENS, width, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(*TOKENS, width, device="cuda")
    for name, kind, stream in (("mixer", MambaMixer, None), ("block", Block, residual)):
        layer = kind(config, device="cuda")
        with torch.no_grad():  # steps of 0.001 … 0.1, as a model begins with
            mixer = getattr(layer, "mixer", layer)
            mixer.dt_proj.bias.uniform_(-6.9, -2.3)
            mixer.A_log.copy_(torch.arange(1, config.d_state + 1).log().expand_as(mixer.A_log))
            mixer.D.fill_(1)
        yield name, config, calls(layer, x, stream)


def eager(call, rounds=20):
    """Seconds a call on the wall clock, and of issuing it."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        call()
    issued = time.perf_counter()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / rounds, (issued - start) / rounds


def profile(call, rows=25):
    """Print the kernels of one call by their time on the GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        call()
        torch.cuda.synchronize()
    kernels = [e for e in record.key_averages() if e.device_type == DeviceType.CUDA]
    kernels = [e for e in kernels if not getattr(e, "is_user_annotation", False)]  # spans of others
    kernels.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    for e in kernels[:rows]:
        part = e.self_device_time_total / total
        print(f"    {e.self_device_time_total:9.1f} µs {part:6.1%} {e.count:4}× {e.key[:90]}")
    print(f"    {total:9.1f} µs in {sum(e.count for e in kernels)} kernels", flush=True)


def row(report, name, width, config, both, args):
    names = ("fwd", "fwd+bwd")
    for i, (what, call) in enumerate(zip(names, both, strict=True)):
        times = graph_times(call, 0.2)
        ms, low = median(times) * 1e3, floor(config, report.exponentials)[i] * 1e3
        peer = EARLIER.get(width, (None, None))[i] if name == "mixer" else None
        text = f"{ms / low:5.2f}× floor"
        text += f"  {ms / peer:5.2f}× mamba_ssm.Mamba as measured earlier" if peer else ""
        text += f" {verdict(ms, TARGET[width])}" if peer and i == 1 else ""
        report.timed(f"{name} {width} {what}", times, text, over_floor=ms / low, earlier_ms=peer)
    if args.profile:
        if name == "mixer":
            profile(both[1])
        return
    for what, call in zip(names, both, strict=True):
        wall, issue = (v * 1e3 for v in eager(call))
        text = f"{wall:9.4f} ms a call, {issue:.4f} ms to issue it"
        report.add(f"{name} {width} {what} eager", text, ms=wall, issue_ms=issue)


def main() -> int:
    args = options(__doc__, widths={"nargs": "+", "type": int, "default": [768, 1024, 2560]},
                   profile={"action": "store_true", "help": "print the kernels by their time"})  # fmt: skip
    torch.manual_seed(0)
    report = GpuReport("gpu_block")
    for width in args.widths[:1] if args.quick else args.widths:
        with report.row(f"width {width}"):
            for name, config, both in layers(width):
                row(report, name, width, config, both, args)
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
