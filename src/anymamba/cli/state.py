"""anymamba state"""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from tyro.conf import Positional, arg

from anymamba.data.corpus import sources
from anymamba.data.tokens import progress_bar, tokenised
from anymamba.errors import AnymambaError
from anymamba.generate import Reading, reading
from anymamba.model import MambaLM
from anymamba.state import MambaState, state_info
from anymamba.train.runs import load_run

USAGE = """usage: anymamba state read RUN FILE … -o OUT [options]
       anymamba state info FILE

  read   read text of any length once; what the model keeps of it goes into a small file
  info   what a state file says: its model, sizes, and how many tokens were read

anymamba state read --help tells the options.
"""

READ = """Read text of any length once, in constant memory, and save the state: a small file, for a book as for a line.

Ctrl-C and SIGTERM save what was read so far. Among several documents each ends with the tokenizer's end-of-text token.

examples:
  anymamba state read runs/NAME book.txt -o book.state
  anymamba state read runs/NAME notes/ --state book.state -o both.state     goes on from an earlier state
  anymamba generate runs/NAME --state book.state
"""

INFO = """What a state file says of itself, without its model.

examples:
  anymamba state info book.state
"""

TOGETHER = 1 << 16  # tokens gathered before they are read: short documents one by one would be slow


@dataclass
class ReadOptions:
    run: Annotated[Positional[str], arg(metavar="RUN")]  # folder of a run or model, or a hub name
    data: Annotated[Positional[tuple[str, ...]], arg(metavar="FILE …")]  # files and folders
    out: Annotated[str, arg(aliases=["-o"])]  # state file to write
    state: str | None = None  # go on from this state file
    skip: int = 0  # tokens of the text to pass over: those that an interrupted reading has read
    field: str = "text"  # where a JSONL object or a Parquet row keeps its text
    tokenizer: str | None = None  # the run's own if none
    chunk: int | None = None  # tokens read at once; by the memory that is free if none
    force: bool = False  # overwrite the file if there is one


@dataclass
class InfoOptions:
    file: Annotated[Positional[str], arg(metavar="FILE")]  # state file


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] == "read":
        return _read(tyro.cli(ReadOptions, prog="anymamba state read", args=argv[1:], description=READ))
    if argv[0] == "info":
        return _info(tyro.cli(InfoOptions, prog="anymamba state info", args=argv[1:], description=INFO).file)
    raise AnymambaError(f"there is no state {argv[0]!r}: subcommands are read, info")


# ---- read ----


def _read(options: ReadOptions) -> int:
    check_output(options.out, options.force)
    if not options.data:
        raise AnymambaError("no text to read: anymamba state read RUN FILE … -o OUT")
    if options.skip < 0:
        raise AnymambaError(f"--skip {options.skip}, but it must be a number of tokens, 0 or more")
    files = sources(options.data)  # refuses before anything is loaded
    size = sum(file.path.stat().st_size for file in files) if all(file.is_plain for file in files) else None
    model, tokenizer = load_run(options.run, options.tokenizer)
    state = None if options.state is None else load_one(options.state, model)[0]
    before = 0 if state is None else int(state.seen)
    begin, last, signum = time.monotonic(), None, None
    try:
        with progress_bar(size, label="reading") as advance, _sigterm_like_ctrl_c():
            pieces = tokenised(options.data, tokenizer, options.field)
            for now in _readings(model, pieces, state, options, advance):
                last = now
    except KeyboardInterrupt as interrupt:
        if last is None:
            raise  # nothing read, nothing to save
        signum = interrupt.args[0] if interrupt.args else signal.SIGINT
    if last is None:
        raise AnymambaError(f"--skip {options.skip} passes over the whole text: nothing is left to read")
    last.save(options.out, model)
    count = int(last.state.seen) - before
    if signum is not None:
        _tell_interrupted(options, count)
        return 128 + signum
    seconds = time.monotonic() - begin
    print(f"{count:,} tokens read, {count / seconds:,.0f}/s; {_size(options.out)} in {options.out}\ngo on with it:")
    print(f"  anymamba generate {shlex.join([options.run, '--state', options.out])}")
    return 0


def _readings(
    model: MambaLM, pieces: Iterable[tuple[np.ndarray, int]], state: MambaState | None, options: ReadOptions, advance
) -> Iterator[Reading]:
    """A reading after each chunk of the text; `advance` is told how many bytes of it that was."""
    for ids, size in _gathered(pieces, options.skip):
        told, before = 0, 0 if state is None else int(state.seen)
        for now in reading(model, ids, state, chunk=options.chunk):
            state, done = now.state, size * (int(now.state.seen) - before) // len(ids)
            advance(done - told)
            told = done
            yield now


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """At once, not after the piece that is being read: whoever sends SIGTERM may soon send SIGKILL."""

    def interrupt(signum, _frame):
        raise KeyboardInterrupt(signum)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _gathered(pieces: Iterable[tuple[np.ndarray, int]], skip: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pieces joined until they have a length worth reading, without the first `skip` tokens."""
    held, size = [], 0
    for ids, of_text in pieces:
        held.append(ids[skip:])
        skip, size = max(0, skip - len(ids)), size + of_text
        if sum(map(len, held)) >= TOGETHER:
            yield np.concatenate(held), size
            held, size = [], 0
    if sum(map(len, held)):
        yield np.concatenate(held), size


def _tell_interrupted(options: ReadOptions, count: int) -> None:
    rest = ["anymamba", "state", "read", options.run, *options.data, "--state", options.out]
    rest += ["--skip", str(options.skip + count), "-o", options.out, "--force"]
    for name in ("field", "tokenizer", "chunk"):
        value = getattr(options, name)
        if value != getattr(ReadOptions, name):
            rest += [f"--{name}", str(value)]
    print(f"\ninterrupted: {count:,} tokens are read, and their state is in {options.out}; to read the rest:\n"
          f"  {shlex.join(rest)}", file=sys.stderr)  # fmt: skip


# ---- files ----


def check_output(path: str, force: bool) -> None:
    """Refuse a state file that cannot be written or would replace another, before any work is done."""
    out = Path(path)
    if out.is_dir():
        raise AnymambaError(f"{out} is a folder; name a file in it, such as {out / 'book.state'}")
    if out.exists() and not force:
        raise AnymambaError(f"{out} exists; choose another name, or --force to overwrite it")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise AnymambaError(f"cannot write {out}: {folder} is not a folder to write in; choose another")


def load_one(path: str, model: MambaLM) -> tuple[MambaState, torch.Tensor | None]:
    """The state of one text in a file, and the logits of what comes next if the file has them.

    Raises AnymambaError as `MambaState.load` does, and for a state of several texts.
    """
    state, extra = MambaState.load_with(path, model)
    if state.batch_size != 1:
        raise AnymambaError(f"{path} holds the states of {state.batch_size} texts; save one of them: state.select([0])")
    return state, extra.get("logits")


def _info(path: str) -> int:
    info = state_info(path)
    conv, ssm = (f"{shape} {str(dtype).removeprefix('torch.')}"
                 for shape, dtype in zip((info.conv, info.ssm), info.dtypes, strict=True))  # fmt: skip
    print(f"file    {path}, {_size(path)}")
    print(f"model   {info.model}")
    print(f"read    {', '.join(f'{count:,}' for count in info.seen)} tokens")
    print(f"layers  {info.layers}: conv {conv}, ssm {ssm}")
    print(f"next    {'goes on by itself' if 'logits' in info.extra else 'needs a prompt to go on'}")
    return 0


def _size(path: str) -> str:
    size = Path(path).stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
