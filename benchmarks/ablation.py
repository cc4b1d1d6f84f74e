"""What makes Mamba selective, one part at a time: byte-level language models whose B, C and dt depend on the input or
are learned constants, trained alike (arXiv 2312.00752, section 4.6, the table on selective parameters).

    python benchmarks/ablation.py [VARIANT …] [--steps 1500] [--seeds 3] [--width 128] [--layers 4] [--batch 16]
        [--seqlen 256] [--heldout 131072] [--lr 3e-3] [--first-seed 0] [--jobs 1] [--save]

Variants: none B C dt all, those of the table and the default; no-gate no-conv; s4 s4d rnn gru lstm, of the same
width, so look at their parameters. Equal steps, batches and learning rate for all; bits per byte on the held-out tenth
of $ANYMAMBA_DATA's books, or of Python's own library. On a GPU if there is one, --jobs runs at a time: small models
leave most of it idle.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from anymamba import MambaConfig, MambaLM
from anymamba.data import ByteTokenizer
from anymamba.train import TrainConfig
from anymamba.train.display import Silent
from anymamba.train.trainer import Trainer
from common import Report, quiet
from real_text import SHARED

VARIANTS = {
    "none": {"selective": ""}, "B": {"selective": "B"}, "C": {"selective": "C"}, "dt": {"selective": "dt"}, "all": {},
    "no-gate": {"gate": False}, "no-conv": {"use_conv": False},
    "s4": {"mixer": "s4", "discretization": "bilinear"}, "s4d": {"mixer": "s4d", "discretization": "zoh"},
    "rnn": {"mixer": "rnn"}, "gru": {"mixer": "gru"}, "lstm": {"mixer": "lstm"},
}  # fmt: skip
TABLE = ("none", "B", "C", "dt", "all")


def options():
    parser = argparse.ArgumentParser(description="selective parameters, one at a time")
    parser.add_argument("variants", nargs="*", default=TABLE, metavar="VARIANT")
    sizes = {"steps": 1500, "seeds": 3, "width": 128, "layers": 4, "batch": 16, "seqlen": 256, "heldout": 2**17,
             "first-seed": 0, "jobs": 1}  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--save", action="store_true")
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.variants if name not in VARIANTS]:
        parser.error(f"no variant {', '.join(unknown)}: choose of {', '.join(VARIANTS)}")
    return chosen


def one_run(variant: str, seed: int, chosen, texts, folder: Path):
    """Bits per byte on the held-out text, parameters, and seconds."""
    quiet()
    tokenizer, run = ByteTokenizer(), folder / f"{variant}-{seed}"
    run.mkdir()
    settings = TrainConfig(
        data=texts, tokens=str(run / "tokens"), steps=chosen.steps, batch_size=chosen.batch, seqlen=chosen.seqlen,
        lr=chosen.lr, seed=seed, eval_every=chosen.steps, sample_every=chosen.steps, save_every=chosen.steps,
        sample_tokens=1, final_tokens=chosen.heldout, weight_decay=0.1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = MambaLM(MambaConfig(vocab_size=tokenizer.vocab_size, d_model=chosen.width, n_layer=chosen.layers,
                                **VARIANTS[variant]))  # fmt: skip
    start = time.perf_counter()
    result = Trainer(run, settings, tokenizer, Silent(), model).run_to_end()
    if result.evaluation is None:
        raise SystemExit(f"{variant}, seed {seed}: interrupted, nothing to report")
    return result.evaluation.bits_per_byte, model.num_params(), time.perf_counter() - start


def main():
    chosen = options()
    quiet()
    report = Report("ablation")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    books = SHARED / "gutenberg"
    texts = (str(books),) if books.is_dir() else None
    name = "books" if texts else "Python's library"
    report.add("setting", f"{device}, {name}, {chosen.steps} steps of {chosen.batch} × {chosen.seqlen} bytes, "
               f"d_model {chosen.width}, {chosen.layers} layers, {chosen.seeds} seeds",
               device=device, books=texts is not None, **vars(chosen))  # fmt: skip
    found = {name: [] for name in chosen.variants}
    # every variant once before any a second time; each in a process of its own, so that runs can stand side by side
    first = chosen.first_seed
    todo = [(name, seed) for seed in range(first, first + chosen.seeds) for name in found]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(chosen.jobs, get_context("spawn")) as pool:
        runs = [pool.submit(one_run, name, seed, chosen, texts, Path(folder)) for name, seed in todo]
        for (name, seed), run in zip(todo, runs, strict=True):
            bits, parameters, seconds = run.result()
            found[name].append(bits)
            report.add(f"{name}, seed {seed}", f"{bits:8.4f} bits a byte   {parameters:,} parameters   "
                       f"{seconds:.0f} s", bits=bits, parameters=parameters, seconds=seconds)  # fmt: skip
    for name, bits in found.items():
        sd = statistics.stdev(bits) if len(bits) > 1 else float("nan")
        report.add(name, f"{statistics.mean(bits):8.4f} ± {sd:.4f} bits a byte", mean=statistics.mean(bits),
                   sd=sd if len(bits) > 1 else None)  # fmt: skip
    report.close()


if __name__ == "__main__":
    main()
