"""The Mamba mixer (arXiv 2312.00752, section 3.4, figure 3).

Axes: b batch, t time, m d_model, d d_inner, n d_state, r dt_rank, w d_conv, s sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.config import MambaConfig
from anymamba.layers.exact import ExactParameters
from anymamba.layers.init import init_mixer
from anymamba.layers.inner import mamba_inner, takes
from anymamba.layers.irregular import gap_steps
from anymamba.layers.linear import Linear, StepProjection
from anymamba.layers.norm import inner_norm
from anymamba.layers.sequence import checked_input
from anymamba.ops import causal_conv1d, selective_scan
from anymamba.state import LayerState, places


class MambaMixer(ExactParameters):
    """Mixes along time: (b,t,m) → (b,t,m). Parameter names and shapes are those of the published checkpoints.

    `selective`, `gate` and `use_conv` of the config leave parts out, for ablations (the paper's section 4.6): a B, C or
    dt that does not depend on the input is a parameter of its own, and nothing exists that is not used. fill=False
    leaves the parameters uninitialised, for whoever fills them in later.
    """

    def __init__(self, config: MambaConfig, device=None, dtype=None, *, fill: bool = True):
        super().__init__()
        m, d, n, r, w = config.d_model, config.d_inner, config.d_state, config.rank, config.d_conv
        kw = {"device": device, "dtype": dtype}
        self.config = config
        self.sizes = {name: size for name, size in (("dt", r), ("B", n), ("C", n)) if name in config.selects}
        self.in_proj = Linear(m, 2 * d if config.gate else d, bias=config.bias, **kw)  # rows [x; z]
        if config.use_conv:
            self.conv1d = nn.Conv1d(d, d, w, groups=d, bias=config.conv_bias, **kw)  # holds weights; `ops` convolves
        if self.sizes:
            self.x_proj = Linear(d, sum(self.sizes.values()), bias=False, **kw)  # rows [dt; B; C]
        if "dt" in self.sizes:
            self.dt_proj = StepProjection(r, d, bias=True, **kw)
        else:
            self.dt_bias = nn.Parameter(torch.empty(d, device=device))
        for name in {"B", "C"} - self.sizes.keys():
            self.register_parameter(name, nn.Parameter(torch.empty(d, n, device=device)))
        self.A_log = nn.Parameter(torch.empty(d, n, device=device))  # A = -exp(A_log), always float32
        self.D = nn.Parameter(torch.empty(d, device=device))
        self.out_proj = Linear(d, m, bias=config.bias, **kw)
        if fill:
            init_mixer(self, config)

    def forward(self, u: Tensor, state: LayerState | None = None, cu_seqlens: Tensor | None = None,
                return_states: int | None = None, delta: Tensor | None = None):  # fmt: skip
        """u (b,t,m) → y (b,t,m) and the new LayerState. `cu_seqlens` and `return_states` as in `ops.selective_scan`.

        With return_states = k the LayerState holds those after every k tokens and the last: (b,p,…), p = ⌈t/k⌉.
        delta (b,t) are the gaps in time between each sample and the one before, see `layers.irregular.gap_steps`.
        Raises AnymambaError for what does not fit.
        """
        cu_seqlens = checked_input(u, cu_seqlens, self.config)
        conv_state, ssm_state = state if state is not None else (None, None)
        xz = self.in_proj(u)
        if return_states is None and delta is None and takes(self, xz):  # the same with gradients joined, for training
            y, *after = mamba_inner(
                xz, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
                self.dt_proj.bias, self._A(), self.D, conv_state, ssm_state, cu_seqlens,
            )  # fmt: skip
            return self.out_proj(y), LayerState(*after)
        x, z = xz.chunk(2, dim=-1) if self.config.gate else (xz, None)
        conv_states = None if return_states is None else self._conv_states(x, conv_state, return_states)
        x, conv_state = self._convolved(x, conv_state, cu_seqlens)
        dt, B, C = self._selected(x)
        dt_bias = self._dt_bias()
        if delta is not None:
            dt, dt_bias = gap_steps(dt, dt_bias, delta), None
        y, ssm_state, *ssm_states = selective_scan(
            x, dt, self._A(), B, C, self.D, z,
            dt_bias=dt_bias, dt_softplus=delta is None, initial_state=ssm_state, cu_seqlens=cu_seqlens,
            return_states=return_states, discretization=self.config.discretization,
        )  # fmt: skip
        after = LayerState(conv_state, ssm_state) if return_states is None else LayerState(conv_states, *ssm_states)
        return self.out_proj(y), after

    def _convolved(self, x, before, cu_seqlens):
        if not self.config.use_conv:
            rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
            return F.silu(x), x.new_zeros(rows, x.shape[2], 0)
        return causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu",
            initial_state=before, cu_seqlens=cu_seqlens,
        )  # fmt: skip

    def _selected(self, x):
        """What makes it selective: step size dt (b,t,d), input and output matrices B, C (b,t,n) depend on the input.
        Where one does not, it is a constant: B, C (d,n); a dt of 0, to which its bias is added."""
        parts = self.x_proj(x).split(list(self.sizes.values()), dim=-1) if self.sizes else ()
        if (eps := self.config.inner_norm_eps) is not None:
            parts = [inner_norm(v, eps) for v in parts]
        parts = dict(zip(self.sizes, parts, strict=True))
        dt = self.dt_proj(parts["dt"]) if "dt" in parts else torch.zeros_like(x)
        return dt, *(parts[name] if name in parts else getattr(self, name) for name in ("B", "C"))

    def _dt_bias(self):
        return self.dt_proj.bias if "dt" in self.sizes else self.dt_bias

    def _exact(self):
        return [*super()._exact(), self._dt_bias()]

    def _A(self):
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _conv_states(self, x, before, k):
        """The last w-1 of the inputs x (b,t,d) after every k tokens and the last: (b,p,d,w-1)."""
        (b, t, d), w = x.shape, self.config.conv_width + 1
        before = x.new_zeros(b, w - 1, d) if before is None else before.transpose(1, 2).to(x.dtype)
        after = torch.cat([before, x], 1).unfold(1, w - 1, 1)  # (b,t+1,d,w-1): at i those after i tokens
        return after[:, list(places(t, k))]

    def flops_per_token(self) -> int:
        """See `MambaLM.flops_per_token`."""
        c = self.config
        d, m, selected = c.d_inner, c.d_model, sum(self.sizes.values())
        matrices = m * (2 * d if c.gate else d) + d * selected + self.sizes.get("dt", 0) * d + d * m
        return 2 * matrices + (2 * c.d_conv * d if c.use_conv else 0) + 9 * d * c.d_state
