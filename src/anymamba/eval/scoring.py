"""How probable a model finds texts after others: the exact numbers that log_softmax over each pair alone gives, at the
price of reading what the pairs share once.

Axis letters: s sequences read at once, t time, m d_model, v vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from anymamba.data import Tokenizer
from anymamba.errors import AnymambaError
from anymamba.eval.prefixes import Node, tree
from anymamba.generate.checks import require_positive, require_vocabulary
from anymamba.generate.read import chunk_for
from anymamba.generate.sampling import mask_padding
from anymamba.model import MambaLM, eval_mode
from anymamba.state import MambaState

STATES = 2**29  # bytes of the states that a batch of short texts may take
LOGITS = 2**24  # numbers at once: the head's output is the largest tensor of all


class Score(NamedTuple):
    """A continuation after its context."""

    logprob: float  # natural logarithm of its probability, the sum over its tokens
    greedy: bool  # whether each of its tokens is the most probable one there, so that greedy decoding writes it
    tokens: int  # of the continuation
    read: int  # tokens that were read for it; what several share counts for one of them
    alone: int  # tokens that would be read for it alone


def loglikelihoods(
    model: MambaLM,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_tokens: int | None = None,
    share: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """The score of each (context, continuation), in order. Texts of any length are read whole.

    The two are tokenised as lm-evaluation-harness does: spaces that end the context go to the continuation, and its
    tokens are those of both together beyond as many as the context alone has. An empty context is the end-of-text id.

    batch_tokens: tokens read at once; None: as many as `generate.read` takes.
    share: read the beginnings that pairs have in common once; the scores are the same without.
    on_progress: called with the number of pairs that are done.

    Raises AnymambaError for a continuation without tokens, an empty context where the tokenizer has no end-of-text
    id, and ids outside the model's vocabulary.
    """
    encoded = encode_pairs(tokenizer, pairs)
    return score_ids(model, encoded, batch_tokens=batch_tokens, share=share, on_progress=on_progress)


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids of the contexts and of their continuations; see `loglikelihoods`."""
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + rest) for context, rest in pairs]
    known = list(dict.fromkeys(context for context, _ in moved))
    contexts = dict(zip(known, tokenizer.encode_batch(known), strict=True))
    wholes = tokenizer.encode_batch([context + rest for context, rest in moved])
    out = []
    for (context, _), whole, (before, text) in zip(moved, wholes, pairs, strict=True):
        head = contexts[context]
        tail = whole[len(head) :]
        if len(head) == 0:
            head, tail = _after_nothing(tokenizer, tail, text)
        if len(tail) == 0:
            what = f"the continuation {text!r} of a context that ends in {before[-40:]!r}"
            raise AnymambaError(f"loglikelihoods: {what} has no tokens of its own; leave it out, or give it a text")
        out.append((head, tail))
    return out


def _after_nothing(tokenizer, ids, text):
    """An empty context is an end of text, unless the continuation brings one."""
    if tokenizer.eos_id is None:
        raise AnymambaError(
            f"loglikelihoods: the context of {text[:40]!r} is empty and the tokenizer {tokenizer.name!r} has no "
            "end-of-text id to stand for it; give a context of at least one token"
        )
    if len(ids) and ids[0] == tokenizer.eos_id:
        return ids[:1], ids[1:]
    return np.array([tokenizer.eos_id], dtype=ids.dtype), ids


@torch.no_grad()
def score_ids(
    model: MambaLM,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    batch_tokens: int | None = None,
    share: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """`loglikelihoods` of ids, (t,) each and at least one. Raises AnymambaError for ids outside the vocabulary."""
    require_vocabulary("loglikelihoods", model)
    batch_tokens = chunk_for(model) if batch_tokens is None else batch_tokens
    require_positive("loglikelihoods", batch_tokens=batch_tokens)
    texts = [_Text(np.concatenate(pair).astype(np.int64), len(pair[0])) for pair in pairs]
    for i, text in enumerate(texts):
        _check_ids(i, text.ids, len(pairs[i][0]), len(pairs[i][1]), model.config.vocab_size)
    with eval_mode(model):
        _Reader(model, texts, batch_tokens, on_progress).read(tree([text.ids[:-1] for text in texts], share), None)
    return [Score(text.logprob, text.greedy, len(text.ids) - text.first, text.read, len(text.ids) - 1)
            for text in texts]  # fmt: skip


def _check_ids(i, ids, context, continuation, vocab_size):
    if not (context and continuation):
        got = f"pair {i} has {context} ids of context and {continuation} of continuation"
        raise AnymambaError(f"loglikelihoods: {got}, but needs at least one of each; an empty context is the EOS id")
    if ids.min() < 0 or ids.max() >= vocab_size:
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        what = f"pair {i} has id {bad}, but the vocabulary has ids 0 … {vocab_size - 1}"
        raise AnymambaError(f"loglikelihoods: {what}; was it encoded with another tokenizer?")


@dataclass
class _Text:
    """A pair under way. The token at `first` and those after it are scored, each from what stands before it."""

    ids: np.ndarray
    first: int
    logprob: float = 0.0
    greedy: bool = True
    read: int = 0


class _Reader:
    """Walks a forest of texts from the roots to the leaves, a batch of nodes at a time."""

    def __init__(self, model, texts, batch_tokens, on_progress):
        self.model, self.texts, self.batch_tokens, self.on_progress = model, texts, batch_tokens, on_progress
        one = MambaState.zeros(model.config, 1, device="meta", dtype=model.backbone.norm_f.weight.dtype)
        self.rows, self.done = max(1, STATES // one.nbytes), 0

    def read(self, nodes: list[Node], state: MambaState | None, parents: list[int] | None = None) -> None:
        """Read nodes and all below them, after their parents' rows of `state`. At most one batch of each level is
        held at a time, for its children come before its neighbours."""
        place = 0
        while place < len(nodes):
            batch = self._fitting(nodes[place : place + self.rows])
            before = None if state is None else state.select(parents[place : place + len(batch)])
            place += len(batch)
            after = self._read_batch(batch, before)
            below = [(child, row) for row, node in enumerate(batch) for child in node.children]
            if below:
                self.read([child for child, _ in below], after, [row for _, row in below])

    def _fitting(self, nodes):
        """The first nodes, as many as make a batch: one that is longer than that is a batch by itself."""
        tokens = np.cumsum([node.stop - node.start for node in nodes])
        return nodes[: max(1, np.searchsorted(tokens, self.batch_tokens, side="right"))]

    def _read_batch(self, nodes: list[Node], state: MambaState | None) -> MambaState:
        """Read the tokens of nodes, end to end, in pieces if there is only one."""
        longest = max(node.stop - node.start for node in nodes)
        for offset in range(0, longest, self.batch_tokens if len(nodes) == 1 else longest):
            spans = [(node.start + offset, min(node.stop, node.start + offset + self.batch_tokens)) for node in nodes]
            pieces = [self.texts[node.members[0]].ids[slice(*span)] for node, span in zip(nodes, spans, strict=True)]
            ids = torch.from_numpy(np.concatenate(pieces))[None].to(self.model.device)
            bounds = np.cumsum([0, *map(len, pieces)])
            packed = torch.from_numpy(bounds).to(self.model.device) if len(nodes) > 1 else None
            out = self.model(ids, state=state, cu_seqlens=packed, last_only=True)
            state = out.state
            self._score(nodes, spans, bounds, out.hidden[0])
        for node in nodes:
            self.texts[node.members[0]].read += node.stop - node.start
            self.done += sum(len(self.texts[i].ids) - 1 == node.stop for i in node.members)
        if self.on_progress is not None:
            self.on_progress(self.done)
        return state

    def _score(self, nodes, spans, bounds, hidden: Tensor) -> None:
        """Add what hidden states (t,m) of the nodes' tokens say of their texts. The state after the token at place p
        predicts the one at p + 1, and several texts may ask it for different ones."""
        owners, places, targets = [], [], []
        for node, (start, stop), offset in zip(nodes, spans, bounds[:-1], strict=True):
            for i in node.members:
                text = self.texts[i]
                begin = max(start, text.first - 1)
                if begin < stop:
                    owners.append(np.full(stop - begin, i))
                    places.append(np.arange(begin, stop) - start + offset)
                    targets.append(text.ids[begin + 1 : stop + 1])
        if not owners:
            return
        owners, places, targets = map(np.concatenate, (owners, places, targets))
        asked, index = np.unique(places, return_inverse=True)
        logprobs, best = self._predict(hidden, asked, index, targets)
        for i, logprob, right in zip(owners.tolist(), logprobs.tolist(), (best == targets).tolist(), strict=True):
            self.texts[i].logprob += logprob
            self.texts[i].greedy &= right

    def _predict(self, hidden, asked, index, targets) -> tuple[np.ndarray, np.ndarray]:
        """The log-probability of each target after the hidden state asked[index], and the most probable id there."""
        logprobs, best = np.empty(len(targets)), np.empty(len(targets), dtype=np.int64)
        size = max(1, LOGITS // self.model.config.padded_vocab_size)
        for begin in range(0, len(asked), size):
            mine = np.flatnonzero((index >= begin) & (index < begin + size))
            rows = hidden[torch.from_numpy(asked[begin : begin + size]).to(hidden.device)]
            logits = self.model.lm_head(rows)
            real = torch.promote_types(logits.dtype, torch.float32)
            logits = mask_padding(logits.to(real), self.model.config.vocab_size)
            at, ids = (torch.from_numpy(v).to(hidden.device) for v in (index[mine] - begin, targets[mine]))
            logprobs[mine] = (logits[at, ids] - logits.logsumexp(-1)[at]).double().cpu().numpy()
            best[mine] = logits.argmax(-1)[at].cpu().numpy()
        return logprobs, best
