"""What an engine has under way: prompts that are being read, and the batch of rows that are being written.

Axis letters: b rows of the batch, t time, v vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from anymamba.generate.prefix import Prefix
from anymamba.generate.requests import Handle
from anymamba.generate.rows import Row
from anymamba.state import LayerState, MambaState


@dataclass(eq=False)
class Job:
    """A request until its prompt is read."""

    handle: Handle
    ids: Tensor  # (t,)
    rows: list[Row]
    state: MambaState | None  # what has read the first `position` ids
    position: int = 0
    prefix: Prefix | None = None  # its beginnings in the engine's cache, once it is looked up there


@dataclass
class Batch:
    """The rows being written: what row i says next is drawn from logits[i]."""

    handles: list[Handle] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    logits: Tensor | None = None  # (b, v); None without rows
    state: MambaState | None = None

    def going(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if not row.finish_reason]

    def select(self, index: list[int]) -> "Batch":
        if len(index) == len(self.rows):
            return self
        if not index:
            return Batch()
        of_rows = ([values[i] for i in index] for values in (self.handles, self.rows))
        return Batch(*of_rows, self.logits[index], self.state.select(index))

    def join(self, other: "Batch") -> "Batch":
        if not (self.rows and other.rows):
            return self if self.rows else other
        of_rows = (self.handles + other.handles, self.rows + other.rows)
        return Batch(*of_rows, torch.cat([self.logits, other.logits]), MambaState.cat([self.state, other.state]))


def batch_of(jobs, logits, state) -> Batch:
    """The rows of prompts that are read, with their logits (b, v) and states."""
    handles = [job.handle for job in jobs for _ in job.rows]
    return Batch(handles, [row for job in jobs for row in job.rows], logits, state)


def joined(states) -> MambaState | None:
    """States of one row as one; None stands for the state before the first token, also where it is that of all."""
    known = next((state for state in states if state is not None), None)
    if known is None:
        return None
    layers = tuple(LayerState(*map(torch.zeros_like, layer)) for layer in known.layers)
    start = MambaState(layers, torch.zeros_like(known.seen))
    return MambaState.cat([start if state is None else state for state in states])
