"""Building blocks: normalisation, the Mamba mixer, the residual block."""

from anymamba.layers.block import Block
from anymamba.layers.mamba import MambaMixer, StepProjection
from anymamba.layers.norm import RMSNorm

__all__ = ["Block", "MambaMixer", "RMSNorm", "StepProjection"]
