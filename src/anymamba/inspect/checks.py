"""What this room's functions are given: refused here, with a message, and not by torch three calls deeper."""

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.generate.checks import require_vocabulary
from anymamba.ids import WHOLE, as_ids
from anymamba.model import MambaLM
from anymamba.state import MambaState


def language_model(model: Any) -> MambaLM:
    """The MambaLM that is given, or the one within a SequenceModel. Raises AnymambaError for anything else."""
    within = getattr(model, "mamba", model)
    if not isinstance(within, MambaLM):
        raise AnymambaError(f"a {type(model).__name__} cannot be looked into: give a MambaLM or a SequenceModel, as it "
                            "was before anything wrapped it")  # fmt: skip
    return within


def listed(values: Any) -> list:
    """What may be one value, several, a tensor or an array, as a list."""
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    return list(values) if hasattr(values, "__iter__") and not isinstance(values, str) else [values]


def is_whole(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.dtype in WHOLE
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def indices(what: str, owner: str, values: Any, count: int) -> list[int]:
    """Indices of `count` things, all if None, each from 0 on; -1 is the last. Raises AnymambaError for others."""
    given = list(range(count)) if values is None else listed(values)
    if not given or not all(is_whole(i) and -count <= i < count for i in given):
        raise AnymambaError(f"{what} are {given}, but the {owner} has {what} 0 … {count - 1}; give one or several of "
                            "these whole numbers")  # fmt: skip
    return [int(i) % count for i in given]


def choose_layers(model: Any, layers: Any) -> list[int]:
    """Indices of layers, each once. Raises AnymambaError for one that does not exist."""
    return list(dict.fromkeys(indices("layers", "model", layers, len(language_model(model).backbone.layers))))


def check_row(row: Any, count: int) -> None:
    if not is_whole(row) or not -count <= row < count:
        raise AnymambaError(f"row {row!r} of a batch of {count}: rows are 0 … {count - 1}")


def check_tokens(tokens: Any) -> slice:
    """A slice of the time axis, the whole if None. Raises AnymambaError for what torch cannot take as one."""
    if tokens is None:
        return slice(None)
    whole = isinstance(tokens, slice) and all(
        v is None or is_whole(v) for v in (tokens.start, tokens.stop, tokens.step)
    )
    if not whole or (tokens.step is not None and tokens.step < 1):
        raise AnymambaError(f"tokens={tokens!r}, but it must be a slice that goes forwards: slice(3, 4) is token 3")
    return tokens


def check_state(who: str, state: Any) -> None:
    if not isinstance(state, MambaState):
        raise AnymambaError(f"{who}: the state is a {type(state).__name__}, but must be a MambaState: the `state` of "
                            "what a model gives")  # fmt: skip


def checked_ids(who: str, model: Any, ids: Any, dims: int) -> Tensor:
    """Token ids (t,) or (b,t) of the model's vocabulary, on its device; there may be none.

    Raises AnymambaError for other ids, and for a model without a vocabulary.
    """
    model = language_model(model)
    require_vocabulary(who, model)
    ids = as_ids(ids, f"{who}: ids", model.device).to(model.device)
    if ids.dim() != dims or ids.dtype not in WHOLE:
        want = "(t,) of whole numbers: one text" if dims == 1 else "(b,t) of whole numbers: one text a row"
        raise AnymambaError(f"{who}: ids are {tuple(ids.shape)} {ids.dtype}, but must be {want}")
    size = model.config.vocab_size
    wrong = ids[(ids < 0) | (ids >= size)]
    if len(wrong):
        raise AnymambaError(f"{who}: id {int(wrong[0])} is outside the vocabulary of {size}: was the text encoded with "
                            "another tokenizer?")  # fmt: skip
    return ids
