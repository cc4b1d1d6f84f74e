"""Decoding on the GPU: tokens a second of one step for every row after another, bfloat16, random weights.

    python benchmarks/gpu_decode.py [2.8b 1.4b 130m accuracy] [--quick] [--save]

Speed: 128 greedy tokens in a loop without synchronisation, the graph's launch and Python included. A state costs the
same wherever it stands and whatever it holds, so each row starts from 64 random tokens and not from a long prompt.
The floor is what must be moved, all weights once and the states read and written, at the bandwidth of a copy measured
in the same run. "state bf16": the scan's states are kept in bfloat16 between tokens, which halves their bytes.
Error: the largest difference of the logits from those of the model's own forward pass, in units of their rms.
Accuracy: the small model that comes with the package reads a real text, byte by byte through the decoder, with states
and weights of several types; against float32 in both: mean KL divergence and bits a byte.
Earlier, measured on one NVIDIA H200 after a prompt of 2048 tokens: mamba-ssm 2.3.2 with its CUDA graphs.
"""

import math
from pathlib import Path

import torch

import anymamba
from anymamba import MambaLM, MambaState
from decoding import DEVICE, Loop, build, greedy_times, logits_error, random_ids, rate, state_of, step_bytes
from gpu_common import GpuReport, options
from real_text import real_text

# tokens a second: mamba-ssm's as measured earlier, our target where there is one
SPEED = {
    "2.8b": {1: (306, 580), 16: (4443, 8700), 64: (13590, 29000), 128: (21870, 47000)},
    "1.4b": {1: (475, None), 16: (6825, None), 64: (21670, None), 128: (35280, None)},
    "130m": {1: (1360, 3500), 16: (21460, None), 64: (74400, None), 128: (127600, 300000)},
}
BATCHES = {"2.8b": (1, 16, 64, 128), "1.4b": (1, 128), "130m": (1, 16, 64, 128)}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LIMIT = 0.05  # of the error: bfloat16 in another order, not another function
READ = (8, 1024)  # rows and bytes of the text


def key_of(preset, b, state_dtype):
    return f"{preset} b={b}, state {NAMES[state_dtype]}"


def kept(loop, state_dtype):
    return "" if loop.kept == state_dtype else f", WRONG: states are kept in {NAMES[loop.kept]}"


def speed(report, preset, model, b, state_dtype):
    """One line: tokens a second of b rows against the floor, mamba-ssm and the target."""
    loop = Loop(model, state_of(model, b), state_dtype)
    error = logits_error(model, loop)
    times = greedy_times(loop, random_ids(model, b))
    floor = step_bytes(model, b, state_dtype) / report.bandwidth
    here, (earlier, target) = rate(times, b), SPEED[preset][b]
    text = f"{here:9,.0f} tokens/s, {floor * 1e3:.3f} ms floor, {b / here / floor:4.2f} × floor, "
    text += f"{here / earlier:4.2f} × mamba-ssm's {earlier:,}"
    if target is not None:
        text += f" (target ≥ {target:,}: {'met' if here >= target else 'NOT MET'})"
    text += f", error {error:.3f}{'' if error <= LIMIT else ' WRONG'}{kept(loop, state_dtype)}"
    report.timed(key_of(preset, b, state_dtype), times, text, model=preset, batch=b, state=NAMES[state_dtype],
                 tokens_per_s=here, floor=floor, earlier=earlier, target=target, error=error)  # fmt: skip


def speeds(report, preset, batches):
    model = build(preset)
    for b in batches:
        for state_dtype in (torch.float32, torch.bfloat16) if b >= 64 else (torch.float32,):
            with report.row(key_of(preset, b, state_dtype)):
                speed(report, preset, model, b, state_dtype)


@torch.no_grad()
def accuracy(report):
    """A line for each type of weights and of states."""
    folder = Path(anymamba.__file__).parent / "models" / "books"
    rows, length = READ
    text, source = real_text(rows * (length + 1))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).view(rows, -1).long().to(DEVICE)
    loops = {}
    for weights in (torch.float32, torch.bfloat16):
        model = MambaLM.from_pretrained(folder, device=DEVICE, dtype=weights).eval()
        start = MambaState.zeros(model.config, rows, device=DEVICE, dtype=weights)
        for state_dtype in NAMES:
            loops[weights, state_dtype] = Loop(model, start, state_dtype)
    sums = {key: torch.zeros(2, dtype=torch.float64, device=DEVICE) for key in loops}
    for now, following in zip(ids[:, :-1].unbind(1), ids[:, 1:].unbind(1), strict=True):
        exact = None
        for key, loop in loops.items():
            log_p = loop.step(now)[:, : model.config.vocab_size].double().log_softmax(-1)  # KL is small
            exact = log_p if exact is None else exact  # the first: all float32
            kl = (exact.exp() * (exact - log_p)).sum(-1).mean()
            sums[key] += torch.stack([kl, -log_p.gather(-1, following[:, None]).mean() / math.log(2)])
    first = None
    for (weights, state), total in sums.items():
        kl, bits = (total / length).tolist()
        first = bits if first is None else first
        text = f"{bits:.5f} bits a byte ({bits - first:+.5f}), KL {kl:.2e} nats; {rows * length:,} bytes of {source}"
        text += kept(loops[weights, state], state)
        report.add(f"weights {NAMES[weights]}, state {NAMES[state]}", text, kl=kl, bits=bits, more=bits - first)


def main() -> int:
    known = [*BATCHES, "accuracy"]
    args = options(__doc__, rows={"nargs": "*", "help": f"some of {', '.join(known)}; all if none"})
    rows = args.rows or (["130m", "accuracy"] if args.quick else known)
    if unknown := set(rows) - set(known):
        raise SystemExit(f"no row {', '.join(unknown)}: rows are {', '.join(known)}")
    report = GpuReport("gpu_decode")
    for name in rows:
        with report.row(name):
            if name == "accuracy":
                accuracy(report)
            else:
                speeds(report, name, BATCHES[name][:1] if args.quick else BATCHES[name])
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
