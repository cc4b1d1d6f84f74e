"""What a person sees of a run: a live display in a terminal, plain lines elsewhere."""

import time
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

PLAIN_SECONDS = 10.0


class Display(Protocol):
    """Told what happens; shows it or not."""

    def step(self, record: dict[str, Any], progress: float, eta: float) -> None: ...
    def heldout(self, nats: float, bits_per_byte: float) -> None: ...
    def sample(self, text: str) -> None: ...
    def measuring(self, done: float) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class Silent:
    """Shows nothing."""

    def step(self, record, progress, eta):
        pass

    def heldout(self, nats, bits_per_byte):
        pass

    def sample(self, text):
        pass

    def measuring(self, done):
        pass

    def note(self, text):
        pass

    def close(self):
        pass


class Lines(Silent):
    """A line every `PLAIN_SECONDS`, one for each measurement, and notes, for logs and pipes."""

    def __init__(self):
        self.last = -PLAIN_SECONDS
        self.newest = None

    def step(self, record, progress, eta):
        self.newest = f"step {record['step']}  {progress:4.0%}  {numbers(record)}  {clock(eta)} to go"
        if time.monotonic() - self.last >= PLAIN_SECONDS:
            self._flush()

    def heldout(self, nats, bits_per_byte):
        self._flush()
        print(f"held-out {heldout_text(nats, bits_per_byte)}", flush=True)

    def sample(self, text):
        print(f"sample: {one_line(text)}", flush=True)

    def note(self, text):
        self._flush()
        print(text, flush=True)

    def close(self):
        self._flush()

    def _flush(self):
        if self.newest is not None:
            print(self.newest, flush=True)
            self.newest, self.last = None, time.monotonic()


class Bar(Silent):
    """A progress bar, the numbers under it, and the last sample."""

    def __init__(self, console: Console):
        self.console = console
        self.bar = Progress(TextColumn("step {task.fields[step]}"), BarColumn(None), TaskProgressColumn(),
                            TextColumn("{task.fields[eta]}"), console=console, expand=True)  # fmt: skip
        self.task = self.bar.add_task("train", total=1.0, step=0, eta="?")
        self.record, self.measured, self.shown = None, "", ""
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def _render(self):
        parts = [self.bar]
        if self.record is not None:
            parts.append(Text(numbers(self.record), no_wrap=True))
        if self.measured:
            parts.append(Text(f"held-out {self.measured}", style="bold", no_wrap=True))
        if self.shown:
            parts.append(Panel(Text(self.shown), title="sample", height=8))
        return Group(*parts)

    def step(self, record, progress, eta):
        if not self.live.is_started:
            self.live.start()
        self.record = record
        self.bar.update(self.task, completed=progress, step=record["step"], eta=f"{clock(eta)} to go")

    def heldout(self, nats, bits_per_byte):
        self.measured = heldout_text(nats, bits_per_byte)

    def sample(self, text):
        self.shown = printable(text)

    def measuring(self, done):
        self.bar.update(self.task, eta=f"measuring {done:4.0%}")

    def note(self, text):
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self):
        if self.live.is_started:
            self.live.stop()


def for_terminal() -> Display:
    """The display that suits standard output."""
    console = Console()
    return Bar(console) if console.is_terminal else Lines()


def numbers(record: dict[str, Any]) -> str:
    return f"loss {record['loss']:.3f}  lr {record['lr']:.1e}  {count(record['tokens_per_second'])} tokens/s"


def heldout_text(nats: float, bits_per_byte: float) -> str:
    return f"{nats:.4f} nats/token  {bits_per_byte:.4f} bits/byte"


def count(number: float) -> str:
    """3 or 4 digits: 950, 1.2k, 45k, 1.3M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.{1 if number < 10 * factor else 0}f}{unit}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def printable(text: str) -> str:
    """Without control characters, which an untrained model writes too, and which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def one_line(text: str) -> str:
    return printable(text).strip().replace("\n", "⏎")
