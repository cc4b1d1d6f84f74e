"""What the Triton kernels of the convolution and the norm share: sums of their programs' shares, and launching."""

import contextlib

import torch
import triton
import triton.language as tl


def on(device):
    """Triton launches on torch's current device: this makes it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def dense(*tensors):
    return [v if v is None or v.is_contiguous() else v.contiguous() for v in tensors]


@triton.jit(do_not_specialize=["items"])
def _sum(shares, out, last, items, d, w: tl.constexpr, parts: tl.constexpr):
    k = tl.program_id(1)
    columns = tl.program_id(0) * 16 + tl.arange(0, 16)
    rows = tl.arange(0, 256)
    total = tl.zeros([256, 16], tl.float32)
    for i in range(0, items, 256):
        place = ((i + rows).to(tl.int64)[:, None] * parts + k) * d + columns[None, :]
        total += tl.load(shares + place, mask=(i + rows < items)[:, None] & (columns < d)[None, :], other=0)
    v = tl.sum(total, 0)
    if k < w:
        tl.store(out + columns * w + k, v.to(out.dtype.element_ty), mask=columns < d)
    elif last is not None:
        tl.store(last + columns, v.to(last.dtype.element_ty), mask=columns < d)


def sum_shares(shares, out, last=None):
    """Sums shares (items,parts,d) over items, in order, into out (d,w); part w, if there is `last`, into last (d,)."""
    items, parts, d = shares.shape
    w = out.numel() // d if d else 0
    if d:
        _sum[(triton.cdiv(d, 16), w + (last is not None))](shares, out, last, items, d, w, parts)
