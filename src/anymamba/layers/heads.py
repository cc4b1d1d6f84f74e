"""Ways in and out of a model of features: patches of a signal, and one vector for a whole sequence.

Axes: b batch, t time, k patches, f features of a sample, m d_model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.errors import AnymambaError
from anymamba.layers.linear import Linear
from anymamba.padding import as_lengths

POOLS = ("last", "mean", "attention")


class Patches(nn.Module):
    """A linear map of windows of `size` samples, one every `stride`: (b,t,f) → (b,k,m) with k = ⌈t/stride⌉.

    Patch i sees the samples before (i+1)·stride, the last `size` of them; what is not there, before the first and after
    the last, is 0. Nothing is lost and nothing is heard early. size = stride = 1 is a plain projection.

    Raises AnymambaError if size < stride, which would skip samples.
    """

    def __init__(self, f: int, m: int, size: int = 1, stride: int = 1, device=None, dtype=None):
        super().__init__()
        if not 1 <= stride <= size:
            raise AnymambaError(f"patches of {size} samples every {stride}, but it must be 1 ≤ stride ≤ size")
        self.size, self.stride = size, stride
        self.projection = Linear(size * f, m, device=device, dtype=dtype)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (b,t,f), `lengths` (b,) samples of each row: the others, on the right, count as 0, whatever they hold.

        Raises AnymambaError for features or lengths that do not fit.
        """
        _check(x, self.projection.in_features // self.size)
        if lengths is not None:
            padding = torch.arange(x.shape[1], device=x.device) >= _lengths(lengths, x)[:, None]
            x = x.masked_fill(padding[..., None], 0)
        if self.size > 1:
            x = F.pad(x, (0, 0, self.size - self.stride, -x.shape[1] % self.stride))
            x = x.unfold(1, self.size, self.stride).flatten(2)  # (b,k,f·size)
        return self.projection(x)

    def count(self, samples):
        """Patches of so many samples, a number or a tensor of them."""
        return (samples + self.stride - 1) // self.stride

    def extra_repr(self) -> str:
        return f"size={self.size}, stride={self.stride}"


class Pool(nn.Module):
    """A sequence (b,t,m) as one vector (b,m): its "last" step, the "mean" of all, or "attention", their mean with
    learned weights softmax(x·q), equal ones at first. NaN for a row of no steps. Raises AnymambaError for others.
    """

    def __init__(self, kind: str, m: int, device=None, dtype=None):
        super().__init__()
        if kind not in POOLS:
            raise AnymambaError(f"pool={kind!r} does not exist: choose one of {', '.join(POOLS)}, or None for "
                                "an output at every step")  # fmt: skip
        self.kind, self.m = kind, m
        if kind == "attention":
            self.query = nn.Parameter(torch.zeros(m, device=device, dtype=dtype))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (b,t,m), `lengths` (b,) steps of each row, the others on the right are padding.

        Raises AnymambaError for vectors or lengths that do not fit.
        """
        _check(x, self.m)
        b, t, _ = x.shape
        lengths = torch.full((b,), t, device=x.device) if lengths is None else _lengths(lengths, x)
        if self.kind == "last":
            rows = x[torch.arange(b, device=x.device), (lengths - 1).clamp(min=0)]
            return rows.masked_fill((lengths == 0)[:, None], torch.nan)
        padding = torch.arange(t, device=x.device) >= lengths[:, None]
        x, dtype = x.masked_fill(padding[..., None], 0), x.dtype
        score = x.new_zeros(b, t) if self.kind == "mean" else x @ self.query.to(dtype)
        # at least float32, and no matrix product, which autocast would lower: 16 bits do not hold sums over long times
        score = score.to(torch.promote_types(dtype, torch.float32))
        weights = score.masked_fill(padding, -torch.inf).softmax(1)
        return (weights[..., None] * x).sum(1).to(dtype)

    def extra_repr(self) -> str:
        return repr(self.kind)


def _check(x, f):
    if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != f or not x.is_floating_point():
        raise AnymambaError(f"x is {tuple(x.shape)} {x.dtype}, but must be real numbers (batch, seqlen ≥ 1, {f})")


def _lengths(lengths, x):
    """Checked, except on a GPU, where looking would stop it."""
    seen = isinstance(lengths, Tensor) and lengths.device.type != "cpu"
    return lengths if seen else as_lengths(lengths, *x.shape[:2], x.device)
