"""The parts of a block that can be seen and replaced, through plain hooks on its modules.

A hook makes the mixer take its own lines instead of the joined path for training or decoding, on every backend.
Axes: b batch, t time, m d_model, d d_inner, n d_state.

| part | shape | what it is |
|---|---|---|
| `residual` | (b,t,m) | the residual stream before the block, float32 |
| `conv_in` | (b,t,d) | what goes into the convolution, or with use_conv=False into silu |
| `x` | (b,t,d) | what goes into the scan: convolved, after silu; replaced through `conv_in` |
| `dt` | (b,t,d) | step size after softplus, float32 |
| `B`, `C` | (b,t,n) | input and output matrices; (b,t,d,n) where they are constants |
| `z` | (b,t,d) | gate, before silu |
| `y` | (b,t,d) | what the scan gives, with D and the gate |
| `out` | (b,t,m) | what the block adds to the residual stream |
| `state` | (b,d,n) | the state that the scan starts from, float32 |
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.errors import AnymambaError
from anymamba.inspect.checks import language_model
from anymamba.layers import MambaMixer
from anymamba.layers.norm import inner_norm
from anymamba.state import LayerState

PARTS = ("residual", "conv_in", "x", "dt", "B", "C", "z", "y", "out", "state")
FADING = ("mamba", "zoh")  # discretizations whose state fades by exp(Δ A), as the equations of this room have it
NO_STEP = -1e4  # its softplus is 0 in every dtype, and finite: kernels need not know what to do with -inf

Listener = Callable[[Tensor], Tensor | None]  # takes the value of a part; what it returns replaces it


def check_model(model: Any) -> None:
    """Raises AnymambaError for a model whose layers are not Mamba's selective scan."""
    for i, block in enumerate(language_model(model).backbone.layers):
        mixer, config = block.mixer, getattr(block.mixer, "config", None)
        if type(mixer) is MambaMixer and config.discretization in FADING:
            continue
        what, others = type(mixer).__name__, ". recall, edit_state, mix_states and the saliencies take other mixers"
        if type(mixer) is MambaMixer:
            what = f"of discretization={config.discretization!r}"
        elif not getattr(mixer, "keeps_state", True):
            what, others = f"{what} and hears both directions", ""
        elif config is not None:
            what = f"of mixer={config.mixer!r}"
        raise AnymambaError(
            f"layer {i} is {what}, which has no steps that the state fades by: only mixer='mamba' with discretization "
            f"'mamba' or 'zoh' can be looked into{others}"
        )


def constants(mixer: MambaMixer) -> list[str]:
    """Those of dt, B and C that do not depend on the input: parameters, which nothing computes."""
    return [name for name in ("dt", "B", "C") if name not in mixer.sizes]


def absent(mixer: MambaMixer) -> dict[str, str]:
    """Parts that this mixer does not have, or not where they can be seen, and why."""
    out = {} if mixer.config.gate else {"z": "a model with gate=False has no z"}
    if not mixer.sizes:
        out["x"] = "nothing is computed from x with selective='', so it does not pass by; conv_in does"
    return out


def listen(block: nn.Module, part: str, f: Listener):
    """Calls f with a part of a block each time it is computed, and puts in its place what f returns, unless None.

    Returns the handle of the hook. Raises AnymambaError for a part that does not exist.
    """
    mixer = block.mixer
    if part in absent(mixer):
        raise AnymambaError(f"part {part!r}: {absent(mixer)[part]}")
    if part in constants(mixer):
        raise AnymambaError(f"part {part!r} does not depend on the input here: change the parameter of the mixer")
    if part in ("conv_in", "z"):
        pieces = 2 if mixer.config.gate else 1
        return mixer.in_proj.register_forward_hook(_of_split(part == "z", lambda xz: xz.chunk(pieces, -1), f))
    if part in ("B", "C"):
        names, sizes, eps = list(mixer.sizes), list(mixer.sizes.values()), mixer.config.inner_norm_eps
        normed = f if eps is None else lambda v: f(inner_norm(v, eps))
        return mixer.x_proj.register_forward_hook(_of_split(names.index(part), lambda v: v.split(sizes, -1), normed))
    if part == "dt":
        return mixer.dt_proj.register_forward_hook(_of_dt(f))
    if part in ("x", "y"):
        module = mixer.x_proj if part == "x" else mixer.out_proj
        return module.register_forward_pre_hook(lambda _, args: _given(f(args[0]), args[0]))
    if part == "out":
        return mixer.out_proj.register_forward_hook(lambda _, args, out: _given(f(out), out))
    if part == "residual":
        return block.register_forward_pre_hook(lambda _, args: _of_residual(args, f))
    if part == "state":
        return mixer.register_forward_pre_hook(lambda module, args: _of_state(module, args, f))
    raise AnymambaError(f"there is no part {part!r}; parts are {', '.join(PARTS)}")


def _given(new, old):
    return None if new is None else new.to(old.dtype)


def _of_split(i, split, f):
    def hook(module, args, out):
        pieces = list(split(out))
        new = f(pieces[i])
        if new is None:
            return None
        pieces[i] = new.to(out.dtype)
        return torch.cat(pieces, -1)

    return hook


def _of_dt(f):
    def hook(module, args, raw):
        real = torch.promote_types(raw.dtype, torch.float32)
        bias = module.bias.to(real)
        new = f(F.softplus(raw.to(real) + bias))
        # the scan adds the bias and takes the softplus itself: hand it what that turns into the new steps
        return None if new is None else (_before_softplus(new) - bias).to(raw.dtype)

    return hook


def _before_softplus(steps):
    wrong = ~(steps.isfinite() & (steps >= 0))
    if bool(wrong.any()):
        raise AnymambaError(f"dt holds {steps[wrong][0].item()}, but step sizes are finite and at least 0; 0 passes a "
                            "token by")  # fmt: skip
    some = steps > 0
    steps = torch.where(some, steps, 1)  # so that no gradient is NaN where the branch is not taken
    return torch.where(some, steps + torch.log(-torch.expm1(-steps)), NO_STEP)


def _of_residual(args, f):
    x, residual, *rest = args
    new = f(x.to(torch.promote_types(x.dtype, torch.float32)) if residual is None else x + residual)
    return None if new is None else (torch.zeros_like(x), new, *rest)


def _of_state(mixer, args, f):
    u, before, *rest = (*args, None)[: max(2, len(args))]
    c = mixer.config
    if before is None:
        rows = u.shape[0] if not rest or rest[0] is None else rest[0].numel() - 1
        conv, ssm = (rows, c.d_inner, c.conv_width), (rows, c.d_inner, c.d_state)
        before = LayerState(u.new_zeros(conv), mixer.A_log.new_zeros(ssm))
    new = f(before.ssm)
    return None if new is None else (u, LayerState(before.conv, new), *rest)
