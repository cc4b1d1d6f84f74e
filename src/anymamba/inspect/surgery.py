"""Changing what a model holds: its state between calls, its activations within one.

A state is read from `MambaOutput.state`, and `state.layers[i].ssm` (b,d,n) is what layer i holds of the text.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from anymamba.errors import AnymambaError
from anymamba.inspect.capture import refuse_recompute
from anymamba.inspect.checks import check_state, choose_layers, indices, is_finite, is_whole, language_model
from anymamba.inspect.parts import check_model, listen
from anymamba.state import LayerState, MambaState

REPLACEABLE = ("residual", "conv_in", "dt", "B", "C", "z", "y", "out", "state")


def edit_state(state: MambaState, edit: Callable[[Tensor], Tensor], layers: int | Iterable[int] | None = None):
    """A state whose SSM states (b,d,n) in these layers, all if None, are what `edit` returns for a copy of them.

    Of every kind of mixer: what n is says `LayerState`. Raises AnymambaError for layers that do not exist or an edit
    that gives no tensor of the same shape.
    """
    check_state("edit_state", state)
    if not callable(edit):
        raise AnymambaError(f"edit_state: edit={edit!r}, but it must be a function of a state (b,d,n), such as "
                            "torch.zeros_like")  # fmt: skip
    chosen = _layers_of(state, layers)
    return MambaState(tuple(_edited(layer, edit) if i in chosen else layer for i, layer in enumerate(state.layers)),
                      state.seen)  # fmt: skip


def _edited(layer, edit):
    new = edit(layer.ssm.clone())
    got = tuple(new.shape) if isinstance(new, Tensor) else f"a {type(new).__name__}"
    if got != tuple(layer.ssm.shape):
        raise AnymambaError(f"edit_state: {got} for a state of {tuple(layer.ssm.shape)}; edit must return a tensor of "
                            "that shape")  # fmt: skip
    return LayerState(layer.conv, new.to(layer.ssm))


def mix_states(a: MambaState, b: MambaState, weight: float, layers: int | Iterable[int] | None = None) -> MambaState:
    """(1 − weight)·a + weight·b, states and the convolutions' inputs, in these layers (all if None); elsewhere a.

    The count of tokens read is a's. Raises AnymambaError for states that differ in shapes, dtype or device, and for a
    weight that is no number.
    """
    for state in (a, b):
        check_state("mix_states", state)
    if not is_finite(weight):
        raise AnymambaError(f"mix_states: weight={weight!r}, but it must be a finite number: the share of b")
    kinds = [[(v.shape, v.dtype, v.device) for layer in state.layers for v in layer] for state in (a, b)]
    if kinds[0] != kinds[1]:
        raise AnymambaError(f"mix_states: {a.batch_size} and {b.batch_size} rows, two models, dtypes or devices; take "
                            "states of one model with as many rows, and `to` where they lie elsewhere")  # fmt: skip
    chosen = _layers_of(a, layers)
    mixed = [LayerState(*(torch.lerp(v, w, weight) for v, w in zip(x, y, strict=True))) if i in chosen else x
             for i, (x, y) in enumerate(zip(a.layers, b.layers, strict=True))]  # fmt: skip
    return MambaState(tuple(mixed), a.seen)


def _layers_of(state, layers):
    return set(indices("layers", "state", layers, len(state.layers)))


@contextmanager
def patch(model: nn.Module, layers: int | Iterable[int] | None, part: str,
          value: Tensor | Callable[[Tensor], Tensor], *, tokens: slice | None = None) -> Iterator[None]:  # fmt: skip
    """While this is open, a part of these layers (all if None) is what `value` says: a tensor, for example of another
    run's `LayerTrace`, or a function of what it would have been. Patches can be nested.

    Args:
        model: as `recording` takes it.
        part: one of `parts.PARTS` but x, whose place is conv_in. A step dt of 0 passes a token by, and no gradient on.
            "state" replaces the state that each call starts from.
        tokens: a slice of the time axis with whole bounds, all if None. They count from the first token of each call
            of the model, and `generate` calls it once for each piece of the prompt (of prefill_chunk tokens), then
            once for each token: there, `value` is best a function, which every call asks. Give it no PrefixCache, which
            would keep states of the patched model.

    Raises AnymambaError for other parts, and, when the model runs, for a value that does not fit.
    """
    check_model(model)
    if part not in REPLACEABLE:
        raise AnymambaError(f"patch: {part!r} cannot be replaced; parts that can are {', '.join(REPLACEABLE)}")
    if not isinstance(value, Tensor) and not callable(value):
        raise AnymambaError(f"patch: a {type(value).__name__} for {part}: give a tensor, or a function of what it was")
    _check_tokens(tokens, part)
    model, chosen = language_model(model), choose_layers(model, layers)
    for i in chosen:
        if part in ("B", "C") and model.backbone.layers[i].mixer.config.inner_norm_eps is not None:
            raise AnymambaError(f"patch: {part} of layer {i} is normed behind its place; patch conv_in")
    with ExitStack() as stack:
        place = _Place(part, packed_too=tokens is None and not isinstance(value, Tensor))
        stack.callback(model.register_forward_pre_hook(place.enter, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(place.leave, always_call=True).remove)
        for i in chosen:
            replace = _replace_state(value, place) if part == "state" else _replace_tokens(part, value, tokens, place)
            stack.callback(listen(model.backbone.layers[i], part, replace).remove)
        yield


def _check_tokens(tokens, part):
    if tokens is None:
        return
    fits = isinstance(tokens, slice) and part != "state" and tokens.step in (None, 1)
    if not fits or not all(v is None or (is_whole(v) and v >= 0) for v in (tokens.start, tokens.stop)):
        raise AnymambaError(f"patch: {tokens=} of {part!r}: it must be a slice from the front, of a part with time: "
                            "slice(3, 4) is token 3")  # fmt: skip


class _Place:
    """Where in the text a call of the model is: it reads a long one in pieces, by calling itself."""

    def __init__(self, part: str, packed_too: bool):
        self.part, self.packed_too, self.depth, self.read, self.total = part, packed_too, 0, 0, None

    def enter(self, model, args, kwargs):
        self.depth += 1  # `leave` is called even if what follows refuses
        ids, _, lengths, cu_seqlens = (*args, *[None] * 4)[:4]
        packed = (lengths, cu_seqlens, kwargs.get("lengths"), kwargs.get("cu_seqlens"))
        if not self.packed_too and any(v is not None for v in packed):
            raise AnymambaError("patch: with lengths or cu_seqlens tokens lie elsewhere; give rows of one length")
        if self.part == "dt" and kwargs.get("delta") is not None:
            raise AnymambaError("patch: dt with gaps in time (delta), which would multiply it; leave delta out")
        refuse_recompute(model)
        if self.depth == 1:
            source = next((v for v in (ids, kwargs.get("ids"), kwargs.get("embeddings")) if v is not None), ())
            self.read, self.total = 0, (*np.shape(source), 0, 0)[1]  # the model refuses what has no time axis

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
    if not isinstance(new, Tensor):
        raise AnymambaError(f"patch: a {type(new).__name__} in place of {part}, which is {tuple(old.shape)}: the "
                            "function must return a tensor")  # fmt: skip
    try:
        return new.to(old.device, old.dtype).expand_as(old)
    except RuntimeError:
        raise AnymambaError(f"patch: {tuple(new.shape)} in place of {part}, which is {tuple(old.shape)}") from None
