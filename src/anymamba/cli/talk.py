"""Turn by turn: `anymamba generate --interactive`."""

import sys
from collections.abc import Iterator

from anymamba.data import Tokenizer
from anymamba.generate import TokenEvent, read, stream
from anymamba.model import MambaLM
from anymamba.state import MambaState


def talk(
    model: MambaLM,
    state: MambaState | None,
    *,
    tokenizer: Tokenizer,
    chat: bool,
    system: str | None,
    seed: int,
    **rules,
) -> MambaState | None:
    """Answer line after line until the input ends; the state after the last answer.

    With `chat` the lines are messages in the tokenizer's chat template, after the `system` message if there is one;
    else they are just text. `rules` go to `generate.stream`.
    """
    turns = Chat(tokenizer, state, system) if chat else Lines(tokenizer, state)
    turn = 0
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return turns.state
        prompt, before = turns.ask(line)
        events = stream(model, prompt, state=before, seed=seed + turn, tokenizer=tokenizer, **rules)
        turns.answered(*_answer(model, prompt, events, before))
        turn += 1


class Lines:
    """Each line goes on where the last answer ended."""

    def __init__(self, tokenizer: Tokenizer, state: MambaState | None):
        self.tokenizer, self.state = tokenizer, state

    def ask(self, line: str) -> tuple[list[int], MambaState | None]:
        """The ids to read now, and the state to read them after."""
        return self.tokenizer.encode(line + "\n").tolist(), self.state

    def answered(self, ids: list[int], text: str, state: MambaState) -> None:
        """Take what was said: its ids, its text, and the state after it."""
        self.state = state


class Chat(Lines):
    """Each line is a message. The model reads what a turn adds to the text of the conversation.

    A template may change what stands before (trim an answer, drop its thoughts): then all of it is read again.
    """

    def __init__(self, tokenizer: Tokenizer, state: MambaState | None, system: str | None):
        super().__init__(tokenizer, state)
        self.first, self.read = state, ""  # the state before the conversation, and what has been read of it
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, line: str) -> tuple[list[int], MambaState | None]:
        self.messages.append({"role": "user", "content": line})
        text = self.tokenizer.chat(self.messages)
        goes_on = text.startswith(self.read)
        new, self.read = text[len(self.read) if goes_on else 0 :], text
        return self.tokenizer.encode(new).tolist(), self.state if goes_on else self.first

    def answered(self, ids: list[int], text: str, state: MambaState) -> None:
        self.messages.append({"role": "assistant", "content": text})
        self.read += self.tokenizer.decode(ids, special=True)  # with the token that ended it, which was read too
        self.state = state


def _answer(
    model: MambaLM, prompt: list[int], events: Iterator[TokenEvent], before: MambaState | None
) -> tuple[list[int], str, MambaState]:
    """Print the answer: its ids, its text, the state after it. Ctrl-C ends it early; the model then knows what it has
    said so far."""
    ids, text = [], ""
    try:
        for event in events:
            ids.append(event.id)
            text += event.text
            write(event.text)
            if event.completion is not None:
                write("\n")
                return ids, text, event.completion.state
    except KeyboardInterrupt:
        write(" …\n")
    return ids, text, read(model, prompt + ids, before).state


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
