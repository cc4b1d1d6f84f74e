"""What the processor can do: the roofline that every CPU benchmark begins with."""

from collections.abc import Callable

import numpy as np
import torch
from numba import njit

from anymamba.kernels import LANES
from anymamba.kernels import numba_launch as launch
from anymamba.kernels.numba_launch import F32, address, next_item, pointer
from anymamba.kernels.numba_math import exp2
from anymamba.kernels.numba_simd import hsum, keep_apart, load, splat, store
from common import measure

ZERO = np.float32(0)
STRETCH = 1 << 14  # numbers that a thread reads in a row


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


@njit
def _sum(x, start, count):
    keep_apart()
    a, b, c, d = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    for i in range(start, start + count, 4 * LANES):
        a, b = a + load(x, i, LANES), b + load(x, i + LANES, LANES)
        c, d = c + load(x, i + 2 * LANES, LANES), d + load(x, i + 3 * LANES, LANES)
    return hsum((a + b) + (c + d))


@launch.Kernel
def sums(_):
    def kernel(p):
        x, y = pointer(p[2], F32), pointer(p[3], F32)
        item = next_item(p)
        while item < p[1]:
            y[item] = _sum(x, item * STRETCH, STRETCH)
            item = next_item(p)

    return kernel


def reading(items: int = 4096) -> tuple[Callable, int]:
    """A function that reads memory as fast as all threads can, larger than any cache, and how many bytes it reads."""
    x, y = torch.ones(items * STRETCH), torch.empty(items)
    return lambda: launch.launch(sums, None, items, [*map(address, (x, y))]), 4 * x.numel()


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
