"""The mathematics, as plain loops: the one truth that every kernel is held to. Differentiable, up to float64."""

from anymamba.reference.conv import causal_conv1d, causal_conv1d_step_
from anymamba.reference.discretize import RULES, discretize
from anymamba.reference.norm import add_rms_norm, rms_norm
from anymamba.reference.quantized import dequantize_weight, quantize_weight
from anymamba.reference.selective import selective_scan, selective_step_

__all__ = ["RULES", "add_rms_norm", "causal_conv1d", "causal_conv1d_step_", "dequantize_weight", "discretize",
           "quantize_weight", "rms_norm", "selective_scan", "selective_step_"]  # fmt: skip
