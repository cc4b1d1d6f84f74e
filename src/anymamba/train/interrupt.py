"""Ctrl-C and SIGTERM as a question that is asked between two steps."""

import signal
import threading


class Interrupt:
    """Within it the first signal is only noted, in `signum`, and the second raises KeyboardInterrupt at once."""

    def __init__(self, on_first=None):
        self.signum: int | None = None
        self.on_first = on_first
        self.before: dict[int, object] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self.before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _handle(self, signum, _frame):
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        if self.on_first is not None:
            self.on_first(signum)
