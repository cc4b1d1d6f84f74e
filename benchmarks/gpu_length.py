"""Time and memory a token as the text grows, 2K to 1M tokens at a fixed number of them (2^20): linear, or not Mamba.

    python benchmarks/gpu_length.py [--model] [--quick] [--save]
    python benchmarks/plot_length.py                            the picture, from the last saved result

Scan: d = 2048, n = 16, bf16, forward and forward + backward. Mixer: d_model 1024 (whose scan has d = 2048), forward.
--model: mamba-130m, bf16, forward. Attention: FlashAttention through torch, causal, bf16, 16 heads of 64 (d_model
1024), up to the length whose next would take longer than LIMIT seconds.
Memory is what a call takes at its peak above its inputs. The promise: each within 15 % over all lengths.
"""

import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from anymamba import MambaConfig, MambaLM
from anymamba.layers import MambaMixer
from common import median
from gpu_common import GpuReport, event_times, flush, options, rounds_for, verdict
from gpu_scan import inputs, ours

TOKENS = 1 << 20
LENGTHS = [1 << k for k in range(11, 21)]
LIMIT = 3.0
PROMISE = 1.15


def measure(call):
    """Seconds of each call and bytes of memory at its peak above what was there before."""
    call()
    flush()  # its buffer is there from now on
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = event_times(call, 1)
    peak = torch.cuda.max_memory_allocated() - before
    return times if times[0] > 0.5 else event_times(call, rounds_for(times[0], 0.5)), peak


def scan(t):
    arguments = inputs(TOKENS // t, 2048, t, 16, strided=False)
    f = ours(None)  # whatever runs by itself

    @torch.no_grad()
    def forward():
        return f(**arguments)

    return forward


def scan_backward(t):
    leaves = {k: v.requires_grad_() for k, v in inputs(TOKENS // t, 2048, t, 16, strided=False).items()}
    f, wanted, dy = ours(None), list(leaves.values()), torch.randn_like(leaves["x"])
    return lambda: torch.autograd.grad(f(**leaves), wanted, dy)


def mixer(t):
    layer = MambaMixer(MambaConfig(d_model=1024), device="cuda").bfloat16()
    with torch.no_grad():
        layer.dt_proj.bias.uniform_(-6.9, -2.3)
        layer.A_log.copy_(torch.arange(1, 17).log().expand_as(layer.A_log))
        layer.D.fill_(1)
    u = torch.randn(TOKENS // t, t, 1024, device="cuda", dtype=torch.bfloat16)

    @torch.inference_mode()
    def forward():
        return layer(u)[0]

    return forward


def model(t):
    lm = MambaLM(MambaConfig.preset("130m"), device="cuda").bfloat16()
    ids = torch.randint(0, 50277, (TOKENS // t, t), device="cuda")

    @torch.inference_mode()
    def forward():
        return lm(ids, last_only=True).logits

    return forward


def attention(t):
    q, k, v = (torch.randn(TOKENS // t, 16, t, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    @torch.inference_mode()
    def forward():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return forward


def curve(report, name, make, lengths, limit=math.inf):
    """Rows of one curve; {t: ns a token}."""
    found, room = {}, {}
    for t in lengths:
        with report.row(f"{name} t={t}"):
            times, peak = measure(make(t))
            found[t], room[t] = median(times) / TOKENS * 1e9, peak / TOKENS
            text = f"{found[t]:9.2f} ns a token, {room[t]:8.0f} bytes a token"
            report.timed(f"{name} t={t}", times, text, curve=name, t=t, ns=found[t], bytes=room[t])
        if t not in found or found[t] * TOKENS * 2e-9 > limit:
            break
    if limit == math.inf and len(found) == len(lengths):
        for what, values in (("time", found), ("memory", room)):
            growth = max(values.values()) / min(values.values())
            text = f"{growth:9.3f} × from best to worst length {verdict(growth, PROMISE)}"
            report.add(f"{name}: {what} a token", text, ratio=growth, last_over_first=values[t] / values[lengths[0]])
    return found


def main() -> int:
    args = options(__doc__, model={"action": "store_true", "help": "mamba-130m too (half a minute more)"})
    torch.manual_seed(0)
    report = GpuReport("gpu_length")
    lengths = LENGTHS[::3] if args.quick else LENGTHS
    curve(report, "scan", scan, lengths)
    curve(report, "scan, forward + backward", scan_backward, lengths)
    ours_at = curve(report, "mixer", mixer, lengths)
    if args.model:
        curve(report, "mamba-130m", model, lengths[::3])
    flash_at = curve(report, "FlashAttention", attention, lengths, LIMIT)
    slower = [t for t in flash_at if t in ours_at and flash_at[t] > ours_at[t]]
    if slower:
        text = f"{min(slower)} tokens; at {max(flash_at)} by {flash_at[max(flash_at)] / ours_at[max(flash_at)]:.1f} ×"
        report.add("attention alone is slower than the mixer from", text, t=min(slower))
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
