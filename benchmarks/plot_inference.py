"""The figures of docs/inference.md, from the last saved results of gpu_decode, gpu_transformer, gpu_prefill, cpu_read.

    python benchmarks/plot_inference.py       docs/inference_*.svg and .png, and the tables in docs/inference.md

What has no results yet is left out, with a message. Needs matplotlib and no GPU.
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"  # between these docs/inference.md is written here
# Mamba from light to dark blue, the Transformer orange, mamba-ssm grey: also readable without colour, by the markers
STYLE = {"130m": ("#7fb3d5", "o"), "1.4b": ("#2980b9", "s"), "2.8b": ("#1a5276", "D"), "Transformer": ("#d35400", "^")}


def load(name: str) -> dict | None:
    """The last line of a results file, None if there is none."""
    path = RESULTS / f"{name}.jsonl"
    if not path.is_file() or not path.read_text().strip():
        print(f"no {path.name}: left out; make it with python benchmarks/{name}.py --save", file=sys.stderr)
        return None
    return json.loads(path.read_text().splitlines()[-1])


def rows(result: dict, *keys: str, **values) -> list[dict]:
    """The rows that have all keys, and these values; rows that failed have none."""
    found = (row for row in result["rows"].values() if all(key in row for key in keys))
    return [row for row in found if all(row.get(key) == value for key, value in values.items())]


# ---- pictures --------------------------------------------------------------------------------------------------


def curve(panel, points, label, style, **options):
    """Points {x: y} as a line. A curve without points has none, and no place in the legend."""
    colour, marker = style
    if points:
        x = sorted(points)
        panel.plot(x, [points[k] for k in x], color=colour, marker=marker, ms=4, label=label, **options)


def batch_panel(panel, decode, _):
    for model in ("130m", "1.4b", "2.8b"):
        of = rows(decode, "tokens_per_s", model=model, state="fp32")
        curve(panel, {r["batch"]: r["tokens_per_s"] for r in of}, f"{model}, anymamba", STYLE[model])
        style = ("#8a8a8a", STYLE[model][1])
        curve(panel, {r["batch"]: r["earlier"] for r in of}, f"{model}, mamba-ssm", style, ls=":")
    panel.set(xlabel="rows side by side", ylabel="tokens a second")


def context_panel(panel, _, other):
    longest = max(r["context"] for r in rows(other, "tokens_per_s", model="transformer"))
    for b, line in ((1, "-"), (16, "--")):
        mamba = rows(other, "tokens_per_s", model="mamba", batch=b)
        of = rows(other, "tokens_per_s", model="transformer", batch=b)
        flat = {t: r["tokens_per_s"] for r in mamba for t in (512, longest)}
        curve(panel, flat, f"mamba-2.8b, batch {b}", STYLE["2.8b"], ls=line)
        curve(
            panel,
            {r["context"]: r["tokens_per_s"] for r in of},
            f"Transformer, batch {b}",
            STYLE["Transformer"],
            ls=line,
        )
    panel.set(xlabel="tokens of context", ylabel="tokens a second")


def memory_panel(panel, _, other):
    of = rows(other, "cache", "state")
    curve(panel, {r["context"]: r["state"] / 1e6 for r in of}, "mamba-2.8b: state", STYLE["2.8b"])
    curve(panel, {r["context"]: r["cache"] / 1e6 for r in of}, "Transformer: keys and values", STYLE["Transformer"])
    panel.set(xlabel="tokens of context", ylabel="MB a row")


PICTURES = {"batch": (batch_panel, 0), "context": (context_panel, 1), "memory": (memory_panel, 1)}


def short(t: float) -> str:
    return f"{t / 2**20:g}M" if t >= 1 << 20 else f"{t / 1024:g}K" if t >= 1024 else f"{t:g}"


def draw(results: tuple, folder: Path) -> list[Path]:
    """Every picture that there are results for, as SVG and PNG, on white, so that it reads on dark pages too."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "anymamba"  # the same bytes for the same numbers
    from matplotlib import pyplot

    paths = []
    for name, (fill, needed) in PICTURES.items():
        if results[needed] is None:
            continue
        figure, panel = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
        fill(panel, *results)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.grid(True, which="major", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        ticks = sorted({float(x) for line in panel.lines for x in line.get_xdata()})
        panel.set_xticks(ticks, [short(t) for t in ticks], minor=False)
        panel.legend(frameon=False, fontsize=8)
        panel.set_title(f"{results[needed]['card']['gpu']['name']}, bf16", fontsize=10)
        for path in (folder / f"inference_{name}.svg", folder / f"inference_{name}.png"):
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
            paths.append(path)
        pyplot.close(figure)
    return paths


# ---- tables ----------------------------------------------------------------------------------------------------


def table(head: tuple, lines: list[tuple]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines])


def decode_tables(result) -> str:
    lines = []
    for r in rows(result, "tokens_per_s", state="fp32"):
        low = rows(result, "tokens_per_s", model=r["model"], batch=r["batch"], state="bf16")
        over = r["ms"] / 1e3 / r["floor"]
        lines.append((r["model"], r["batch"], f"{r['tokens_per_s']:,.0f}", f"{over:.2f}",
                      f"{low[0]['tokens_per_s']:,.0f}" if low else "", f"{r['earlier']:,}"))  # fmt: skip
    head = ("model", "batch", "tokens/s", "time over the floor", "tokens/s, states in bf16", "mamba-ssm, earlier")
    text = f"Decoding, bfloat16, one {result['card']['gpu']['name']} (`gpu_decode.py`):\n\n{table(head, lines)}"
    kinds = {key: row for key, row in result["rows"].items() if "kl" in row}
    if kinds:
        lines = [(key, f"{r['bits']:.5f}", f"{r['more']:+.5f}", f"{r['kl']:.1e}") for key, r in kinds.items()]
        head = ("the package's small model", "bits a byte", "more", "KL divergence, nats a byte")
        text += f"\n\nWhat states of lower precision cost, on a real text:\n\n{table(head, lines)}"
    return text


def transformer_table(result) -> str:
    lines = []
    for r in rows(result, "tokens_per_s", model="transformer"):
        for ours in rows(result, "tokens_per_s", model="mamba", batch=r["batch"]):
            ratio = f"{ours['tokens_per_s'] / r['tokens_per_s']:.1f} ×"
            rates = (f"{each['tokens_per_s']:,.0f}" for each in (ours, r))
            lines.append((r["batch"], f"{r['context']:,}", *rates, ratio))
    head = ("batch", "context", "mamba-2.8b, tokens/s", "Transformer, tokens/s", "ratio")
    return f"Beside a Transformer of the same size (`gpu_transformer.py`):\n\n{table(head, lines)}"


def prefill_table(result) -> str:
    lines = []
    for r in rows(result, "t", "tokens_per_s", "gib"):
        measured = f"{r['tokens_per_s'] / 1e6:.2f} M tokens/s, {r['gib']:.2f} GiB beyond the weights"
        lines.append((f"reading {r['t']:,} tokens", measured))
    named = {key: r for key, r in result["rows"].items() if "ms" in r}
    lines += [
        (f"a token, decoded after {r['t']:,}", f"{r['ms']:.3f} ms") for k, r in named.items() if k[:6] == "decode"
    ]
    lines += [(k, f"{r['ms']:.1f} ms") for k, r in named.items() if k[:11] == "first token"]
    return f"Long prompts, mamba-130m (`gpu_prefill.py`):\n\n{table(('what', 'measured'), lines)}"


def cpu_table(result) -> str:
    lines = [(f"{r['t']:,}", f"{r['tokens_per_s']:,.0f}", f"{r['bytes'] / 2**20:.1f}")
             for r in rows(result, "t", "tokens_per_s")]  # fmt: skip
    head = ("tokens of a book", "tokens/s of processor time", "MiB beyond the start, at the peak")
    where = result["card"]["processor"]
    return f"Reading on a CPU, preset tiny, one thread of {where} (`cpu_read.py`):\n\n{table(head, lines)}"


def tables(decode, other, prefill, cpu) -> str:
    """The text between the marks."""
    parts = [(decode_tables, decode), (transformer_table, other), (prefill_table, prefill), (cpu_table, cpu)]
    return "\n\n".join(make(result) for make, result in parts if result is not None)


def write_tables(path: Path, text: str) -> None:
    page = path.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"{path} must have {BEGIN} and, after it, {END}, once each")
    before, _, rest = page.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def main() -> int:
    decode, other, prefill, cpu = map(load, ("gpu_decode", "gpu_transformer", "gpu_prefill", "cpu_read"))
    for path in draw((decode, other), DOCS):
        print(path)
    write_tables(DOCS / "inference.md", tables(decode, other, prefill, cpu))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
