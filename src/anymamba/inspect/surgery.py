"""Changing what a model holds: its state between calls, its activations within one.

A state is read from `MambaOutput.state`, and `state.layers[i].ssm` (b,d,n) is what layer i holds of the text.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from anymamba.errors import AnymambaError
from anymamba.inspect.parts import choose_layers, listen
from anymamba.state import LayerState, MambaState

REPLACEABLE = ("residual", "conv_in", "dt", "B", "C", "z", "y", "out", "state")


def edit_state(state: MambaState, edit: Callable[[Tensor], Tensor], layers: int | Iterable[int] | None = None):
    """A state whose SSM states (b,d,n) in these layers, all if None, are what `edit` returns for a copy of them.

    Raises AnymambaError for layers that do not exist or an edit that changes the shape.
    """
    chosen = _layers_of(state, layers)
    return MambaState(tuple(_edited(layer, edit) if i in chosen else layer for i, layer in enumerate(state.layers)),
                      state.seen)  # fmt: skip


def _edited(layer, edit):
    new = edit(layer.ssm.clone())
    if new.shape != layer.ssm.shape:
        raise AnymambaError(f"edit_state: {tuple(new.shape)} for a state of {tuple(layer.ssm.shape)}; keep the shape")
    return LayerState(layer.conv, new.to(layer.ssm.dtype))


def mix_states(a: MambaState, b: MambaState, weight: float, layers: int | Iterable[int] | None = None) -> MambaState:
    """(1 − weight)·a + weight·b, states and the convolutions' inputs, in these layers (all if None); elsewhere a.

    The count of tokens read is a's. Raises AnymambaError for states of different shapes.
    """
    shapes = [[(c.shape, s.shape) for c, s in state.layers] for state in (a, b)]
    if shapes[0] != shapes[1]:
        raise AnymambaError(f"mix_states: {a.batch_size} and {b.batch_size} rows, or two models; take states of one "
                            "model with as many rows")  # fmt: skip
    chosen = _layers_of(a, layers)
    mixed = [LayerState(*(torch.lerp(v, w, weight) for v, w in zip(x, y, strict=True))) if i in chosen else x
             for i, (x, y) in enumerate(zip(a.layers, b.layers, strict=True))]  # fmt: skip
    return MambaState(tuple(mixed), a.seen)


def _layers_of(state, layers):
    count = len(state.layers)
    chosen = [layers] if isinstance(layers, int) else list(range(count) if layers is None else layers)
    if not all(-count <= i < count for i in chosen):
        raise AnymambaError(f"layers are {chosen}, but the state has layers 0 … {count - 1}")
    return {i % count for i in chosen}


@contextmanager
def patch(model: nn.Module, layers: int | Iterable[int] | None, part: str,
          value: Tensor | Callable[[Tensor], Tensor], *, tokens: slice | None = None) -> Iterator[None]:  # fmt: skip
    """While this is open, a part of these layers (all if None) is what `value` says: a tensor, for example of another
    run's `LayerTrace`, or a function of what it would have been. Patches can be nested.

    part: one of `parts.PARTS` but x, whose place is conv_in. "state" replaces the state that each call starts from.
    tokens: a slice of the time axis with whole bounds, counted from the first token of each call; all if None.
    Raises AnymambaError for other parts, and, when the model runs, for a value that does not fit.
    """
    if part not in REPLACEABLE:
        raise AnymambaError(f"patch: {part!r} cannot be replaced; parts that can are {', '.join(REPLACEABLE)}")
    if tokens is not None and (part == "state" or tokens.step not in (None, 1) or (tokens.start or 0) < 0
                               or (tokens.stop is not None and tokens.stop < 0)):  # fmt: skip
        raise AnymambaError(f"patch: {tokens=} of {part!r}: it must be a slice from the front, of a part with time")
    chosen = choose_layers(model, layers)
    for i in chosen:
        if part in ("B", "C") and model.backbone.layers[i].mixer.config.inner_norm_eps is not None:
            raise AnymambaError(f"patch: {part} of layer {i} is normed behind its place; patch conv_in")
    with ExitStack() as stack:
        place = _Place(packed_too=tokens is None and not isinstance(value, Tensor))
        stack.callback(model.register_forward_pre_hook(place.enter, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(place.leave, always_call=True).remove)
        for i in chosen:
            replace = _replace_state(value, place) if part == "state" else _replace_tokens(part, value, tokens, place)
            stack.callback(listen(model.backbone.layers[i], part, replace).remove)
        yield


class _Place:
    """Where in the text a call of the model is: it reads a long one in pieces, by calling itself."""

    def __init__(self, packed_too: bool):
        self.packed_too, self.depth, self.read, self.total = packed_too, 0, 0, None

    def enter(self, model, args, kwargs):
        ids, _, lengths, cu_seqlens = (*args, *[None] * 4)[:4]
        packed = (lengths, cu_seqlens, kwargs.get("lengths"), kwargs.get("cu_seqlens"))
        if not self.packed_too and any(v is not None for v in packed):
            raise AnymambaError("patch: with lengths or cu_seqlens tokens lie elsewhere; give rows of one length")
        if self.depth == 0:
            source = next(v for v in (ids, kwargs.get("ids"), kwargs.get("embeddings")) if v is not None)
            self.read, self.total = 0, np.shape(source)[1]
        self.depth += 1

    def leave(self, model, args, output):
        self.depth -= 1
        if output is not None:
            self.read += output.hidden.shape[1]


def _replace_state(value, place):
    def replace(old):
        if place.read:  # a later piece of the same call
            return None
        return _fitting("state", value if isinstance(value, Tensor) else value(old), old)

    return replace


def _replace_tokens(part, value, tokens, place):
    def replace(old):
        if place.packed_too:
            return _fitting(part, value(old), old)
        start = (tokens and tokens.start) or 0
        stop = place.total if tokens is None or tokens.stop is None else tokens.stop
        if not start < stop <= place.total:
            raise AnymambaError(f"patch: tokens {start} … {stop - 1} of {part}, but the text has {place.total}")
        low, high = max(start - place.read, 0), min(stop - place.read, old.shape[1])
        if low >= high:
            return None  # they are in another piece
        here = old[:, low:high]
        if isinstance(value, Tensor):
            if value.dim() != 3 or value.shape[1] != stop - start:
                raise AnymambaError(
                    f"patch: {tuple(value.shape)} for {stop - start} tokens of {part}, which is (b,t,…)"
                )
            at = low + place.read - start
            new = value[:, at : at + high - low]
        else:
            new = value(here)
        return torch.cat([old[:, :low], _fitting(part, new, here), old[:, high:]], 1)

    return replace


def _fitting(part, new, old):
    try:
        return new.to(old.device, old.dtype).expand_as(old)
    except RuntimeError:
        raise AnymambaError(f"patch: {tuple(new.shape)} in place of {part}, which is {tuple(old.shape)}") from None
