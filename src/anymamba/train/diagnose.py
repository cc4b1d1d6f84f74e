"""Where a NaN or an infinity came from."""

import math

from torch import Tensor, nn


def first_nonfinite(model: nn.Module, forward) -> str:
    """Names the first tensor that is not finite: among the parameters, else in `forward()`, else in its backward pass.

    `forward` runs the model and returns the loss. Gradients are overwritten.
    """
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        place = _first_output(model, forward)[0]
        return f"the parameter {bad[0]}{others} is not finite" + (f"; it shows first in {place}" if place else "")
    place, loss = _first_output(model, forward)
    if place:
        return f"the first output that is not finite is that of {place}"
    if not math.isfinite(loss.item()):
        return "every layer's output is finite, and the loss is not: the logits are too large"
    model.zero_grad(set_to_none=True)
    loss.backward()
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    model.zero_grad(set_to_none=True)
    if bad:  # backward goes from the last layer to the first
        return f"the forward pass is finite; the first gradient that is not is that of {bad[-1]}"
    return "every output and gradient is finite on its own; the gradient's norm is too large"


def _first_output(model: nn.Module, forward) -> tuple[str | None, Tensor]:
    """Name of the first module to give something that is not finite, and the loss. Inner modules come before outer."""
    found: list[str] = []

    def hook(name):
        def look(module, inputs, output):
            if not found and not all(v.isfinite().all() for v in _tensors(output)):
                found.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        loss = forward()
    finally:
        for handle in handles:
            handle.remove()
    return (found[0] if found else None), loss


def _tensors(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    return [v for part in output for v in _tensors(part)] if isinstance(output, tuple | list) else []
