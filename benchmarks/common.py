"""What every benchmark shares: the environment card, paired timing, the results file. Needs no kernels."""

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from anymamba.cli.doctor import _features, _processor

RESULTS = Path(__file__).parent / "results"


def versions(*names: str) -> dict[str, str | None]:
    """The installed version of each package, None for one that is not installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def card() -> dict:
    """The machine and the versions that a result belongs to."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "features": _features(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions("anymamba", "torch", "numba", "numpy", "transformers", "mambapy"),
    }


def measure(functions: dict, rounds: int = 5, settle: int = 1) -> dict[str, list[float]]:
    """Seconds of each function, in rounds of one timed call each: the machine's moods hit all of them alike.

    `settle` untimed calls go before each timed one: they bring back memory and caches that the others took.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, f in functions.items():
            for _ in range(settle):
                f()
            start = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - start)
    return times


def median(times: list[float]) -> float:
    return statistics.median(times)


def spread(times: list[float]) -> str:
    """median (min–max) in ms."""
    return f"{median(times) * 1e3:9.2f}  ({min(times) * 1e3:.2f}–{max(times) * 1e3:.2f})"


def ratio(a: list[float], b: list[float]) -> float:
    """Median over the rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def arguments() -> list[str]:
    """The command line without --save, which appends the results to results/."""
    return [a for a in sys.argv[1:] if a != "--save"]


class Report:
    """Prints lines and keeps what they say; `close` writes one JSON line, the last line of the output too."""

    def __init__(self, name: str):
        self.name, self.rows = name, {}
        self.card = self.machine()
        print(f"# {name}: {self.title()}, {self.card['versions']}", flush=True)

    def machine(self) -> dict:
        return card()

    def title(self) -> str:
        return f"{self.card['processor']}, {self.card['threads']} threads"

    def add(self, key: str, text: str, **values) -> None:
        print(f"{key:<46} {text}", flush=True)
        self.rows[key] = values

    def roofline(self) -> tuple[float, float]:
        """Print and keep what the machine can do: exponentials and bytes copied a second."""
        from cpu_limits import copy_bandwidth, exponential_rate

        rate, bandwidth = exponential_rate(), copy_bandwidth()
        self.add("machine", f"{rate / 1e9:.2f} G exp/s, copy {bandwidth / 1e9:.1f} GB/s", exp=rate, copy=bandwidth)
        return rate, bandwidth

    def compare(self, key: str, times: dict, ours: str, peer: str, target: str) -> None:
        """One line: how often faster than the peer `ours` is."""
        r = ratio(times[peer], times[ours])
        self.add(key, f"{r:8.2f} ×   (target {target})", ratio=round(r, 3), target=target)

    def close(self) -> None:
        line = json.dumps({"benchmark": self.name, "card": self.card, "rows": self.rows})
        if "--save" not in sys.argv:
            print(line)
            return
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / f"{self.name}.jsonl", "a") as file:
            file.write(line + "\n")
        print(line)


def quiet() -> None:
    """No progress bars or advice of peers between our lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.stdout.reconfigure(line_buffering=True)
