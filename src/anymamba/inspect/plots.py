"""The page's pictures as PNG files, through matplotlib."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from anymamba.errors import AnymambaError
from anymamba.inspect.report import LayerSummary

MOST = 12  # layers with a map of their own in the picture, evenly spread


def save_plots(summaries: Sequence[LayerSummary], folder: str | Path) -> list[Path]:
    """Write step_sizes.png, attention.png and horizons.png into a folder; returns their paths.

    Raises AnymambaError as `check_plots`.
    """
    folder = check_plots(folder)
    from matplotlib.figure import Figure

    figures = {"step_sizes": _steps, "attention": _attention, "horizons": _horizons}
    out = []
    for name, draw in figures.items():
        figure = Figure(layout="constrained")
        draw(figure, summaries)
        out.append(folder / f"{name}.png")
        figure.savefig(out[-1], dpi=120)
    return out


def check_plots(folder: str | Path) -> Path:
    """Make the folder for pictures. Raises AnymambaError where that fails or matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise AnymambaError("pictures need matplotlib: pip install 'anymamba[plot]'")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnymambaError(f"pictures need a folder, and {folder} cannot be one ({error}): choose another") from None
    return folder


def _steps(figure, summaries):
    figure.set_size_inches(9, 1.5 + 0.18 * len(summaries))
    axes = figure.subplots()
    image = axes.imshow(torch.stack([s.dt for s in summaries]).log10(), aspect="auto", interpolation="nearest")
    axes.set(xlabel="token", ylabel="layer", title="step size, mean over channels")
    figure.colorbar(image, label="log10 Δ")


def _attention(figure, summaries):
    shown = torch.linspace(0, len(summaries) - 1, min(MOST, len(summaries))).long().tolist()
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure.set_size_inches(2.6 * columns, 2.7 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, i in zip(grid, shown, strict=False):
        mean = summaries[i].maps[0]
        signed = mean.sign() * (mean.abs() / mean.abs().max().clamp(min=1e-30)).sqrt()
        axes.imshow(signed, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"layer {i}", fontsize=9)
    figure.suptitle("hidden attention, mean over channels (signed square root)")


def _horizons(figure, summaries):
    figure.set_size_inches(7, 1.5 + 0.2 * len(summaries))
    axes = figure.subplots()
    for i, (low, quarter, middle, upper, high) in enumerate(s.horizon.tolist() for s in summaries):
        axes.plot([low, high], [i, i], color="tab:orange", alpha=0.4, linewidth=2)
        axes.plot([quarter, upper], [i, i], color="tab:orange", linewidth=5)
        axes.plot([middle], [i], "k|")
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set(xlabel="tokens until a share is under 1/e", ylabel="layer", title="memory horizons")
