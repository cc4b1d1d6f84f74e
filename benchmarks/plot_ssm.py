"""The pictures of docs/from-ssm-to-mamba.md.

    python benchmarks/plot_ssm.py             docs/ssm_spring.svg, ssm_selection.svg, ssm_attention.png

Needs matplotlib; takes seconds on any machine.
"""

import sys
from pathlib import Path

import torch

import anymamba
from anymamba import MambaLM
from anymamba.data import load_tokenizer
from anymamba.inspect import capture, hidden_attention
from anymamba.reference import discretize, selective_scan

DOCS = Path(__file__).parents[1] / "docs"
COLOURS = {"zoh": "#1a5276", "bilinear": "#7fb3d5", "euler": "#d35400"}
TEXT = "It was the best of times, it was the worst of times"


def spring(pyplot):
    """Position after a steady pull begins: each rule in steps of 0.25, and the motion itself."""
    A = torch.tensor([[0.0, 1.0], [-4.0, -0.3]], dtype=torch.float64)
    B = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    figure, axes = pyplot.subplots(figsize=(7, 3))
    for rule, dt in (("exact", 0.01), ("zoh", 0.25), ("bilinear", 0.25), ("euler", 0.25)):
        A_bar, B_bar, _ = discretize(A, B, dt, "zoh" if rule == "exact" else rule, dense=True)
        h, y = torch.zeros(2, dtype=torch.float64), []
        for _ in range(round(8 / dt)):
            h = A_bar @ h + B_bar[:, 0]
            y.append(float(h[0]))
        time = [dt * (i + 1) for i in range(len(y))]
        style = {"color": "#999999", "lw": 4} if rule == "exact" else {"color": COLOURS[rule], "marker": "o", "ms": 3.5}
        axes.plot(time, y, label=rule, **style)
    axes.set(xlabel="time", ylabel="position", ylim=(-0.5, 1.1), title="A mass on a spring, pulled from time 0")
    axes.legend(ncols=4, loc="lower right")
    return figure


def selection(pyplot):
    """The share of a marked input in the state, among noise: fixed steps, and steps that choose."""
    t, mark = 120, 20
    torch.manual_seed(0)
    x = torch.randn(1, t, 1)
    x[0, mark] = 3.0
    one = torch.ones(1, t, 1)
    figure, axes = pyplot.subplots(figsize=(7, 3))
    chosen = torch.zeros(1, t, 1)
    chosen[0, mark] = 1.0
    for name, dt, colour in (("time-invariant: Δ = 0.1 always", 0.1 * one, COLOURS["euler"]),
                             ("selective: Δ = 1 for the mark, else 0", chosen, COLOURS["zoh"])):  # fmt: skip
        y, _ = selective_scan(x, dt, torch.tensor([[-0.5]]), one, one)
        axes.plot(y[0, :, 0], color=colour, label=name)
    axes.axvline(mark, color="#999999", ls=":")
    axes.set(xlabel="token", ylabel="state", title="One marked input (dotted) among noise")
    axes.legend()
    return figure


def attention(pyplot):
    """Mean hidden attention of three layers of the package's model, absolute, each row of its own scale."""
    books = Path(anymamba.__file__).parent / "models" / "books"
    model, tokenizer = MambaLM.from_pretrained(books, dtype=torch.float32), load_tokenizer(books)
    ids = tokenizer.encode(TEXT).astype("int64")
    words = [tokenizer.decode([i]).replace(" ", "·") for i in ids]
    layers = (0, model.config.n_layer // 2, model.config.n_layer - 1)
    trace = capture(model, torch.tensor(ids)[None], layers=layers, keep=["dt", "B", "C"])
    figure, grid = pyplot.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    for layer, axes in zip(layers, grid, strict=True):
        M = torch.stack([hidden_attention(trace.layers[layer], channels=c).abs() for c in range(0, 512, 8)]).mean(0)
        axes.imshow(M / M.amax(1, keepdim=True), cmap="Blues")
        axes.set(title=f"layer {layer + 1}", xticks=range(len(words)), yticks=range(len(words)))
        axes.set_xticklabels(words, fontsize=8)
        axes.set_yticklabels(words, fontsize=8)
    return figure


def main() -> int:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "anymamba"  # the same bytes for the same numbers
    from matplotlib import pyplot

    for draw, name in ((spring, "ssm_spring.svg"), (selection, "ssm_selection.svg"), (attention, "ssm_attention.png")):
        figure = draw(pyplot)
        kind = {"metadata": {"Date": None}} if name.endswith("svg") else {"dpi": 90}
        figure.savefig(DOCS / name, bbox_inches="tight", **kind)
        pyplot.close(figure)
        print(DOCS / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
