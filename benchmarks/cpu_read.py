"""A text of a million tokens through a small model on the CPU: constant memory, linear time.

    python benchmarks/cpu_read.py [--save]

Preset "tiny" (0.5 M parameters, random weights), bytes of a real text mapped from a file, `anymamba.generate.read`.
Each length runs in a process of its own, with one thread; what it takes at its peak beyond what it had before, and the
time: of the processor, which does not count what else the machine does, and by the clock.
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
from common import Report, arguments, quiet
from real_text import real_text

LENGTHS = (10_000, 100_000, 1_000_000)
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
    before, start, busy = status("RssAnon"), time.perf_counter(), time.process_time()
    out = read(model, ids)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    assert out.logits.isfinite().all(), "the logits are not finite"
    peak = status("VmHWM") - status("RssFile") - before  # the text itself is the file's, not ours
    print(json.dumps({"seconds": seconds, "processor_seconds": busy, "bytes": peak}))


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
        # large blocks go back to the system at once, so that what is held is what is needed
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        found = {}
        for t in LENGTHS:
            command = [sys.executable, __file__, str(path), str(t)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            found[t] = r = json.loads(done.stdout.splitlines()[-1])
            rate = t / r["processor_seconds"]
            line = f"{rate:9,.0f} tokens/s of processor time ({t / r['seconds']:,.0f} by the clock), "
            line += f"{r['bytes'] / 2**20:7.1f} MiB beyond the start; {source}"
            report.add(f"read t={t}", line, t=t, tokens_per_s=rate, **r)
    first, last = (found[t] for t in LENGTHS[-2:])
    for what, key, share in (("memory", "bytes", 1), ("time a token", "processor_seconds", LENGTHS[-2] / LENGTHS[-1])):
        growth = last[key] / first[key] * share
        met = "met" if growth <= TARGET else "NOT MET"
        report.add(
            f"{what}, {LENGTHS[-1]} over {LENGTHS[-2]}", f"{growth:8.3f} × (target ≤ {TARGET:g}: {met})", ratio=growth
        )
    report.close()


if __name__ == "__main__":
    main()
