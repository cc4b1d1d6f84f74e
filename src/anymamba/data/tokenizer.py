"""Text to token ids and back: bytes, or any `tokenizer.json` of the `tokenizers` library."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from anymamba.data.corpus import close_match
from anymamba.errors import AnymambaError

FILE_NAME = "tokenizer.json"
EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "<|im_end|>", "<|eot_id|>", "[EOS]")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders give for bytes that are not, or not yet, a character


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8 text and 256 ends a document. Nothing to train, nothing unknown to it."""

    name = "bytes"
    vocab_size = 257
    eos_id: int | None = 256
    fingerprint = "bytes"  # equal fingerprints give equal ids

    def encode(self, text: str | bytes) -> np.ndarray:
        """The bytes of `text` as uint16 ids, shape (t,)."""
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; end-of-document ids are dropped and bytes that are not UTF-8 become U+FFFD.

        Raises AnymambaError for an id outside 0..256.
        """
        ids = _as_ids(ids, self)
        return ids[ids != self.eos_id].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write a marker that `load_tokenizer(folder)` understands."""
        _write_json(Path(folder), json.dumps({"type": "bytes", "vocab_size": self.vocab_size, "eos_id": self.eos_id}))


class JsonTokenizer:
    """A `tokenizers.Tokenizer`, as kept in the `tokenizer.json` next to published checkpoints.

    `eos_id` is the first of EOS_NAMES among its added tokens, or None.
    """

    def __init__(self, tokenizer, name: str = FILE_NAME):
        # Settings for padded batches in a tokenizer.json would silently shorten or pad a corpus.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
        self._tokenizer = tokenizer
        self.name = name
        # The embedding needs a row up to the highest id; ids may have gaps, so counting them is not enough.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_id: int | None = next((added[name] for name in EOS_NAMES if name in added), None)
        self.fingerprint = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        self._dtype = dtype_for(self.vocab_size)

    @classmethod
    def from_file(cls, path: Path) -> "JsonTokenizer":
        """Read a `tokenizer.json`. Raises AnymambaError when it is not one."""
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
        except PermissionError as error:
            raise AnymambaError(f"{path}: permission denied; make the file readable for this user") from error
        except Exception as error:  # the library raises bare Exception for anything that it cannot parse
            raise AnymambaError(
                f"{path}: not a tokenizer.json of the `tokenizers` library ({error}); "
                "give the file of that name from a Hugging Face model, or 'bytes'"
            ) from error
        return cls(tokenizer, name=str(path))

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of `text`, shape (t,), uint16 (uint32 past 65536 tokens); no special token is added.

        Raises AnymambaError for bytes that are not UTF-8.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        texts = [_unicode(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self._dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens dropped. Raises AnymambaError for an id outside the vocabulary."""
        return self._tokenizer.decode(_as_ids(ids, self).tolist(), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into `folder`."""
        _write_json(Path(folder), self._tokenizer.to_str(pretty=True))


Tokenizer = ByteTokenizer | JsonTokenizer


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that `spec` names: "bytes", a `tokenizer.json`, or a folder that holds one.

    Raises AnymambaError when there is none, or it cannot be read.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        close = close_match(path)
        raise AnymambaError(
            f"no tokenizer at {path}{f' (did you mean {close}?)' if close else ''}; "
            "give 'bytes', the path of a tokenizer.json, or a folder that holds one"
        )
    if path.stat().st_size < 1024 and _is_byte_marker(path):
        return ByteTokenizer()
    return JsonTokenizer.from_file(path)


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
        _write_json(out.parent, tokenizer.to_str(pretty=True), out.name)
    else:
        trained.save(out)
    return trained


class StreamDecoder:
    """Text from ids that arrive one at a time: what is given out never has to be taken back.

    A character whose bytes are not all there yet is held back, and a token is decoded behind the ones before it,
    because some tokenizers put spaces by context. All pushes and the flush together are `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._reset()

    def _reset(self) -> None:
        self._context: list[int] = []  # the last ids given out, starting and ending between two characters
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, id: int) -> str:
        """Take one token id; the text that is complete now, often "" in the middle of a character."""
        self._pending.append(int(id))
        text = self._tokenizer.decode(self._context + self._pending)
        new = text[len(self._context_text) :]
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._context, self._pending = self._pending, []
        self._context_text = self._tokenizer.decode(self._context)
        return new

    def flush(self) -> str:
        """The rest, with U+FFFD where a character stayed incomplete; after it the decoder is as new."""
        text = self._tokenizer.decode(self._context + self._pending)[len(self._context_text) :]
        self._reset()
        return text


def dtype_for(vocab_size: int) -> type[np.unsignedinteger]:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _utf8(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        # A command line argument that is not UTF-8 arrives with its bytes escaped; this gives them back.
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise AnymambaError(
            f"encode: {text[error.start]!a} at character {error.start} is half of a surrogate pair, not a character; "
            "replace it, for example with text.encode('utf-8', 'replace').decode()"
        ) from error


def _unicode(text: str | bytes) -> str:
    try:
        return _utf8(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise AnymambaError(
            f"encode: byte {error.object[error.start]:#04x} at offset {error.start} is not UTF-8, "
            "and this tokenizer needs text; decode it first, or use the 'bytes' tokenizer"
        ) from error


def _as_ids(ids: Iterable[int], tokenizer: Tokenizer) -> np.ndarray:
    ids = np.asarray(ids if hasattr(ids, "__len__") else list(ids)).astype(np.int64).reshape(-1)
    outside = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if outside.size:
        raise AnymambaError(
            f"decode: token id {outside[0]} is outside 0..{tokenizer.vocab_size - 1} of the tokenizer "
            f"{tokenizer.name!r}; are the ids from a model that was trained with another tokenizer?"
        )
    return ids


def _is_byte_marker(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # JsonTokenizer.from_file says what is wrong with it
    return isinstance(content, dict) and content.get("type") == "bytes"


def _write_json(folder: Path, text: str, name: str = FILE_NAME) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{name}.{os.getpid()}.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / name)


def _not_empty(documents: Iterable[str]) -> Iterator[str]:
    seen = False
    for text in documents:
        seen = seen or bool(text)
        yield text
    if not seen:
        raise AnymambaError("train_bpe: the documents hold no text; give at least one that is not empty")
