"""Padded rows ↔ sequences laid end to end. Padding is taken out before the model, so it cannot change anything."""

import torch
from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.ids import WHOLE, as_ids


def pack(x: Tensor, lengths: Tensor, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """x (b,t,m) with `lengths` (b,) real entries a row → packed (1,total,m), cu_seqlens (b+1,), index (total,).

    Raises AnymambaError for lengths that do not fit or an unknown side.
    """
    b, t, m = x.shape
    lengths = as_lengths(lengths, b, t, x.device)
    if side not in ("right", "left"):
        raise AnymambaError(f'padding_side={side!r}, but it must be "right" or "left"')
    position = torch.arange(t, device=x.device)
    real = position < lengths[:, None] if side == "right" else position >= t - lengths[:, None]
    index = real.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.zeros(b + 1, dtype=torch.int64, device=x.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    return x.reshape(b * t, m).index_select(0, index)[None], cu_seqlens, index


def unpack(x: Tensor, index: Tensor, b: int, t: int) -> Tensor:
    """The inverse of `pack`: (1,total,m) → (b,t,m), zeros where there was padding."""
    out = x.new_zeros(b * t, x.shape[-1])
    return out.index_copy(0, index, x[0]).view(b, t, x.shape[-1])


def as_lengths(lengths: Tensor, b: int, t: int, device: torch.device) -> Tensor:
    """`lengths` as a tensor on `device`. Raises AnymambaError if they are not b integers from 0 to t."""
    lengths = as_ids(lengths, "lengths").to(device)
    if lengths.shape != (b,) or lengths.dtype not in WHOLE or bool(((lengths < 0) | (lengths > t)).any()):
        raise AnymambaError(f"lengths are {lengths.tolist()}, but must be {b} integers from 0 to {t}, one a row")
    return lengths


def as_offsets(cu_seqlens: Tensor, b: int) -> Tensor:
    """`cu_seqlens` as a tensor. Raises AnymambaError if it is no vector of integers, or for b rows; what the integers
    are is seen where the sequences are read."""
    cu_seqlens = as_ids(cu_seqlens, "cu_seqlens")
    if b != 1:
        raise AnymambaError(f"cu_seqlens with a batch of {b}, but then the sequences lie end to end in one row")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in WHOLE:
        got = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise AnymambaError(f"cu_seqlens is {got}, but must be at least 2 integers: 0 and the sequences' ends")
    return cu_seqlens
