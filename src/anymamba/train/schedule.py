"""Functions of a run's progress, a number from 0 to 1: the learning rate, and when something is due."""

import math
import time
from collections.abc import Callable


def learning_rate(progress: float, *, lr: float, min_lr: float, warmup: float) -> float:
    """Linear from 0 to `lr` over the share `warmup` of the run, then along a cosine down to `min_lr`."""
    if progress < warmup:
        return lr * progress / warmup
    rest = min(1.0, (progress - warmup) / (1 - warmup))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * rest))


class Every:
    """Says when something is due: each `steps` steps or, with None, each `share` of the run or each `seconds`."""

    def __init__(self, steps: int | None, *, share: float = math.inf, seconds: float = math.inf, progress: float = 0.0,
                 clock: Callable[[], float] = time.monotonic):  # fmt: skip
        self.steps, self.share, self.seconds, self.clock = steps, share, seconds, clock
        self.last_progress, self.last_time = progress, clock()

    def is_due(self, step: int, progress: float) -> bool:
        """Whether it is, after `step` steps; if so, the next time is counted from here."""
        if self.steps is not None:
            return step % self.steps == 0
        # a share counts in whole shares from the beginning of the run, so that a resumed run keeps the rhythm
        due = progress // self.share > self.last_progress // self.share
        due = due or self.clock() - self.last_time >= self.seconds
        if due:
            self.last_progress, self.last_time = progress, self.clock()
        return due
