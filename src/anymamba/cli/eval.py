"""anymamba eval"""

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import tyro
from tyro.conf import Positional, arg

from anymamba.data import Tokenizer
from anymamba.data.tokens import tokenised
from anymamba.errors import AnymambaError
from anymamba.layers import quantize
from anymamba.train.evaluate import Evaluation, evaluate
from anymamba.train.runs import load_run

DESCRIPTION = """Loss, perplexity and bits per byte of a model on text.

examples:
  anymamba eval runs/NAME book.txt
  anymamba eval runs/NAME notes/ --context 4096
  anymamba eval runs/NAME book.txt --no-carry --context 256    windows that do not know what stands before them
  anymamba eval runs/NAME posts.jsonl --field body --json
  anymamba eval runs/NAME book.txt --quantize int4         what the model loses with 4-bit weights
"""


@dataclass
class Options:
    run: Annotated[Positional[str], arg(metavar="RUN")]  # folder of a run or model, or a hub name
    data: Annotated[Positional[tuple[str, ...]], arg(metavar="FILE …")]  # files and folders
    field: str = "text"  # where a JSONL object or a Parquet row keeps its text
    tokenizer: str | None = None  # the run's own if none
    quantize: Literal["int8", "int4"] | None = None  # weights as integers: faster on a CPU, a little less exact
    context: int = 1024  # tokens read at once
    carry: bool = True  # read the text as one, the state going from each context to the next
    batch_size: int = 8  # contexts at a time with --no-carry
    max_tokens: int | None = None  # stop after so many
    json: bool = False  # print one JSON object


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="anymamba eval", args=argv, description=DESCRIPTION)
    if not options.data:
        raise AnymambaError("no text to measure on: anymamba eval RUN FILE …")
    model, tokenizer = load_run(options.run, options.tokenizer)
    if options.quantize:
        quantize(model, options.quantize)
    tokens, size = read_tokens(options.data, options.field, tokenizer)
    result = _with_progress(model, tokens, size / len(tokens), options)
    print(_json(result, options) if options.json else _text(result, options))
    return 0


def read_tokens(paths: tuple[str, ...], field: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """All documents as one array of ids (n,), and their size in bytes; among several, each ends with the EOS id."""
    pieces, sizes = zip(*tokenised(paths, tokenizer, field), strict=True)
    return np.concatenate(pieces), sum(sizes)


def _with_progress(model, tokens: np.ndarray, bytes_per_token: float, options: Options) -> Evaluation:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    total = min(len(tokens) - 1, options.max_tokens or len(tokens))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=total)
        return evaluate(
            model, tokens, context=options.context, carry=options.carry, batch_size=options.batch_size,
            max_tokens=options.max_tokens, bytes_per_token=bytes_per_token,
            on_progress=lambda count: bar.update(task, completed=count),
        )  # fmt: skip


def _text(result: Evaluation, options: Options) -> str:
    how = "state carried along" if options.carry else "each context alone"
    return (
        f"loss           {result.nats:.4f} nats/token\n"
        f"perplexity     {result.perplexity:.4g}\n"
        f"bits per byte  {result.bits_per_byte:.4f}\n"
        f"tokens         {result.tokens}, in contexts of {options.context}, {how}"
    )


def _json(result: Evaluation, options: Options) -> str:
    return json.dumps({
        "nats_per_token": result.nats, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens, "context": options.context, "carry": options.carry,
    })  # fmt: skip
