"""What generation and the engine refuse, before a model is called."""

import math
from numbers import Integral

import torch

from anymamba.errors import AnymambaError
from anymamba.ids import WHOLE, as_ids
from anymamba.state import MambaState


def checked_prompts(model, prompts, state, logits=None, cache=None):
    """Each prompt as a tensor (t,) of int64."""
    require_vocabulary("generate", model)
    try:
        prompts = [prompts] if isinstance(prompts, str | bytes) else list(prompts)
    except TypeError:
        raise AnymambaError(f"generate: prompts={prompts!r}, but it must be a list of prompts, of ids each") from None
    if any(isinstance(prompt, str | bytes) for prompt in prompts):
        raise AnymambaError("generate: prompts are token ids, not text; encode each one with the tokenizer")
    if len(prompts) == 0:
        raise AnymambaError("generate: no prompts; pass a list of at least one")
    if state is not None and state.batch_size != len(prompts):
        rows = f"a state of {state.batch_size} rows for {len(prompts)} prompts"
        raise AnymambaError(f"generate: {rows}; pass one row for each prompt, in order, by state.select([...])")
    _check_start(model, len(prompts), state, logits, cache)
    prompts = [as_ids(prompt, f"generate: prompt {p}").cpu() for p, prompt in enumerate(prompts)]
    for p, ids in enumerate(prompts):
        if ids.dim() != 1:
            raise AnymambaError(f"generate: prompt {p} is {tuple(ids.shape)}, but must be (t,); for one pass [prompt]")
        if len(ids) == 0 and logits is None:
            raise AnymambaError(f"generate: prompt {p} is empty; give it a token to start from, such as the EOS id")
        prompts[p] = checked_ids(ids, model.config.vocab_size, f"generate: prompt {p}")
    return prompts


def checked_ids(ids, vocab_size, who, offset=0):
    """ids (t,) as int64. `offset` is where they stand in the whole, for the message."""
    if len(ids) and ids.dtype not in WHOLE:
        raise AnymambaError(f"{who} is {ids.dtype}, but token ids are whole numbers")
    ids = ids.long()
    for t in ((ids < 0) | (ids >= vocab_size)).nonzero()[:1, 0].tolist():
        what = f"has id {int(ids[t])} at position {offset + t}, but the vocabulary has ids 0 … {vocab_size - 1}"
        raise AnymambaError(f"{who} {what}; was it encoded with another tokenizer?")
    return ids


def require_vocabulary(who, model):
    """Raises AnymambaError for a model that predicts no next token."""
    if model.config.vocab_size is None:
        raise AnymambaError(f"{who}: this model has no vocabulary, it maps features; use one made with vocab_size")
    if not getattr(model, "keeps_state", True):
        raise AnymambaError(f"{who}: this model hears both directions: it has no state to go on from, and what follows "
                            "is no guess of it; call it on whole texts, or use a causal model")  # fmt: skip


def _check_start(model, rows, state, logits, cache):
    """`logits` and `cache` against the state that they go with."""
    if logits is not None and (state is None or logits.shape != (rows, model.config.padded_vocab_size)):
        got = f"logits {tuple(logits.shape)} {'without' if state is None else 'with'} a state"
        want = (rows, model.config.padded_vocab_size)
        raise AnymambaError(f"generate: {got}, but they must be {want} and go with one: pass both of a Reading")
    if cache is not None and state is not None:
        raise AnymambaError("generate: cache with state: a cache knows texts from their first token, drop one of them")
    check_cache(model, cache)


def check_cache(model, cache):
    if cache is not None and cache.model is not model:
        raise AnymambaError("generate: the cache was made for another model; make one for this: PrefixCache(model)")


def checked_state(model, state):
    """A state from outside as `model` itself would give it, so that it can be laid beside others; None stays None."""
    if state is None:
        return None
    dtype = model.backbone.norm_f.weight.dtype
    shapes = lambda state: [(tuple(c.shape[1:]), tuple(s.shape[1:])) for c, s in state.layers]  # noqa: E731
    got, want = shapes(state), shapes(MambaState.zeros(model.config, 1, device="meta"))
    if got != want:
        given = f"a state of {len(got)} layers of (conv, ssm) = {got[0]} for a model of {len(want)} of {want[0]}"
        raise AnymambaError(f"generate: {given}; pass a state that this model has given")
    return state.to(model.device, dtype, torch.float32)


def check_rules(rules, vocab_size):
    require_positive(max_new_tokens=rules.max_new_tokens)
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


def check_beams(num_beams, n, sampling, length_penalty, on_token):
    changes = {name: value for name, value in sampling.changes().items() if (name, value) != ("temperature", 0)}
    if changes:
        raise AnymambaError(f"generate: num_beams={num_beams} with {changes}: beam search does not sample, drop one")
    if n > num_beams:
        raise AnymambaError(f"generate: n={n} of num_beams={num_beams}; ask for as many beams as results, or more")
    if on_token is not None:
        raise AnymambaError(f"generate: on_token with num_beams={num_beams}: a beam is known only at the end, drop one")
    if not isinstance(length_penalty, (int, float)) or not math.isfinite(length_penalty):
        raise AnymambaError(f"generate: length_penalty={length_penalty!r}, but it must be a finite number (0: none)")


def require_positive(who="generate", /, **values):
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AnymambaError(f"{who}: {name}={value!r}, but it must be a whole number of at least 1")
