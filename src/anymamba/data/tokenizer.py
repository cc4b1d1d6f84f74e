"""Text to token ids and back: bytes, or any `tokenizer.json` of the `tokenizers` library, from wherever it is."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from anymamba.checkpoint import gguf, hub
from anymamba.checkpoint.gguf_vocabulary import read_tokenizer
from anymamba.data import chat
from anymamba.data.corpus import close_match
from anymamba.data.special import CONFIG, GENERATION, MAP, TEMPLATE, Special, read_special, special
from anymamba.errors import AnymambaError

FILE_NAME = "tokenizer.json"
EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "<|im_end|>", "<|eot_id|>", "[EOS]")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders give for bytes that are not, or not yet, a character


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8 text and 256 ends a document. Nothing to train, nothing unknown to it."""

    name = "bytes"
    vocab_size = 257
    eos_id: int | None = 256
    eos_ids: tuple[int, ...] = (256,)
    special = Special()
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

    def chat(self, messages: Sequence[chat.Message], add_generation_prompt: bool = True) -> str:
        """Raises AnymambaError: bytes have no chat template."""
        return _chat(self, messages, add_generation_prompt)

    def to_json(self) -> str:
        """A marker that `load_tokenizer` understands."""
        return json.dumps({"type": "bytes", "vocab_size": self.vocab_size, "eos_id": self.eos_id})

    def save(self, folder: Path) -> None:
        """Write the marker as `tokenizer.json` into `folder`."""
        _save(self, Path(folder))


class JsonTokenizer:
    """A `tokenizers.Tokenizer`, as kept in the `tokenizer.json` next to published checkpoints.

    `eos_ids` end a text, `eos_id` is the first of them or None: those that `special` names, or else the first of
    EOS_NAMES among the added tokens. Raises AnymambaError if `special` names tokens that do not exist.
    """

    def __init__(self, tokenizer, name: str = FILE_NAME, special: Special | None = None):
        # Settings for padded batches in a tokenizer.json would silently shorten or pad a corpus.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
        self._tokenizer = tokenizer
        self.name = name
        # The embedding needs a row up to the highest id; ids may have gaps, so counting them is not enough.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.special = special or Special()
        self.eos_ids = self._ends(added)
        self.eos_id: int | None = self.eos_ids[0] if self.eos_ids else None
        self.fingerprint = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        self._dtype = dtype_for(self.vocab_size)

    def _ends(self, added: dict[str, int]) -> tuple[int, ...]:
        named = self.special.tokens.get("eos_token")
        if named is None:
            first = [] if self.special.eos_ids else [added[name] for name in EOS_NAMES if name in added][:1]
        else:
            first = [self._tokenizer.token_to_id(named)]
        ids = tuple(dict.fromkeys([*first, *self.special.eos_ids]))
        if any(i is None or i >= self.vocab_size for i in ids):
            raise AnymambaError(
                f"{self.name}: the files beside it say that {named!r} and the ids {list(self.special.eos_ids)} end a "
                f"text, but its vocabulary of {self.vocab_size} has no such token; take all files from one model"
            )
        return ids

    @classmethod
    def from_file(cls, path: Path) -> "JsonTokenizer":
        """Read a `tokenizer.json` and what stands beside it. Raises AnymambaError when it is not one."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except PermissionError as error:
            raise AnymambaError(f"{path}: permission denied; make the file readable for this user") from error
        except UnicodeDecodeError as error:
            raise _no_tokenizer(path, error) from error
        return cls.from_json(text, str(path), read_special(path.parent) if path.name == FILE_NAME else None)

    @classmethod
    def from_json(cls, text: str, name: str, special: Special | None = None) -> "JsonTokenizer":
        """The tokenizer of a `tokenizer.json`'s text. Raises AnymambaError when it is not one."""
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for anything that it cannot parse
            raise _no_tokenizer(name, error) from error
        return cls(tokenizer, name, special)

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

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of `ids`, special tokens dropped or not. Raises AnymambaError for an id outside the vocabulary."""
        return self._tokenizer.decode(_as_ids(ids, self).tolist(), skip_special_tokens=not special)

    def chat(self, messages: Sequence[chat.Message], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on, by its chat template; encode it as any other.

        `messages` are dicts with "role" and "content"; with `add_generation_prompt` the text ends where the model is to
        answer. Raises AnymambaError if there is no template, or it is broken or refuses the messages.
        """
        return _chat(self, messages, add_generation_prompt)

    def to_json(self) -> str:
        """The text of its `tokenizer.json`."""
        return self._tokenizer.to_str(pretty=True)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into `folder`, and beside it the special tokens and the template if there are any.

        Such files of another tokenizer, which would speak for this one, are removed.
        """
        _save(self, Path(folder))


Tokenizer = ByteTokenizer | JsonTokenizer


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that `spec` names: "bytes", a `tokenizer.json`, a folder that holds one, a GGUF file that does, or
    a model on the Hugging Face Hub, "owner/name" or "owner/name@revision".

    Raises AnymambaError when there is none, or it cannot be read.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if (name := hub.hub_name(str(spec), None)) is not None:
        path = hub.fetch_small(*name)
        if not (path / FILE_NAME).is_file():
            raise AnymambaError(
                f"{spec} has no {FILE_NAME} on the Hub (or none in its cache, if offline): give --tokenizer another "
                "model's that has it, as state-spaces' have EleutherAI/gpt-neox-20b"
            )
    if gguf.matches(path):
        return _from_gguf(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        close = close_match(path)
        raise AnymambaError(
            f"no tokenizer at {path}{f' (did you mean {close}?)' if close else ''}; "
            "give 'bytes', the path of a tokenizer.json, or a folder or a model on the Hub that holds one"
        )
    if path.stat().st_size < 1024 and _is_byte_marker(path.read_bytes()):
        return ByteTokenizer()
    return JsonTokenizer.from_file(path)


def _from_gguf(path: Path) -> Tokenizer:
    contents = read_tokenizer(path)
    text = contents[FILE_NAME]
    return (
        ByteTokenizer()
        if _is_byte_marker(text)
        else JsonTokenizer.from_json(text, str(path), special(contents, str(path)))
    )


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


def _is_byte_marker(text: str | bytes) -> bool:
    try:
        content = json.loads(text)
    except ValueError:
        return False  # JsonTokenizer says what is wrong with it
    return isinstance(content, dict) and content.get("type") == "bytes"


def _no_tokenizer(name: str | Path, error: Exception) -> AnymambaError:
    return AnymambaError(
        f"{name}: not a tokenizer.json of the `tokenizers` library ({error}); "
        "give the file of that name from a Hugging Face model, or 'bytes'"
    )


def _chat(tokenizer: Tokenizer, messages: Sequence[chat.Message], add_generation_prompt: bool) -> str:
    kept = tokenizer.special
    if kept.chat_template is None:
        raise AnymambaError(
            f"the tokenizer {tokenizer.name!r} has no chat template: give the model plain text, or put a "
            f"{TEMPLATE} beside its {FILE_NAME}"
        )
    return chat.render(kept.chat_template, messages, add_generation_prompt, kept.tokens)


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    kept = tokenizer.special
    write_text(folder / FILE_NAME, tokenizer.to_json())
    beside = {CONFIG: kept.config(), GENERATION: {"eos_token_id": list(kept.eos_ids)} if kept.eos_ids else {}}
    for name in (CONFIG, GENERATION, MAP, TEMPLATE):
        if beside.get(name):
            write_text(folder / name, json.dumps(beside[name], ensure_ascii=False, indent=2))
        else:
            (folder / name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
