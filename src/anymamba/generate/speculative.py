"""Speculative decoding: several tokens are guessed, cheaply, and the model reads them all in one pass.

What is written follows the model's own distribution whatever the guesses are; they decide how fast it comes (Leviathan
et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318). The guesses come from a smaller model, or from the
text so far, which often repeats itself. Where one is wrong, the state after the last right one is gone on from.

Axis letters: t time, v vocabulary. There is one row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.generate.checks import check_rules, checked_prompts, require_positive, require_vocabulary
from anymamba.generate.read import read_batch
from anymamba.generate.rows import Completion, Row, Rules, TokenEvent
from anymamba.generate.sampling import SamplingConfig, greedy, processed, row_generators, sample
from anymamba.state import MambaState

_DEFAULT = SamplingConfig()


@dataclass(frozen=True)
class Speculation:
    """A completion, and how it came about."""

    completion: Completion
    proposed: int  # tokens that were guessed
    accepted: int  # of these, tokens that were written
    passes: int  # of the model, after it had read the prompt

    @property
    def acceptance(self) -> float:
        """The share of the guesses that was right; 0 without any."""
        return self.accepted / max(self.proposed, 1)

    @property
    def tokens_per_pass(self) -> float:
        """How many tokens the model wrote in a pass; `generate` writes 1."""
        return len(self.completion.ids) / self.passes


def speculate(
    model: torch.nn.Module,
    prompt: Sequence[int] | Tensor,
    *,
    draft: torch.nn.Module | None = None,
    k: int = 4,
    ngram: int = 3,
    max_new_tokens: int = 128,
    sampling: SamplingConfig = _DEFAULT,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    seed: int = 0,
    state: MambaState | None = None,
    logits: Tensor | None = None,
    draft_state: MambaState | None = None,
    logprobs: bool = False,
    on_token: Callable[[TokenEvent], None] | None = None,
    prefill_chunk: int = 2048,
) -> Speculation:
    """One completion of `prompt` (t,), as `generate` gives it, in fewer passes of `model`.

    draft: a smaller model of the same vocabulary on the same device, which writes the guesses: a guess is accepted with
        probability min(1, p / q) of the two models' distributions, and else a token is drawn from what is left of p
        (arXiv 2211.17192, section 2.3). Without one a guess is what followed the last tokens, up to `ngram` of them,
        where they stood in prompt or completion before; where they did not, the pass is a plain one.
    k: guesses at a time, at most. A pass reads one token more. Where guesses go wrong, fewer are made, and more again
        when they are right: up to one more than twice as many as the last time were right.
    draft_state: what the draft has read, where `state` is given; it knows no more than the prompt without.
    The other arguments are those of `generate`, which also change what the draft proposes.

    Greedy, and without a draft for any `sampling`, the tokens are those of `generate` with the same seed, but for
    rounding: a pass over several tokens may round otherwise than one over a single token, in 16 bits visibly so. With a
    draft and sampling the tokens are others, of the same distribution. Raises AnymambaError for what cannot be meant.
    """
    [prompt] = checked_prompts(model, [prompt], state, logits)
    rules = Rules(max_new_tokens, sampling, stop_ids, stop_strings, tokenizer, logprobs)
    check_rules(rules, model.config.vocab_size)
    require_positive("speculate", k=k, ngram=ngram, prefill_chunk=prefill_chunk)
    _check_draft(model, draft, draft_state)
    [[generator, of_draft]] = row_generators(seed, 1, 2)
    row, start = Row(rules, prompt=prompt, generator=generator), (state, logits)
    guesser = _LookUp(prompt, ngram)
    if draft is not None:
        before = read_batch(draft, [prompt], draft_state, chunk=prefill_chunk).state if len(prompt) else draft_state
        guesser = _Draft(draft, before, of_draft)
    run = _Run(model, row, guesser, k)
    for event in run.tokens(*read_batch(model, [prompt], *start, chunk=prefill_chunk)):
        if on_token is not None:
            on_token(event)
    return Speculation(event.completion, run.proposed, run.accepted, run.passes)


def look_up(text: np.ndarray, ngram: int, k: int) -> list[int]:
    """k tokens that may follow `text` (t,): those after the latest place where its end, as long as possible but at most
    `ngram` tokens, has stood before. A text that ends before k tokens goes on from that place, for it may be a loop.
    None where even the last token is new.
    """
    places = np.flatnonzero(text[:-1] == text[-1])
    for n in range(2, min(ngram, len(text)) + 1):
        longer = places[places >= n - 1]
        longer = longer[text[longer - n + 1] == text[-n]]
        if len(longer) == 0:
            break
        places = longer
    if len(places) == 0:
        return []
    after = text[places[-1] + 1 :]
    return [int(after[i % len(after)]) for i in range(k)]


class _Guess(NamedTuple):
    ids: list[int]
    logits: list[Tensor | None]  # (1,v) that each was drawn from; None for what was not drawn


class _LookUp:
    def __init__(self, prompt, ngram):
        self.prompt, self.ngram = prompt.numpy(), ngram

    def guess(self, row, k) -> _Guess:
        ids = look_up(np.concatenate([self.prompt, row.ids]), self.ngram, k)
        return _Guess(ids, [None] * len(ids))


class _Draft:
    """A smaller model and its states. A state is a value: to go back is to take an earlier one."""

    def __init__(self, model, state, generator):
        self.model, self.generator = model, generator
        self.states, self.known = [state], 0  # states[i] has read `known` + i tokens of the completion

    def guess(self, row, k) -> _Guess:
        right = min(len(row.ids) - 1 - self.known, len(self.states) - 1)  # all but the last token were guessed right
        state, unread = self.states[right], row.ids[self.known + right :]
        guess, sampling, self.known, self.states = _Guess([], []), row.rules.sampling, len(row.ids), []
        for _ in range(k):
            out = self.model(torch.tensor([unread], device=self.model.device), state=state, last_only=True)
            state = out.state
            logits = _real(self.model, out.logits[0])
            logits = processed(logits, sampling, [row.ids + guess.ids], [row.prompt])
            unread = (greedy(logits) if sampling.is_greedy else sample(logits, self.generator)).tolist()
            self.states.append(state)
            guess.ids.extend(unread)
            guess.logits.append(logits)
        return guess


class _Run:
    """The passes of the model over one text."""

    def __init__(self, model, row, guesser, k):
        self.model, self.row, self.guesser, self.k = model, row, guesser, k
        self.ahead = k  # guesses next time
        self.proposed = self.accepted = self.passes = 0

    @torch.no_grad()  # not inference_mode: one may train from the state that comes back
    def tokens(self, logits, state) -> Iterator[TokenEvent]:
        """Every token, from the logits (1,v) and the state after the prompt."""
        row, guess, states = self.row, _Guess([], []), None
        logits = _real(self.model, logits)
        while True:
            events, right = self._judge(logits, guess)
            if states is not None:  # after the token before the guesses, and those that were right
                state = states.after(1 + right)
            if row.finish_reason:
                break
            yield from events
            guess = self.guesser.guess(row, min(self.ahead, row.rules.max_new_tokens - len(row.ids)))
            logits, states = self._pass([row.ids[-1], *guess.ids], state)
        yield from events[:-1]
        if right < len(events):  # the last token is the model's own and not read
            state = self._pass(row.ids[-1:], state)[1].after(1)
        yield replace(events[-1], completion=row.completion(state))

    def _judge(self, logits, guess):
        """The next tokens, from the logits (t+1,v) after each of t guesses, and how many of them were guessed."""
        events, right = [], 0
        for i, guessed in enumerate([*guess.ids, None]):
            token = _draw(logits[[i]], self.row, guessed, guess.logits[i] if guessed is not None else None)
            events.append(self.row.push(token, float(logits[i].log_softmax(-1)[token])))
            right += token == guessed
            if token != guessed or self.row.finish_reason:
                break
        if guess.ids:
            self.ahead = min(self.k, 2 * right + 1)
        self.proposed += len(guess.ids)
        self.accepted += right
        return events, right

    def _pass(self, ids, state):
        """The logits (t,v) after each of the ids, and the states."""
        self.passes += 1
        out = self.model(torch.tensor([ids], device=self.model.device), state=state, return_states=1)
        return _real(self.model, out.logits[0]), out.states


def _real(model, logits):
    """Logits (t,v) in float32 without the padding of the vocabulary, in which two models may differ."""
    return logits[:, : model.config.vocab_size].float()


def _draw(logits, row, guessed, drawn_from) -> int:
    """The next id, from the model's logits (1,v): the one guessed if it may stand."""
    sampling = row.rules.sampling
    logits = processed(logits, sampling, [row.ids], [row.prompt])
    if sampling.is_greedy:
        return int(greedy(logits))
    if drawn_from is None:  # a guess that is no draw has q = 1: it stands with probability p, so draw and see
        return int(sample(logits, row.generator))
    p, q = logits.softmax(-1), drawn_from.softmax(-1)
    u = float(torch.rand((), dtype=torch.float64, generator=row.generator))
    if u * float(q[0, guessed]) < float(p[0, guessed]):
        return guessed
    left = (p - q).clamp_min(0)  # nothing where p is q but for rounding
    return int(sample(left.log() if left.any() else logits, row.generator))


def _check_draft(model, draft, state):
    if draft is None:
        if state is not None:
            raise AnymambaError("speculate: draft_state without a draft; pass the model that it belongs to")
        return
    require_vocabulary("speculate: the draft", draft)
    ours, theirs = model.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        raise AnymambaError(f"speculate: the draft knows {theirs} tokens, the model {ours}; take two of one tokenizer")
    if draft.device != model.device:
        raise AnymambaError(f"speculate: the draft is on {draft.device}, the model on {model.device}; move one of them")
    if state is not None and state.batch_size != 1:
        raise AnymambaError(f"speculate: draft_state has {state.batch_size} rows; choose one: state.select([0])")
