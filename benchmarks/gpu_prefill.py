"""Reading long prompts on one GPU: mamba-130m, bfloat16, random weights.

    python benchmarks/gpu_prefill.py [read position prefix] [--quick] [--save]

read: texts of 4K to 1M tokens through `anymamba.generate.read`: tokens a second of wall clock, ids from the host's
memory, and the peak of memory beyond the weights, which must stay below 2 GiB at any length.
position: a decoded token after 1K and after 1M tokens; the two take turns.
prefix: time to the first token of a prompt of 100,000 tokens and 50 more, read from the first token on (miss) and from
a `PrefixCache` that has read the 100,000 (hit): the checkpoint in memory, on disk, and on disk in a process that has
just started, before and after it has read a few tokens as a warm-up. The prompt is a list of Python numbers.
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS

import numpy as np
import torch

from anymamba.generate import PrefixCache, read
from anymamba.generate.read import chunk_for
from common import median
from decoding import Loop, build, greedy_times, random_ids
from gpu_common import GpuReport, options, release, verdict

PRESET = "130m"
LENGTHS = [1 << k for k in (12, 14, 16, 18, 20)]
SHORT, LONG = 1 << 16, 1 << 20  # of the promise: tokens a second at the second over those at the first
WORKING, STEADY, SPEED, FIRST = 2.0, 1.02, 0.9, 50.0  # GiB, ratio, ratio, ms
POSITIONS = (1 << 10, 1 << 20)
PREFIX, MORE = 100_000, 50
GIB = 2**30


def tokens(model, count, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, count)


def seconds(f):
    """Wall clock until the GPU has done what f asked of it, and what f gave."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = f()
    torch.cuda.synchronize()
    return time.perf_counter() - start, out


# ---- read ------------------------------------------------------------------------------------------------------


def reading(report, model, t, rounds):
    """One line; tokens a second and the peak in GiB."""
    ids = tokens(model, t)
    read(model, ids[: min(t, 2 * SHORT)])  # compiles
    release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = [seconds(lambda: read(model, ids))[0] for _ in range(rounds)]
    peak = (torch.cuda.max_memory_allocated() - before) / GIB
    speed = t / median(times)
    text = f"{speed / 1e6:6.3f} M tokens/s, {peak:6.3f} GiB beyond the weights, {chunk_for(model):,} tokens at a time"
    report.timed(f"read t={t}", times, text, t=t, tokens_per_s=speed, gib=peak)
    return speed, peak


def reads(report, model, quick):
    found = {}
    for t in LENGTHS[: 3 if quick else None]:
        with report.row(f"read t={t}"):
            found[t] = reading(report, model, t, 3 if t >= LONG else 5)
    if found:
        worst = max(peak for _, peak in found.values())
        report.add("read: worst peak", f"{worst:9.3f} GiB {verdict(worst, WORKING)}", gib=worst)
    if SHORT in found and LONG in found:
        ratio = found[LONG][0] / found[SHORT][0]
        met = "met" if ratio >= SPEED else "NOT MET"
        text = f"{ratio:9.3f} × the tokens a second of {SHORT} (target ≥ {SPEED:g}: {met})"
        report.add(f"read: {LONG} tokens", text, ratio=ratio, memory=found[LONG][1] / found[SHORT][1])


# ---- position --------------------------------------------------------------------------------------------------


def position(report, model, quick):
    places = POSITIONS[:1] if quick else POSITIONS
    loops = {t: Loop(model, read(model, tokens(model, t)).state) for t in places}
    times = {t: [] for t in places}
    for _ in range(6):
        for t, loop in loops.items():
            times[t].append(median(greedy_times(loop, random_ids(model, 1), budget=0.0)))
    for t in places:
        report.timed(f"decode at {t}", times[t], f"{1 / median(times[t]):8.0f} tokens/s", t=t)
    if len(places) > 1:
        ratio = median(times[places[1]]) / median(times[places[0]])
        text = f"{ratio:9.4f} × {verdict(max(ratio, 1 / ratio), STEADY)}"
        report.add(f"decode at {places[1]} over {places[0]}", text, ratio=ratio)


# ---- prefix ----------------------------------------------------------------------------------------------------


def prompt(model, seed):
    """The prefix and tokens of this seed behind it, as a server gets them."""
    return [*tokens(model, PREFIX).tolist(), *tokens(model, MORE, seed).tolist()]


def first_token(model, cache, ids):
    """Seconds until the first token of the answer is known to the host, and whether the cache knew the prefix."""
    known = cache.hits

    def first():
        return int(cache.read(ids).logits[0, : model.config.vocab_size].argmax())

    return seconds(first)[0], cache.hits > known


def told(report, key, times, hit, expected=True):
    text = "" if not expected else verdict(median(times) * 1e3, FIRST)
    report.timed(f"first token: {key}", times, text if hit == expected else "WRONG: " + ("a hit" if hit else "a miss"))


def prefix(report, model, quick):
    cache, prompts = PrefixCache(model), [prompt(model, seed) for seed in range(1, 7)]
    read(model, prompts[0][:1000], chunk=cache.every)  # warms this process
    for key, ids, expected in (("miss", prompts[:1], False), ("hit, in memory", prompts[1:], True)):
        results = [first_token(model, cache, each) for each in ids]
        told(report, key, [s for s, _ in results], all(hit for _, hit in results), expected)
    with tempfile.TemporaryDirectory() as folder:
        miss, hit = first_token(model, PrefixCache(model, folder=folder), prompts[0])
        told(report, "miss, and to disk", [miss], hit, False)
        results = [first_token(model, PrefixCache(model, folder=folder), each) for each in prompts[1:]]
        told(report, "hit, on disk", [s for s, _ in results], all(hit for _, hit in results))
        del cache
        release()
        with report.row("first token: fresh process"):
            fresh(report, folder)


def fresh(report, folder):
    """The same in processes that have just started."""
    for key, flag in (("a fresh process's first act", "cold"), ("a fresh process, warmed", "warm")):
        command = [sys.executable, __file__, "--child", flag, "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"the {flag} process failed: {done.stderr.strip().splitlines()[-1]}")
        result = json.loads(done.stdout.splitlines()[-1])
        told(report, f"hit, on disk, {key}", [result["seconds"]], result["hit"])


def child(flag, folder):
    """One hit, printed as JSON."""
    model = build(PRESET)
    cache = PrefixCache(model, folder=folder)
    ids = prompt(model, seed=7)
    if flag == "warm":
        cache.read(ids[-(cache.every // 2) :])
    took, hit = first_token(model, cache, ids)
    print(json.dumps({"seconds": took, "hit": hit}))
    return 0


PARTS = {"read": reads, "position": position, "prefix": prefix}


def main() -> int:
    args = options(__doc__, rows={"nargs": "*", "help": f"some of {', '.join(PARTS)}; all if none"},
                   child={"help": SUPPRESS}, folder={"help": SUPPRESS})  # fmt: skip
    if args.child:
        return child(args.child, args.folder)
    if unknown := set(args.rows) - set(PARTS):
        raise SystemExit(f"no row {', '.join(unknown)}: rows are {', '.join(PARTS)}")
    report, model = GpuReport("gpu_prefill"), build(PRESET)
    for name in args.rows or PARTS:
        with report.row(name):
            PARTS[name](report, model, args.quick)
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
