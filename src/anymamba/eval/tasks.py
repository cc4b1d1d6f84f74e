"""Zero-shot tasks from local JSON lines, with the prompts and metrics of lm-evaluation-harness.

A row is one of
    {"query", "choices", "gold"}                  which choice fits the query
    {"context_options", "continuation", "gold"}   after which context the continuation fits (partial evaluation,
                                                  arXiv 1806.02847)
    {"context", "continuation"}                   would greedy decoding write it
    {"text"}                                      would greedy decoding write the last word (LAMBADA, arXiv 1606.06031)
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from anymamba.data import Tokenizer
from anymamba.data.corpus import close_match, json_rows
from anymamba.errors import AnymambaError
from anymamba.eval.scoring import Score, loglikelihoods
from anymamba.model import MambaLM

BLOCK = 64  # questions between two results
FOLDERS = ("", "zeroshot", "lambada")  # of a data folder
SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz")


@dataclass(frozen=True)
class Task:
    """A task of the table below."""

    kind: str  # a key of _KINDS
    ending: str = ""  # of a prompt, after the query
    delimiter: str = " "  # before a choice or continuation
    file: str | None = None  # its name where that is not the task's
    norm: bool = True  # whether choices are also compared by log-probability a character, acc_norm


TASKS = {
    "lambada": Task("text", file="lambada_test"),
    "arc_easy": Task("choices", "\nAnswer:"),
    "arc_challenge": Task("choices", "\nAnswer:"),
    "piqa": Task("choices", "Answer:"),  # the query has the line break
    "winogrande": Task("contexts"),
    "openbook_qa": Task("choices"),
    "copa": Task("choices", norm=False),
    "siqa": Task("choices", norm=False),
    "commonsense_qa": Task("choices", norm=False),
    "winograd_wsc": Task("contexts"),
    "bigbench_dyck_languages": Task("continuation"),
}


class Question(NamedTuple):
    pairs: list[tuple[str, str]]  # (context, continuation), one for each answer
    gold: int | None  # which of them is right; None where there is only one
    lengths: list[int] | None  # characters of the choices, for acc_norm


@dataclass(frozen=True)
class TaskResult:
    """What is known of a task after its first `n` questions of `total`."""

    task: str
    n: int
    total: int
    metrics: dict[str, tuple[float, float | None]]  # acc, acc_norm, ppl: value and standard error, None if n is 1
    read: int  # tokens read
    alone: int  # tokens that reading every answer by itself would take


def find(names: Sequence[str], folder: str | Path) -> dict[str, Path]:
    """The file of each task, NAME.jsonl, .jsonl.xz or .jsonl.gz in `folder` or its folders zeroshot and lambada.

    Raises AnymambaError for an unknown task and a file that is not there.
    """
    folder = Path(folder).expanduser()
    for name in names:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise AnymambaError(f"unknown task {name!r}: {hint}known tasks are {', '.join(TASKS)}")
    if not folder.is_dir():
        close = close_match(folder)
        cure = f"did you mean {close}?" if close else "give the folder that holds the tasks' files"
        raise AnymambaError(f"no folder {folder}; {cure}")
    return {name: _file(name, folder) for name in names}


def _file(name: str, folder: Path) -> Path:
    stem = TASKS[name].file or name
    places = [folder / sub / (stem + suffix) for sub in FOLDERS for suffix in SUFFIXES]
    for path in places:
        if path.is_file():
            return path
    raise AnymambaError(
        f"task {name}: no {stem}.jsonl, .jsonl.xz or .jsonl.gz in {folder} or its folders zeroshot and lambada; "
        "put the file there, or give its folder"
    )


def run(model: MambaLM, tokenizer: Tokenizer, name: str, path: str | Path, *, limit: int | None = None,
        share: bool = True) -> Iterator[TaskResult]:  # fmt: skip
    """Ask the questions of a task's file, the first `limit` of them, in order: a result after each 64, the last of
    them for all, so that whoever stops early has what is known by then.

    share: read what the answers of a question share once. Raises AnymambaError for a limit below 1 and, before the
    model is called, for a row that is not what the task needs, with its line.
    """
    if limit is not None and limit < 1:
        raise AnymambaError(f"eval: limit={limit}, but it must be at least 1 question")
    questions = list(islice(_questions(TASKS[name], Path(path)), limit))
    if not questions:
        raise AnymambaError(f"{path}: no questions in it; give a file with a JSON object on each line")
    return _run(model, tokenizer, name, questions, share)


def _run(model, tokenizer, name, questions, share):
    values, read, alone = [], 0, 0
    for start in range(0, len(questions), BLOCK):
        block = questions[start : start + BLOCK]
        scores = iter(loglikelihoods(model, tokenizer, [p for question in block for p in question.pairs], share=share))
        for question in block:
            mine = list(islice(scores, len(question.pairs)))
            values.append(_values(question, mine))
            read, alone = read + sum(s.read for s in mine), alone + sum(s.alone for s in mine)
        yield TaskResult(name, len(values), len(questions), _metrics(values), read, alone)


def _values(question: Question, scores: list[Score]) -> dict[str, float]:
    """What one question adds to each metric."""
    logprobs = np.array([score.logprob for score in scores])
    if question.gold is None:
        return {"acc": float(scores[0].greedy), "ppl": scores[0].logprob}
    found = {"acc": float(logprobs.argmax() == question.gold)}
    if question.lengths is not None:
        found["acc_norm"] = float((logprobs / question.lengths).argmax() == question.gold)
    return found


def _metrics(values: list[dict[str, float]]) -> dict[str, tuple[float, float | None]]:
    """The mean of each metric with its standard error; perplexity is of the mean, its error to first order."""
    out, n = {}, len(values)
    for name in values[0]:
        column = np.array([value[name] for value in values])
        mean, error = float(column.mean()), float(column.std(ddof=1) / math.sqrt(n)) if n > 1 else None
        if name == "ppl":
            mean = math.exp(-mean) if mean > -700 else math.inf
            error = None if error is None else mean * error
        out[name] = (mean, error)
    return out


# ---- rows ----


def _questions(task: Task, path: Path) -> Iterator[Question]:
    for where, row in json_rows(path):
        try:
            yield _KINDS[task.kind](task, row)
        except AnymambaError as error:
            raise AnymambaError(f"{where}: {error}") from None


def _of_choices(task, row):
    query, choices = _text(row, "query"), _texts(row, "choices")
    pairs = [(query + task.ending, task.delimiter + choice) for choice in choices]
    return Question(pairs, _gold(row, len(choices)), [len(choice) for choice in choices] if task.norm else None)


def _of_contexts(task, row):
    contexts, continuation = _texts(row, "context_options"), _text(row, "continuation")
    pairs = [(context, task.delimiter + continuation) for context in contexts]
    return Question(pairs, _gold(row, len(contexts)), None)


def _of_continuation(task, row):
    return Question([(_text(row, "context"), task.delimiter + _text(row, "continuation"))], None, None)


def _of_text(task, row):
    context, _, word = _text(row, "text").rpartition(" ")
    if not (context and word):
        raise AnymambaError(f"text {row['text'][-40:]!r} has no last word after a space; give one of two words or more")
    return Question([(context, task.delimiter + word)], None, None)


_KINDS = {"choices": _of_choices, "contexts": _of_contexts, "continuation": _of_continuation, "text": _of_text}


def _field(row, name):
    if name not in row:
        fields = ", ".join(map(repr, row)) or "none"
        raise AnymambaError(f"no field {name!r}; the fields are {fields}: this task needs another file")
    return row[name]


def _text(row, name):
    value = _field(row, name)
    if not isinstance(value, str) or not value:
        raise AnymambaError(f"field {name!r} is {value!r}, but must be a text that is not empty")
    return value


def _texts(row, name):
    values = _field(row, name)
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(v, str) and v for v in values):
        raise AnymambaError(f"field {name!r} is {values!r}, but must be a list of two texts or more, none empty")
    return values


def _gold(row, count):
    value = _field(row, "gold")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise AnymambaError(f"field 'gold' is {value!r}, but must say which of the {count} is right: 0 … {count - 1}")
    return value
