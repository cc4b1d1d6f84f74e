"""What kernels need that decode a token through whole blocks at once."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from anymamba.layers.block import Block
from anymamba.layers.linear import Linear, StepProjection, is_watched
from anymamba.layers.mamba import MambaMixer
from anymamba.layers.norm import RMSNorm
from anymamba.layers.quantized import QuantizedLinear


class Integers(NamedTuple):
    """A matrix as `reference.quantize_weight` makes it."""

    weight: Tensor
    scale: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype


Matrix = Tensor | Integers


class BlockWeights(NamedTuple):
    """The parameters of a block, by the names of its modules; axes as in `layers.mamba`."""

    norm: Tensor  # (m,)
    in_proj: Matrix  # (2d,m), rows [x; z]
    in_bias: Tensor | None
    conv: Tensor  # (d,w)
    conv_bias: Tensor | None
    x_proj: Matrix  # (r+2n,d), rows [dt; B; C]
    dt_proj: Matrix  # (d,r)
    dt_bias: Tensor  # (d,)
    A_log: Tensor  # (d,n)
    D: Tensor  # (d,)
    out_proj: Matrix  # (m,d)
    out_bias: Tensor | None

    @property
    def matrices(self) -> tuple[Matrix, Matrix, Matrix, Matrix]:
        return self.in_proj, self.x_proj, self.dt_proj, self.out_proj


def block_weights(block: nn.Module) -> BlockWeights | None:
    """The parameters of a block; None if they are not all that it does: something replaces a part of it or listens,
    or its mixer is another than the published one."""
    mixer = block.mixer
    if not (is_plain(block) and mixer.config.published):
        return None
    return BlockWeights(
        block.norm.weight, matrix(mixer.in_proj), mixer.in_proj.bias, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias,
        matrix(mixer.x_proj), matrix(mixer.dt_proj), mixer.dt_proj.bias, mixer.A_log, mixer.D, matrix(mixer.out_proj),
        mixer.out_proj.bias,
    )  # fmt: skip


def matrix(layer: nn.Module) -> Matrix:
    """The weight of a linear layer."""
    return Integers(layer.weight, layer.scale) if isinstance(layer, QuantizedLinear) else layer.weight


_TYPES = {Block, RMSNorm, MambaMixer, Linear, StepProjection, QuantizedLinear, nn.Conv1d, nn.Embedding}


def is_plain(part: nn.Module) -> bool:
    """Whether the parameters of a part of the model are all that it does."""
    for module in part.modules():
        if type(module) not in _TYPES or is_watched(module):
            return False
    tensors = (*part.parameters(), *part.buffers())
    return all(type(v) in (nn.Parameter, Tensor) and v.is_contiguous() for v in tensors)
