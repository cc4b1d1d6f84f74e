"""Where text comes from: files, folders, JSONL, Parquet, compressed or not, and Python's own source.

Everything streams: a document is read in pieces when it is its turn, so that a corpus may be larger than memory.
"""

import codecs
import difflib
import gzip
import itertools
import json
import lzma
import os
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from anymamba.errors import AnymambaError

PIECE_BYTES = 1 << 18
_COMPRESSED = {".xz": lzma.open, ".gz": gzip.open}
_BYTE_ORDER_MARK = "\ufeff"  # some editors begin a file with it; it is no text
_JSONL = (".jsonl", ".ndjson")
# Not the library itself, or not the same from one installation to the next.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class NotTextError(AnymambaError):
    """A file that was to be read as text holds bytes that are not UTF-8."""


@dataclass(frozen=True)
class Document:
    """One text. `pieces` yields it in parts of some 100 KiB, cut between characters, once; `text` reads it whole."""

    name: str
    pieces: Iterable[str]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True)
class Source:
    """One file of a corpus."""

    path: Path
    name: str
    explicit: bool  # named by the caller rather than found in a folder: then it must hold text

    @property
    def format(self) -> str:
        """The suffix that says how to read it, without that of a compression."""
        stem = self.path.with_suffix("") if self.path.suffix in _COMPRESSED else self.path
        return stem.suffix.lower()

    @property
    def is_plain(self) -> bool:
        """Whether the file's size is that of its text."""
        return self.path.suffix not in _COMPRESSED and self.format not in (*_JSONL, ".parquet")


def documents(paths: Iterable[str | Path] | None, field: str = "text") -> Iterator[Document]:
    """The documents under `paths` in a fixed order; `None` means the running Python's standard library.

    A text file is one document; CR LF at its line ends becomes LF. A folder is searched for files, hidden ones and
    `__pycache__` left out, and those that are not text are skipped with a warning. Each line of a `.jsonl` and each row
    of a `.parquet` file is a document, its text in `field`. `.xz` and `.gz` are decompressed on the way. Empty
    documents are left out.

    Raises AnymambaError for a path that does not exist or holds no text (at once), and while reading for a file that is
    unreadable, damaged or not UTF-8, a line that is not JSON, or a missing field.
    """
    paths = _as_list(paths)
    return _read_all(sources(paths), paths, field)


def sources(paths: Iterable[str | Path] | None) -> list[Source]:
    """The files that `documents(paths)` reads, each once, sorted within a folder."""
    paths = _as_list(paths)
    if paths is None:
        return _standard_library()
    found = [source for path in paths for source in _sources_of(path)]
    unique: dict[str, Source] = {}  # a file that is named twice must not be both trained on and held out
    for source in found:
        unique.setdefault(os.path.realpath(source.path), source)
    return list(unique.values())


def _as_list(paths):
    if paths is None:
        return None
    paths = [Path(p).expanduser() for p in ([paths] if isinstance(paths, str | Path) else paths)]
    if not paths:
        raise AnymambaError("no paths given: name at least one file or folder, or None for Python's standard library")
    return paths


def _sources_of(path: Path) -> list[Source]:
    with _readable(path):
        if path.is_dir():
            if files := _walk(path):
                return [Source(file, str(file), explicit=False) for file in files]
            raise AnymambaError(f"{path}: the folder holds no files; give one with text files")
        if path.is_file():
            if path.stat().st_size == 0:
                raise AnymambaError(f"{path}: the file is empty; give a file with text")
            return [Source(path, str(path), explicit=True)]
        if path.exists():
            raise AnymambaError(f"{path}: neither a file nor a folder; save its text to a file first")
        close = close_match(path)
    cure = f"did you mean {close}?" if close else f"check the spelling; the folder now is {Path.cwd()}"
    raise AnymambaError(f"{path}: no such file or folder; {cure}")


def close_match(path: Path) -> Path | None:
    """What a misspelt path may have meant: a neighbour with nearly the same name."""
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return path.parent / close[0] if close else None


def _walk(folder: Path, leave_out: Iterable[str] = ()) -> list[Path]:
    """The files under `folder`, sorted; hidden ones, `__pycache__` and folders named in `leave_out` are not visited."""

    def fail(error):  # os.walk would leave out a folder that it may not list, without a word
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ("__pycache__", *leave_out)]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _standard_library() -> list[Source]:
    root = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in _walk(root, leave_out=_NOT_STDLIB) if path.suffix == ".py"]
    if not modules:
        raise AnymambaError(f"{root}: this Python keeps no source of its library there; name a file or folder instead")
    return [Source(path, path.relative_to(root).as_posix(), explicit=False) for path in modules]


def _read_all(files: list[Source], paths: list[Path] | None, field: str) -> Iterator[Document]:
    skipped, count = [], 0
    for source in files:
        before = count
        try:
            for document in _read(source, field):
                count += 1
                yield document
        except NotTextError:
            if source.explicit:
                raise
            skipped.append(source.name)
        if source.explicit and count == before:
            raise AnymambaError(
                f"{source.name}: no text in it (field {field!r}); give a file with text, or another field"
            )
    if skipped:
        names = ", ".join(skipped[:3]) + (", …" if len(skipped) > 3 else "")
        warnings.warn(f"skipped {len(skipped)} of {len(files)} files that are not UTF-8 text: {names}", stacklevel=2)
    if not count:
        given = ", ".join(map(str, paths or ["standard library"]))
        raise AnymambaError(f"{given}: no text in {len(files)} files; give a folder or a file with UTF-8 text")


def _read(source: Source, field: str) -> Iterator[Document]:
    if source.format in _JSONL:
        return _read_jsonl(source, field)
    if source.format == ".parquet":
        return _read_parquet(source, field)
    return _read_text(source)


def _read_text(source: Source) -> Iterator[Document]:
    pieces = _pieces(source)
    first = next(pieces, None)  # so that binary files show before the document is handed out
    if first is not None:
        yield Document(source.name, itertools.chain([first], pieces))


def _pieces(source: Source) -> Iterator[str]:
    """The text in parts, its lines ended by LF alone: with CR LF a model would have to learn, and a text would be
    measured by, how some system ends lines."""
    held = ""  # a CR that ends a part may belong to an LF
    for text in _decoded(source):
        text = held + text
        held = "\r" if text.endswith("\r") else ""
        if text := text.removesuffix(held).replace("\r\n", "\n"):
            yield text
    if held:
        yield held


def _decoded(source: Source) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with _readable(source.path), _open(source.path) as stream:
        # To the end of a line where that is near: a cut inside a word would change its tokens.
        while data := stream.read(PIECE_BYTES) + stream.readline(4096):
            text = _decode(decoder, data, offset, source)
            if offset == 0:
                text = text.removeprefix(_BYTE_ORDER_MARK)
            offset += len(data)
            yield text
        _decode(decoder, b"", offset, source, final=True)


def _decode(decoder, data: bytes, offset: int, source: Source, final: bool = False) -> str:
    held = len(decoder.getstate()[0])
    cure = f"convert it, for example with: iconv -f LATIN1 -t UTF-8 {source.path.name}; or leave the file out"
    if (nul := data.find(b"\0")) >= 0:
        raise NotTextError(f"{source.name}: a NUL byte at offset {offset + nul}, so this is no UTF-8 text; {cure}")
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as error:
        byte, place = error.object[error.start], offset - held + error.start
        raise NotTextError(f"{source.name}: byte {byte:#04x} at offset {place} is not UTF-8 text; {cure}") from error


def _read_jsonl(source: Source, field: str) -> Iterator[Document]:
    for where, record in json_rows(source.path):
        if text := _json_text(record, field, where):
            yield Document(where, [text])


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSONL file, compressed or not, each with where it stands, "path:line"; empty lines left out.

    Raises AnymambaError for a line that is not an object, and a file that is unreadable or damaged.
    """
    with _readable(path), _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{path}:{number}", _json_object(line, f"{path}:{number}")


def _json_object(line: bytes, where: str) -> dict:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise AnymambaError(f"{where}: byte {byte:#04x} at offset {error.start} of the line is not UTF-8") from error
    except ValueError as error:
        raise AnymambaError(f"{where}: not JSON ({error}); a .jsonl file has one whole object on each line") from error
    if not isinstance(record, dict):
        raise AnymambaError(
            f'{where}: a {type(record).__name__}, but each line must be an object such as {{"text": …}}'
        )
    return record


def _json_text(record: dict, field: str, where: str) -> str:
    if field not in record:
        raise AnymambaError(f"{where}: no field {field!r}; the fields are {_listed(record)}: choose one with field=")
    if not isinstance(record[field], str):
        kind = type(record[field]).__name__
        raise AnymambaError(f"{where}: field {field!r} is a {kind}, not text; the fields are {_listed(record)}")
    # JSON can spell half of a surrogate pair, which no UTF-8 text can hold.
    return record[field].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_parquet(source: Source, field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise AnymambaError(f"{source.name}: reading Parquet needs pyarrow: pip install 'anymamba[data]'") from error

    with _readable(source.path), _open(source.path) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
        except pyarrow.ArrowInvalid as error:
            raise AnymambaError(f"{source.name}: not a Parquet file, or a damaged one ({error})") from error
        columns = table.schema_arrow
        if field not in columns.names:
            raise AnymambaError(
                f"{source.name}: no column {field!r}; the columns are {_listed(columns.names)}: choose one with field="
            )
        kind = columns.field(field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise AnymambaError(f"{source.name}: column {field!r} holds {kind}, not text; choose another with field=")
        batches = table.iter_batches(batch_size=1024, columns=[field])
        texts = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
        for row, text in enumerate(texts, start=1):
            if text:
                yield Document(f"{source.name}:{row}", [text])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _open(path: Path) -> BinaryIO:
    return _COMPRESSED.get(path.suffix, open)(path, "rb")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise AnymambaError(
            f"{error.filename or path}: permission denied; make it readable for this user (chmod u+r), or leave it out"
        ) from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise AnymambaError(f"{path}: damaged or cut-off {path.suffix} file ({error}); get it again") from error
