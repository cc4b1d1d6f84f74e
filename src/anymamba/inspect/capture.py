"""What the scan of each layer saw while a model read.

Axes: b batch, t time, m d_model, d d_inner, n d_state.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymamba.errors import AnymambaError
from anymamba.inspect.checks import check_state, choose_layers, indices, is_whole, language_model, listed
from anymamba.inspect.parts import PARTS, absent, check_model, constants, listen
from anymamba.state import MambaState

SCAN = ("x", "dt", "B", "C", "z", "y", "state")  # all that the scan takes and gives


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """One layer of a recorded run. Parts that were not asked for are None; `parts` says what each is."""

    layer: int
    A: Tensor  # (d,n) float32, negative
    D: Tensor  # (d,) skip
    residual: Tensor | None = None  # (b,t,m)
    conv_in: Tensor | None = None  # (b,t,d)
    x: Tensor | None = None  # (b,t,d)
    dt: Tensor | None = None  # (b,t,d) after softplus
    B: Tensor | None = None  # (b,t,n), or (b,t,d,n) of a constant, a view without memory of its own
    C: Tensor | None = None  # as B
    z: Tensor | None = None  # (b,t,d)
    y: Tensor | None = None  # (b,t,d) with D and the gate
    out: Tensor | None = None  # (b,t,m)
    state: Tensor | None = None  # (b,d,n) before the first token
    discretization: str = "mamba"  # how A, B and dt make a step, see `reference.discretize`: "mamba" or "zoh"

    def need(self, *parts: str) -> list[Tensor]:
        """These parts, in this order. Raises AnymambaError if one was not kept."""
        missing = [part for part in parts if getattr(self, part) is None]
        if missing:
            raise AnymambaError(f"layer {self.layer} was recorded without {', '.join(missing)}: add them to keep, "
                                "if the model has them")  # fmt: skip
        return [getattr(self, part) for part in parts]


def need(trace: Any, *parts: str) -> list[Tensor]:
    """These parts of a layer, in this order. Raises AnymambaError for what is no layer, and as `LayerTrace.need`."""
    if not isinstance(trace, LayerTrace):
        cure = "take one layer of it: trace.layers[0]" if isinstance(trace, Trace) else "see `capture`"
        raise AnymambaError(f"a {type(trace).__name__}, but must be a LayerTrace: {cure}")
    return trace.need(*parts)


@dataclass(frozen=True, eq=False)
class Trace:
    """A recorded run: its layers by index, and what the model gave."""

    layers: dict[int, LayerTrace]
    output: Any  # MambaOutput, or SequenceOutput


@dataclass
class _Kept:
    """What is recorded of a layer: (b,t) of each call of the model, and its parts."""

    parts: dict[str, list[Tensor]]
    constants: list[str]
    calls: list[tuple[int, int]] = field(default_factory=list)
    beginnings: list[int] = field(default_factory=list)  # calls that did not go on from a state


class Recording:
    """What `recording` has kept so far."""

    def __init__(self, model: nn.Module, kept: dict[int, _Kept]):
        self._model, self._kept = model, kept

    @torch.no_grad()
    def layer(self, i: int) -> LayerTrace:
        """One layer; calls of the model one after the other are joined in time.

        Raises AnymambaError if the model has not run, the layer was not asked for, or calls are not one text.
        """
        layers = self._model.backbone.layers
        (at,) = indices("layers", "model", i, len(layers)) if is_whole(i) else (None,)
        if at not in self._kept or not self._kept[at].calls:
            raise AnymambaError(f"nothing is recorded of layer {i}: ask for it in layers, and run the model within")
        kept, mixer = self._kept[at], layers[at].mixer
        rows = list(dict.fromkeys(b for b, _ in kept.calls))
        if len(rows) > 1:
            raise AnymambaError(f"calls of {rows[0]} and of {rows[1]} rows do not join in time: a text that ends "
                                "before others leaves the batch; record one text at a time")  # fmt: skip
        if any(kept.beginnings):
            raise AnymambaError("the model was run on a second text, which did not go on from the first one's state: "
                                "record each apart")  # fmt: skip
        values = {k: v[0] if k == "state" else torch.cat(v, 1) for k, v in kept.parts.items()}
        for name in kept.constants:
            v = _constant(mixer, name)
            values[name] = v.expand(rows[0], sum(t for _, t in kept.calls), *v.shape)
        return LayerTrace(at, mixer._A(), mixer.D.detach(), **values, discretization=mixer.config.discretization)


def _constant(mixer, name):
    """A step size (d,), or an input or output matrix (d,n), that the mixer does not make from its input."""
    if name != "dt":
        return getattr(mixer, name).clone()
    return F.softplus(mixer.dt_bias.to(torch.promote_types(mixer.dt_bias.dtype, torch.float32)))


@contextmanager
def recording(model: nn.Module, layers: int | Iterable[int] | None = None,
              keep: str | Iterable[str] | None = None) -> Iterator[Recording]:  # fmt: skip
    """While this is open, whatever runs the model is recorded: a forward pass, training, or `generate`.

    Calls of the model one after the other, each with the state of the one before, are one text read in pieces. What a
    PrefixCache spares the model is not seen.

    Args:
        model: a MambaLM, or a SequenceModel whose blocks look back only.
        layers: which, all if None.
        keep: which of `parts.PARTS`; None for all that the scan takes and gives (`SCAN`), as far as the model has
            them. Nothing else takes memory. Values are detached copies.

    Rows must be of one length (no cu_seqlens, no lengths), and time regular (no delta). Raises AnymambaError for other
    layers, for parts that do not exist in this model, and when such a call is made.
    """
    check_model(model)
    model, chosen = language_model(model), choose_layers(model, layers)
    wanted = list(SCAN) if keep is None else [keep] if isinstance(keep, str) else listed(keep)
    if not wanted or not all(part in PARTS for part in wanted):
        raise AnymambaError(f"keep={wanted}, but parts are {', '.join(PARTS)}")
    kept = {}
    with ExitStack() as stack:
        for i in chosen:
            block = model.backbone.layers[i]
            parts = [part for part in wanted if keep is not None or part not in absent(block.mixer)]
            fixed = [part for part in parts if part in constants(block.mixer)]
            kept[i] = _Kept({part: [] for part in parts if part not in fixed}, fixed)
            stack.callback(block.register_forward_pre_hook(_note_call(model, kept[i])).remove)
            for part, values in kept[i].parts.items():
                stack.callback(listen(block, part, _keeper(values, first_only=part == "state")).remove)
        yield Recording(model, kept)


def _keeper(values, first_only):
    def keep(v):
        if not (first_only and values):
            values.append(v.detach().clone())  # of a view: the whole would stay in memory

    return keep


def _note_call(model, kept):
    def note(block, args):
        if args[3] is not None:
            raise AnymambaError("rows of several lengths (lengths, cu_seqlens) are not recorded; give them apart")
        if len(args) > 5 and args[5] is not None:
            raise AnymambaError("steps that gaps in time (delta) multiply are not recorded; leave delta out")
        refuse_recompute(model)
        if args[2] is None:
            kept.beginnings.append(len(kept.calls))
        kept.calls.append(tuple(args[0].shape[:2]))

    return note


def refuse_recompute(model: nn.Module) -> None:
    """Raises AnymambaError where blocks are to run a second time, in the backward pass."""
    if model.recompute and torch.is_grad_enabled():
        raise AnymambaError("a model that recomputes its blocks runs them twice: model.recompute = False, or no_grad")


@torch.no_grad()
def capture(model: nn.Module, ids, *, layers: int | Iterable[int] | None = None,
            keep: str | Iterable[str] | None = None, state: MambaState | None = None,
            return_states: int | None = None) -> Trace:  # fmt: skip
    """Run a model over a text and keep what the scans saw; logits are of the last token only.

    Args:
        ids: (b,t); of a model without a vocabulary embeddings (b,t,m), of a SequenceModel features (b,t,f).
        layers, keep: as `recording`. state: go on from it.
        return_states: k also keeps the states after every k tokens, in `output.states`; not of a SequenceModel.

    Raises AnymambaError as `recording` and the model do.
    """
    if state is not None:
        check_state("capture", state)
    lm = language_model(model)
    if lm.config.vocab_size is None and not (isinstance(ids, Tensor) and ids.is_floating_point()):
        raise AnymambaError(f"capture: a {getattr(ids, 'dtype', type(ids).__name__)} for a model that reads features: "
                            "give a tensor of real numbers, of float32 for example")  # fmt: skip
    ids = ids.to(lm.device) if isinstance(ids, Tensor) else ids
    with recording(model, layers, keep) as seen:
        if lm is not model:
            if return_states is not None:
                raise AnymambaError("return_states is for a MambaLM; a SequenceModel does not have it")
            output = model(ids, state=state)
        else:
            given = {"ids" if lm.config.vocab_size is not None else "embeddings": ids}
            output = model(**given, state=state, return_states=return_states, last_only=True)
    return Trace({i: seen.layer(i) for i in choose_layers(model, layers)}, output)
