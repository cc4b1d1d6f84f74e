"""Time and memory of a forward pass as the text grows, 4K to 64K tokens: linear, or it is not Mamba.

    python benchmarks/cpu_length.py [--save]

A model of 4 layers of width 256, the last position's logits only. Each length runs in a process of its own, so that
the peak memory is that length's; time is the median of 3.
"""

import json
import resource
import subprocess
import sys
import time

import torch

from anymamba import MambaConfig, MambaLM
from common import Report, arguments, median, quiet

LENGTHS = (4096, 8192, 16384, 32768, 65536)


def one(t):
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=256, n_layer=4))
    ids = torch.randint(0, 256, (1, t))
    times = []
    with torch.inference_mode():
        model(ids[:, :64], last_only=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(4):
            start = time.perf_counter()
            model(ids, last_only=True)
            times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": median(times[1:]), "bytes": peak * 1024}))


def main():
    if arguments():
        return one(int(arguments()[0]))
    quiet()
    report = Report("cpu_length")
    report.roofline()
    results = {}
    for t in LENGTHS:
        out = subprocess.run([sys.executable, __file__, str(t)], capture_output=True, text=True, check=True).stdout
        results[t] = r = json.loads(out.splitlines()[-1])
        report.add(f"t = {t}", f"{r['seconds'] / t * 1e6:8.2f} µs a token, {r['bytes'] / t:8.0f} bytes a token", **r)
    first, last = (results[t] for t in (LENGTHS[0], LENGTHS[-1]))
    for key in ("seconds", "bytes"):
        growth = (last[key] / LENGTHS[-1]) / (first[key] / LENGTHS[0])
        report.add(f"{key} a token, 64K over 4K", f"{growth:8.2f} ×   (target ≤ 1.1)", ratio=growth)
    report.close()


if __name__ == "__main__":
    main()
