"""Whole models on the GPU: a training step of mamba-130m, and reading a prompt with 130m and 2.8b. Random weights.

    python benchmarks/gpu_model.py                          all rows
    python benchmarks/gpu_model.py train-130m --profile     one row, and its kernels by their time

train-130m: 8×2048 tokens, bf16 autocast, float32 parameters, fused AdamW, loss from labels; tokens a second of a step
as Python issues it and of the same step as a CUDA graph, and the peak of memory.
prefill-130m, prefill-2.8b: 8×2048 tokens, bf16 weights, logits of the last token only (`last_only`), as when a prompt
is read; as Python issues it and as a CUDA graph.
Earlier, measured on one NVIDIA H200: mamba-ssm 167K, 936K, 72K tokens a second, and 29.7 GiB for the training step.
"""

import torch

from anymamba import MambaConfig, MambaLM
from common import median
from gpu_block import profile
from gpu_common import GpuReport, eager_times, graph_times, options

TOKENS = (8, 2048)
GIB = 2**30
# tokens a second: mamba-ssm's as measured earlier, our target
SPEED = {"train-130m": (167e3, 310e3), "prefill-130m": (936e3, 1.25e6), "prefill-2.8b": (72e3, 85e3)}
PEAK = 15.0  # GiB of the training step


def ids():
    return torch.randint(0, 50277, TOKENS, device="cuda")


def training_step(capturable=False):
    """A function that makes one step, and the model that it changes."""
    model = MambaLM(MambaConfig.preset("130m"), device="cuda")
    optimizer = torch.optim.AdamW(model.param_groups(0.1), lr=1e-4, fused=True, capturable=capturable)
    text = torch.randint(0, 50277, (TOKENS[0], TOKENS[1] + 1), device="cuda")
    inputs, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=not capturable):
            loss = model(inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def speed(report, key, name, times):
    """One line: tokens a second against mamba-ssm's and the target."""
    rate = TOKENS[0] * TOKENS[1] / median(times)
    earlier, target = SPEED[name]
    met = "met" if rate >= target else "NOT MET"
    text = f"{rate / 1e3:8.1f}K tokens/s, {rate / earlier:4.2f}× mamba-ssm as measured earlier "
    text += f"(target ≥ {target / 1e3:g}K: {met})"
    report.timed(key, times, text, tokens_per_s=rate, of_earlier=rate / earlier, target=target)


def train(report, name, args):
    step = training_step()
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    losses = [step() for _ in range(3)]
    peak = torch.cuda.max_memory_allocated() / GIB
    assert all(loss.isfinite() for loss in losses), "the loss is not finite"
    speed(report, f"{name} eager", name, eager_times(step, 2.0))
    met = "met" if peak <= PEAK else "NOT MET"
    report.add(f"{name} peak", f"{peak:9.2f} GiB (target ≤ {PEAK:g}: {met}; mamba-ssm 29.7)", gib=peak)
    if args.profile:
        profile(step, 40)
    del step, losses
    with report.row(f"{name} graph"):
        speed(report, f"{name} graph", name, graph_times(training_step(capturable=True), 2.0))


def prefill(report, name, args):
    model = MambaLM(MambaConfig.preset(name.removeprefix("prefill-")), device="cuda").bfloat16().eval()
    text = ids()

    @torch.inference_mode()
    def read():
        return model(text, last_only=True).logits

    assert read().isfinite().all(), "the logits are not finite"
    torch.cuda.reset_peak_memory_stats()
    speed(report, f"{name} eager", name, eager_times(read, 1.0))
    peak = torch.cuda.max_memory_allocated() / GIB
    report.add(f"{name} peak", f"{peak:9.2f} GiB, weights among them", gib=peak)
    if args.profile:
        profile(read, 40)
    speed(report, f"{name} graph", name, graph_times(read, 1.0))


def main() -> int:
    args = options(__doc__, rows={"nargs": "*", "help": f"some of {', '.join(SPEED)}; all if none"},
                   profile={"action": "store_true", "help": "print the kernels by their time"})  # fmt: skip
    rows = args.rows or (list(SPEED)[:2] if args.quick else list(SPEED))
    if unknown := set(rows) - set(SPEED):
        raise SystemExit(f"no row {', '.join(unknown)}: rows are {', '.join(SPEED)}")
    torch.manual_seed(0)
    report = GpuReport("gpu_model")
    for name in rows:
        with report.row(name):
            (train if name.startswith("train") else prefill)(report, name, args)
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
