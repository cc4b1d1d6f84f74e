"""What mixers share that know only how to read rows of one length.

Axes: b batch, t time, m d_model, d d_inner, w conv_width, n state_width, s sequences, p places.
"""

import torch
from torch import Tensor, nn

from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.layers.irregular import check_gaps
from anymamba.padding import as_offsets, unpack
from anymamba.registration import check_bounds
from anymamba.state import LayerState, places

WASTE = 4  # times the tokens that there are, padding included, are read at once at most


class SequenceMixer(nn.Module):
    """Mixes along time: (b,t,m) → (b,t,m), by `read`, which a subclass has."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config

    def read(self, u: Tensor, state: LayerState, lengths: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """u (b,t,m) and the state before it → y (b,t,m) and the state after it, or after `lengths` (b,) of its steps:
        the others are padding behind, whose y means nothing."""
        raise NotImplementedError

    def forward(self, u: Tensor, state: LayerState | None = None, cu_seqlens: Tensor | None = None,
                return_states: int | None = None, delta: Tensor | None = None):  # fmt: skip
        """u (b,t,m) → y (b,t,m) and the new LayerState, one row a sequence. Arguments as `MambaMixer.forward` has them.

        Raises AnymambaError for u, a state or cu_seqlens that do not fit, return_states with cu_seqlens, and for gaps
        delta, which only Mamba knows.
        """
        cu_seqlens = checked_input(u, cu_seqlens, self.config)
        if return_states is not None and cu_seqlens is not None:
            raise AnymambaError("return_states with cu_seqlens: read the sequences one by one for states within them")
        if delta is not None:
            check_gaps(delta, u.shape[:2], self.config.mixer)
        rows = u.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = self._checked(state, u, rows)
        if cu_seqlens is not None:
            return self._read_packed(u, state, cu_seqlens)
        if return_states is None:
            return self.read(u, state)
        y, states = [], []
        places(u.shape[1], return_states)  # refuses numbers that make no sense
        for piece in u.split(return_states, 1):
            out, state = self.read(piece, state)
            y.append(out)
            states.append(state)
        return torch.cat(y, 1), LayerState(*(torch.stack(v, 1) for v in zip(*states, strict=True)))

    def _read_packed(self, u, state, cu_seqlens):
        """Sequences of similar lengths side by side, padded; of very different ones, one after the other."""
        check_bounds(cu_seqlens, u.shape[1])
        lengths, total = cu_seqlens.diff().to(u.device), u.shape[1]
        if total == 0:
            return u, state
        s, longest = len(lengths), int(lengths.max())
        if s * longest > WASTE * total:
            return self._read_one_by_one(u, state, lengths.tolist())
        row = torch.arange(s, device=u.device).repeat_interleave(lengths, output_size=total)
        index = row * longest + torch.arange(total, device=u.device) - cu_seqlens.to(u.device)[row]
        y, after = self.read(unpack(u, index, s, longest), state, lengths)
        return y.flatten(0, 1)[index][None], after

    def _read_one_by_one(self, u, state, sizes):
        y, after = [], []
        for i, piece in enumerate(u.split(sizes, 1)):
            row = LayerState(*(v[i : i + 1] for v in state))
            out, row = self.read(piece, row) if piece.shape[1] else (piece, row)
            y.append(out)
            after.append(row)
        dtype = next((out.dtype for out in y if out.shape[1]), u.dtype)  # an empty sequence is as it came
        conv, ssm = zip(*after, strict=True)
        return torch.cat([out.to(dtype) for out in y], 1), LayerState(torch.cat(conv), torch.cat(ssm))

    def _checked(self, state, u, rows):
        """The state, zeros if there is none."""
        c, real = self.config, torch.promote_types(u.dtype, torch.float32)
        shapes = (rows, c.d_inner, c.conv_width), (rows, c.d_inner, c.state_width)
        if state is None:
            return LayerState(u.new_zeros(shapes[0]), u.new_zeros(shapes[1], dtype=real))
        if (got := tuple(tuple(v.shape) for v in state)) != shapes:
            raise AnymambaError(f"mixer {c.mixer!r}: the state is conv {got[0]}, ssm {got[1]}, but this input needs "
                                f"{shapes[0]} and {shapes[1]}: one row a sequence")  # fmt: skip
        return LayerState(state[0], state[1].to(real))


def checked_input(u: Tensor, cu_seqlens: Tensor | None, config: MambaConfig) -> Tensor | None:
    """`cu_seqlens` as a tensor. Raises AnymambaError unless u is real numbers (b,t,m), one row if there are offsets."""
    if u.dim() != 3 or u.shape[2] != config.d_model or not u.is_floating_point():
        got = f"u is {tuple(u.shape)} {u.dtype}"
        raise AnymambaError(f"{got}, but must be real numbers (batch, seqlen, d_model = {config.d_model})")
    return None if cu_seqlens is None else as_offsets(cu_seqlens, u.shape[0])
