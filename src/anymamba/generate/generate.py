"""Text from a model: prompts of any lengths in, completions with their final states out.

Axis letters: b rows of the batch, t time, v vocabulary. Each row stands alone: it has its own random stream, it leaves
the batch when it ends, and what it says does not depend on what is generated beside it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anymamba.generate.checks import check_beams, check_rules, checked_prompts, require_positive
from anymamba.generate.decode import Decoder
from anymamba.generate.prefix import PrefixCache
from anymamba.generate.read import read_batch
from anymamba.generate.rows import Completion, Row, Rules, TokenEvent, read
from anymamba.generate.sampling import Drawn, SamplingConfig, choose, mask_padding, no_choice, row_generators
from anymamba.state import MambaState

_DEFAULT = SamplingConfig()


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
    logits: Tensor | None = None,
    cache: PrefixCache | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    logprobs: bool = False,
    on_token: Callable[[TokenEvent], None] | None = None,
    prefill_chunk: int = 2048,
) -> list[Completion]:
    """`n` completions of each prompt, sorted by prompt and then by sample or by rank of the beam.

    prompts: ids, each at least one, of any lengths. With `state` (one row per prompt) they continue what it has read.
    logits: (b, v) that came with `state`, as of a `Reading`: a prompt may then be empty, and the text just goes on.
    cache: a `PrefixCache` of this model: each prompt is read from the longest beginning that it knows.
    max_new_tokens, stop_ids, stop_strings: a row ends at the first that applies; stop strings may span tokens.
    seed: sample i of prompt p draws from a stream of its own, seeded with (seed, p, i); for a list, (seed[p], 0, i).
    num_beams: above 1, beam search, which does not sample; gives the `n` best by `Completion.score`.
    on_token: called with every `TokenEvent` as soon as it is known.
    prefill_chunk: prompts are read in pieces of this many tokens, which bounds the memory that long ones take; with
        a cache in pieces of its `every`.

    Penalties see the prompt given here, not what `state` has read. Raises AnymambaError for what cannot be meant.
    """
    prompts = checked_prompts(model, prompts, state, logits, cache)
    rules = Rules(max_new_tokens, sampling, stop_ids, stop_strings, tokenizer, logprobs)
    check_rules(rules, model.config.vocab_size)
    require_positive(n=n, num_beams=num_beams, prefill_chunk=prefill_chunk)
    start = _Start(state, logits, cache, prefill_chunk)
    if num_beams > 1:
        check_beams(num_beams, n, sampling, length_penalty, on_token)
        return _beam_search(model, prompts, start, rules, num_beams, n, length_penalty)
    generators = row_generators(seed, len(prompts), n)
    completions = []
    for event in _tokens(model, prompts, start, rules, generators):
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
    logits: Tensor | None = None,
    cache: PrefixCache | None = None,
    prefill_chunk: int = 2048,
) -> Iterator[TokenEvent]:
    """The tokens of one completion, one by one, the same as `generate` gives; the last event carries the `Completion`.

    The texts of the events add up to the completion's text. Raises AnymambaError, at once, as `generate` does.
    """
    prompts = checked_prompts(model, [prompt], state, logits, cache)
    rules = Rules(max_new_tokens, sampling, stop_ids, stop_strings, tokenizer, logprobs=True)
    check_rules(rules, model.config.vocab_size)
    require_positive(prefill_chunk=prefill_chunk)
    return _tokens(model, prompts, _Start(state, logits, cache, prefill_chunk), rules, row_generators(seed, 1, 1))


@torch.no_grad()  # not inference_mode: one may train from the states that come back
def _tokens(model, prompts, start, rules, generators) -> Iterator[TokenEvent]:
    """Every token of every row. A prompt is read once for all its rows; a row leaves the batch when it ends."""
    logits, state = _prefill(model, prompts, start)
    decoder, ahead = Decoder(model), logits.is_cuda
    rows = [Row(rules, p, i, prompts[p], g) for p, of_p in enumerate(generators) for i, g in enumerate(of_p)]
    going = [row.prompt_index for row in rows]
    while rows:
        if len(going) != len(logits):
            logits, state = logits[going], state.select(going)
        texts = ([row.ids for row in rows], [row.prompt for row in rows])
        drawn = Drawn(choose(logits, rules.sampling, [row.generator for row in rows], *texts), logits)
        if ahead:  # a GPU reads the tokens before anyone here has seen them
            logits, state = decoder.step(drawn.ids, state)
        events = [_push(i, row, *new) for i, (row, new) in enumerate(zip(rows, drawn.tokens(), strict=True))]
        yield from (event for row, event in zip(rows, events, strict=True) if not row.finish_reason)
        if not ahead:
            logits, state = decoder.step(drawn.ids, state)
        for i, row in enumerate(rows):
            if row.finish_reason:  # its last token has been read, too
                yield replace(events[i], completion=row.completion(state.select([i])))
        going = [i for i, row in enumerate(rows) if not row.finish_reason]
        rows = [rows[i] for i in going]


def _push(i, row, token, logprob):
    if token < 0:
        raise no_choice(i)
    return row.push(token, logprob)


class _Start(NamedTuple):
    """What the prompts are read after, and how: arguments of `generate`."""

    state: MambaState | None
    logits: Tensor | None
    cache: PrefixCache | None
    chunk: int


def _prefill(model, prompts, start):
    """The logits (b, v) and the state after each prompt."""
    if start.cache is not None:
        logits, state = start.cache.read_batch(prompts)
    else:
        logits, state = read_batch(model, prompts, start.state, start.logits, chunk=start.chunk)
    return mask_padding(logits.float(), model.config.vocab_size), state


class _Beam(NamedTuple):
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0  # sum of logprobs
    parent: int = 0  # its row in the batch before the last token

    def row(self, rules, *place) -> Row:
        row = Row(rules, *place)
        for new in zip(self.ids, self.logprobs, strict=True):
            row.push(*new)
        return row


@torch.no_grad()
def _beam_search(model, prompts, start, rules, num_beams, n, length_penalty):
    """One prompt after the other, its beams as a batch."""
    logits, state = _prefill(model, prompts, start)
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
        logits, after = read(model, ids, state.select([beam.parent for beam in both]))
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
