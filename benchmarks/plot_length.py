"""The picture of gpu_length.py: time and memory a token against the length of the text.

    python benchmarks/plot_length.py          results/gpu_length.jsonl → docs/gpu_length.svg and .png

Draws the last line of the results file. Needs matplotlib and no GPU.
"""

import json
import math
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "gpu_length.jsonl"
DOCS = Path(__file__).parents[1] / "docs"
# one hue for the curves of Mamba, from light to dark, and another for attention, so that it also reads in grey
STYLE = {
    "scan": ("#7fb3d5", "o"),
    "scan, forward + backward": ("#2980b9", "s"),
    "mixer": ("#1a5276", "D"),
    "mamba-130m": ("#117864", "v"),
    "FlashAttention": ("#d35400", "^"),
}


def curves(result: dict) -> dict[str, list[dict]]:
    """{name of a curve: its rows in order of length}"""
    found: dict[str, list[dict]] = {}
    for row in result["rows"].values():
        if "curve" in row and "ns" in row:
            found.setdefault(row["curve"], []).append(row)
    return {name: sorted(rows, key=lambda row: row["t"]) for name, rows in found.items()}


def draw(result: dict, folder: Path) -> list[Path]:
    """Write the picture to a folder, as SVG and PNG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "anymamba"  # the same bytes for the same numbers
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for panel, key, label in zip(
        panels, ("ns", "bytes"), ("ns a token", "bytes a token, above the inputs"), strict=True
    ):
        for name, rows in curves(result).items():
            colour, marker = STYLE.get(name, ("#555555", "x"))
            panel.plot([r["t"] for r in rows], [r[key] for r in rows], color=colour, marker=marker, ms=4, label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("length of the text, tokens")
        panel.set_ylabel(label)
        panel.grid(True, which="major", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        ticks = sorted({r["t"] for rows in curves(result).values() for r in rows})[::3]
        panel.set_xticks(ticks, [f"{t // 1024}K" if t < 1 << 20 else f"{t >> 20}M" for t in ticks])
        low, high = panel.get_ylim()
        panel.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    figure.suptitle(f"{result['card']['gpu']['name']}, bf16, {1 << 20:,} tokens at once", fontsize=10)
    paths = [folder / "gpu_length.svg", folder / "gpu_length.png"]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return paths


def main() -> int:
    if not RESULTS.is_file():
        print(f"no {RESULTS}: run benchmarks/gpu_length.py --save on a machine with a GPU", file=sys.stderr)
        return 1
    result = json.loads(RESULTS.read_text().splitlines()[-1])
    for path in draw(result, DOCS):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
