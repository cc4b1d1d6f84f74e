"""How mixers begin; the table for a Mamba is in `MambaLM.reset_parameters`."""

import math

import torch
from torch import Tensor, nn

from anymamba.config import CONVOLVING, MambaConfig
from anymamba.reference import dplr
from anymamba.reference.hippo import DIAGONALS


@torch.no_grad()
def init_mixer(mixer: nn.Module, c: MambaConfig) -> None:
    """Fill in every parameter of a mixer; on meta there is nothing to fill.

    | parameter | value |
    |---|---|
    | in_proj, out_proj, conv1d, D, dt, of any mixer | as those of Mamba |
    | constant B, and C, in place of selective ones | 1, and N(0, 1) (S4D, arXiv 2206.11893, section 4.4) |
    | A_log, A_imag of S4D | the diagonal that `s4d_init` names, in every channel |
    | C of S4D | complex N(0, 1) |
    | A_log, A_imag, P, B of S4 | HiPPO-LegS, in every channel (S4, arXiv 2111.00396, equation 2); C: N(0, 1) |
    | cell of an RNN, LSTM or GRU | torch's own, U(±1/√d_inner) |
    """
    if mixer.out_proj.weight.is_meta:
        return
    if c.bias:
        mixer.out_proj.bias.zero_()
    if c.mixer not in CONVOLVING:
        mixer.cell.reset_parameters()
        _init_out(mixer, c)
        return
    uniform(mixer.in_proj.weight, c.d_model**-0.5)
    if c.bias:
        mixer.in_proj.bias.zero_()
    if c.mixer == "mamba" and c.selects:
        uniform(mixer.x_proj.weight, c.d_inner**-0.5)
    _init_out(mixer, c)
    if c.use_conv:
        uniform(mixer.conv1d.weight, c.d_conv**-0.5)
        if c.conv_bias:
            uniform(mixer.conv1d.bias, c.d_conv**-0.5)
    mixer.D.fill_(1)
    if c.mixer == "s4":
        _init_s4(mixer, c)
    elif c.mixer == "s4d":
        _init_s4d(mixer, c)
    else:
        _init_mamba(mixer, c)


def uniform(p: Tensor, bound: float) -> None:
    """U(±bound)."""
    p.uniform_(-bound, bound)


def _init_out(mixer, c):
    uniform(mixer.out_proj.weight, c.d_inner**-0.5 / math.sqrt(c.n_layer))


def _init_mamba(mixer: nn.Module, c: MambaConfig) -> None:
    if "dt" in c.selects:
        uniform(mixer.dt_proj.weight, c.dt_scale * c.rank**-0.5)
    dt = _steps(c, mixer.D.device)
    (mixer.dt_proj.bias if "dt" in c.selects else mixer.dt_bias).copy_(dt + torch.log(-torch.expm1(-dt)))
    if "B" not in c.selects:
        mixer.B.fill_(1)
    if "C" not in c.selects:
        mixer.C.normal_()
    mixer.A_log.copy_(torch.log(torch.arange(1, c.d_state + 1, dtype=torch.float32)).expand_as(mixer.A_log))


def _init_s4d(mixer: nn.Module, c: MambaConfig) -> None:
    A = DIAGONALS[c.s4d_init](c.d_state // 2)
    mixer.A_log.copy_(torch.log(-A.real).expand_as(mixer.A_log))
    mixer.A_imag.copy_(A.imag.expand_as(mixer.A_imag))
    mixer.C.normal_(0, math.sqrt(0.5))
    mixer.log_dt.copy_(torch.log(_steps(c, mixer.D.device)))


def _init_s4(mixer: nn.Module, c: MambaConfig) -> None:
    a, omega, P, B = dplr.legs(c.d_state)
    for parameter, row in ((mixer.A_log, torch.log(a)), (mixer.A_imag, omega), (mixer.P, P), (mixer.B, B)):
        parameter.copy_(row.expand_as(parameter))
    mixer.C.normal_()
    mixer.log_dt.copy_(torch.log(_steps(c, mixer.D.device)))


def _steps(c, device):
    """Step sizes (d,), log-uniform."""
    low, high = math.log(c.dt_min), math.log(c.dt_max)
    return torch.exp(torch.rand(c.d_inner, device=device) * (high - low) + low).clamp(min=c.dt_init_floor)
