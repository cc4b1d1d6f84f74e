"""Weights as integers: fewer bytes to read for each token on a CPU."""

import torch
from torch import Tensor, nn

from anymamba.errors import AnymambaError
from anymamba.layers.linear import Linear, StepProjection
from anymamba.ops import quantized_linear
from anymamba.reference import quantize_weight

BITS = {"int8": 8, "int4": 4}
SMALL = ("x_proj", "dt_proj")  # decide over step sizes, B and C, and are a twentieth of the weights: 8 bits always


class QuantizedLinear(nn.Module):
    """The linear layer of a `Linear`, with integer weights and float32 scales: for inference, made by `quantize`."""

    def __init__(self, layer: Linear, bits: int):
        super().__init__()
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        self.adds_bias = not isinstance(layer, StepProjection)  # whose bias the scan adds
        weight, scale = quantize_weight(layer.weight.detach(), bits)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise AnymambaError(f"x is {tuple(x.shape)}, but this layer needs (…, {self.in_features})")
        if x.requires_grad and torch.is_grad_enabled():
            raise AnymambaError(
                "no gradients go through quantised weights: train the model before it is quantised, or compute under "
                "torch.no_grad()"
            )
        return quantized_linear(x, self.weight, self.scale, self.bias if self.adds_bias else None)

    def train(self, mode: bool = True):
        if mode:
            raise AnymambaError("a quantised model is for inference only: train the model that it was made from, and "
                                "quantise that again")  # fmt: skip
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        # model.bfloat16() must not round the scales, which the kernels read as float32
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


@torch.no_grad()
def quantize(model: nn.Module, kind: str = "int8") -> nn.Module:
    """Turn the projections and the head of a model on a CPU into integers, in place; returns the same model.

    What remains is for inference: all parameters are frozen, and neither training nor saving is possible. Keep what
    it was made from and quantise after loading. Activations, the scan and the embedding stay as they are (a head tied
    to the embedding gets its own quantised copy). States of the original do not belong to the quantised model.

    Args:
        kind: "int8", one scale a row; or "int4", one scale for each 64 weights of a row, with x_proj and dt_proj (a
            twentieth of the weights, which decide over step sizes, B and C) in int8.

    Raises AnymambaError for another kind, a model on another device, or one that has no linear layers to quantise.
    """
    if kind not in BITS:
        raise AnymambaError(f"quantize: kind={kind!r} does not exist: choose one of {', '.join(BITS)}")
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) in (Linear, StepProjection)
    ]
    if not found:
        done = any(isinstance(module, QuantizedLinear) for module in model.modules())
        why = "it is quantised already: load it again for another kind" if done else "it has no anymamba Linear layers"
        raise AnymambaError(f"quantize: nothing to do for this {type(model).__name__}, {why}")
    if device := next((str(l.weight.device) for _, _, l in found if l.weight.device.type != "cpu"), None):
        raise AnymambaError(f"quantize: the model is on {device}, and its kernels run on a CPU: model.cpu() first")
    for parent, name, layer in found:
        setattr(parent, name, QuantizedLinear(layer, 8 if name in SMALL else BITS[kind]))
    return model.eval().requires_grad_(False)
