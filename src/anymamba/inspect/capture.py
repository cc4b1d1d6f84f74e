"""What the scan of each layer saw while a model read.

Axes: b batch, t time, m d_model, d d_inner, n d_state.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anymamba.errors import AnymambaError
from anymamba.inspect.parts import PARTS, choose_layers, listen
from anymamba.model import MambaOutput

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
    B: Tensor | None = None  # (b,t,n)
    C: Tensor | None = None  # (b,t,n)
    z: Tensor | None = None  # (b,t,d)
    y: Tensor | None = None  # (b,t,d) with D and the gate
    out: Tensor | None = None  # (b,t,m)
    state: Tensor | None = None  # (b,d,n) before the first token

    def need(self, *parts: str) -> list[Tensor]:
        """These parts, in this order. Raises AnymambaError if one was not kept."""
        missing = [part for part in parts if getattr(self, part) is None]
        if missing:
            raise AnymambaError(f"layer {self.layer} was recorded without {', '.join(missing)}: add them to keep")
        return [getattr(self, part) for part in parts]


@dataclass(frozen=True, eq=False)
class Trace:
    """A recorded run: its layers by index, and what the model gave."""

    layers: dict[int, LayerTrace]
    output: MambaOutput


class Recording:
    """What `recording` has kept so far."""

    def __init__(self, model: nn.Module, kept: dict[int, dict[str, list[Tensor]]]):
        self._model, self._kept = model, kept

    def layer(self, i: int) -> LayerTrace:
        """One layer; calls of the model one after the other are joined in time.

        Raises AnymambaError if the model has not run, or the layer was not asked for.
        """
        if i not in self._kept or not all(self._kept[i].values()):
            raise AnymambaError(f"nothing is recorded of layer {i}: ask for it in layers, and run the model within")
        mixer = self._model.backbone.layers[i].mixer
        values = {k: v[0] if k == "state" else torch.cat(v, 1) for k, v in self._kept[i].items()}
        with torch.no_grad():
            return LayerTrace(i, mixer._A(), mixer.D.detach(), **values)


@contextmanager
def recording(
    model: nn.Module, layers: int | Iterable[int] | None = None, keep: Iterable[str] = SCAN
) -> Iterator[Recording]:
    """While this is open, whatever runs the model is recorded: a forward pass, or decoding token by token.

    layers: which, all if None. keep: which of `parts.PARTS`; nothing else takes memory. Values are detached copies.
    Rows must be of one length (no cu_seqlens, no lengths). Raises AnymambaError for other layers or parts.
    """
    keep = [keep] if isinstance(keep, str) else list(keep)
    if not keep or not set(keep) <= set(PARTS):
        raise AnymambaError(f"inspect: keep={keep}, but parts are {', '.join(PARTS)}")
    kept = {i: {part: [] for part in keep} for i in choose_layers(model, layers)}
    with ExitStack() as stack:
        for i, parts in kept.items():
            block = model.backbone.layers[i]
            stack.callback(block.register_forward_pre_hook(_refuse_others).remove)
            for part, values in parts.items():
                stack.callback(listen(block, part, _keeper(values, first_only=part == "state")).remove)
        yield Recording(model, kept)


def _keeper(values, first_only):
    def keep(v):
        if not (first_only and values):
            values.append(v.detach().clone())  # of a view: the whole would stay in memory

    return keep


def _refuse_others(block, args):
    if args[3] is not None:
        raise AnymambaError("inspect: rows of several lengths (lengths, cu_seqlens) are not recorded; give them apart")
    if len(args) > 5 and args[5] is not None:
        raise AnymambaError("inspect: steps that gaps in time (delta) multiply are not recorded; leave delta out")


@torch.no_grad()
def capture(model: nn.Module, ids, *, layers: int | Iterable[int] | None = None, keep: Iterable[str] = SCAN,
            state=None, return_states: int | None = None) -> Trace:  # fmt: skip
    """Run a model over `ids` (b,t) and keep what the scans saw; logits are of the last token only.

    layers, keep: as `recording`. state: go on from it. return_states: k also keeps the states after every k tokens,
    in `output.states`. Raises AnymambaError as `recording` and the model do.
    """
    with recording(model, layers, keep) as seen:
        output = model(ids, state=state, return_states=return_states, last_only=True)
    return Trace({i: seen.layer(i) for i in choose_layers(model, layers)}, output)
