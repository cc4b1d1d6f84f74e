"""A completion in the making: its rules, its text, its events. `generate` and the engine share it.

Axis letters: b rows of the batch, t time, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from anymamba.data.tokenizer import StreamDecoder
from anymamba.generate.sampling import SamplingConfig, mask_padding
from anymamba.state import MambaState


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt. To go on, pass `state`: it has read the prompt and all of `ids`.

    "cancelled" and "error" come from an engine only; then `state` is None where there is none that has read all that.
    """

    ids: list[int]  # every token written, a final stop id included
    text: str | None  # without stop id and stop string; None without a tokenizer
    logprobs: list[float] | None  # of each token under the model's own distribution, before any sampling transform
    finish_reason: Literal["stop", "length", "cancelled", "error"]
    state: MambaState | None  # batch size 1
    prompt_index: int
    sample_index: int  # 0 … n-1, or the rank of the beam
    score: float | None = None  # of a beam: sum of log-probabilities / length ** length_penalty


@dataclass(frozen=True)
class TokenEvent:
    """One token as it is generated. The last event of a row carries its completion."""

    id: int
    text: str  # what this token adds; "" while it may still turn into a stop string or is half a character
    logprob: float  # natural logarithm, under the model's own distribution
    prompt_index: int
    sample_index: int
    completion: Completion | None = None


@dataclass(frozen=True)
class Rules:
    """How a completion is written, as `generate` takes it."""

    max_new_tokens: int
    sampling: SamplingConfig
    stop_ids: Sequence[int]
    stop_strings: Sequence[str]
    tokenizer: Any
    logprobs: bool


class Row:
    """One completion in the making."""

    def __init__(self, rules, prompt_index=0, sample_index=0, prompt=None, generator=None):
        self.rules, self.prompt_index, self.sample_index = rules, prompt_index, sample_index
        self.prompt, self.generator = prompt, generator
        self.text = Text(rules.tokenizer, rules.stop_strings)
        self.ids, self.logprobs, self.finish_reason = [], [], None

    def push(self, token, logprob) -> TokenEvent:
        """Takes the next token; `finish_reason` then says whether it was the last."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        stops = token in self.rules.stop_ids
        if not stops:
            self.text.add(token)
        ends = stops or self.text.stopped or len(self.ids) == self.rules.max_new_tokens
        piece = self.text.take(final=ends)
        if ends:
            self.finish_reason = "stop" if stops or self.text.stopped else "length"
        return TokenEvent(token, piece, logprob, self.prompt_index, self.sample_index)

    def completion(self, state, score=None) -> Completion:
        text = self.text.text if self.rules.tokenizer is not None else None
        logprobs = self.logprobs if self.rules.logprobs else None
        at = (self.prompt_index, self.sample_index)
        return Completion(self.ids, text, logprobs, self.finish_reason, state, *at, score)


class Text:
    """The text of a completion as it grows, cut at the first stop string; always empty without a tokenizer."""

    def __init__(self, tokenizer, stop_strings):
        self.decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self.stop_strings = stop_strings
        self.text, self.taken, self.stopped = "", 0, False

    def add(self, token):
        if self.decoder is not None:
            self._append(self.decoder.push(token))

    def take(self, final) -> str:
        """What was not taken yet; an end that may still become a stop string only when it is final."""
        if final and self.decoder is not None and not self.stopped:
            self._append(self.decoder.flush())
        starts = [] if final else [s[:k] for s in self.stop_strings for k in range(1, len(s))]
        held = max((len(start) for start in starts if self.text.endswith(start)), default=0)
        before, self.taken = self.taken, len(self.text) - held
        return self.text[before : self.taken]

    def _append(self, piece):
        self.text += piece
        # Nothing of a stop string has been taken, so none begins earlier.
        places = [i for s in self.stop_strings if (i := self.text.find(s, self.taken)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True


def lengths_of(counts, device):
    """Tokens of each row for a model; None where all are as long as the longest.

    With lengths a model lays rows end to end, where `inspect` cannot tell one from the next.
    """
    return torch.tensor(counts, device=device) if min(counts) < max(counts) else None


def read(model, ids, state, lengths=None):
    """The next logits (b, v), with -inf where the vocabulary is padded, and the state after `ids` (b, t)."""
    out = model(ids, state=state, lengths=lengths, last_only=True)
    return mask_padding(out.logits[:, -1].float(), model.config.vocab_size), out.state
