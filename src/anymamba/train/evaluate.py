"""How well a model predicts a text, in units that compare across tokenizers and context lengths.

Axes: b batch, t time, v vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from anymamba.data import heldout_batches
from anymamba.errors import AnymambaError
from anymamba.generate.checks import require_vocabulary
from anymamba.model import MambaLM, eval_mode
from anymamba.train.hardware import to_device


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over `tokens` predicted tokens."""

    nats: float  # per token
    tokens: int
    bytes_per_token: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats) if self.nats < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer."""
        return self.nats / math.log(2) / self.bytes_per_token


@torch.no_grad()
def evaluate(
    model: MambaLM,
    tokens: np.ndarray,
    *,
    context: int = 1024,
    carry: bool = True,
    batch_size: int = 8,
    max_tokens: int | None = None,
    bytes_per_token: float = 1.0,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """The mean loss of `model` on `tokens` (n,), an array of ids that may be mapped from disk.

    carry: read the text from its beginning in chunks of `context`, each going on from the state after the one before;
        the result does not depend on `context`, which only bounds the memory. Otherwise windows of `context` tokens
        that know nothing of what stands before them, `batch_size` at a time.
    max_tokens: the first so many with carry, otherwise windows spread over the text; None for all.
    bytes_per_token: of the text, for `bits_per_byte`; 1 is right for the byte tokenizer.
    on_progress: called with the number of tokens measured so far.

    Raises AnymambaError for sizes below 1, fewer than 2 tokens, and ids outside the vocabulary.
    """
    require_vocabulary("evaluate", model)
    for name, value in {
        "context": context,
        "batch_size": batch_size,
        "max_tokens": 1 if max_tokens is None else max_tokens,
    }.items():
        if value < 1:
            raise AnymambaError(f"evaluate: {name}={value}, but it must be at least 1")
    if len(tokens) < 2:
        raise AnymambaError(f"evaluate: a text of {len(tokens)} tokens, but a prediction needs at least 2; give more")
    chunks = _chunks(tokens, context, max_tokens) if carry else heldout_batches(tokens, batch_size, context, max_tokens)
    losses, count, state = [], 0, None
    with eval_mode(model):
        for ids, labels in chunks:
            out = model(to_device(ids, model.device), state=state, labels=to_device(labels, model.device))
            state = out.state if carry else None
            losses.append(out.loss * labels.numel())  # on the device: to read each would be to wait for each
            count += labels.numel()
            if on_progress is not None:
                on_progress(count)
    return Evaluation(torch.stack(losses).cpu().double().sum().item() / count, count, bytes_per_token)


def _chunks(tokens: np.ndarray, context: int, max_tokens: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """ids and labels (1, t ≤ context), one after the other."""
    end = len(tokens) - 1 if max_tokens is None else min(max_tokens, len(tokens) - 1)
    for start in range(0, end, context):
        stop = min(start + context, end)
        part = torch.from_numpy(np.asarray(tokens[start : stop + 1], dtype=np.int64))[None]
        yield part[:, :-1], part[:, 1:]
