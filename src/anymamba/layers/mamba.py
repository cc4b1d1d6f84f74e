"""The Mamba mixer (arXiv 2312.00752, section 3.4, figure 3).

Axes: b batch, t time, m d_model, d d_inner, n d_state, r dt_rank, w d_conv, s sequences.
"""

import torch
from torch import Tensor, nn

from anymamba.config import MambaConfig
from anymamba.layers.inner import mamba_inner, takes
from anymamba.layers.irregular import gap_steps
from anymamba.layers.linear import Linear, StepProjection
from anymamba.layers.norm import inner_norm
from anymamba.ops import causal_conv1d, selective_scan
from anymamba.state import LayerState, places


class MambaMixer(nn.Module):
    """Mixes along time: (b,t,m) → (b,t,m). Parameter names and shapes are those of the published checkpoints."""

    def __init__(self, config: MambaConfig, device=None, dtype=None):
        super().__init__()
        m, d, n, r, w = config.d_model, config.d_inner, config.d_state, config.rank, config.d_conv
        kw = {"device": device, "dtype": dtype}
        self.config = config
        self.in_proj = Linear(m, 2 * d, bias=config.bias, **kw)  # rows [x; z]
        self.conv1d = nn.Conv1d(d, d, w, groups=d, bias=config.conv_bias, **kw)  # holds weights; `ops` convolves
        self.x_proj = Linear(d, r + 2 * n, bias=False, **kw)  # rows [dt; B; C]
        self.dt_proj = StepProjection(r, d, bias=True, **kw)
        self.A_log = nn.Parameter(torch.empty(d, n, device=device))  # A = -exp(A_log), always float32
        self.D = nn.Parameter(torch.empty(d, device=device))
        self.out_proj = Linear(d, m, bias=config.bias, **kw)

    def forward(self, u: Tensor, state: LayerState | None = None, cu_seqlens: Tensor | None = None,
                return_states: int | None = None, delta: Tensor | None = None):  # fmt: skip
        """u (b,t,m) → y (b,t,m) and the new LayerState. `cu_seqlens` and `return_states` as in `ops.selective_scan`.

        With return_states = k the LayerState holds those after every k tokens and the last: (b,p,…), p = ⌈t/k⌉.
        delta (b,t) are the gaps in time between each sample and the one before, see `layers.irregular.gap_steps`.
        """
        conv_state, ssm_state = state if state is not None else (None, None)
        xz = self.in_proj(u)
        if return_states is None and delta is None and takes(self, xz):  # the same with gradients joined, for training
            y, *after = mamba_inner(
                xz, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
                self.dt_proj.bias, self._A(), self.D, conv_state, ssm_state, cu_seqlens,
            )  # fmt: skip
            return self.out_proj(y), LayerState(*after)
        x, z = xz.chunk(2, dim=-1)
        conv_states = None if return_states is None else self._conv_states(x, conv_state, return_states)
        x, conv_state = causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu",
            initial_state=conv_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        # what makes it selective: step size, input and output matrices depend on the input
        dt, B, C = self.x_proj(x).split([self.config.rank, self.config.d_state, self.config.d_state], dim=-1)
        if (eps := self.config.inner_norm_eps) is not None:
            dt, B, C = (inner_norm(v, eps) for v in (dt, B, C))
        dt, dt_bias = self.dt_proj(dt), self.dt_proj.bias
        if delta is not None:
            dt, dt_bias = gap_steps(dt, dt_bias, delta), None
        y, ssm_state, *ssm_states = selective_scan(
            x, dt, self._A(), B, C, self.D, z,
            dt_bias=dt_bias, dt_softplus=delta is None, initial_state=ssm_state, cu_seqlens=cu_seqlens,
            return_states=return_states, discretization=self.config.discretization,
        )  # fmt: skip
        after = LayerState(conv_state, ssm_state) if return_states is None else LayerState(conv_states, *ssm_states)
        return self.out_proj(y), after

    def _A(self):
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _conv_states(self, x, before, k):
        """The last w-1 of the inputs x (b,t,d) after every k tokens and the last: (b,p,d,w-1)."""
        (b, t, d), w = x.shape, self.config.d_conv
        before = x.new_zeros(b, w - 1, d) if before is None else before.transpose(1, 2).to(x.dtype)
        after = torch.cat([before, x], 1).unfold(1, w - 1, 1)  # (b,t+1,d,w-1): at i those after i tokens
        return after[:, list(places(t, k))]

    def _apply(self, fn, recurse=True):
        # model.bfloat16() must not round A, D and the step bias: errors in A compound over the whole text
        keep = {id(self.A_log), id(self.D), id(self.dt_proj.bias)}

        def convert(v):
            out = fn(v)
            lowered = id(v) in keep and out.dtype in (torch.bfloat16, torch.float16)
            return v.to(out.device) if lowered else out

        return super()._apply(convert, recurse)
