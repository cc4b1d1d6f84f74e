"""The parts of a block that can be seen and replaced, through plain hooks on its modules.

A hook makes the mixer take its own lines instead of the joined path for training or decoding, on every backend.
Axes: b batch, t time, m d_model, d d_inner, n d_state.

| part | shape | what it is |
|---|---|---|
| `residual` | (b,t,m) | the residual stream before the block, float32 |
| `conv_in` | (b,t,d) | what goes into the convolution |
| `x` | (b,t,d) | what goes into the scan: convolved, after silu; replaced through `conv_in` |
| `dt` | (b,t,d) | step size after softplus, float32 |
| `B`, `C` | (b,t,n) | input and output matrices |
| `z` | (b,t,d) | gate, before silu |
| `y` | (b,t,d) | what the scan gives, with D and the gate |
| `out` | (b,t,m) | what the block adds to the residual stream |
| `state` | (b,d,n) | the state that the scan starts from, float32 |
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.layers import MambaMixer
from anymamba.layers.norm import inner_norm
from anymamba.state import LayerState

PARTS = ("residual", "conv_in", "x", "dt", "B", "C", "z", "y", "out", "state")
# fields of a config by which a model computes something else than the equations of this room
OF_OTHERS = ("discretization", "mixer", "selective", "gate", "use_conv")

Listener = Callable[[Tensor], Tensor | None]  # takes the value of a part; what it returns replaces it


def check_model(model: nn.Module) -> None:
    """Raises AnymambaError for a model whose layers are not Mamba's selective scan."""
    for block in model.backbone.layers:
        if type(block.mixer) is not MambaMixer:
            raise AnymambaError(f"inspect: a layer is a {type(block.mixer).__name__}, but only MambaMixer can be seen")
        for name in OF_OTHERS:
            usual = getattr(MambaConfig, name, None)
            if (got := getattr(block.mixer.config, name, usual)) != usual:
                raise AnymambaError(f"inspect: a layer has {name}={got!r}, but only {usual!r} can be looked into")


def choose_layers(model: nn.Module, layers: int | Iterable[int] | None) -> list[int]:
    """Indices of layers, all if None; -1 is the last. Raises AnymambaError for one that does not exist."""
    check_model(model)
    count = len(model.backbone.layers)
    chosen = [layers] if isinstance(layers, int) else list(range(count) if layers is None else layers)
    if not chosen or not all(isinstance(i, int) and -count <= i < count for i in chosen):
        raise AnymambaError(f"inspect: layers are {chosen}, but the model has layers 0 … {count - 1}")
    return list(dict.fromkeys(i % count for i in chosen))


def listen(block: nn.Module, part: str, f: Listener):
    """Calls f with a part of a block each time it is computed, and puts in its place what f returns, unless None.

    Returns the handle of the hook. Raises AnymambaError for a part that does not exist.
    """
    mixer = block.mixer
    if part in ("conv_in", "z"):
        return mixer.in_proj.register_forward_hook(_of_split(part == "z", lambda xz: xz.chunk(2, -1), f))
    if part in ("B", "C"):
        config = mixer.config
        sizes = [config.rank, config.d_state, config.d_state]
        normed = f if config.inner_norm_eps is None else lambda v: f(inner_norm(v, config.inner_norm_eps))
        return mixer.x_proj.register_forward_hook(_of_split("_BC".index(part), lambda v: v.split(sizes, -1), normed))
    if part == "dt":
        return mixer.dt_proj.register_forward_hook(_of_dt(mixer, f))
    if part in ("x", "y"):
        module = mixer.x_proj if part == "x" else mixer.out_proj
        return module.register_forward_pre_hook(lambda _, args: _given(f(args[0]), args[0]))
    if part == "out":
        return mixer.out_proj.register_forward_hook(lambda _, args, out: _given(f(out), out))
    if part == "residual":
        return block.register_forward_pre_hook(lambda _, args: _of_residual(args, f))
    if part == "state":
        return mixer.register_forward_pre_hook(lambda module, args: _of_state(module, args, f))
    raise AnymambaError(f"inspect: there is no part {part!r}; parts are {', '.join(PARTS)}")


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


def _of_dt(mixer, f):
    def hook(module, args, raw):
        real = torch.promote_types(raw.dtype, torch.float32)
        bias = module.bias.to(real)
        new = f(F.softplus(raw.to(real) + bias))
        # the scan adds the bias and takes the softplus itself: hand it what that turns into the new steps
        return None if new is None else (new + torch.log(-torch.expm1(-new)) - bias).to(raw.dtype)

    return hook


def _of_residual(args, f):
    x, residual, *rest = args
    new = f(x.to(torch.promote_types(x.dtype, torch.float32)) if residual is None else x + residual)
    return None if new is None else (torch.zeros_like(x), new, *rest)


def _of_state(mixer, args, f):
    u, before, *rest = (*args, None)[: max(2, len(args))]
    d, n, w = mixer.config.d_inner, mixer.config.d_state, mixer.config.d_conv
    if before is None:
        rows = u.shape[0] if not rest or rest[0] is None else rest[0].numel() - 1
        before = LayerState(u.new_zeros(rows, d, w - 1), mixer.A_log.new_zeros(rows, d, n))
    new = f(before.ssm)
    return None if new is None else (u, LayerState(before.conv, new), *rest)
