"""anymamba inspect"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from tyro.conf import Positional, arg

from anymamba.cli.generate import DEFAULT_MODEL, stdin_text
from anymamba.cli.state import check_output
from anymamba.data import StreamDecoder, Tokenizer
from anymamba.errors import AnymambaError
from anymamba.files import write_atomically
from anymamba.inspect.plots import check_plots, save_plots
from anymamba.inspect.report import page, side_for, summarise
from anymamba.train.runs import load_run

DESCRIPTION = """What a model does with a text, as one page for a browser: step sizes, hidden attention, memory.

examples:
  anymamba inspect --prompt "It was a dark night" -o report.html
  anymamba inspect runs/NAME --file book.txt --tokens 2000 -o report.html
  anymamba inspect runs/NAME --prompt - -o report.html --png pictures < text.txt
"""


@dataclass
class Options:
    out: Annotated[str, arg(aliases=["-o"])]  # page to write
    run: Annotated[Positional[str | None], arg(metavar="RUN")] = None  # run, model or hub name; a small one if none
    prompt: str | None = None  # text to look at; - reads standard input
    file: str | None = None  # or the file that holds it
    tokens: int = 1000  # of the text's beginning
    png: str | None = None  # folder for pictures, too
    tokenizer: str | None = None  # the run's own if none
    force: bool = False  # overwrite the page if there is one


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="anymamba inspect", args=argv, description=DESCRIPTION)
    if (options.prompt is None) == (options.file is None):
        raise AnymambaError("what text? give --prompt TEXT or --file FILE, one of the two")
    if options.tokens < 1:
        raise AnymambaError(f"--tokens {options.tokens}, but it must be at least 1")
    check_output(options.out, options.force)
    if options.png is not None:
        check_plots(options.png)
    text = _text(options)
    model, tokenizer = load_run(options.run or DEFAULT_MODEL, options.tokenizer)
    ids = tokenizer.encode(text)
    if len(ids) == 0:
        raise AnymambaError("the text is empty: there is nothing to look at")
    read = ids[: options.tokens].astype("int64")
    about = f"{len(read):,} token{'s' * (len(read) > 1)}" + (
        f", the first of {len(ids):,}" if len(read) < len(ids) else ""
    )
    with _progress(model.config.n_layer) as advance:
        summaries = summarise(model, read, side=side_for(model.config.n_layer), on_layer=advance)
    report = page(summaries, token_texts(read, tokenizer), options.run or "the package's model", about)
    write_atomically(options.out, lambda part: part.write_text(report, encoding="utf-8"))
    print(f"{options.out}: {about}, {len(report.encode()) / 1e6:.1f} MB")
    for path in save_plots(summaries, options.png) if options.png is not None else ():
        print(path)
    return 0


def _text(options: Options) -> str:
    if options.file is None:
        return stdin_text() if options.prompt == "-" else options.prompt
    try:
        return Path(options.file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AnymambaError(f"{options.file} is not UTF-8 text ({error}); convert it first") from None


@contextmanager
def _progress(layers: int) -> Iterator[Callable[[], None]]:
    """Gives what is to be called after each layer. The bar is for a person at a terminal, and goes when all is done."""
    console = Console(stderr=True)
    columns = ("looking into layers", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=layers)
        yield lambda: bar.advance(task)


def token_texts(ids, tokenizer: Tokenizer) -> list[str]:
    """The text of each token; of a character's pieces the last has it, the others "".

    Together they are the text.
    """
    decoder = StreamDecoder(tokenizer)
    out = [decoder.push(i) for i in ids]
    out[-1] += decoder.flush()
    return out
