"""Batches of token ids as a pure function of (seed, step): to resume a run is to know its step.

Axis letters: b batch, t time.
"""

from collections.abc import Iterator

import numpy as np
import torch

from anymamba.errors import AnymambaError

Batch = tuple[torch.Tensor, torch.Tensor]  # ids and labels, both (b, t) int64


class Batches:
    """Endless training batches from `tokens`, an array of ids of shape (n,), which may be mapped from disk.

    carry=False: each epoch takes every window of `seqlen` tokens once, in a new order and from a new random offset.
    carry=True: row r reads a stretch of its own, chunk after chunk, so that the state can be carried from one step to
    the next (truncated backpropagation through time); `starts_fresh(step)` says when the rows jump.

    Under data parallelism, ask for the whole batch everywhere and let each rank take its rows.

    Raises AnymambaError for sizes that are not positive, and for fewer tokens than one window, or with carry one
    window a row, needs.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seqlen: int, seed: int = 0, carry: bool = False):
        for name, value in {"batch_size": batch_size, "seqlen": seqlen}.items():
            if value < 1:
                raise AnymambaError(f"Batches: {name}={value}, but it must be at least 1")
        if not 0 <= seed < 2**32:
            raise AnymambaError(f"Batches: seed={seed}, but it must be from 0 to 2³² − 1")
        rows = batch_size if carry else 1
        needed = rows * seqlen + 1
        if len(tokens) < needed:
            sizes = f"batch_size={batch_size} rows of seqlen={seqlen} in a row" if carry else f"seqlen={seqlen}"
            raise AnymambaError(
                f"Batches: {len(tokens)} tokens, but {sizes} needs at least {needed} (the last label is one further); "
                f"give more text, or a smaller {'batch_size or seqlen' if carry else 'seqlen'}"
            )
        self.tokens, self.batch_size, self.seqlen, self.seed, self.carry = tokens, batch_size, seqlen, seed, carry
        if carry:
            self._windows = batch_size * ((len(tokens) - 1) // (batch_size * seqlen))
        else:  # one window less than would fit leaves room for the offset
            self._windows = max(1, len(tokens) // seqlen - 1)
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which all tokens are seen about once."""
        return -(-self._windows // self.batch_size)

    def batch(self, step: int) -> Batch:
        """ids and labels of `step` = 0, 1, …, each (b, t) int64; a label is the token after its id."""
        if step < 0:
            raise AnymambaError(f"Batches: step={step}, but steps count from 0")
        index = step * self.batch_size + np.arange(self.batch_size)
        starts = [self._starts(epoch)[place] for epoch, place in zip(*divmod(index, self._windows), strict=True)]
        return _gather(self.tokens, starts, self.seqlen)

    def starts_fresh(self, step: int) -> bool:
        """Whether the rows of `step` do not continue those of the step before: then the state must be reset."""
        return not self.carry or step % self.steps_per_epoch == 0

    def _starts(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch begin, in the order in which they are read."""
        if epoch not in self._epochs:
            # RandomState and not default_rng: NumPy promises that its numbers never change, so runs resume for years.
            random = np.random.RandomState([self.seed, epoch % 2**32])
            offset = random.randint(len(self.tokens) - self._windows * self.seqlen, dtype=np.int64)
            if self.carry:
                order = np.arange(self._windows).reshape(self.batch_size, -1).T.reshape(-1)
            else:
                order = random.permutation(self._windows)
            if len(self._epochs) >= 2:  # a batch can lie across two epochs
                self._epochs.clear()
            self._epochs[epoch] = offset + order * self.seqlen
        return self._epochs[epoch]


def heldout_batches(tokens: np.ndarray, batch_size: int, seqlen: int, max_tokens: int | None = None) -> Iterator[Batch]:
    """The same evaluation windows every time: at most `max_tokens` labels, spread evenly over `tokens` (n,).

    No window overlaps another and none comes twice, so the last batch may have fewer rows. Where `tokens` are fewer
    than `seqlen` + 1, there is one window of all. Raises AnymambaError for sizes below 1 and fewer than 2 tokens.
    """
    for name, value in {"batch_size": batch_size, "seqlen": seqlen, "max_tokens": max_tokens or 1}.items():
        if value < 1:
            raise AnymambaError(f"heldout_batches: {name}={value}, but it must be at least 1")
    if len(tokens) < 2:
        raise AnymambaError(f"heldout_batches: {len(tokens)} tokens, but a label needs at least 2; give more text")
    seqlen = min(seqlen, len(tokens) - 1)
    windows = (len(tokens) - 1) // seqlen
    count = windows if max_tokens is None else min(windows, max(1, max_tokens // seqlen))
    starts = np.linspace(0, windows - 1, count).round().astype(np.int64) * seqlen
    return (_gather(tokens, starts[i : i + batch_size], seqlen) for i in range(0, count, batch_size))


def cu_seqlens_at_eos(ids: torch.Tensor, eos_id: int | None) -> torch.Tensor:
    """Boundaries of the documents in `ids` (b, t), for the ops' `cu_seqlens` after flattening ids to (1, b·t).

    int32, from 0 to b·t: a sequence begins with each row and after each `eos_id`, so no state crosses a document.
    """
    if ids.ndim != 2:
        raise AnymambaError(f"cu_seqlens_at_eos: ids have shape {tuple(ids.shape)}, but must be (batch, seqlen)")
    rows = torch.arange(0, ids.numel() + 1, max(ids.shape[1], 1), device=ids.device)
    if eos_id is None:
        return rows.int()
    after_eos = (ids.reshape(-1) == eos_id).nonzero().squeeze(1) + 1
    return torch.cat([rows, after_eos]).unique().int()


def _gather(tokens: np.ndarray, starts, seqlen: int) -> Batch:
    windows = np.stack([tokens[start : start + seqlen + 1] for start in starts]).astype(np.int64)
    return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())
