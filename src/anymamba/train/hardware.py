"""Where and how finely a run computes: the device, and fp32 or bf16, whichever is faster for this model here."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from anymamba.errors import AnymambaError
from anymamba.ops import explain

WORTH = 0.9  # bf16 rounds coarsely: it must take at most this share of the time of fp32


def choose_device(wish: str) -> torch.device:
    """`wish`, or for auto a GPU if there are kernels for it, else the CPU. Raises AnymambaError if it is not there."""
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() and explain("cuda")[0] != "reference" else "cpu"
    try:
        device = torch.device(wish)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AnymambaError(f"device={wish!r} cannot be used here ({error}): use cpu, or auto") from None
    return device


def choose_precision(wish: str, device: torch.device, forward_backward: Callable[[str], None]) -> tuple[str, str]:
    """("fp32" or "bf16", reason). `forward_backward(precision)` makes one pass of the real size and changes no weight.

    Raises AnymambaError for bf16 on a GPU that has none.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        if wish == "bf16":
            raise AnymambaError("precision=bf16, but this GPU has no bfloat16: use fp32 or auto")
        return "fp32", "this GPU has no bfloat16"
    if wish != "auto":
        return wish, "as asked"
    if device.type == "cuda":
        return "bf16", "a GPU is faster in it"
    seconds = {name: _fastest(forward_backward, name) for name in ("fp32", "bf16")}
    choice = "bf16" if seconds["bf16"] <= WORTH * seconds["fp32"] else "fp32"
    return choice, f"a pass takes {1000 * seconds['fp32']:.0f} ms in fp32 and {1000 * seconds['bf16']:.0f} ms in bf16"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which matrices are multiplied in bfloat16, or not."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def random_numbers(seed: int, index: int, device: torch.device) -> Iterator[None]:
    """Random numbers (of dropout) that are a function of (seed, index), like batches, so that runs can be resumed."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed << 32) + index)
        yield


def to_device(v: torch.Tensor, device: torch.device) -> torch.Tensor:
    """v on the device; to a GPU from pinned memory, so that nobody waits."""
    return v.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else v.to(device)


def _fastest(forward_backward, name: str, repeats: int = 3) -> float:
    """Seconds of the fastest pass, after one that compiles and warms up."""
    taken = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        forward_backward(name)
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])
