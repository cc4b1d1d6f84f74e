"""anymamba generate"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tyro.conf import Positional, arg

from anymamba.cli.state import check_output, load_one
from anymamba.cli.talk import talk, write
from anymamba.data import Tokenizer
from anymamba.errors import AnymambaError
from anymamba.generate import SamplingConfig, TokenEvent, generate, read, speculate, stream
from anymamba.layers import quantize
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
  anymamba generate runs/NAME --state book.state          goes on with what `anymamba state read` has read
  anymamba generate runs/NAME --interactive --save-state talk.state
  anymamba generate MODEL --interactive --system "You answer in rhyme."   if the model has a chat template
  anymamba generate runs/BIG --draft runs/SMALL           the small model guesses, the big one checks
  anymamba generate runs/NAME --lookup --prompt - < code  guesses from the text so far
"""


@dataclass
class Options:
    run: Annotated[Positional[str | None], arg(metavar="RUN")] = None  # run, model or hub name; a small one if none
    # text to continue; - reads standard input; without one the model begins a text, or goes on with --state
    prompt: str | None = None
    state: str | None = None  # file of what the model has read before, from `anymamba state read` or --save-state
    save_state: str | None = None  # file to write: what the model has read after its answer
    force: bool = False  # let --save-state overwrite a file
    interactive: bool = False  # turn by turn; Ctrl-C stops an answer, Ctrl-D ends
    chat: bool = True  # talk in the model's chat template if it has one
    system: str | None = None  # what the chat begins with: who the model is to be
    echo: bool = True  # print the prompt before what follows
    tokenizer: str | None = None  # the run's own if none
    quantize: Literal["int8", "int4"] | None = None  # weights as integers: faster on a CPU, a little less exact
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
    draft: str | None = None  # folder of a smaller model with the same tokenizer, whose guesses are checked together
    lookup: bool = False  # guess what followed the last words before; the text is the same as without
    guesses: int = 4  # tokens that --draft or --lookup guesses at a time

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
    if options.draft is not None or options.lookup:
        if options.draft is not None and options.lookup:
            raise AnymambaError("--draft with --lookup: guesses come from one of them, drop the other")
        if options.n != 1 or options.interactive:
            raise AnymambaError("--draft and --lookup write one answer: drop --n and --interactive")
    elif options.guesses != Options.guesses:
        raise AnymambaError("--guesses says how many tokens --draft or --lookup guesses: add one of them, or drop it")
    if options.interactive and (options.n != 1 or options.prompt is not None):
        raise AnymambaError(
            "--interactive takes its prompts from the keyboard and gives one answer: drop --prompt, --n"
        )
    if options.system is not None and not options.interactive:
        raise AnymambaError("--system begins a conversation: add --interactive, or drop it")
    if options.save_state is not None:
        if options.n != 1:
            raise AnymambaError(f"--save-state with --n {options.n}: a file holds the state after one answer, drop one")
        check_output(options.save_state, options.force)
    model, tokenizer = load_run(options.run or DEFAULT_MODEL, options.tokenizer)
    if options.quantize:
        quantize(model, options.quantize)
    state, logits = (None, None) if options.state is None else load_one(options.state, model)
    if options.interactive:
        _interactive(model, tokenizer, options, state)
    else:
        _continue(model, tokenizer, options, state, logits)
    return 0


def _interactive(model: MambaLM, tokenizer: Tokenizer, options: Options, state: MambaState | None) -> None:
    chat = options.chat and tokenizer.special.chat_template is not None
    if options.system is not None and not chat:
        why = "--no-chat goes without" if not options.chat else f"the tokenizer {tokenizer.name!r} has no"
        raise AnymambaError(f"--system is a message in a chat template, and {why} one: drop --system")
    state = talk(model, state, chat=chat, system=options.system, seed=options.seed, **_rules(tokenizer, options))
    if state is not None and options.save_state is not None:
        state.save(options.save_state, model)  # without what comes next: it is the person's turn


def stdin_text() -> str:
    """Standard input, which is UTF-8 whatever the terminal's locale. Raises AnymambaError if it is not."""
    raw = getattr(sys.stdin, "buffer", None)
    try:
        return sys.stdin.read() if raw is None else raw.read().decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise AnymambaError(f"standard input is not UTF-8 text ({error}); convert it first") from None


def _continue(
    model: MambaLM, tokenizer: Tokenizer, options: Options, state: MambaState | None, logits: torch.Tensor | None
) -> None:
    text = stdin_text() if options.prompt == "-" else options.prompt or ""
    prompt = tokenizer.encode(text).tolist()
    if not prompt and state is not None and logits is None:
        raise AnymambaError(f"{options.state} does not say what comes next, only what was read: give a --prompt")
    if not prompt and state is None:
        prompt = first_ids(tokenizer)
    start = {"state": state, "seed": options.seed, "logits": logits, **_rules(tokenizer, options)}
    if options.n > 1:  # side by side in one batch, so shown when they are done
        for i, completion in enumerate(generate(model, [prompt], n=options.n, **start), start=1):
            print(f"--- {i}\n{text if options.echo else ''}{completion.text}")
        return
    said, echo = [], text if options.echo else ""

    def say(event: TokenEvent) -> None:
        write(event.text if said else echo + event.text)
        said.append(event.id)

    try:
        if options.draft is not None or options.lookup:
            draft = None if options.draft is None else _load_draft(options, tokenizer)
            out = speculate(model, prompt, draft=draft, k=options.guesses, on_token=say, **start)
            write("\n")
            told = f"{out.accepted} of {out.proposed} guesses right ({out.acceptance:.0%})"
            print(f"{told}, {out.tokens_per_pass:.2f} tokens a pass", file=sys.stderr)
        else:
            events = stream(model, prompt, **start)  # refuses before we write
            write(echo)
            echo = ""  # it may stand there long before the first token
            for event in events:
                say(event)
            write("\n")
    finally:  # Ctrl-C keeps what was said so far
        if said and options.save_state is not None:
            read(model, prompt + said, state).save(options.save_state, model)


def _load_draft(options: Options, tokenizer: Tokenizer) -> MambaLM:
    draft, own = load_run(options.draft, options.tokenizer)
    if own.fingerprint != tokenizer.fingerprint:
        raise AnymambaError(f"the draft {options.draft} has another tokenizer than the model: its guesses mean nothing")
    return draft


def _rules(tokenizer: Tokenizer, options: Options) -> dict:
    return {"max_new_tokens": options.max_new_tokens, "sampling": options.sampling(),
            "stop_ids": list(tokenizer.eos_ids), "stop_strings": options.stop, "tokenizer": tokenizer}  # fmt: skip
