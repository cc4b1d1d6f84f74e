"""What the processor can do: the roofline that every CPU benchmark begins with."""

import numpy as np
import torch
from numba import njit

from anymamba.kernels import LANES
from anymamba.kernels import numba_launch as launch
from anymamba.kernels.numba_launch import next_item
from anymamba.kernels.numba_math import exp2
from anymamba.kernels.numba_simd import keep_apart, load, splat, store
from common import measure


@njit
def _exponentials(buffer, count):
    keep_apart()
    for _ in range(count):
        for i in range(0, 512, LANES):
            store(buffer, i, exp2(load(buffer, i, LANES)) - splat(np.float32(1)), LANES)


@launch.Kernel
def exponentials(_):
    def kernel(p):
        buffer = np.zeros(512, np.float32)
        item = next_item(p)
        while item < p[1]:
            _exponentials(buffer, p[2])
            item = next_item(p)

    return kernel


def exponential_rate() -> float:
    """Exponentials a second with all threads, from L1: the compute roof of a scan."""
    items, count = 8 * launch.threads(), 500
    times = measure({"exp": lambda: launch.launch(exponentials, None, items, [count])}, rounds=7)
    return items * count * 512 / min(times["exp"])


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy larger than any cache."""
    x = torch.empty(64 << 20).normal_()
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / min(measure({"copy": lambda: y.copy_(x)}, rounds=5)["copy"])


def read_bandwidth() -> float:
    """Bytes a second of a sum over an array larger than any cache, all threads: what decoding cannot exceed."""
    x = torch.empty(64 << 20).normal_()
    return x.numel() * 4 / min(measure({"read": x.sum}, rounds=9)["read"])
