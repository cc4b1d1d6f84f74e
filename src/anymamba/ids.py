"""What people have as tensors: arrays and lists, of token ids above all."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from anymamba.errors import AnymambaError

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def as_ids(ids: Any, who: str, device: torch.device | str | None = None) -> Tensor:
    """`ids` as a tensor; what is none yet goes to `device`. Whole numbers become int64 or stay int32, as an embedding
    takes them; other types are left for the caller to refuse.

    Raises AnymambaError, which begins with `who`, for what makes no tensor.
    """
    ids = as_tensor(ids, who, device, "whole numbers")
    return ids.long() if ids.dtype in WHOLE[2:] else ids


def as_tensor(v: Any, who: str, device: torch.device | str | None = None, what: str = "numbers") -> Tensor:
    """A tensor as it is, and anything else as one on `device`. Raises AnymambaError, which begins with `who`, for what
    makes none."""
    if isinstance(v, Tensor):
        return v
    try:
        # lists by way of numpy, which takes a fifth of the time: a prompt may have 100,000 tokens
        array = np.asarray(v) if isinstance(v, list) else v
        if isinstance(array, np.ndarray):  # torch takes no reversed ones, and none that must not be written to
            array = np.require(array, requirements="CW")
        return torch.as_tensor(array, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{who}: a {type(v).__name__} that makes no tensor ({error})"
        raise AnymambaError(f"{got}; give {what}, in rows of one length") from None


def check_labels(labels: Tensor, shape: tuple[int, int], vocab_size: int | None) -> None:
    """Raises AnymambaError for labels that are not (b,t) int64, or for a model without a vocabulary."""
    if vocab_size is None:
        raise AnymambaError("labels need a vocabulary to predict, and this model has none")
    if labels.shape != shape or labels.dtype != torch.int64:
        raise AnymambaError(
            f"labels are {tuple(labels.shape)} {labels.dtype}, but must be (batch, seqlen) = {shape} torch.int64: "
            "for each position the token that follows, -100 where it does not count"
        )
