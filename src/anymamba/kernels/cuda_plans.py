"""How the CUDA scan spreads a problem over a GPU: from the shape alone, so that results do not depend on its mood."""

import functools


def padded(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def chunk_length(n: int) -> int:
    """Steps between the states that are saved for backward: at most 8 bytes a channel and step."""
    return 16 if n <= 16 else 32


def saved_shape(x_shape, A_shape, groups, sequences):
    """Shape of the saved states: one every `chunk_length` steps of each sequence."""
    d, n = A_shape
    return x_shape[0] * x_shape[1] // chunk_length(n) + sequences + 1, d, padded(n)


# Milliseconds that 2048 steps took with 1, 2, … blocks on each multiprocessor of an H200, measured as in
# benchmarks/gpu_plans.py, for each number K of states a lane: many cost less, few spread a small problem wider.
FORWARD = {4: (0.149, 0.179, 0.216, 0.268), 8: (0.241, 0.294, 0.373, 0.469), 2: (0.091, 0.107, 0.13, 0.159)}
FORWARD_WIDE = {16: (0.305, 0.411, 0.566, 0.738), 8: (0.249, 0.295, 0.349, 0.437, 0.542, 0.672)}  # d_state over 32
# Backward, for (threads of a block, KEEP).
BACKWARD = {(128, 0): (0.395, 0.522, 0.672), (256, 0): (0.473,), (128, 1): (0.363, 0.489)}
BACKWARD_WIDE = {(256, 1): (0.86,), (128, 1): (0.647, 0.929)}
MULTIPROCESSORS = 132


def _cost(blocks, times):
    """Of that many blocks in waves that fill the chip, and a rest."""
    full, rest = divmod(blocks, MULTIPROCESSORS * len(times))
    return full * times[-1] + (times[-(-rest // MULTIPROCESSORS) - 1] if rest else 0)


def forward_layout(n: int, K: int, blocks: int) -> dict:
    """How states are spread: K a lane, L lanes a channel, tiles of CB channels and T steps, BLOCKS a multiprocessor."""
    L = padded(n) // K
    return {"K": K, "L": L, "CB": 128 // L, "T": 32 if K == 2 else 16, "BLOCKS": blocks}


def backward_layout(n: int, threads: int, keep: int, blocks: int) -> dict:
    """As `forward_layout`; KEEP: whether the walk back finds the decays of the walk forward in registers."""
    K = min(4 if n <= 32 else 8, padded(n))
    L = padded(n) // K
    return {"K": K, "L": L, "CB": threads // L, "T": 16 if K <= 4 else 8, "BLOCKS": blocks, "KEEP": keep}


@functools.lru_cache(1024)
def forward_plan(sequences: int, t: int, d: int, n: int, whole: bool = False) -> tuple[int, dict]:
    """Into how many pieces time is cut, and a `forward_layout`. `whole`: time must not be cut."""
    best = float("inf"), 1, forward_layout(n, 1, 4)  # the only one for a single state
    for K, times in (FORWARD if n <= 32 else FORWARD_WIDE).items():
        if K > padded(n) or padded(n) // K > 16:
            continue
        layout = forward_layout(n, K, len(times))
        for pieces in _pieces(t, whole):
            cost = _cost(-(-d // layout["CB"]) * sequences * pieces, times) / pieces
            cost = cost if pieces == 1 else 1.65 * cost + 0.03 * 2048 / t  # a pass that finds the states comes before
            if cost < 0.98 * best[0]:
                best = cost, pieces, layout
    return best[1:]


@functools.lru_cache(1024)
def backward_plan(sequences: int, t: int, d: int, n: int, whole: bool = False) -> tuple[int, dict]:
    """As `forward_plan`, with a `backward_layout`."""
    best = float("inf"), 1, None
    for (threads, keep), times in (BACKWARD if n <= 32 else BACKWARD_WIDE).items():
        layout = backward_layout(n, threads, keep, len(times))
        for pieces in _pieces(t, whole):
            cost = _cost(-(-d // layout["CB"]) * sequences * pieces, times) / pieces
            cost = cost if pieces == 1 else cost + 0.12 * sequences * d * layout["L"] / 65_536 + 0.04 * 2048 / t
            if cost < 0.98 * best[0]:
                best = cost, pieces, layout
    return best[1:]


def _pieces(t, whole):
    return (1,) if whole else range(1, max(1, min(64, t // 256)) + 1)


def pieces_of(t, pieces):
    """(pieces, steps of each): whole chunks of saved states, so perhaps fewer pieces than asked for."""
    if pieces == 1:
        return 1, t
    step = -(-t // (32 * pieces)) * 32
    return -(-t // step), step
