"""Runs as others see them: a model and the tokenizer that it was trained with."""

import hashlib
from pathlib import Path

import numpy as np

from anymamba import checkpoint, lora
from anymamba.data import TokenData, Tokenizer, load_tokenizer
from anymamba.errors import AnymambaError
from anymamba.model import MambaLM

PADDING = 128  # the most by which vocabularies are usually rounded up


def load_run(run: str | Path, tokenizer: str | Path | None = None) -> tuple[MambaLM, Tokenizer]:
    """The model of a run, or any that `checkpoint.load` takes, and its tokenizer, or the one that `tokenizer` names.
    Adapters are merged in.

    Published models count the rows that only round their embedding up as vocabulary; here it becomes that of the
    tokenizer, so that no id without a meaning is ever sampled. Raises AnymambaError if either is missing or damaged,
    or if they do not belong together.
    """
    path = checkpoint.locate(run)
    model, tokens = (lora if lora.matches(path) else checkpoint).load(path), load_tokenizer(tokenizer or path)
    config = model.config
    spare = (config.vocab_size or 0) - tokens.vocab_size
    rounded = config.pad_vocab_size_multiple
    most = rounded if rounded > 1 else PADDING  # not every config says how its vocabulary was rounded up
    if spare < 0 or (spare >= most and tokenizer is not None):
        raise AnymambaError(
            f"the tokenizer {tokens.name!r} has {tokens.vocab_size} tokens and the model {run} knows "
            f"{config.vocab_size or 0}: give the model's own with --tokenizer"
        )
    if spare:
        model.config = config.replace(vocab_size=tokens.vocab_size, pad_vocab_size_multiple=config.padded_vocab_size)
    return model, tokens


def typical_start(tokens: np.ndarray, tokenizer: Tokenizer, length: int = 40) -> str:
    """The beginning of a line in `tokens` (n,), for the model to go on from; "" if there is none.

    The first long line that is not indented, for such a line stands for itself, or else the longest.
    """
    lines = tokenizer.decode(tokens[:8192]).splitlines()[1:]
    lines = [line for line in lines if line[:1].isalnum() and line.isprintable()]
    line = next((line for line in lines if len(line) >= length // 2), max(lines, key=len, default=""))
    return line if len(line) <= length else line[:length].rsplit(" ", 1)[0]


def first_ids(tokenizer: Tokenizer) -> list[int]:
    """What a text without a prompt starts from: a line break, which every text knows, or else the end of another."""
    return tokenizer.encode("\n").tolist() or [tokenizer.eos_id or 0]


def text_digest(data: TokenData) -> str:
    """Tells one tokenised text from another, by its length and a sample of its tokens."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (data.train, data.heldout):
        digest.update(f"{len(part)} ".encode() + np.ascontiguousarray(part[:: len(part) // 65536 + 1]).tobytes())
    return digest.hexdigest()
