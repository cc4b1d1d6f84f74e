"""Irregular time: how far a step goes is the time since the one before it, times what the model makes of it.

Axes: b batch, t time, d d_inner.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba.errors import AnymambaError


def gap_steps(raw: Tensor, bias: Tensor, delta: Tensor) -> Tensor:
    """Step sizes where the samples are not equally far apart, delta_t · softplus(raw_t + bias).

    With Δ_t = softplus(raw_t + bias), the model's own step for a gap of 1, the scan is then

        h_t = exp(delta_t Δ_t A) h_{t-1} + delta_t Δ_t B_t x_t

    which is the discretisation over an interval of delta_t Δ_t (arXiv 2312.00752, section 2; A exactly, B by Euler's
    rule): the state decays by the time that has passed, and an input counts for as long as it stood. A gap of 0 leaves
    the state as it is. The convolution before the scan counts samples, not time.

    Args:
        raw: (b,t,d), bias: (d,): what softplus is taken of. delta: (b,t), from 0 on, 1 where time is regular.

    Returns (b,t,d) in at least float32. Raises AnymambaError for gaps of another shape, negative or not finite.
    """
    check_gaps(delta, raw.shape[:2])
    if delta.device.type == "cpu" and not torch.compiler.is_compiling():  # looking would stop a GPU
        wrong = ~(delta.isfinite() & (delta >= 0))
        if bool(wrong.any()):
            raise AnymambaError(f"delta holds {delta[wrong][0].item()}, but gaps are finite and at least 0: the time "
                                "since the sample before, 1 where it is regular")  # fmt: skip
    real = torch.promote_types(raw.dtype, torch.float32)
    return F.softplus(raw.to(real) + bias.to(real)) * delta.to(raw.device, real)[..., None]


def check_gaps(delta: Tensor, shape: tuple[int, ...], mixer: str = "mamba") -> None:
    """Raises AnymambaError if gaps are not real numbers (b,t), or the mixers have no step sizes to multiply."""
    if mixer != "mamba":
        raise AnymambaError(f"delta is for mixer='mamba', whose step sizes gaps multiply, and this one is {mixer!r}")
    if tuple(delta.shape) != tuple(shape) or delta.is_complex() or delta.dtype == torch.bool:
        raise AnymambaError(f"delta is {tuple(delta.shape)} {delta.dtype}, but must be numbers (batch, seqlen) = "
                            f"{tuple(shape)}: the time between each sample and the one before it")  # fmt: skip
