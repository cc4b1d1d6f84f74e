"""S4 (arXiv 2111.00396) in the place of the selective scan: the state matrix is diagonal plus low rank.

Axes: b batch, t time, d d_inner, n d_state.
"""

import torch
from torch import nn

from anymamba.config import MambaConfig
from anymamba.layers.init import init_mixer
from anymamba.layers.s4d import S4DMixer
from anymamba.reference import dense, discretize, dplr


class S4Mixer(S4DMixer):
    """S4D with one more column: A = diag - P Pᵀ, in which each pair of conjugates acts on all others.

    Everything is real, as in `reference.dplr.matrix`: a = exp(A_log) and ω = A_imag are (d,n/2), P, B, C (d,n), and the
    state (b,d,n). A is stable for every value that training may give them. It is run in chunks of time, with matrices
    n × n for each channel, not by S4's transforms: n is small, and so the state after any step is at hand.

    discretization="bilinear" is S4's own, and the fastest here; the others take a matrix exponential at every call.
    """

    def __init__(self, config: MambaConfig, device=None, dtype=None, *, fill: bool = True):
        super().__init__(config, device=device, dtype=dtype, fill=False)
        for name in ("P", "B", "C"):  # C is real here
            setattr(self, name, nn.Parameter(torch.empty(config.d_inner, config.d_state, device=device)))
        if fill:
            init_mixer(self, config)

    def _ssm(self, x, state, lengths):
        own = self.A_log.exp(), self.A_imag, self.P, self.B, self.C, self.D, self.log_dt.exp()
        a, omega, P, B, C, D, dt = (v.to(x.dtype) for v in own)
        if (rule := self.config.discretization) == "bilinear":
            A_bar, B_bar = dplr.bilinear_real(a, omega, P, B, dt)
        else:
            A_bar, B_bar, _ = discretize(dplr.matrix(a, omega, P), B[..., None], dt, rule, dense=True)
            B_bar = B_bar[..., 0]
        y, after = dense.chunked(x, A_bar, B_bar, C, state, lengths)
        return y + D * x, after

    def _ssm_flops(self):
        c = self.config
        return c.d_inner * (2 * c.d_state**2 + 4 * c.d_state)
