"""The Mamba mixer (arXiv 2312.00752, section 3.4, figure 3).

Axes: b batch, t time, m d_model, d d_inner, n d_state, r dt_rank, w d_conv, s sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.config import MambaConfig
from anymamba.ops import causal_conv1d, selective_scan
from anymamba.state import LayerState


class StepProjection(nn.Linear):
    """The linear layer from rank r to the step sizes. Its bias is added inside the scan, in float32, not here.

    Still a Linear that is called, so that adapters (LoRA) on it work.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class MambaMixer(nn.Module):
    """Mixes along time: (b,t,m) → (b,t,m). Parameter names and shapes are those of the published checkpoints."""

    def __init__(self, config: MambaConfig, device=None, dtype=None):
        super().__init__()
        m, d, n, r, w = config.d_model, config.d_inner, config.d_state, config.rank, config.d_conv
        kw = {"device": device, "dtype": dtype}
        self.config = config
        self.in_proj = nn.Linear(m, 2 * d, bias=config.bias, **kw)  # rows [x; z]
        self.conv1d = nn.Conv1d(d, d, w, groups=d, bias=config.conv_bias, **kw)  # holds weights; `ops` convolves
        self.x_proj = nn.Linear(d, r + 2 * n, bias=False, **kw)  # rows [dt; B; C]
        self.dt_proj = StepProjection(r, d, bias=True, **kw)
        self.A_log = nn.Parameter(torch.empty(d, n, device=device))  # A = -exp(A_log), always float32
        self.D = nn.Parameter(torch.empty(d, device=device))
        self.out_proj = nn.Linear(d, m, bias=config.bias, **kw)
        self._kept_A = None, None, 0, None  # of which A_log, its memory, its version, and A

    def forward(self, u: Tensor, state: LayerState | None = None, cu_seqlens: Tensor | None = None):
        """u (b,t,m) → y (b,t,m) and the new LayerState. `cu_seqlens` as in `ops.selective_scan`."""
        conv_state, ssm_state = state if state is not None else (None, None)
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x, conv_state = causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu",
            initial_state=conv_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        # what makes it selective: step size, input and output matrices depend on the input
        dt, B, C = self.x_proj(x).split([self.config.rank, self.config.d_state, self.config.d_state], dim=-1)
        y, ssm_state = selective_scan(
            x, self.dt_proj(dt), self.A(), B, C, self.D, z,
            dt_bias=self.dt_proj.bias, dt_softplus=True, initial_state=ssm_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return self.out_proj(y), LayerState(conv_state, ssm_state)

    def A(self) -> Tensor:
        """A = -exp(A_log) (d,n), float32 or wider.

        Without gradients on a CPU it is kept until A_log changes: for one token its exponentials take as long as the
        rest of the scan.
        """
        A_log = self.A_log
        learning = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if learning or type(A_log) is not nn.Parameter or A_log.device.type != "cpu" or A_log.is_inference():
            return _negative_exp(A_log)  # inference tensors count no versions
        of, memory, version, A = self._kept_A
        if of is not A_log or memory.data_ptr() != A_log.data_ptr() or version != A_log._version:
            with torch.inference_mode(False), torch.no_grad():  # for use in any mode
                A = _negative_exp(A_log)
            self._kept_A = A_log, A_log.detach(), A_log._version, A  # held, so that nothing else can lie there
        return A

    def _apply(self, fn, recurse=True):
        # model.bfloat16() must not round A, D and the step bias: errors in A compound over the whole text
        keep = {id(self.A_log), id(self.D), id(self.dt_proj.bias)}

        def convert(v):
            out = fn(v)
            lowered = id(v) in keep and out.dtype in (torch.bfloat16, torch.float16)
            return v.to(out.device) if lowered else out

        return super()._apply(convert, recurse)


def _negative_exp(A_log):
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
