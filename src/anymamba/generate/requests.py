"""What an engine is asked for, and what the asker holds meanwhile."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.generate.rows import Completion, TokenEvent
from anymamba.generate.sampling import SamplingConfig
from anymamba.state import MambaState


class QueueFull(AnymambaError):
    """The engine's queue has no room: try again later, or pass `submit` a timeout."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """`n` completions of one prompt, as `generate(model, [prompt], ...)` gives them."""

    prompt: Sequence[int] | Tensor  # at least one id
    max_new_tokens: int = 128
    sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009  it is immutable
    stop_ids: Sequence[int] = ()  # a completion ends with the first of these
    seed: int = 0  # sample i draws from the stream of (seed, 0, i)
    n: int = 1  # the prompt is read once for all of them
    state: MambaState | None = None  # one row: the prompt continues what it has read


@dataclass(frozen=True)
class Counters:
    """What an engine has done and is doing. submitted = waiting + reading + running + finished + cancelled + failed."""

    submitted: int  # requests that entered the queue
    waiting: int  # requests in the queue
    reading: int  # requests whose prompt is being read
    running: int  # requests that are being answered
    finished: int  # requests of which every completion ended by "stop" or "length"
    cancelled: int  # requests cancelled before that
    failed: int  # requests with an error
    slots: int  # rows of the batch that are taken, of max_batch
    prefill_tokens: int  # tokens of prompts that were read
    generated_tokens: int
    steps: int  # steps that had something to do


class _Waiter(Protocol):
    def wait_until(self, ready: Callable[[], bool]) -> None: ...


class Handle:
    """One request under way. Any thread may use it."""

    def __init__(self, request: Request, engine: _Waiter):
        self.request = request
        self.error: BaseException | None = None  # why it failed
        self.cancelled = False  # whether `cancel` came before the end
        self._engine = engine
        self._events: deque[TokenEvent] = deque()
        self._completions: dict[int, Completion] = {}  # by sample_index

    @property
    def done(self) -> bool:
        """Whether every completion has ended, for whatever reason."""
        return len(self._completions) == self.request.n

    def cancel(self) -> bool:
        """Ask for the end: the next step frees the slots. False if it has ended already."""
        if self.done:
            return False
        self.cancelled = True
        return True

    def poll(self) -> list[TokenEvent]:
        """The tokens that came since the last look, without waiting; those of `n` samples mixed."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def __iter__(self) -> Iterator[TokenEvent]:
        """The tokens as they come, each once, until the end. The last of a completion carries it, unless it was
        cancelled or failed."""
        while True:
            self._engine.wait_until(lambda: self._events or self.done)
            if not self._events:
                return
            yield self._events.popleft()

    def result(self) -> list[Completion]:
        """Waits for the end: the `n` completions by sample_index. `finish_reason` says how each ended."""
        self._engine.wait_until(lambda: self.done)
        return [self._completions[i] for i in range(self.request.n)]
