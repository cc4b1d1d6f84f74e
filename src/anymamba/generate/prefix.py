"""What many prompts begin with, read once: states at checkpoints, found by the tokens that lead to them.

A state costs the same however long its text is, so a checkpoint every few hundred tokens is cheap.
"""

import hashlib
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.generate.checks import checked_prompts, require_positive
from anymamba.generate.read import Reading, chunk_for, read_batch
from anymamba.state import MambaState

SUFFIX = ".state"
AT_ONCE = 16  # blocks of `every` tokens that are read at a time: memory holds a state for each


class Prefix(NamedTuple):
    """What a cache knows of one prompt."""

    keys: list[str]  # of all its checkpoints
    position: int  # tokens that need not be read
    state: MambaState  # after them


class PrefixCache:
    """States of one model after the beginnings of texts that it has read, the least recently used dropped first.

    Checkpoints stand after every `every` tokens. They are kept on the model's device, up to `max_bytes` of them, and
    with `folder` also on disk, up to `max_disk_bytes`, where other processes and later ones find them; several models
    may share a folder. A file there that is damaged or of another model is passed over with a warning.
    `hits` and `misses` count prompts, `tokens_saved` the tokens that need not have been read. Threads may share a
    cache. It knows the model by its weights when it is made: after training on, make a new one.
    Raises AnymambaError for sizes below 1 and for a folder that cannot be made.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        every: int = 512,
        max_bytes: int = 1 << 30,
        folder: str | os.PathLike | None = None,
        max_disk_bytes: int = 16 << 30,
    ):
        require_positive("PrefixCache", every=every, max_bytes=max_bytes, max_disk_bytes=max_disk_bytes)
        self.model, self.every, self.max_bytes = model, every, max_bytes
        named = _Named(model.config, model.device, model.fingerprint())
        self.disk = None if folder is None else _Disk(Path(folder), named, max_disk_bytes)
        self.hits = self.misses = self.tokens_saved = 0
        self.nbytes = 0  # of the states in memory
        self._states: OrderedDict[str, MambaState] = OrderedDict()  # the most recently used last
        self._root = hashlib.sha256(named.name.encode()).digest()
        self._lock = threading.Lock()  # around the books, never around the model

    def __len__(self) -> int:
        """How many states are in memory, those on disk only left out."""
        return len(self._states)

    def read(self, ids: Sequence[int] | Tensor) -> Reading:
        """The logits (1,v) after `ids` (t,) and the state, from the longest beginning known; keeps checkpoints on the
        way. Raises AnymambaError for ids that are empty or outside the vocabulary."""
        return self.read_batch([ids])

    def read_batch(self, prompts: Sequence[Sequence[int] | Tensor]) -> Reading:
        """`read` of b prompts of any lengths, side by side: logits (b,v) and a state of b rows."""
        prompts = checked_prompts(self.model, prompts, None)
        found = [self.start(ids) for ids in prompts]
        if len(prompts) == 1:
            return self._read_one(prompts[0], found[0])

        def keep(counts: list[int], states: MambaState) -> None:
            for row, (prefix, count) in enumerate(zip(found, counts, strict=True)):
                self.keep(prefix, prefix.position + count, states, row)

        rests = [ids[prefix.position :] for prefix, ids in zip(found, prompts, strict=True)]
        state = MambaState.cat(prefix.state for prefix in found)
        out = read_batch(self.model, rests, state, chunk=self.every, on_chunk=keep)
        self.trim()
        return out

    @torch.no_grad()
    def _read_one(self, ids: Tensor, prefix: Prefix) -> Reading:
        """A prompt alone is read in long pieces, which bring the states at the checkpoints within them."""
        state, position, ids = prefix.state, prefix.position, ids[None].to(self.model.device)
        piece = self.every * max(1, min(AT_ONCE, chunk_for(self.model) // self.every))
        while position < ids.shape[1]:
            part = ids[:, position : position + piece]
            every = self.every if part.shape[1] >= self.every else None  # less than a block has no checkpoint
            out = self.model(part, state=state, last_only=True, return_states=every)
            for count in range(self.every, part.shape[1] + 1, self.every):
                self.keep(prefix, position + count, out.states.after(count))
            position, state = position + part.shape[1], out.state
        self.trim()
        return Reading(out.logits[:, -1], state)

    # ---- for those who read by themselves ----

    def start(self, ids: Tensor) -> Prefix:
        """The longest beginning known of a prompt (t,) of int64, and the state after it: read on from there."""
        keys = self._keys(ids)
        return Prefix(keys, *self._find(keys, len(ids)))

    def keep(self, prefix: Prefix, position: int, states: MambaState, row: int = 0) -> None:
        """Keep a row of `states` if it stands at a checkpoint: it has read the first `position` tokens of the prompt
        that `start` was asked for."""
        blocks, rest = divmod(position, self.every)
        if blocks > 0 and rest == 0:
            self._put(prefix.keys[blocks - 1], states, row)

    def trim(self) -> None:
        """Keep the folder within its size. To be called when prompts are read."""
        if self.disk is not None:
            with self._lock:
                self.disk.trim()

    # ---- the books ----

    def _keys(self, ids: Tensor) -> list[str]:
        """A key for each whole block of `ids`: a hash of all tokens up to its end, made from the key before."""
        digest, keys = self._root, []
        for block in ids.numpy()[: len(ids) // self.every * self.every].reshape(-1, self.every):
            digest = hashlib.sha256(digest + block.astype("<i8").tobytes()).digest()
            keys.append(digest.hex())
        return keys

    def _find(self, keys: list[str], length: int) -> tuple[int, MambaState]:
        """The longest beginning known of a prompt of `length`, in tokens, and the state after it. At least one token
        is left to read, for the logits are not kept."""
        with self._lock:
            for blocks in range((length - 1) // self.every, 0, -1):
                state = self._get(keys[blocks - 1], blocks * self.every)
                if state is not None:
                    self.hits += 1
                    self.tokens_saved += blocks * self.every
                    return blocks * self.every, state
            self.misses += 1
        dtype = self.model.backbone.norm_f.weight.dtype
        return 0, MambaState.zeros(self.model.config, 1, device=self.model.device, dtype=dtype)

    def _get(self, key: str, seen: int) -> MambaState | None:
        if key in self._states:
            self._states.move_to_end(key)
            return self._states[key]
        state = None if self.disk is None else self.disk.load(key, seen)
        if state is not None:
            self._remember(key, state)
        return state

    def _put(self, key: str, states: MambaState, row: int) -> None:
        with self._lock:
            if key in self._states:
                return
            state = states.select([row])  # a copy of this row alone
            self._remember(key, state)
            if self.disk is not None:
                self.disk.save(key, state)

    def _remember(self, key: str, state: MambaState) -> None:
        self._states[key] = state
        self.nbytes += state.nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._states.popitem(last=False)[1].nbytes


class _Named(NamedTuple):
    """What state files ask of their model. Its fingerprint is taken once, not for every file: on a GPU that is a
    transfer for every parameter, which the first token would wait for."""

    config: MambaConfig
    device: torch.device
    name: str

    def fingerprint(self) -> str:
        return self.name


class _Disk:
    """State files in a folder, named by key; when one was last used is the time of its file. What goes wrong here is
    worth a note and costs time, never an answer."""

    def __init__(self, folder: Path, model: _Named, max_bytes: int):
        self.folder, self.model, self.max_bytes = folder, model, max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AnymambaError(f"PrefixCache: cannot make {folder} ({error}); choose another folder") from None

    def load(self, key: str, seen: int) -> MambaState | None:
        """The state of a key if its file is whole and says that this model has read `seen` tokens."""
        path = self.folder / (key + SUFFIX)
        if not path.exists():
            return None
        try:
            state = MambaState.load(path, self.model)
            if state.seen.tolist() != [seen]:
                raise AnymambaError(f"{path} has read {state.seen.tolist()} tokens, not {seen}")
            os.utime(path)
        except (AnymambaError, OSError) as error:
            _note(f"prefix cache: passed over a file, its text is read again: {error}")
            return None
        return state

    def save(self, key: str, state: MambaState) -> None:
        try:
            state.save(self.folder / (key + SUFFIX), self.model)
        except AnymambaError as error:
            _note(f"prefix cache: not kept on disk: {error}")

    def trim(self) -> None:
        """Delete the files longest unused until the rest fits. Other processes may do the same at the same time."""
        try:
            files = [(path.stat(), path) for path in self.folder.glob(f"*{SUFFIX}")]
            total = sum(stat.st_size for stat, _ in files)
            for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
                if total <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= stat.st_size
        except FileNotFoundError:  # another process is at it
            pass
        except OSError as error:
            _note(f"prefix cache: the folder could not be kept small: {error}")


def _note(text: str) -> None:
    warnings.warn(text, stacklevel=4)
