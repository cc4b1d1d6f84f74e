"""A corpus as two memory-mapped arrays of token ids, for training and held out, tokenised once.

On disk: `train.bin` and `heldout.bin`, raw ids, and `tokens.json`, written last, without which they count for nothing.
"""

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from anymamba.data.corpus import Source, documents, sources
from anymamba.data.tokenizer import Tokenizer, dtype_for
from anymamba.errors import AnymambaError

FORMAT_VERSION = 2  # of what a text becomes; 2: CR LF is LF
_META = "tokens.json"
_PARTS = ("train", "heldout")
_BATCH_CHARS = 1 << 21  # handed to the tokenizer at once: some pieces, so that it can use several cores
_PEEK = 16  # documents looked at before the split is decided


@dataclass(frozen=True, eq=False)
class TokenData:
    """Token ids of a corpus, shape (t,) each, uint16 or uint32, mapped from disk.

    `train_bytes` and `heldout_bytes` count the UTF-8 bytes of the text: loss in nats per token times tokens, divided by
    bytes and ln 2, is bits per byte, which compares across tokenizers.
    """

    train: np.ndarray
    heldout: np.ndarray
    train_bytes: int
    heldout_bytes: int
    vocab_size: int
    eos_id: int | None


def prepare(
    paths: Iterable[str | Path] | None,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    field: str = "text",
    holdout: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> TokenData:
    """Tokenise the documents under `paths` (see `documents`) into `folder`, or reuse what is there already.

    Of many documents, each followed by `tokenizer.eos_id`, a fraction of about `holdout` and at least one is held out
    whole, chosen by a hash of (seed, index). Of a single one, the last fraction of its text is, and no eos is added.
    The result is reused while the files, their sizes and times, the tokenizer and the arguments stay the same.

    Raises AnymambaError for text that is too short to split, a full disk, and whatever `documents` raises.
    """
    folder = Path(folder)
    if not 0 < holdout < 1:
        raise AnymambaError(f"prepare: holdout={holdout}, but it is a fraction between 0 and 1, such as 0.1")
    paths = [paths] if isinstance(paths, str | Path) else paths and list(paths)
    files = sources(paths)
    fingerprint = _fingerprint(files, tokenizer, field, holdout, seed)
    if data := _load(folder, fingerprint):
        return data
    size = sum(file.path.stat().st_size for file in files) if all(file.is_plain for file in files) else None
    with _writable(folder), progress_bar(size, progress) as advance:
        folder.mkdir(parents=True, exist_ok=True)
        # Killed in the middle, only this folder is left over, and nothing takes it for a corpus.
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=folder) as unfinished:
            counts = _write_parts(Path(unfinished), _routed(paths, field, holdout, seed), tokenizer, advance)
            _check_length(counts, holdout)
            meta = {"fingerprint": fingerprint, "tokenizer": tokenizer.name, "counts": counts}
            meta |= {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
            _publish(Path(unfinished), folder, meta)
    data = _load(folder, fingerprint)
    assert data is not None
    return data


def _fingerprint(files: list[Source], tokenizer: Tokenizer, field: str, holdout: float, seed: int) -> str:
    stats = [(os.path.realpath(file.path), file.path.stat()) for file in files]
    identity = [
        FORMAT_VERSION,
        [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
        tokenizer.fingerprint,
        field,
        holdout,
        seed,
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _load(folder: Path, fingerprint: str) -> TokenData | None:
    """What `prepare` left in `folder`, if it is whole and of this fingerprint."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        if meta["fingerprint"] != fingerprint:
            return None
        dtype, counts = dtype_for(meta["vocab_size"]), meta["counts"]
        arrays = [np.memmap(folder / f"{part}.bin", dtype=dtype, mode="r") for part in _PARTS]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any(len(array) != counts[part]["tokens"] for part, array in zip(_PARTS, arrays, strict=True)):
        return None
    sizes = [counts[part]["bytes"] for part in _PARTS]
    return TokenData(*arrays, *sizes, vocab_size=meta["vocab_size"], eos_id=meta["eos_id"])


# The stream of text: (part, text), with text None at the end of a document.


def _routed(paths, field: str, holdout: float, seed: int) -> Iterator[tuple[str, str | None]]:
    stream = documents(paths, field)
    first = list(islice(stream, _PEEK))
    if len(first) == 1:
        length = sum(map(len, first[0].pieces))
        yield from _cut(next(documents(paths, field)).pieces, int(length * (1 - holdout)))
        return
    heldout_first = _heldout_of_first(len(first), holdout, seed)
    for index, document in enumerate(chain(first, stream)):
        held = index in heldout_first if index < len(first) else _hash(seed, index) < holdout
        part = "heldout" if held else "train"
        for piece in document.pieces:
            yield part, piece
        yield part, None


def _cut(pieces: Iterable[str], place: int) -> Iterator[tuple[str, str]]:
    """One document, cut at character `place`."""
    for piece in pieces:
        head, tail = piece[: max(place, 0)], piece[max(place, 0) :]
        place -= len(piece)
        if head:
            yield "train", head
        if tail:
            yield "heldout", tail


def _heldout_of_first(count: int, holdout: float, seed: int) -> set[int]:
    """Which of the first documents are held out. Among few, chance alone could take none, or half of the text; so
    their number is fixed and the hash only says which."""
    order = sorted(range(count), key=lambda index: _hash(seed, index))
    return set(order[: min(max(round(count * holdout), 1), count - 1)])


def _hash(seed: int, index: int) -> float:
    """A fixed pseudo-random number in [0, 1)."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


# Writing.


def _write_parts(
    folder: Path, stream: Iterator[tuple[str, str | None]], tokenizer: Tokenizer, advance: Callable[[int], None]
) -> dict[str, dict[str, int]]:
    """Write both parts and count their tokens and bytes."""
    dtype = dtype_for(tokenizer.vocab_size)
    eos = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype=dtype)
    counts = {part: {"tokens": 0, "bytes": 0} for part in _PARTS}
    with ExitStack() as stack:
        files = {part: stack.enter_context(_create(folder / f"{part}.bin")) for part in _PARTS}
        for batch in _batched(stream):
            encoded = iter(tokenizer.encode_batch([text for _, text in batch if text is not None]))
            for part, text in batch:
                ids = eos if text is None else next(encoded)
                files[part].write(ids.astype(dtype).tobytes())
                size = 0 if text is None else len(text.encode())
                counts[part]["tokens"] += len(ids)
                counts[part]["bytes"] += size
                advance(size)
    return counts


def _batched(stream: Iterator[tuple[str, str | None]]) -> Iterator[list[tuple[str, str | None]]]:
    batch, chars = [], 0
    for part, text in stream:
        batch.append((part, text))
        chars += len(text or "")
        if chars >= _BATCH_CHARS or len(batch) >= 1 << 16:
            yield batch
            batch, chars = [], 0
    yield batch


def _create(path: Path) -> BinaryIO:
    return open(path, "wb")


def _check_length(counts: dict[str, dict[str, int]], holdout: float) -> None:
    train, heldout = (counts[part]["tokens"] for part in _PARTS)
    if min(train, heldout) < 2:
        raise AnymambaError(
            f"the text is too short: {train} tokens to train on and {heldout} held out (holdout={holdout}), "
            "but each needs at least 2; give more text"
        )


def _publish(unfinished: Path, folder: Path, meta: dict) -> None:
    """Move the finished files in place. The old meta goes first and the new one comes last: at no moment does one
    describe arrays that are not its own."""
    (unfinished / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    (folder / _META).unlink(missing_ok=True)
    for name in (*(f"{part}.bin" for part in _PARTS), _META):
        os.replace(unfinished / name, folder / name)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AnymambaError(
                f"{folder}: the disk is full, and nothing half-written was left; a token takes "
                "2 bytes, or 4 with a vocabulary past 65536: free some space, or choose a folder on another disk"
            ) from error
        if isinstance(error, PermissionError | FileExistsError | NotADirectoryError) or error.errno == errno.EROFS:
            raise AnymambaError(f"{folder}: cannot write there ({error.strerror}); choose another folder") from error
        raise


def tokenised(paths: Iterable[str | Path], tokenizer: Tokenizer, field: str) -> Iterator[tuple[np.ndarray, int]]:
    """The documents under `paths` piece by piece: ids (t,) and the size of their text in bytes.

    Among several documents each ends with the EOS id; a single one, as in training, has no end. Raises AnymambaError
    as `documents` does.
    """
    eos = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype=dtype_for(tokenizer.vocab_size))
    for index, document in enumerate(documents(paths, field)):
        if index == 1:
            yield eos, 0
        for text in document.pieces:
            yield tokenizer.encode(text), len(text.encode())
        if index:
            yield eos, 0


@contextmanager
def progress_bar(total: int | None, show: bool = True, label: str = "tokenising") -> Iterator[Callable[[int], None]]:
    """Gives `advance(bytes)`. The bar comes up when the work takes more than a second and a person may be looking."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (label, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(label, total=total)
    begin = time.monotonic()

    def advance(size: int) -> None:
        bar.advance(task, size)
        if show and console.is_terminal and not bar.live.is_started and time.monotonic() - begin > 1:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
