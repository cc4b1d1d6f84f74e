"""Both directions: each position hears what was before it and what comes after it.

Axes: b batch, t time, m d_model, s sequences.
"""

import torch
from torch import Tensor, nn

from anymamba.errors import AnymambaError
from anymamba.ids import as_tensor
from anymamba.layers.irregular import check_gaps
from anymamba.padding import as_offsets, pack, unpack
from anymamba.registration import bounds

MERGES = ("sum", "concat")


class Bidirectional(nn.Module):
    """One mixer from the start to the end, another from the end to the start (as in arXiv 2401.09417, section 3.3).

    Args:
        causal: a mixer of layers (b,t,m) → (b,t,m) that only looks back, a `MambaMixer` for example.
        anticausal: the one for the other direction; None shares the weights of the first.
        merge: "sum" of both outputs (b,t,m), or "concat" (b,t,2m), the causal one first.

    With merge="sum" it can take the place of a Block's mixer. There is no state: what comes later would change it, and
    a MambaLM that holds one gives none, takes none and does not generate. Raises AnymambaError for an unknown merge.
    """

    keeps_state = False

    def __init__(self, causal: nn.Module, anticausal: nn.Module | None = None, merge: str = "sum"):
        super().__init__()
        if merge not in MERGES:
            raise AnymambaError(f"merge={merge!r} does not exist: choose one of {', '.join(MERGES)}")
        self.causal, self.anticausal, self.merge = causal, anticausal, merge

    def forward(self, u: Tensor, state: None = None, cu_seqlens: Tensor | None = None,
                return_states: None = None, delta: Tensor | None = None, *,
                lengths: Tensor | None = None) -> tuple[Tensor, None]:  # fmt: skip
        """u (b,t,m) → y (b,t,m or 2m), and None where other mixers give their state.

        Args:
            cu_seqlens: (s+1,) offsets of s sequences laid end to end in one row; each is reversed on its own.
            delta: (b,t) gaps in time as `MambaMixer` takes them; backwards, the gap before a sample is the one that
                comes after it forwards, and the first sample's gap is the last one's.
            lengths: (b,) samples of each row; the others, on the right, are padding, and y is 0 there.

        Raises AnymambaError if a state is given or asked for, or lengths and cu_seqlens both, and for any of them that
        does not fit.
        """
        if state is not None or return_states is not None:
            raise AnymambaError("a bidirectional layer has no state to go on from: give it whole sequences")
        if u.dim() != 3 or not u.is_floating_point():
            raise AnymambaError(f"u is {tuple(u.shape)} {u.dtype}, but must be real numbers (batch, seqlen, d_model)")
        if lengths is not None and cu_seqlens is not None:
            raise AnymambaError("give lengths (padded rows) or cu_seqlens (rows end to end), not both")
        if cu_seqlens is not None:
            cu_seqlens = as_offsets(cu_seqlens, u.shape[0])
            cu_seqlens = cu_seqlens if torch.compiler.is_compiling() else bounds(cu_seqlens, u, None)
        if delta is not None:
            delta = as_tensor(delta, "delta").to(u.device)
            check_gaps(delta, u.shape[:2])
        if lengths is None:
            return self._both(u, cu_seqlens, delta), None
        packed, cu_seqlens, index = pack(u, lengths, "right")
        delta = None if delta is None else delta.reshape(1, -1).index_select(1, index)
        return unpack(self._both(packed, cu_seqlens, delta), index, *u.shape[:2]), None

    def _both(self, u, cu_seqlens, delta):
        mirror, shifted = _mirrors(u, cu_seqlens)
        gaps, back = ({}, {}) if delta is None else ({"delta": delta}, {"delta": delta.index_select(1, shifted)})
        ahead, _ = self.causal(u, None, cu_seqlens, None, **gaps)
        anticausal = self.causal if self.anticausal is None else self.anticausal
        behind, _ = anticausal(u.index_select(1, mirror), None, cu_seqlens, None, **back)
        behind = behind.index_select(1, mirror)
        return ahead + behind if self.merge == "sum" else torch.cat([ahead, behind], -1)

    @property
    def config(self):
        """That of the causal mixer."""
        return self.causal.config

    def flops_per_token(self) -> int:
        """Of both directions; see `MambaLM.flops_per_token`."""
        other = self.causal if self.anticausal is None else self.anticausal
        return self.causal.flops_per_token() + other.flops_per_token()

    def extra_repr(self) -> str:
        return f"merge={self.merge!r}, shared={self.anticausal is None}"


def _mirrors(u, cu_seqlens):
    """Where each place of a reversed sequence was (t,), and where its gap was: between i+1 and i is the gap of i+1."""
    place = torch.arange(u.shape[1], device=u.device)
    if cu_seqlens is None:
        first, last = torch.zeros_like(place), torch.full_like(place, u.shape[1] - 1)
    else:
        ends = cu_seqlens.to(u.device, torch.int64)
        sequence = torch.searchsorted(ends, place, right=True) - 1
        first, last = ends[sequence], ends[sequence + 1] - 1
    mirror = first + last - place
    return mirror, torch.where(place == first, first, mirror + 1)
