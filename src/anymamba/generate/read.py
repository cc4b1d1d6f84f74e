"""Reading text of any length in constant memory: what the model keeps of it is its state.

Axis letters: b rows, t time, v padded vocabulary.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from anymamba.errors import AnymambaError
from anymamba.generate.checks import checked_ids, require_positive, require_vocabulary
from anymamba.generate.rows import lengths_of
from anymamba.model import PIECE
from anymamba.state import MambaState

SHORTEST = 256  # tokens of a chunk: with fewer, weights are fetched more often than they are used
MOST = 1.6 * 2**30  # bytes, by the estimate below, that a chunk may take where more are free: 2 GiB with all around it
LONGEST = {"cpu": 2048, "gpu": 8 * PIECE}  # longer ones are no faster, and rarer to report and to interrupt


class Reading(NamedTuple):
    """Where a reader stands: the logits (b,v) of the next token, as the model gives them, and the state."""

    logits: Tensor
    state: MambaState

    def save(self, path: str | os.PathLike, model) -> None:
        """Write a state file that also says what comes next, so that the text can go on without another prompt.

        `MambaState.load` reads it, too. Raises AnymambaError if the file cannot be written.
        """
        self.state.save(path, model, logits=self.logits)

    @classmethod
    def load(cls, path: str | os.PathLike, model) -> Self:
        """Read a file of `save`. Raises AnymambaError as `MambaState.load` does, and for a state without logits."""
        state, extra = MambaState.load_with(path, model)
        if "logits" not in extra:
            raise AnymambaError(f"{path} does not say what comes next: it was saved by a state alone; give a prompt")
        return cls(extra["logits"], state)


def read(
    model: torch.nn.Module,
    ids: Sequence[int] | Tensor | np.ndarray,
    state: MambaState | None = None,
    *,
    chunk: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Reading:
    """The logits (1,v) after `ids` (t,) and the state, the same as of one pass, in memory that does not grow with t.

    ids: a list, a tensor, or an array, which may be mapped from disk.
    state: of one row, what was read before; None starts anew.
    chunk: tokens at a time. None takes as many as fit into a quarter of the memory that is free (of a CPU, what the
        system says is available, of a GPU, what its driver says) and into 2 GiB, at least 256, and at most 2048 on a
        CPU, where longer ones are no faster, and on a GPU 65536, as many as a forward pass takes at once.
    on_progress: called with the number of tokens read so far after each chunk.

    To keep what was read when a person interrupts, iterate over `reading` instead. Raises AnymambaError for ids that
    are empty, not (t,), not whole numbers or outside the vocabulary, and for a state of another shape.
    """
    out = None
    for out in reading(model, ids, state, chunk=chunk):
        if on_progress is not None:
            on_progress(int(out.state.seen) - (0 if state is None else int(state.seen)))
    return out


def reading(model: torch.nn.Module, ids, state: MambaState | None = None, *, chunk: int | None = None):
    """`read` step by step: an iterator that gives a `Reading` after each chunk, so that the last one given is what
    there is when anything ends the loop, Ctrl-C for example. `int(reading.state.seen)` tokens are read by then.

    Raises AnymambaError as `read` does, for ids outside the vocabulary when their chunk's turn comes.
    """
    require_vocabulary("read", model)
    if isinstance(ids, str | bytes):
        raise AnymambaError(f"read: a text ({type(ids).__name__}), but it must be token ids; encode it first")
    ids = ids if isinstance(ids, Tensor) else np.asarray(ids)
    if ids.ndim != 1 or len(ids) == 0:
        raise AnymambaError(f"read: ids are {tuple(ids.shape)}, but must be (t,) of at least one token")
    if isinstance(ids, np.ndarray) and ids.dtype.kind not in "iu":
        raise AnymambaError(f"read: the text is {ids.dtype}, but token ids are whole numbers")
    if state is not None and state.batch_size != 1:
        raise AnymambaError(f"read: a state of {state.batch_size} rows for one text; choose a row: state.select([0])")
    if chunk is None:
        chunk = chunk_for(model)
    require_positive("read", chunk=chunk)
    return _reading(model, ids, state, chunk)


@torch.no_grad()
def _reading(model, ids, state, chunk) -> Iterator[Reading]:
    bounds = [*range(0, len(ids), chunk), len(ids)]
    for start, stop in pairwise(bounds):
        part = ids[start:stop]
        if not isinstance(part, Tensor):  # a copy, for memory mapped from disk may not be written to
            part = torch.from_numpy(np.array(part, dtype=np.int64))
        part = checked_ids(part, model.config.vocab_size, "read: the text", offset=start)
        out = model(part[None].to(model.device), state=state, last_only=True)
        state = out.state
        yield Reading(out.logits[:, -1], state)


@torch.no_grad()
def read_batch(
    model: torch.nn.Module,
    prompts: Sequence[Tensor],
    state: MambaState | None = None,
    logits: Tensor | None = None,
    *,
    chunk: int,
    on_chunk: Callable[[list[int], MambaState], None] | None = None,
) -> Reading:
    """A `Reading` of b rows, after prompts (t,) of any lengths side by side, `chunk` tokens at a time.

    logits: (b,v) that belong to `state`: what a row of an empty prompt keeps.
    on_chunk: called after each chunk with how many tokens of each prompt are read, and the state then.
    """
    counts = [len(prompt) for prompt in prompts]
    ids = pad_sequence(list(prompts), batch_first=True).to(model.device)
    for start in range(0, ids.shape[1], chunk):
        here = [min(max(count - start, 0), chunk) for count in counts]
        lengths = lengths_of(here, model.device)
        out = model(ids[:, start : start + chunk], state=state, lengths=lengths, last_only=True)
        new, state = out.logits[:, -1], out.state
        logits = new if logits is None or lengths is None else torch.where(lengths[:, None] > 0, new, logits)
        if on_chunk is not None:
            on_chunk([min(count, start + chunk) for count in counts], state)
    return Reading(logits, state)


# ---- how much at a time ----


def chunk_for(model: torch.nn.Module) -> int:
    """How many tokens `read` reads at a time: see there."""
    longest = LONGEST["cpu" if model.device.type == "cpu" else "gpu"]
    free = free_memory(model.device)
    room = MOST if free is None else min(MOST, free / 4)
    return max(SHORTEST, min(longest, int(room / bytes_per_token(model))))


def bytes_per_token(model: torch.nn.Module) -> int:
    """Memory that reading one more token at a time takes: the activations of one block, the largest moment.

    Within the mixer x, z, the convolved x, the step sizes and y (d_inner each), and what they are made of; around it
    the block's input and output and the residual stream (d_model), the latter in float32.
    """
    c, size = model.config, model.backbone.norm_f.weight.element_size()
    return size * (5 * c.d_inner + c.rank + 2 * c.d_state + 2 * c.d_model) + 2 * 4 * c.d_model + 2 * 8


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had without taking them from anyone; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    values = _numbers("/proc/meminfo")
    if "MemAvailable:" not in values:
        return None
    free = 1024 * values["MemAvailable:"]
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container, whose own limit meminfo does not know
    used = _numbers("/sys/fs/cgroup/memory.stat").get("anon")
    if used is not None and limit.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(text) - used))
    return free


def _numbers(path: str) -> dict[str, int]:
    """Lines "name number …" of a file of the system; none if there is no such file."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
