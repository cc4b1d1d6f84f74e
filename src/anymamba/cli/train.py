"""anymamba train"""

import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from anymamba import lora
from anymamba.train import Result, TrainConfig, resume, train
from anymamba.train.display import for_terminal, heldout_text, printable

DESCRIPTION = """Train a Mamba on text.

examples:
  anymamba train                                         three minutes, on the source code of Python's library
  anymamba train --data book.txt notes/ --minutes 10     files and folders
  anymamba train --data posts.jsonl --field body         JSONL or Parquet
  anymamba train --data book.txt --steps 2000            steps instead of minutes: resuming is bit-identical
  anymamba train --preset small --d-state 32             another size
  anymamba train --resume runs/NAME                      go on after Ctrl-C or a crash
  anymamba train --config runs/NAME/train.json --lr 1e-3 as another run, with changes
  anymamba train --init runs/NAME --data notes/          fine-tune a model, all of it
  anymamba train --init runs/NAME --lora --data notes/   or a small adapter of it: less to learn, to hold and to keep

beside the options below:
  --resume RUN     go on with a run, by its own options: no other one goes with it
  --config FILE    a train.json, whose values take the place of the defaults below
"""


@dataclass
class Resume:
    """Go on with a run; its own options, in train.json, apply."""

    resume: str  # folder of the run


def main(argv: list[str]) -> int:
    """Train; returns 0, or 128 + the number of the signal that ended it."""
    if any(a == "--resume" or a.startswith("--resume=") for a in argv):
        run = tyro.cli(Resume, prog="anymamba train", args=argv).resume
        return _report(resume(run, for_terminal()))
    config, argv = _take_config(argv)
    config = tyro.cli(TrainConfig, prog="anymamba train", args=argv, default=config, description=DESCRIPTION)
    return _report(train(config, for_terminal()))


def _take_config(argv: list[str]) -> tuple[TrainConfig | None, list[str]]:
    """`--config FILE` gives other defaults for the rest of the options."""
    for i, a in enumerate(argv):
        if a == "--config" and i + 1 < len(argv):
            return TrainConfig.from_file(argv[i + 1]), argv[:i] + argv[i + 2 :]
        if a.startswith("--config="):
            return TrainConfig.from_file(a.partition("=")[2]), argv[:i] + argv[i + 1 :]
    return None, argv


def _report(result: Result) -> int:
    run = result.run
    if result.interrupted is not None:
        name = signal.Signals(result.interrupted).name
        print(f"\nstopped by {name} after step {result.step}, saved. Go on with:\n  anymamba train --resume {run}")
        return 128 + result.interrupted
    evaluation = result.evaluation
    sys.stdout.reconfigure(errors="replace")
    print(f"\nsample:\n{printable(result.sample)}\n")
    print(f"held-out {heldout_text(evaluation.nats, evaluation.bits_per_byte)}  ({evaluation.tokens} tokens)")
    is_adapter = lora.matches(run)
    kind, file = ("adapter", lora.WEIGHTS) if is_adapter else ("model", "model.safetensors")
    print(f"{kind:<11} {Path(run) / file} after {result.step} steps")
    print(result.plot)
    prompt = f" --prompt {shlex.quote(result.prompt)}" if result.prompt else ""
    print(f"\nmore of it:\n  anymamba generate {run}{prompt}")
    if is_adapter:
        print(f"as a model of its own:\n  anymamba merge {run} -o FOLDER")
    return 0
