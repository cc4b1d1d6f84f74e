"""Samplers: small pure functions from logits (b, v) to logits (b, v), where -inf means "never chosen".

Axis letters: b rows of the batch, v vocabulary. Every row is treated alone, and a permutation of the vocabulary
permutes the result: equally probable tokens are kept or dropped together, so a filter may keep a few more than asked.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anymamba.errors import AnymambaError

_HEAD = 1024  # tokens that top_p ranks first; sorting all of a large vocabulary costs five times as much


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen. The defaults sample from the model's own distribution.

    Raises AnymambaError for a value outside its range.
    """

    temperature: float = 1.0  # divides the logits; 0: greedy, the most probable token (filters are then not needed)
    top_k: int = 0  # keep the k most probable tokens; 0: all
    top_p: float = 1.0  # keep the smallest set with this probability, in (0, 1]; 1: all
    min_p: float = 0.0  # drop tokens below this share of the highest probability; 0: none
    typical_p: float = 1.0  # keep the most typical tokens up to this probability, in (0, 1]; 1: all
    repetition_penalty: float = 1.0  # > 1 disfavours tokens of the prompt and of the completion
    presence_penalty: float = 0.0  # subtracted from the logit of every token of the completion
    frequency_penalty: float = 0.0  # the same, times how often the token has occurred
    logit_bias: Mapping[int, float] | None = None  # token id → added to its logit; -100 is as good as a ban

    def __post_init__(self):
        _require(self, "temperature", "0 (greedy) or a finite number ≥ 1e-6", lambda x: x == 0 or x >= 1e-6)
        _require(self, "top_k", "a whole number ≥ 0 (0 keeps every token)", lambda x: x >= 0 and isinstance(x, int))
        for name in ("top_p", "typical_p"):
            _require(self, name, "in (0, 1] (1 keeps every token)", lambda x: 0 < x <= 1)
        _require(self, "min_p", "in [0, 1] (0 keeps every token)", lambda x: 0 <= x <= 1)
        _require(self, "repetition_penalty", "a finite number > 0 (1 is off)", lambda x: x > 0)
        for name in ("presence_penalty", "frequency_penalty"):
            _require(self, name, "a finite number (0 is off)", lambda x: True)
        for token, bias in (self.logit_bias or {}).items():
            if not isinstance(token, int) or token < 0 or not _is_number(bias):
                raise AnymambaError(
                    f"sampling: logit_bias has {token!r}: {bias!r}, but it maps token ids to finite numbers; -100 bans"
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def needs_counts(self) -> bool:
        """Whether a penalty is on, so that `process` must be told which tokens have occurred."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def changes(self) -> dict[str, object]:
        """The fields that differ from their defaults, for messages and logs."""
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}


def process(logits: Tensor, config: SamplingConfig, counts: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """The logits (b, v) that `sample` or, at temperature 0, `greedy` draws from: what is on in `config`, in this order.

    Bias, penalties, temperature, top_k, top_p, min_p, typical. `counts` (b, v): how often each token stands in the
    completion so far; `seen` (b, v) bool: which stand in prompt or completion, by default `counts > 0`. Presence and
    frequency penalties look at the completion only, else the common words of a long prompt would be forbidden.
    Raises AnymambaError when a penalty is on and `counts` is missing.
    """
    if config.needs_counts and counts is None:
        raise AnymambaError(f"sampling: {config.changes()} without counts; pass the token counts, shape (b, vocab)")
    if config.logit_bias:
        logits = logit_bias(logits, config.logit_bias)
    if config.repetition_penalty != 1:
        logits = repetition_penalty(logits, counts > 0 if seen is None else seen, config.repetition_penalty)
    if config.presence_penalty != 0:
        logits = presence_penalty(logits, counts, config.presence_penalty)
    if config.frequency_penalty != 0:
        logits = frequency_penalty(logits, counts, config.frequency_penalty)
    if config.is_greedy:  # no filter may take the most probable token away, which typical_p alone could do
        return logits
    if config.temperature != 1:
        logits = temperature(logits, config.temperature)
    if config.top_k > 0:
        logits = top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = top_p(logits, config.top_p)
    if config.min_p > 0:
        logits = min_p(logits, config.min_p)
    if config.typical_p < 1:
        logits = typical(logits, config.typical_p)
    return logits


def mask_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """Ids from `vocab_size` on exist only to make the embedding's size round: they are never chosen."""
    padding = torch.arange(logits.shape[-1], device=logits.device) >= vocab_size
    return logits.masked_fill(padding, -math.inf)


def logit_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Adds bias[id] to the logit of each id. Raises AnymambaError for an id outside the vocabulary."""
    for token in bias:
        if token >= logits.shape[-1]:
            raise AnymambaError(f"logit_bias names token id {token}, but the vocabulary has {logits.shape[-1]} tokens")
    added = torch.zeros_like(logits[0])
    added[list(bias)] = torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
    return logits + added


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of the tokens in `seen` (b, v) (CTRL, Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def presence_penalty(logits: Tensor, counts: Tensor, penalty: float) -> Tensor:
    """Subtracts `penalty` from every token with a positive count (b, v)."""
    return logits - penalty * (counts > 0)


def frequency_penalty(logits: Tensor, counts: Tensor, penalty: float) -> Tensor:
    """Subtracts `penalty` times the count (b, v)."""
    return logits - penalty * counts


def temperature(logits: Tensor, t: float) -> Tensor:
    """logits / t, t > 0: below 1 sharper, above 1 flatter."""
    return logits / t


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keeps the k highest logits and those equal to the k-th (Fan et al. 2018); all when k exceeds the vocabulary."""
    k = min(k, logits.shape[-1])
    return _keep(logits, logits >= logits.topk(k).values[:, -1:])


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the most probable tokens until their probabilities add up to p, the one that crosses p included, and those
    equal to that one (nucleus sampling, Holtzman et al. 2020)."""
    probabilities = logits.softmax(-1)
    ranked = probabilities.topk(min(_HEAD, logits.shape[-1])).values
    if logits.is_cuda or (ranked.sum(-1) < p).any():  # to look would stop a GPU
        ranked = probabilities.sort(descending=True).values
    last = _crossing(ranked, p)
    return _keep(logits, probabilities >= ranked.gather(-1, last))


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keeps tokens at least p times as probable as the most probable one (Nguyen et al. 2024)."""
    return _keep(logits, logits >= logits.amax(-1, keepdim=True) + math.log(p))


def typical(logits: Tensor, p: float) -> Tensor:
    """Keeps the tokens whose information -log q is nearest to the entropy until their probabilities add up to p, the
    one that crosses p included, and those equal to that one (locally typical sampling, Meister et al. 2022)."""
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    entropy = -(q * log_q).nansum(-1, keepdim=True)  # 0 · -inf is NaN, and counts as 0
    distance = (log_q + entropy).abs()  # inf for tokens dropped before: they come last
    ranked, order = distance.sort(-1)
    last = _crossing(q.gather(-1, order), p)
    return _keep(logits, distance <= ranked.gather(-1, last))


def greedy(logits: Tensor) -> Tensor:
    """The highest logit of each row, the lowest id among equals: ids (b,).

    Raises AnymambaError for a row with NaN; on a GPU, where to look would stop it, its id is -1.
    """
    highest, ids = logits.max(-1)
    return _where_possible(highest.isfinite(), ids, "logits")


def sample(logits: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """One draw per row from softmax(logits): ids (b,).

    With a list, row i draws one number from generator i, so what it gets does not depend on the rows beside it.
    Generators belong on the CPU, where a seed means the same on every machine; the logits may be anywhere.
    Raises AnymambaError for a list of the wrong length, and as `greedy` for a row with NaN or nothing but -inf.
    """
    rows = logits.shape[0]
    if generator is None or isinstance(generator, torch.Generator):
        u = torch.rand(rows, dtype=torch.float64, generator=generator)
    elif len(generator) == rows:
        u = torch.stack([torch.rand((), dtype=torch.float64, generator=g) for g in generator])
    else:
        raise AnymambaError(f"sample: {len(generator)} generators for logits of {rows} rows; pass one for each row")
    # The inverse of the distribution function: the first id whose cumulated probability exceeds u.
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple GPUs have no float64
    cumulated = logits.to(dtype).softmax(-1).cumsum(-1)
    total = cumulated[:, -1:].contiguous()
    u = on_device(u[:, None].to(dtype), logits.device)
    ids = torch.searchsorted(cumulated, u * total, right=True)
    last_possible = torch.searchsorted(cumulated, total)  # should u · total round up to total
    return _where_possible(total[:, 0] > 0, torch.minimum(ids, last_possible)[:, 0], "probabilities")


def choose(
    logits: Tensor,
    config: SamplingConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    written: Sequence[Sequence[int]],
    prompts: Sequence[Tensor],
) -> Tensor:
    """The next id (b,) of each row, from the model's logits (b, v), what the row has written so far, and its prompt."""
    logits = processed(logits, config, written, prompts)
    return greedy(logits) if config.is_greedy else sample(logits, generator)


def processed(
    logits: Tensor, config: SamplingConfig, written: Sequence[Sequence[int]], prompts: Sequence[Tensor]
) -> Tensor:
    """`process` of logits (b, v), with what each row has written so far, and its prompt, counted if need be."""
    counts = seen = None
    if config.needs_counts:
        counts = on_device(count_tokens(written, logits.shape[1]), logits.device)
        seen = counts + on_device(count_tokens(prompts, logits.shape[1]), logits.device) > 0
    return process(logits, config, counts, seen)


def choose_each(
    logits: Tensor,
    configs: Sequence[SamplingConfig],
    generators: Sequence[torch.Generator],
    written: Sequence[Sequence[int]],
    prompts: Sequence[Tensor],
) -> Tensor:
    """`choose` with a config for each row: ids (b,). Rows with equal configs are treated together."""
    kinds, groups = [], []  # a config may hold a dict, which has no hash
    for row, config in enumerate(configs):
        if config not in kinds:
            kinds.append(config)
            groups.append([])
        groups[kinds.index(config)].append(row)
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for config, rows in zip(kinds, groups, strict=True):
        of_rows = ([values[row] for row in rows] for values in (generators, written, prompts))
        if len(groups) == 1:
            return choose(logits, config, *of_rows)
        index = on_device(torch.tensor(rows), logits.device)
        ids.index_copy_(0, index, choose(logits.index_select(0, index), config, *of_rows))
    return ids


class Drawn:
    """Chosen ids on their way to the host. Until they are there, a GPU can go on with `ids` (b,) by itself."""

    def __init__(self, ids: Tensor, logits: Tensor):
        self.ids = ids.clamp(min=0)
        logprobs = logits.log_softmax(-1).gather(-1, self.ids[:, None])[:, 0]
        both = torch.stack([ids.float(), logprobs.float()])  # ids are exact below 2²⁴
        self._there = torch.cuda.Event() if both.is_cuda else None
        self._both = both.to("cpu", non_blocking=both.is_cuda)
        if self._there is not None:
            self._there.record()

    def tokens(self) -> list[tuple[int, float]]:
        """Waits: (id, logprob) of each row; id -1 where there was none to choose."""
        if self._there is not None:
            self._there.synchronize()
        return [(int(id), logprob) for id, logprob in zip(*self._both.tolist(), strict=True)]


def on_device(v: Tensor, device: torch.device) -> Tensor:
    """v, from the CPU, on another device; nothing waits for what a GPU is doing."""
    return v.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else v.to(device)


def count_tokens(sequences: Sequence[Sequence[int] | Tensor], vocab_size: int) -> Tensor:
    """How often each id stands in each sequence: (b, v), on the CPU."""
    return torch.stack([torch.as_tensor(ids, dtype=torch.long).bincount(minlength=vocab_size) for ids in sequences])


def row_generators(seed: int | Sequence[int], prompts: int, n: int) -> list[list[torch.Generator]]:
    """Random streams, on the CPU, for `n` samples of each of so many prompts.

    Sample i of prompt p has the stream of (seed, p, i), or with a seed for each prompt that of (seed[p], 0, i): it gets
    the same numbers whatever else is sampled. Raises AnymambaError for seeds that are not whole numbers ≥ 0.
    """
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * prompts
    if not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise AnymambaError(f"seed={seed!r}, but a seed is a whole number ≥ 0; pass one, or one for each prompt")
    if len(seeds) != prompts:
        raise AnymambaError(f"{len(seeds)} seeds for {prompts} prompts; pass one number, or one for each prompt")

    def stream(p, i):  # mixed, not added up: else sample 1 of seed 0 would be sample 0 of seed 1
        numbers = (seeds[p], 0 if isinstance(seed, Sequence) else p, i)
        return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))

    return [[stream(p, i) for i in range(n)] for p in range(prompts)]


def _keep(logits, kept):
    return logits.masked_fill(~kept, -math.inf)


def _crossing(ranked, p):
    """Index (b, 1) of the first probability, in the given order, at which the sum reaches p."""
    before = ranked.cumsum(-1) - ranked
    return ((before < p).sum(-1, keepdim=True) - 1).clamp_min(0)


def _require(config, name, rule, holds):
    value = getattr(config, name)
    if not _is_number(value) or not holds(value):
        raise AnymambaError(f"sampling: {name}={value!r}, but it must be {rule}")


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _where_possible(possible, ids, what):
    if possible.is_cuda:
        return ids.masked_fill(~possible, -1)
    if not possible.all():
        raise no_choice(int((~possible).nonzero()[0]), what)
    return ids


def no_choice(row: int, what: str = "logits") -> AnymambaError:
    return AnymambaError(
        f"row {row} has no token to choose: its {what} are NaN or all -inf; check the model's weights and input"
    )
