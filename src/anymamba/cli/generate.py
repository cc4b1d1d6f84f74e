"""anymamba generate"""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tyro.conf import Positional, arg

from anymamba.data import Tokenizer
from anymamba.errors import AnymambaError
from anymamba.generate import SamplingConfig, TokenEvent, generate, stream
from anymamba.model import MambaLM
from anymamba.state import MambaState
from anymamba.train.runs import first_ids, load_run

DEFAULT_MODEL = Path(__file__).parents[1] / "models" / "books"  # its README.md says what it is

DESCRIPTION = """Continue a prompt with a trained model; without RUN with a small one that writes like old novels.

examples:
  anymamba generate --prompt "It was a dark night"
  anymamba generate runs/NAME --prompt "def main"
  anymamba generate runs/NAME --prompt "Once" --temperature 0.7 --top-p 0.9 --n 3
  anymamba generate runs/NAME --prompt - < question.txt
  anymamba generate runs/NAME --interactive               the model remembers the whole conversation
"""


@dataclass
class Options:
    run: Annotated[Positional[str | None], arg(metavar="RUN")] = None  # folder of a run or model; a small one if none
    prompt: str | None = None  # text to continue; - reads standard input; without one the model begins a text
    interactive: bool = False  # turn by turn; Ctrl-C stops an answer, Ctrl-D ends
    echo: bool = True  # print the prompt before what follows
    tokenizer: str | None = None  # the run's own if none
    max_new_tokens: int = 256  # length of the continuation
    greedy: bool = False  # always the most probable token
    temperature: float = 0.8  # below 1 sharper, above 1 flatter
    top_k: int = 0  # only the k most probable tokens; 0: all
    top_p: float = 0.95  # only the most probable tokens up to this probability; 1: all
    min_p: float = 0.0  # no token below this share of the highest probability
    repetition_penalty: float = 1.0  # above 1 disfavours what was said
    stop: tuple[str, ...] = ()  # end before any of these texts
    seed: int = 0
    n: int = 1  # continuations

    def sampling(self) -> SamplingConfig:
        names = {f.name for f in dataclasses.fields(SamplingConfig)}
        if self.greedy:
            return SamplingConfig(temperature=0, repetition_penalty=self.repetition_penalty)
        return SamplingConfig(**{k: v for k, v in dataclasses.asdict(self).items() if k in names})


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="anymamba generate", args=argv, description=DESCRIPTION)
    options.sampling()  # refuse bad numbers before anything is loaded
    if options.n < 1:
        raise AnymambaError(f"--n {options.n}, but it must be at least 1: the number of continuations")
    if options.interactive and (options.n != 1 or options.prompt is not None):
        raise AnymambaError(
            "--interactive takes its prompts from the keyboard and gives one answer: drop --prompt, --n"
        )
    model, tokenizer = load_run(options.run or DEFAULT_MODEL, options.tokenizer)
    sys.stdout.reconfigure(errors="replace")  # not every terminal knows every character
    if options.interactive:
        _talk(model, tokenizer, options)
    else:
        _continue(model, tokenizer, options)
    return 0


def _continue(model: MambaLM, tokenizer: Tokenizer, options: Options) -> None:
    text = sys.stdin.read() if options.prompt == "-" else options.prompt or ""
    prompt = tokenizer.encode(text).tolist() or first_ids(tokenizer)
    if options.n > 1:  # side by side in one batch, so shown when they are done
        done = generate(model, [prompt], n=options.n, seed=options.seed, **_rules(tokenizer, options))
        for i, completion in enumerate(done, start=1):
            print(f"--- {i}\n{text if options.echo else ''}{completion.text}")
        return
    events = stream(model, prompt, seed=options.seed, **_rules(tokenizer, options))  # refuses before we write
    _write(text if options.echo else "")
    for event in events:
        _write(event.text)
    _write("\n")


def _talk(model: MambaLM, tokenizer: Tokenizer, options: Options) -> None:
    state, turn = None, 0
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            _write("\n")
            return
        prompt = tokenizer.encode(line + "\n").tolist()
        events = stream(model, prompt, state=state, seed=options.seed + turn, **_rules(tokenizer, options))
        state = _answer(model, prompt, events, state)
        turn += 1


def _answer(model: MambaLM, prompt: list[int], events: Iterator[TokenEvent], before: MambaState | None) -> MambaState:
    """Print the answer; the state after it. Ctrl-C ends it early, and the model then knows what it has said so far."""
    ids = list(prompt)
    try:
        for event in events:
            ids.append(event.id)
            _write(event.text)
            if event.completion is not None:
                _write("\n")
                return event.completion.state
    except KeyboardInterrupt:
        _write(" …\n")
    with torch.no_grad():
        return model(torch.tensor([ids]), state=before, last_only=True).state


def _rules(tokenizer: Tokenizer, options: Options) -> dict:
    stop_ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return {"max_new_tokens": options.max_new_tokens, "sampling": options.sampling(), "stop_ids": stop_ids,
            "stop_strings": options.stop, "tokenizer": tokenizer}  # fmt: skip


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
