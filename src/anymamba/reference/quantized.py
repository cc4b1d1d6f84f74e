"""Weights as small integers: w ≈ scale · q with q = round(w / scale), one scale for a group of weights.

The weight of a group that is largest in size, of either sign, is the lowest integer, whose range is one longer: with
4 bits that leaves an eighth less error than scales that are all positive.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = 16  # 4-bit weights i and i + 16 of 32 share a byte, so that a kernel finds vectors in both halves of its bytes
GROUP = 64  # 4-bit weights of one scale


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """weight (outputs, inputs) as integers and scales.

    bits 8: int8 (outputs, k) with a scale a row; bits 4: two integers from -8 to 7 a byte, uint8 (outputs, k / 2), with
    a scale for each group of 64. scale: (outputs, groups) float32. Rows are filled up with
    zeros to k, a multiple of 32 or of 64.
    """
    outputs, inputs = weight.shape
    padded = F.pad(weight.float(), (0, -inputs % (2 * HALF if bits == 8 else GROUP)))
    groups = padded[:, None] if bits == 8 else padded.view(outputs, -1, GROUP)
    lowest = -(2 ** (bits - 1))
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / lowest
    whole = (groups / scale.where(scale != 0, 1)).round().clamp(max=-lowest - 1).to(torch.int8).view(outputs, -1)
    scale = scale.squeeze(-1).contiguous()
    if bits == 8:
        return whole, scale
    low, high = whole.view(outputs, -1, 2, HALF).unbind(2)
    return (low & 15 | high << 4).view(torch.uint8).view(outputs, -1), scale


def dequantize_weight(weight: Tensor, scale: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """What `quantize_weight` has made, as (outputs, inputs) of a dtype."""
    outputs = len(weight)
    if weight.dtype == torch.uint8:
        both = weight.view(torch.int8).view(outputs, -1, HALF)
        weight = torch.stack([both << 4 >> 4, both >> 4], 2).view(outputs, -1)
    real = torch.promote_types(dtype, torch.float32)
    groups = weight.view(*scale.shape, -1).to(real) * scale.unsqueeze(-1)
    return groups.view(outputs, -1)[:, :inputs].to(dtype)
