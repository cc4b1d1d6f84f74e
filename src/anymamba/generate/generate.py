"""Text from a model: prompts of any lengths in, completions with their final states out.

Axis letters: b rows of the batch, t time, v vocabulary. Each row stands alone: it has its own random stream, it leaves
the batch when it ends, and what it says does not depend on what is generated beside it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from anymamba.data.tokenizer import StreamDecoder
from anymamba.errors import AnymambaError
from anymamba.generate.sampling import SamplingConfig, choose, mask_padding, row_generators
from anymamba.state import MambaState

_DEFAULT = SamplingConfig()


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt. To go on, pass `state`: it has read the prompt and all of `ids`."""

    ids: list[int]  # every token written, a final stop id included
    text: str | None  # without stop id and stop string; None without a tokenizer
    logprobs: list[float] | None  # of each token under the model's own distribution, before any sampling transform
    finish_reason: Literal["stop", "length"]
    state: MambaState  # batch size 1
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


def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    max_new_tokens: int = 128,
    sampling: SamplingConfig = _DEFAULT,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    seed: int | Sequence[int] = 0,
    n: int = 1,
    state: MambaState | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    logprobs: bool = False,
    on_token: Callable[[TokenEvent], None] | None = None,
    prefill_chunk: int = 2048,
) -> list[Completion]:
    """`n` completions of each prompt, sorted by prompt and then by sample or by rank of the beam.

    prompts: ids, each at least one, of any lengths. With `state` (one row per prompt) they continue what it has read.
    max_new_tokens, stop_ids, stop_strings: a row ends at the first that applies; stop strings may span tokens.
    seed: sample i of prompt p draws from a stream of its own, seeded with (seed, p, i); for a list, (seed[p], 0, i).
    num_beams: above 1, beam search, which does not sample; gives the `n` best by `Completion.score`.
    on_token: called with every `TokenEvent` as soon as it is known.
    prefill_chunk: prompts are read in pieces of this many tokens, which bounds the memory that long ones take.

    Penalties see the prompt given here, not what `state` has read. Raises AnymambaError for what cannot be meant.
    """
    prompts = _checked_prompts(model, prompts, state)
    rules = _Rules(max_new_tokens, sampling, stop_ids, stop_strings, tokenizer, logprobs)
    _check_rules(rules, model.config.vocab_size)
    _require_positive(n=n, num_beams=num_beams, prefill_chunk=prefill_chunk)
    if num_beams > 1:
        _check_beams(num_beams, n, sampling, length_penalty, on_token)
        return _beam_search(model, prompts, state, rules, num_beams, n, length_penalty, prefill_chunk)
    generators = row_generators(seed, len(prompts), n)
    completions = []
    for event in _tokens(model, prompts, state, rules, generators, prefill_chunk):
        if on_token is not None:
            on_token(event)
        if event.completion is not None:
            completions.append(event.completion)
    return sorted(completions, key=lambda c: (c.prompt_index, c.sample_index))


def stream(
    model: torch.nn.Module,
    prompt: Sequence[int] | Tensor,
    *,
    max_new_tokens: int = 128,
    sampling: SamplingConfig = _DEFAULT,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    seed: int = 0,
    state: MambaState | None = None,
    prefill_chunk: int = 2048,
) -> Iterator[TokenEvent]:
    """The tokens of one completion, one by one, the same as `generate` gives; the last event carries the `Completion`.

    The texts of the events add up to the completion's text. Raises AnymambaError, at once, as `generate` does.
    """
    prompts = _checked_prompts(model, [prompt], state)
    rules = _Rules(max_new_tokens, sampling, stop_ids, stop_strings, tokenizer, logprobs=True)
    _check_rules(rules, model.config.vocab_size)
    _require_positive(prefill_chunk=prefill_chunk)
    return _tokens(model, prompts, state, rules, row_generators(seed, 1, 1), prefill_chunk)


@torch.no_grad()  # not inference_mode: one may train from the states that come back
def _tokens(model, prompts, state, rules, generators, prefill_chunk) -> Iterator[TokenEvent]:
    """Every token of every row. A prompt is read once for all its rows; a row leaves the batch when it ends."""
    logits, state = _prefill(model, prompts, state, prefill_chunk)
    rows = [_Row(rules, p, i, prompts[p], g) for p, of_p in enumerate(generators) for i, g in enumerate(of_p)]
    going = [row.prompt_index for row in rows]
    while rows:
        if len(going) != len(logits):
            logits, state = logits[going], state.select(going)
        texts = ([row.ids for row in rows], [row.prompt for row in rows])
        ids = choose(logits, rules.sampling, [row.generator for row in rows], *texts)
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0].tolist()
        events = [row.push(*new) for row, *new in zip(rows, ids.tolist(), logprobs, strict=True)]
        yield from (event for row, event in zip(rows, events, strict=True) if not row.finish_reason)
        logits, state = _read(model, ids[:, None], state)  # rows that end read their last token, too
        for i, row in enumerate(rows):
            if row.finish_reason:
                yield replace(events[i], completion=row.completion(state.select([i])))
        going = [i for i, row in enumerate(rows) if not row.finish_reason]
        rows = [rows[i] for i in going]


def _prefill(model, prompts, state, chunk):
    """The logits (b, v) and the state after each prompt."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    ids, logits = pad_sequence(prompts, batch_first=True).to(model.device), None
    for start in range(0, ids.shape[1], chunk):
        here = (lengths - start).clamp(0, chunk)
        new, state = _read(model, ids[:, start : start + chunk], state, here)
        logits = new if logits is None else torch.where(here[:, None] > 0, new, logits)
    return logits, state


def _read(model, ids, state, lengths=None):
    """The next logits (b, v), with -inf where the vocabulary is padded, and the state after `ids` (b, t)."""
    out = model(ids, state=state, lengths=lengths, last_only=True)
    return mask_padding(out.logits[:, -1].float(), model.config.vocab_size), out.state


@dataclass(frozen=True)
class _Rules:
    """How a completion is written, as `generate` takes it."""

    max_new_tokens: int
    sampling: SamplingConfig
    stop_ids: Sequence[int]
    stop_strings: Sequence[str]
    tokenizer: Any
    logprobs: bool


class _Row:
    """One completion in the making."""

    def __init__(self, rules, prompt_index=0, sample_index=0, prompt=None, generator=None):
        self.rules, self.prompt_index, self.sample_index = rules, prompt_index, sample_index
        self.prompt, self.generator = prompt, generator
        self.text = _Text(rules.tokenizer, rules.stop_strings)
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


class _Text:
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


class _Beam(NamedTuple):
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0  # sum of logprobs
    parent: int = 0  # its row in the batch before the last token

    def row(self, rules, *place) -> _Row:
        row = _Row(rules, *place)
        for new in zip(self.ids, self.logprobs, strict=True):
            row.push(*new)
        return row


@torch.no_grad()
def _beam_search(model, prompts, state, rules, num_beams, n, length_penalty, prefill_chunk):
    """One prompt after the other, its beams as a batch."""
    logits, state = _prefill(model, prompts, state, prefill_chunk)
    completions = []
    for p in range(len(prompts)):
        found = _search(model, logits[[p]], state.select([p]), rules, num_beams, length_penalty)[:n]
        completions += [beam.row(rules, p, i).completion(after, score) for i, (score, beam, after) in enumerate(found)]
    return completions


def _search(model, logits, state, rules, num_beams, length_penalty):
    """The best ended beams (score, beam, state) of a prompt, best first, from the logits (1, v) after it."""
    beams, found = [_Beam()], []
    for length in range(1, rules.max_new_tokens + 1):
        beams, ended = _extended(beams, logits, rules, num_beams)
        both = beams + ended
        ids = torch.tensor([beam.ids[-1:] for beam in both], device=logits.device)
        logits, after = _read(model, ids, state.select([beam.parent for beam in both]))
        scores = [beam.total / length**length_penalty for beam in ended]
        states = [after.select([i]) for i in range(len(beams), len(both))]
        found = sorted([*found, *zip(scores, ended, states, strict=True)], key=lambda f: -f[0])[:num_beams]
        # Totals only fall, so no beam can end better than with its present total at the kindest length.
        kindest = max(length**length_penalty, rules.max_new_tokens**length_penalty)
        best = max((beam.total / kindest for beam in beams), default=-math.inf)
        if not beams or (len(found) == num_beams and best <= found[-1][0]):
            break
        logits, state = logits[: len(beams)], after
    return found


def _extended(beams, logits, rules, num_beams):
    """The best continuations by one token: num_beams that go on, and those better than the last of them that end."""
    logprobs = logits.log_softmax(-1).cpu().double()
    totals = (logprobs + torch.tensor([[beam.total] for beam in beams])).flatten()
    best = totals.topk(min(len(totals), num_beams * (1 + len(rules.stop_ids))))
    if not rules.stop_strings:
        rules = replace(rules, tokenizer=None)  # the text cannot end a beam, so it is made for the best ones only
    going, ended = [], []
    for total, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if len(going) == num_beams or total == -math.inf:
            break
        parent, token = divmod(place, logits.shape[1])
        ids, logprob = beams[parent].ids, logprobs[parent, token].item()
        beam = _Beam((*ids, token), (*beams[parent].logprobs, logprob), total, parent)
        (ended if beam.row(rules).finish_reason else going).append(beam)
    return going, ended


def _checked_prompts(model, prompts, state):
    """Each prompt as a tensor (t,) of int64."""
    v = model.config.vocab_size
    if v is None:
        raise AnymambaError("generate: this model has no vocabulary, it maps features; use one made with vocab_size")
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise AnymambaError("generate: prompts are token ids, not text; encode each one with the tokenizer")
    if len(prompts) == 0:
        raise AnymambaError("generate: no prompts; pass a list of at least one")
    if state is not None and state.batch_size != len(prompts):
        rows = f"a state of {state.batch_size} rows for {len(prompts)} prompts"
        raise AnymambaError(f"generate: {rows}; pass one row for each prompt, in order, by state.select([...])")
    prompts = [torch.as_tensor(prompt, device="cpu") for prompt in prompts]
    for p, ids in enumerate(prompts):
        if ids.dim() != 1:
            raise AnymambaError(f"generate: prompt {p} is {tuple(ids.shape)}, but must be (t,); for one pass [prompt]")
        if len(ids) == 0:
            raise AnymambaError(f"generate: prompt {p} is empty; give it a token to start from, such as the EOS id")
        if ids.dtype.is_floating_point:
            raise AnymambaError(f"generate: prompt {p} is {ids.dtype}, but token ids are whole numbers")
        prompts[p] = ids = ids.long()
        for t in ((ids < 0) | (ids >= v)).nonzero()[:1, 0].tolist():
            what = f"prompt {p} has id {int(ids[t])} at position {t}, but the vocabulary has ids 0 … {v - 1}"
            raise AnymambaError(f"generate: {what}; was it encoded with another tokenizer?")
    return prompts


def _check_rules(rules, vocab_size):
    _require_positive(max_new_tokens=rules.max_new_tokens)
    if isinstance(rules.stop_ids, Integral) or not all(isinstance(id, Integral) for id in rules.stop_ids):
        raise AnymambaError(f"generate: stop_ids={rules.stop_ids!r}, but it must be a list of token ids")
    if isinstance(rules.stop_strings, str) or not all(isinstance(s, str) and s for s in rules.stop_strings):
        raise AnymambaError(f"generate: stop_strings={rules.stop_strings!r}, but it must be a list, none empty")
    for name, ids in (("stop_ids", rules.stop_ids), ("logit_bias", rules.sampling.logit_bias or ())):
        for id in ids:
            if not 0 <= id < vocab_size:
                raise AnymambaError(f"generate: {name} has id {id}, but the vocabulary is 0 … {vocab_size - 1}")
    if rules.stop_strings and rules.tokenizer is None:
        raise AnymambaError(f"generate: stop_strings={rules.stop_strings!r} without a tokenizer; pass the model's")


def _check_beams(num_beams, n, sampling, length_penalty, on_token):
    changes = {name: value for name, value in sampling.changes().items() if (name, value) != ("temperature", 0)}
    if changes:
        raise AnymambaError(f"generate: num_beams={num_beams} with {changes}: beam search does not sample, drop one")
    if n > num_beams:
        raise AnymambaError(f"generate: n={n} of num_beams={num_beams}; ask for as many beams as results, or more")
    if on_token is not None:
        raise AnymambaError(f"generate: on_token with num_beams={num_beams}: a beam is known only at the end, drop one")
    if not isinstance(length_penalty, (int, float)) or not math.isfinite(length_penalty):
        raise AnymambaError(f"generate: length_penalty={length_penalty!r}, but it must be a finite number (0: none)")


def _require_positive(**values):
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AnymambaError(f"generate: {name}={value!r}, but it must be a whole number of at least 1")
