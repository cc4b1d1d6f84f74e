"""Training a byte-level BPE tokenizer."""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from anymamba.data.tokenizer import JsonTokenizer, write_text
from anymamba.errors import AnymambaError


def train_bpe(documents: Iterable[str], vocab_size: int, out: Path) -> JsonTokenizer:
    """Train byte-level BPE on `documents` and write it to `out`, a file, or a folder that gets a `tokenizer.json`.

    `vocab_size` counts the 256 bytes and `<|endoftext|>`. Raises AnymambaError when it is below that, or there is no
    text; warns when the text is too short for that many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise AnymambaError(
            f"train_bpe: vocab_size={vocab_size}, but the 256 bytes and <|endoftext|> alone are {len(alphabet) + 1}; "
            "ask for more, 4096 is usual for a small corpus, or use the 'bytes' tokenizer"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=True
    )
    tokenizer.train_from_iterator(_not_empty(documents), trainer)
    trained = JsonTokenizer(tokenizer, name=str(out))
    if trained.vocab_size < vocab_size:
        warnings.warn(
            f"train_bpe: the text holds pairs for {trained.vocab_size} tokens only, not for {vocab_size}; "
            "the tokenizer is the smaller one",
            stacklevel=2,
        )
    out = Path(out)
    if out.suffix == ".json":
        write_text(out, trained.to_json())
    else:
        trained.save(out)
    return trained


def _not_empty(documents: Iterable[str]) -> Iterator[str]:
    seen = False
    for text in documents:
        seen = seen or bool(text)
        yield text
    if not seen:
        raise AnymambaError("train_bpe: the documents hold no text; give at least one that is not empty")
