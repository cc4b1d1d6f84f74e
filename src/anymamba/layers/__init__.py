"""Building blocks: normalisation, the Mamba mixer, both directions, the residual block, the loss."""

from anymamba.layers.bidirectional import Bidirectional
from anymamba.layers.block import Block
from anymamba.layers.linear import Linear, StepProjection
from anymamba.layers.loss import is_bare, linear_cross_entropy
from anymamba.layers.mamba import MambaMixer
from anymamba.layers.norm import RMSNorm
from anymamba.layers.quantized import QuantizedLinear, quantize

__all__ = ["Bidirectional", "Block", "Linear", "MambaMixer", "QuantizedLinear", "RMSNorm", "StepProjection", "is_bare",
           "linear_cross_entropy", "quantize"]  # fmt: skip
