"""What a model has read, as a value: a few tensors of fixed size however long the text was.

Axes: b rows, d d_inner, w d_conv, n d_state.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.files import write_atomically

FORMAT = "anymamba-state-1"
EXTRA = "extra."  # begins the names of tensors in a file that are not of the state


class LayerState(NamedTuple):
    """State of one layer: `conv` (b,d,w-1) its last inputs, (b,d,0) where nothing convolves, and `ssm` (b,d,n) float32.

    What a mixer other than Mamba remembers is `ssm`, too: real and imaginary parts of S4D's n/2 numbers side by side
    (S4's n are real), h of an RNN or GRU (b,d,1), h and c of an LSTM (b,d,2).
    """

    conv: Tensor
    ssm: Tensor


@dataclass(frozen=True, eq=False)  # tensors have no single truth value: compare them yourself
class MambaState:
    """State of a model for b sequences. Immutable: every method returns a new one, so a state can be shared freely."""

    layers: tuple[LayerState, ...]
    seen: Tensor  # (b,) int64: how many tokens each row has read

    @classmethod
    def zeros(cls, config: MambaConfig, batch_size: int, *, device=None, dtype: torch.dtype | None = None) -> Self:
        """The state before the first token. `dtype` is that of the activations (the SSM state is float32)."""
        d, n, w = config.d_inner, config.state_width, config.conv_width
        layer = lambda: LayerState(  # noqa: E731
            torch.zeros(batch_size, d, w, device=device, dtype=dtype), torch.zeros(batch_size, d, n, device=device)
        )
        seen = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return cls(tuple(layer() for _ in range(config.n_layer)), seen)

    @property
    def batch_size(self) -> int:
        return self.seen.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(v.numel() * v.element_size() for v in (self.seen, *(v for layer in self.layers for v in layer)))

    def _map(self, f: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(tuple(LayerState(f(c), f(s)) for c, s in self.layers), f(self.seen))

    def copy(self) -> Self:
        """A state with storage of its own."""
        return self._map(torch.clone)

    def detach(self) -> Self:
        """The same values without history: what truncated backpropagation through time carries on."""
        return self._map(torch.detach)

    def select(self, rows: Tensor | Sequence[int]) -> Self:
        """Rows by index, in that order; an index may repeat or be left out.

        Raises AnymambaError for an index that does not exist.
        """
        index = torch.as_tensor(rows)  # a list is checked here: to look at it on a GPU would stop that
        if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):
            raise AnymambaError(f"state.select: rows are {index.dtype}, but must be integers, the indices of rows")
        index = index.to(torch.int64)
        if index.numel() and not (0 <= int(index.min()) and int(index.max()) < self.batch_size):
            raise AnymambaError(
                f"state.select: rows {index.tolist()}, but the state has rows 0 … {self.batch_size - 1}"
            )
        index = index.to(self.seen.device, non_blocking=True)
        return self._map(lambda v: v.index_select(0, index))

    def fork(self, copies: int) -> Self:
        """Each row `copies` times in a row: many continuations of one text read once."""
        return self._map(lambda v: v.repeat_interleave(copies, 0))

    @classmethod
    def cat(cls, states: Iterable[Self]) -> Self:
        """The rows of several states of one model, one after the other. Raises AnymambaError if shapes differ."""
        states = list(states)
        shapes = {tuple((c.shape[1:], s.shape[1:]) for c, s in state.layers) for state in states}
        if len(shapes) != 1:
            raise AnymambaError(f"MambaState.cat: {len(states)} states of {len(shapes)} models; states must be of one")
        layers = tuple(
            LayerState(*(torch.cat(parts) for parts in zip(*layer, strict=True)))
            for layer in zip(*(state.layers for state in states), strict=True)
        )
        return cls(layers, torch.cat([state.seen for state in states]))

    def to(self, device=None, dtype: torch.dtype | None = None, ssm_dtype: torch.dtype | None = None) -> Self:
        """Moved to a device; `dtype` for the convolution's inputs, `ssm_dtype` for the SSM state.

        Lower the latter only to save space: the recurrence itself always runs in float32.
        """
        layers = tuple(LayerState(c.to(device, dtype), s.to(device, ssm_dtype)) for c, s in self.layers)
        return type(self)(layers, self.seen.to(device))

    # ---- files ----

    def save(self, path: str | os.PathLike, model, **extra: Tensor) -> None:
        """Write to a safetensors file, with the fingerprint of the `MambaLM` that read the text. Atomic.

        `extra` tensors are kept beside the state; `load_with` gives them back. Raises AnymambaError if the file cannot
        be written.
        """
        from safetensors.torch import save_file

        tensors = {"seen": self.seen, **{EXTRA + k: v for k, v in extra.items()}}
        for i, (conv, ssm) in enumerate(self.layers):
            tensors |= {f"layers.{i}.conv": conv, f"layers.{i}.ssm": ssm}
        tensors = {k: v.detach().contiguous() for k, v in tensors.items()}
        meta = {"format": FORMAT, "model": model.fingerprint()}
        write_atomically(path, lambda part: save_file(tensors, part, metadata=meta))

    @classmethod
    def load(cls, path: str | os.PathLike, model) -> Self:
        """Read a file that `save` wrote, onto the device of `model`.

        Raises AnymambaError if the file is not a state, is damaged, or belongs to another model.
        """
        return cls.load_with(path, model)[0]

    @classmethod
    def load_with(cls, path: str | os.PathLike, model) -> tuple[Self, dict[str, Tensor]]:
        """`load`, and the extra tensors that were saved with the state, by name."""
        with _open(path, str(model.device)) as file:
            meta, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        if meta.get("model") != model.fingerprint():
            raise AnymambaError(
                f"{path} is the state of another model:\n  state of  {meta.get('model')}\n  this is   "
                f"{model.fingerprint()}\nLoad the model that read the text, or read it again with this one."
            )
        count = model.config.n_layer
        try:
            layers = tuple(LayerState(tensors[f"layers.{i}.conv"], tensors[f"layers.{i}.ssm"]) for i in range(count))
            state = cls(layers, tensors["seen"])
        except KeyError as error:
            raise AnymambaError(f"{path} has no tensor {error}; read the text again") from None
        return state, {k.removeprefix(EXTRA): v for k, v in tensors.items() if k.startswith(EXTRA)}


def check_state(state: MambaState, config: MambaConfig, rows: int) -> None:
    """Raises AnymambaError unless `state` is one of so many rows, of a model of this config."""
    if not isinstance(state, MambaState):
        raise AnymambaError(
            f"state is a {type(state).__name__}, but must be a MambaState: `.state` of an earlier output"
        )
    want = (rows, config.d_inner, config.state_width)
    got = tuple(state.layers[0].ssm.shape)
    if len(state.layers) != config.n_layer or got != want:
        raise AnymambaError(
            f"the state has {len(state.layers)} layers of (rows, d_inner, d_state) = {got}, but this input and "
            f"model need {config.n_layer} of {want}; use state.select or fork for other rows"
        )


@dataclass(frozen=True, eq=False)
class StateHistory:
    """The states of a model at p places of the text that it has just read, as `MambaLM.forward(return_states=k)` gives
    them: after k, 2k, … tokens and after the last."""

    layers: tuple[LayerState, ...]  # with one more axis: conv (b,p,d,w-1), ssm (b,p,d,n)
    counts: tuple[int, ...]  # tokens of that text read at each place
    seen: Tensor  # (b,p) int64: how many tokens each row has read in all

    def after(self, tokens: int | Sequence[int] | Tensor) -> MambaState:
        """The state after so many tokens of the text: one number for all rows, or one for each.

        It has storage of its own. Raises AnymambaError where no state was kept.
        """
        rows, index = len(self.seen), torch.as_tensor(tokens)
        counts = index.expand(rows).tolist() if index.dim() == 0 else index.tolist()
        if len(counts) != rows or not all(count in self.counts for count in counts):
            places = f"after {', '.join(map(str, self.counts[:8]))}{', …' if len(self.counts) > 8 else ''} tokens"
            raise AnymambaError(f"state after {counts} tokens, but there are {rows} rows with states {places}")
        places = torch.tensor([self.counts.index(count) for count in counts], device=self.seen.device)
        rows = torch.arange(rows, device=self.seen.device)
        layers = tuple(LayerState(conv[rows, places], ssm[rows, places]) for conv, ssm in self.layers)
        return MambaState(layers, self.seen[rows, places])


def places(t: int, k: int) -> tuple[int, ...]:
    """After how many of t tokens a state is kept: every k, and all. Raises AnymambaError for a k below 1."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise AnymambaError(f"return_states={k!r}, but it must be a whole number of tokens, at least 1")
    return tuple(min(start + k, t) for start in range(0, t, k))


class StateInfo(NamedTuple):
    """What a state file says of itself."""

    model: str  # fingerprint of the model that read the text
    seen: list[int]  # tokens that each row has read
    layers: int
    conv: tuple[int, ...]  # shape (b,d,w-1) of a layer's last inputs
    ssm: tuple[int, ...]  # shape (b,d,n) of a layer's SSM state
    dtypes: tuple[torch.dtype, torch.dtype]  # of the two
    extra: list[str]  # names of what was saved beside the state
    nbytes: int  # of the file


def state_info(path: str | os.PathLike) -> StateInfo:
    """What is in a state file, without its model. Raises AnymambaError if it is no state or is damaged."""
    with _open(path, "cpu") as file:
        names = sorted(file.keys())
        layers = sum(name.endswith(".ssm") for name in names)
        seen, conv, ssm = (file.get_tensor(name) for name in ("seen", "layers.0.conv", "layers.0.ssm"))
        extra = [name.removeprefix(EXTRA) for name in names if name.startswith(EXTRA)]
        shapes, dtypes = (tuple(conv.shape), tuple(ssm.shape)), (conv.dtype, ssm.dtype)
        model = file.metadata().get("model", "unknown")
    return StateInfo(model, seen.tolist(), layers, *shapes, dtypes, extra, Path(path).stat().st_size)


@contextmanager
def _open(path, device):
    """A state file, open. Raises AnymambaError if it is not there, not readable or none of ours."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise AnymambaError(f"no state file at {path}")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            found = (file.metadata() or {}).get("format", "no anymamba format")
            if found != FORMAT:
                raise AnymambaError(f"{path} is not an anymamba state: it says {found!r}, expected {FORMAT!r}")
            yield file
    except (SafetensorError, OSError) as error:
        raise AnymambaError(f"{path} is not a readable state file ({error}); read the text again") from None
