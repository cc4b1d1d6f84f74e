"""Softmax cross-entropy of rows of logits, in Triton: the loss, and the logits become their own gradient, in place.

Axes: r rows (tokens), v vocabulary.
"""

import contextlib

import torch
import triton
import triton.language as tl

BLOCK = 4096  # logits that a program holds at a time
ALIGNMENT = 64  # the rows of logits begin at multiples of so many entries, so that loads and stores are wide


@triton.jit
def _cross_entropy(logits, labels, losses, v, stride, IGNORE: tl.constexpr, GRADIENT: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride
    columns = tl.arange(0, BLOCK)
    label = tl.load(labels + r)
    if label == IGNORE:
        tl.store(losses + r, 0.0)
        if GRADIENT:
            for start in range(0, stride, BLOCK):
                k = start + columns
                tl.store(row + k, tl.zeros([BLOCK], logits.dtype.element_ty), mask=k < stride)
    else:
        # a label outside the vocabulary reads nothing and makes the loss NaN, which nobody overlooks
        target = tl.load(row + label, mask=(label >= 0) & (label < v), other=float("nan")).to(tl.float32)
        largest = -float("inf")
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, stride, BLOCK):
            k = start + columns
            # masked up to the stride, a multiple of ALIGNMENT, for that keeps the loads wide; then up to v
            x = tl.load(row + k, mask=k < stride, other=0.0).to(tl.float32)
            x = tl.where(k < v, x, -float("inf"))
            before, largest = largest, tl.maximum(largest, tl.max(x, 0))
            sums = sums * tl.exp(before - largest) + tl.exp(x - largest)
        total = tl.sum(sums, 0)
        tl.store(losses + r, tl.log(total) + largest - target)
        if GRADIENT:
            scale = 1.0 / total
            for start in range(0, stride, BLOCK):  # the row is in the L2 cache by now
                k = start + columns
                x = tl.load(row + k, mask=k < stride, other=0.0).to(tl.float32)
                p = tl.exp(tl.where(k < v, x, -float("inf")) - largest) * scale
                p = tl.where(k == label, p - 1.0, p)
                tl.store(row + k, p.to(logits.dtype.element_ty), mask=k < stride)


def empty_logits(rows: int, v: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Room for logits (r,v), its rows aligned as `cross_entropy_` needs them."""
    return torch.empty(rows, -(-v // ALIGNMENT) * ALIGNMENT, dtype=dtype, device=device)[:, :v]


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, ignore: int, gradient: bool) -> torch.Tensor:
    """losses (r,) float32 of logits (r,v) made by `empty_logits`, for labels (r,) int64; 0 where the label is `ignore`.

    With `gradient` the logits are overwritten by the gradient of the sum of losses. A label outside 0 … v-1 gives NaN.
    """
    rows, v = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(logits.stride(0)))
        with torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext():
            _cross_entropy[(rows,)](logits, labels, losses, v, logits.stride(0), ignore, gradient, block,
                                    num_warps=8 if block == BLOCK else 4)  # fmt: skip
    return losses
