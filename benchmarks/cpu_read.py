"""A text of a million tokens through a small model on the CPU: constant memory, linear time.

    python benchmarks/cpu_read.py [--save]

Preset "tiny" (0.5 M parameters, random weights), bytes of a real text mapped from a file, `anymamba.generate.read`.
Each length runs in a process of its own; what it takes at its peak beyond what it had before, and the time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from anymamba import MambaConfig, MambaLM
from anymamba.generate import read
from common import Report, arguments, median, quiet
from real_text import real_text

LENGTHS = (10_000, 100_000, 1_000_000)
ROUNDS = 2  # processes for each length, in turn: the machine's moods hit all of them alike
TARGET = 1.05


def status(key: str) -> int:
    """Bytes, from what Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def one(path: str, t: int) -> None:
    """Read the first t bytes of a file; a line of JSON."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig.preset("tiny"))
    ids = np.memmap(path, dtype=np.uint8, mode="r")[:t]
    read(model, ids[:4000])  # compiles
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = status("RssAnon"), time.perf_counter()
    out = read(model, ids)
    seconds = time.perf_counter() - start
    assert out.logits.isfinite().all(), "the logits are not finite"
    peak = status("VmHWM") - status("RssFile") - before  # the text itself is the file's, not ours
    print(json.dumps({"seconds": seconds, "bytes": peak}))


def main():
    if arguments():
        return one(arguments()[0], int(arguments()[1]))
    quiet()
    report = Report("cpu_read")
    report.roofline()
    text, source = real_text(max(LENGTHS))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        path.write_bytes(text)
        found = {t: [] for t in LENGTHS}
        # large blocks go back to the system at once, so that what is held is what is needed
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        for _ in range(ROUNDS):
            for t in LENGTHS:
                command = [sys.executable, __file__, str(path), str(t)]
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
                found[t].append(json.loads(done.stdout.splitlines()[-1]))
    times, peaks = ({t: median([r[key] for r in rows]) for t, rows in found.items()} for key in ("seconds", "bytes"))
    for t in LENGTHS:
        rate = t / times[t]
        line = f"{times[t]:8.2f} s, {rate:9,.0f} tokens/s, {peaks[t] / 2**20:7.1f} MiB beyond the start; {source}"
        report.add(f"read t={t}", line, t=t, seconds=times[t], tokens_per_s=rate, bytes=peaks[t], runs=found[t])
    short, long = LENGTHS[-2:]
    for what, growth in (("memory", peaks[long] / peaks[short]),
                         ("time a token", times[long] / long / times[short] * short)):  # fmt: skip
        met = "met" if growth <= TARGET else "NOT MET"
        report.add(f"{what}, {long} over {short}", f"{growth:8.3f} × (target ≤ {TARGET:g}: {met})", ratio=growth)
    report.close()


if __name__ == "__main__":
    main()
