"""Recurrent networks from before state-space models, to compare with: torch's own RNN, LSTM and GRU.

Axes: b batch, t time, m d_model, d d_inner.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from anymamba.config import MambaConfig
from anymamba.layers.init import init_mixer
from anymamba.layers.linear import Linear
from anymamba.layers.sequence import SequenceMixer
from anymamba.state import LayerState

KINDS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class RecurrentMixer(SequenceMixer):
    """One layer of d_inner cells and a projection back to d_model. `cell` has torch's parameter names and defaults.

    With g gates (1, 4, 3 for rnn, lstm, gru) it has g·d (m + d + 2) + d·m parameters, where Mamba has about 3·d·m: a
    smaller `expand` makes models of one size. The state is h, for an LSTM h and c.
    """

    def __init__(self, config: MambaConfig, device=None, dtype=None, *, fill: bool = True):
        super().__init__(config)
        m, d = config.d_model, config.d_inner
        self.cell = KINDS[config.mixer](m, d, batch_first=True, device=device, dtype=dtype)
        self.out_proj = Linear(d, m, bias=config.bias, device=device, dtype=dtype)
        if fill:
            init_mixer(self, config)

    def read(self, u: Tensor, state: LayerState, lengths: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """See `SequenceMixer.read`."""
        if u.shape[1] == 0:  # torch knows no empty rows
            return u, state
        dtype = self.cell.weight_hh_l0.dtype
        before = tuple(v.to(dtype)[None].contiguous() for v in state.ssm.unbind(-1))
        with torch.autocast(u.device.type, enabled=False):  # a recurrence in 16 bits adds up its errors
            h = before if self.config.mixer == "lstm" else before[0]
            y, after = self.cell(u.to(dtype), h) if lengths is None else self._padded(u.to(dtype), h, lengths)
        after = after if self.config.mixer == "lstm" else (after,)
        ssm = torch.stack([v.squeeze(0) for v in after], -1).to(state.ssm.dtype)
        if lengths is not None:
            ssm = torch.where((lengths > 0)[:, None, None], ssm, state.ssm)
        return self.out_proj(y), LayerState(state.conv, ssm)

    def _padded(self, u, h, lengths):
        packed = rnn.pack_padded_sequence(u, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        y, after = self.cell(packed, h)
        return rnn.pad_packed_sequence(y, batch_first=True, total_length=u.shape[1])[0], after

    def flops_per_token(self) -> int:
        """Of the matrices; see `MambaLM.flops_per_token`."""
        cell = self.cell
        return 2 * sum(v.numel() for v in (cell.weight_ih_l0, cell.weight_hh_l0, self.out_proj.weight))
