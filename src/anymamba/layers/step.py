"""What kernels need that decode a token through whole blocks at once."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from anymamba.layers.block import Block
from anymamba.layers.linear import Linear
from anymamba.layers.mamba import MambaMixer, StepProjection
from anymamba.layers.norm import RMSNorm


class BlockWeights(NamedTuple):
    """The parameters of a block, by the names of its modules; axes as in `layers.mamba`."""

    norm: Tensor  # (m,)
    in_proj: Tensor  # (2d,m), rows [x; z]
    in_bias: Tensor | None
    conv: Tensor  # (d,w)
    conv_bias: Tensor | None
    x_proj: Tensor  # (r+2n,d), rows [dt; B; C]
    dt_proj: Tensor  # (d,r)
    dt_bias: Tensor  # (d,)
    A_log: Tensor  # (d,n)
    D: Tensor  # (d,)
    out_proj: Tensor  # (m,d)
    out_bias: Tensor | None


def block_weights(block: nn.Module) -> BlockWeights | None:
    """The parameters of a block; None if they are not all that it does: something replaces a part of it or listens."""
    if not is_plain(block):
        return None
    mixer = block.mixer
    return BlockWeights(
        block.norm.weight, mixer.in_proj.weight, mixer.in_proj.bias, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias,
        mixer.x_proj.weight, mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log, mixer.D, mixer.out_proj.weight,
        mixer.out_proj.bias,
    )  # fmt: skip


_TYPES = {Block, RMSNorm, MambaMixer, Linear, StepProjection, nn.Conv1d, nn.Embedding}


def is_plain(part: nn.Module) -> bool:
    """Whether the parameters of a part of the model are all that it does."""
    for module in part.modules():
        if type(module) not in _TYPES or "forward" in module.__dict__ or is_watched(module):
            return False
    return all(type(p) in (nn.Parameter, Tensor) and p.is_contiguous() for p in part.parameters())


def is_watched(module: nn.Module) -> bool:
    """Whether hooks listen to a module's forward pass."""
    return bool(module._forward_pre_hooks or module._forward_hooks or torch.nn.modules.module._has_any_global_hook())
