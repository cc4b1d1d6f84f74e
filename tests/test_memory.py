"""Memory of the scan: O(b·t·d), never (b,t,d,n). Measured in a process of its own, whose peak the kernel records."""

import os

import pytest

from conftest import run_python

CLEAR_REFS = "/proc/self/clear_refs"  # writing 5 there restarts the record of the peak (Linux)
MEASURE = """
import torch
from anymamba import selective_scan

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

def extra_peak(t, d=1536, n=16):
    shapes = [(1, t, d), (1, t, d), (d, n), (1, t, n), (1, t, n), (d,), (1, t, d)]
    arguments = [(-torch.rand(*shape)).requires_grad_() for shape in shapes]
    dy = torch.randn(1, t, d)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    y, state = selective_scan(*arguments, dt_softplus=True)
    y.backward(dy)
    return (status("VmHWM") - before) / (4 * t * d)

extra_peak(64)  # compiles
print(*(extra_peak(t) for t in (2048, 4096, 8192)))
"""


@pytest.mark.skipif(
    not os.access(CLEAR_REFS, os.W_OK), reason="the system does not record a peak that can be restarted"
)
def test_extra_memory_of_the_scan():
    """In units of x's bytes: y and the gradients of x, dt and z are 4; saved states and the rest at most 2 more."""
    done = run_python(MEASURE, MALLOC_MMAP_THRESHOLD_="65536")  # freed tensors go back to the system at once
    assert done.returncode == 0, done.stderr
    short, middle, long = (float(v) for v in done.stdout.split())
    assert middle <= 6
    assert 4 <= long <= 6  # the outputs themselves: less would mean that nothing was measured
    assert long <= 1.1 * middle <= 1.1 * 1.1 * short
