"""S4D (arXiv 2206.11893) in the place of the selective scan: the same block, and a time-invariant model within.

Axes: b batch, t time, m d_model, d d_inner, n pairs of the state (d_state / 2), w d_conv.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.config import MambaConfig
from anymamba.layers.exact import ExactParameters
from anymamba.layers.init import init_mixer
from anymamba.layers.linear import Linear
from anymamba.layers.sequence import SequenceMixer
from anymamba.ops import causal_conv1d, time_invariant_scan
from anymamba.reference import discretize, lti
from anymamba.state import LayerState


class S4DMixer(ExactParameters, SequenceMixer):
    """A Mamba mixer whose SSM has constant step sizes and matrices, so that it is a convolution too.

    A = -exp(A_log) + i A_imag is complex, each entry stands for itself and its conjugate; B is 1, as only B C matters.
    The state keeps real and imaginary parts side by side, (b,d,d_state).
    """

    def __init__(self, config: MambaConfig, device=None, dtype=None, *, fill: bool = True):
        super().__init__(config)
        m, d, n, w = config.d_model, config.d_inner, config.d_state // 2, config.d_conv
        kw = {"device": device, "dtype": dtype}
        self.in_proj = Linear(m, 2 * d if config.gate else d, bias=config.bias, **kw)  # rows [x; z]
        if config.use_conv:
            self.conv1d = nn.Conv1d(d, d, w, groups=d, bias=config.conv_bias, **kw)
        self.A_log = nn.Parameter(torch.empty(d, n, device=device))
        self.A_imag = nn.Parameter(torch.empty(d, n, device=device))
        self.C = nn.Parameter(torch.empty(d, n, 2, device=device))  # real and imaginary parts
        self.D = nn.Parameter(torch.empty(d, device=device))
        self.log_dt = nn.Parameter(torch.empty(d, device=device))
        self.out_proj = Linear(d, m, bias=config.bias, **kw)
        if fill:
            init_mixer(self, config)

    def read(self, u: Tensor, state: LayerState, lengths: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """See `SequenceMixer.read`. One pass over time, or convolutions of chunks."""
        xz = self.in_proj(u)
        x, z = xz.chunk(2, dim=-1) if self.config.gate else (xz, None)
        if self.config.use_conv:
            before = x
            x, conv_state = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu",
                                          initial_state=state.conv)  # fmt: skip
            if lengths is not None:
                conv_state = _last_inputs(before, state.conv, lengths)
        else:
            x, conv_state = F.silu(x), x.new_zeros(state.conv.shape)
        with torch.autocast(x.device.type, enabled=False):
            y, ssm_state = self._ssm(x.to(torch.promote_types(x.dtype, torch.float32)), state.ssm, lengths)
        y = y.to(x.dtype)
        return self.out_proj(y if z is None else y * F.silu(z)), LayerState(conv_state, ssm_state)

    def _ssm(self, x, state, lengths):
        A, C, D, dt = (v.to(x.dtype) for v in (self.A_log, self.C, self.D, self.log_dt.exp()))
        A = torch.complex(-torch.exp(A), self.A_imag.to(x.dtype))
        A_bar, B_bar, _ = discretize(A, torch.ones_like(A), dt[:, None], self.config.discretization)
        h = torch.view_as_complex(state.unflatten(-1, (-1, 2)).contiguous())
        y, after = time_invariant_scan(x, A_bar, B_bar, torch.view_as_complex(C), h)
        if lengths is not None:  # zeros in front change nothing, so the state after each row's own end is a sum
            after = lti.state_after(_to_the_end(x, lengths), A_bar, B_bar) + A_bar ** lengths[:, None, None] * h
        h = after
        return y + D * x, torch.view_as_real(h).flatten(-2)

    def flops_per_token(self) -> int:
        """Of the recurrence, not of its chunks. See `MambaLM.flops_per_token`."""
        c = self.config
        matrices = self.in_proj.in_features * self.in_proj.out_features + c.d_inner * c.d_model
        conv = 2 * c.d_conv * c.d_inner if c.use_conv else 0
        return 2 * matrices + conv + self._ssm_flops()

    def _ssm_flops(self):
        """A complex number of the state takes a complex and a real-by-complex product, two sums and the real part of a
        product: 16 operations."""
        return 16 * self.config.d_inner * self.config.d_state // 2


def _last_inputs(x, before, lengths):
    """The last w-1 inputs (b,d,w-1) of rows x (b,t,d) that have `lengths` (b,), and `before` them (b,d,w-1)."""
    place = lengths[:, None] + torch.arange(before.shape[2], device=x.device)  # in `before` and x end to end
    both = torch.cat([before.transpose(1, 2).to(x.dtype), x], 1)
    return both.take_along_dim(place[..., None], 1).transpose(1, 2)


def _to_the_end(x, lengths):
    """Rows x (b,t,d) moved to end where t ends, zeros before them."""
    place = torch.arange(x.shape[1], device=x.device) - (x.shape[1] - lengths[:, None])
    return x.take_along_dim(place.clamp(min=0)[..., None], 1) * (place >= 0)[..., None]
