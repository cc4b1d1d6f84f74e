"""anymamba eval"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import tyro
from tyro.conf import Positional, arg

from anymamba.data import Tokenizer
from anymamba.data.tokens import tokenised
from anymamba.errors import AnymambaError
from anymamba.eval import TaskResult, find, run
from anymamba.layers import quantize
from anymamba.train.evaluate import Evaluation, evaluate
from anymamba.train.runs import load_run

DESCRIPTION = """How well a model predicts a text (loss, perplexity, bits per byte), or zero-shot tasks (--tasks).

examples:
  anymamba eval runs/NAME book.txt
  anymamba eval runs/NAME notes/ --context 4096
  anymamba eval runs/NAME book.txt --no-carry --context 256    windows that do not know what stands before them
  anymamba eval runs/NAME posts.jsonl --field body --json
  anymamba eval runs/NAME book.txt --quantize int4         what the model loses with 4-bit weights
  anymamba eval MODEL --tasks lambada,arc_easy --data-dir DIR --limit 200

tasks, scored as lm-evaluation-harness does, from DIR/NAME.jsonl (.xz, .gz), also in DIR/zeroshot and DIR/lambada:
  lambada (its file is lambada_test), arc_easy, arc_challenge, piqa, winogrande, openbook_qa, copa, siqa,
  commonsense_qa, winograd_wsc, bigbench_dyck_languages
  Ctrl-C prints what is known by then. The harness itself, with all its tasks:
  python -m anymamba.eval --model anymamba --model_args pretrained=MODEL --tasks NAME
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
    tasks: str | None = None  # zero-shot tasks in place of a text, with commas between them
    data_dir: str | None = None  # where the tasks' files are; $ANYMAMBA_DATA if none
    limit: int | None = None  # questions of each task
    json: bool = False  # print one JSON object


OF_TEXTS = ("field", "context", "carry", "batch_size", "max_tokens")  # options that tasks do not have,
OF_TASKS = ("data_dir", "limit")  # and that only they have


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="anymamba eval", args=argv, description=DESCRIPTION)
    _check(options)
    if options.tasks is not None:
        return _tasks(options)
    model, tokenizer = _load(options)
    tokens, size = read_tokens(options.data, options.field, tokenizer)
    result = _with_progress(model, tokens, size / len(tokens), options)
    print(_json(result, options) if options.json else _text(result, options))
    return 0


def _check(options: Options) -> None:
    """Refuses what would be ignored."""
    if options.data and options.tasks is not None:
        raise AnymambaError(f"{options.data[0]} and --tasks {options.tasks}: give texts or tasks, one of the two")
    if not options.data and options.tasks is None:
        raise AnymambaError("no text to measure on: anymamba eval RUN FILE …, or give --tasks")
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    kind, others = ("--tasks", OF_TEXTS) if options.tasks is not None else ("a text", OF_TASKS)
    for name in others:
        if getattr(options, name) != defaults[name]:
            flag = "--no-carry" if name == "carry" else "--" + name.replace("_", "-")
            raise AnymambaError(f"{flag} says nothing about {kind}; leave it out")


def _load(options: Options):
    model, tokenizer = load_run(options.run, options.tokenizer)
    if options.quantize:
        quantize(model, options.quantize)
    return model, tokenizer


# ---- a text ----


def read_tokens(paths: tuple[str, ...], field: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """All documents as one array of ids (n,), and their size in bytes; among several, each ends with the EOS id."""
    pieces, sizes = zip(*tokenised(paths, tokenizer, field), strict=True)
    return np.concatenate(pieces), sum(sizes)


def _with_progress(model, tokens: np.ndarray, bytes_per_token: float, options: Options) -> Evaluation:
    total = min(len(tokens) - 1, options.max_tokens or len(tokens))
    with _progress() as bar:
        task = bar.add_task("reading", total=total)
        return evaluate(
            model, tokens, context=options.context, carry=options.carry, batch_size=options.batch_size,
            max_tokens=options.max_tokens, bytes_per_token=bytes_per_token,
            on_progress=lambda count: bar.update(task, completed=count),
        )  # fmt: skip


def _progress():
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


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


# ---- tasks ----


def _tasks(options: Options) -> int:
    names = list(dict.fromkeys(name.strip() for name in options.tasks.split(",")))
    folder = options.data_dir or os.environ.get("ANYMAMBA_DATA")
    if folder is None:
        raise AnymambaError("where are the tasks' files? give --data-dir DIR, or set ANYMAMBA_DATA to it")
    files = find(names, folder)
    model, tokenizer = _load(options)
    # rows are checked before the first task takes its time
    runs = {name: run(model, tokenizer, name, path, limit=options.limit) for name, path in files.items()}
    results: dict[str, TaskResult] = {}
    interrupted = False
    try:
        with _progress() as bar:
            for name, steps in runs.items():
                task = bar.add_task(name, total=None)
                for result in steps:
                    results[name] = result
                    bar.update(task, completed=result.n, total=result.total)
    except KeyboardInterrupt:
        interrupted = True
    if results or not interrupted:
        print(_tasks_json(results) if options.json else _table(results))
    if interrupted:
        print("interrupted", file=sys.stderr)
    return 130 if interrupted else 0


def _table(results: dict[str, TaskResult]) -> str:
    """A line for each task: questions asked, and each metric ± its standard error."""
    metrics = [name for name in ("acc", "acc_norm", "ppl") if any(name in r.metrics for r in results.values())]
    rows = [["task", "n", *metrics]]
    for name, result in results.items():
        n = str(result.n) if result.n == result.total else f"{result.n} of {result.total}"
        rows.append([name, n, *(_cell(metric, result) for metric in metrics)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    read, alone = (sum(getattr(r, name) for r in results.values()) for name in ("read", "alone"))
    return "\n".join([*lines, f"{read} tokens read; {alone} if what answers share were read for each"])


def _cell(metric: str, result: TaskResult) -> str:
    if metric not in result.metrics:
        return ""
    value, error = result.metrics[metric]
    form = ".4g" if metric == "ppl" else ".4f"
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{'.2g' if metric == 'ppl' else '.4f'}}")


def _tasks_json(results: dict[str, TaskResult]) -> str:
    out = {}
    for name, result in results.items():
        values = {m: value for m, (value, _) in result.metrics.items()}
        errors = {f"{m}_stderr": error for m, (_, error) in result.metrics.items()}
        out[name] = {"n": result.n, "of": result.total, **values, **errors, "tokens_read": result.read,
                     "tokens_alone": result.alone}  # fmt: skip
    return json.dumps(out)
