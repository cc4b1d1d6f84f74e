"""The log of a run, log.jsonl: one object a line; its picture; TensorBoard events on request.

Lines are of four kinds, told apart by their keys: a step (loss, lr, grad_norm, tokens, tokens_per_second, seconds), a
measurement (heldout_nats, heldout_bits_per_byte), a sample (sample), and the last (final_nats, final_bits_per_byte, …).
All have `step`.
"""

import json
from pathlib import Path
from typing import Any

from anymamba.errors import AnymambaError
from anymamba.files import write_atomically

LOG, PLOT = "log.jsonl", "loss.png"


class Log:
    """Appends records; a killed process loses at most the line that it was writing."""

    def __init__(self, run: Path, step: int, tensorboard: bool = False):
        """Goes on after `step`: what a stopped process wrote beyond its last checkpoint is dropped, and comes again."""
        path = run / LOG
        records = (r for r in read(run) if 0 < step >= r["step"] and "final_nats" not in r)
        kept = [json.dumps(record) + "\n" for record in records]
        write_atomically(path, lambda part: part.write_text("".join(kept), encoding="utf-8"))
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.events = _tensorboard(run, step) if tensorboard else None

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        if self.events is not None:
            for name, value in record.items():
                if name == "sample":
                    self.events.add_text(name, value, record["step"])
                elif name != "step":
                    self.events.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.file.close()
        if self.events is not None:
            self.events.close()


def read(run: Path) -> list[dict[str, Any]]:
    """The records of a run's log so far; a line that was cut off by a crash is left out."""
    path, records = run / LOG, []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records


def plot(run: Path) -> str:
    """Draw loss.png from the log; a line that says where it is, or how to get it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no loss curve without matplotlib: pip install 'anymamba[plot]'"
    records = read(run)
    steps = [r for r in records if "loss" in r]
    measured = [r for r in records if "heldout_nats" in r]
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # not pyplot, which looks for a screen
    axes = figure.subplots()
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], lw=0.5, alpha=0.4, color="C0", label="training")
    axes.plot([r["step"] for r in steps], _smooth([r["loss"] for r in steps]), color="C0", label="training, smoothed")
    axes.plot([r["step"] for r in measured], [r["heldout_nats"] for r in measured], "o-", color="C1", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run / PLOT, dpi=120)
    return f"loss curve  {run / PLOT}"


def _smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential mean, corrected for its start."""
    out, mean = [], 0.0
    for i, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**i))
    return out


def _tensorboard(run: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise AnymambaError(f"tensorboard=True needs tensorboard ({error}): pip install 'anymamba[log]'") from None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
