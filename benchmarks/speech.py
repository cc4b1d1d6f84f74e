"""Which digit was spoken, from the waveform at 8 kHz, no spectrogram: accuracy on the official test of `fsdd`.

    python benchmarks/speech.py [--minutes 3] [--mixers mamba s4 s4d gru] [--data FOLDER] [--quick] [--save]

Each mixer has the same number of parameters, the same training recordings (shifted, stretched, louder or softer, with
noise) and the same time, on the GPU if there is one (autocast to bfloat16). Mamba reads recordings of any length packed
end to end; the others, which would read those one by one, get all cut or filled up to a second. The data are `fsdd` in
FOLDER, $ANYMAMBA_DATA or `shared/data` beside the repository. The test is looked at once, at the end. --quick: half a
minute on a fifth of the recordings.
"""

import argparse
import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anymamba import MambaConfig, SequenceModel
from common import Report, card, quiet
from fsdd import RATE, Digit, digits
from gpu_common import GpuReport, gpu_card

SHARED = Path(os.environ.get("ANYMAMBA_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
SIZES = {"d_model": 96, "n_layer": 4, "d_state": 16}
HEARS = {"inputs": 1, "outputs": 10, "pool": "mean", "patch": 32, "stride": 16, "bidirectional": True}
CLIP = RATE  # samples of a recording where all must have one length; 1 in 150 is longer
BATCH, LR, WEIGHT_DECAY, DROPOUT, WARM_UP = 48, 3e-3, 0.05, 0.1, 50


class Recordings(NamedTuple):
    x: Tensor  # (N,t) float32, each of mean square 1, zeros behind
    lengths: Tensor  # (N,)
    classes: Tensor  # (N,)


def recordings(found: list[Digit], device) -> Recordings:
    """Padded to one length, without the mean, all equally loud."""
    lengths = torch.tensor([len(one.x) for one in found])
    x = torch.zeros(len(found), int(lengths.max()))
    for row, one in zip(x, found, strict=True):
        own = torch.from_numpy(one.x) - float(one.x.mean())
        row[: len(own)] = own / own.square().mean().sqrt().clamp(min=1e-4)
    return Recordings(x.to(device), lengths.to(device), torch.tensor([one.digit for one in found], device=device))


def augment(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The same words otherwise: x (b,t) up to 15 % slower or faster, up to 0.1 s later, by up to 10 dB softer or
    louder, with white noise 10 to 40 dB below. Returns them (b,t') and their lengths."""

    def uniform(low, high):
        return low + (high - low) * torch.rand(len(x), 1, device=x.device)

    speed, late, loud, quieter = (uniform(*v) for v in ((0.85, 1.15), (0, 0.1 * RATE), (-10, 10), (-40, -10)))
    t = math.ceil(x.shape[1] / 0.85 + 0.1 * RATE)
    place = (torch.arange(t, device=x.device) - late) * speed
    end = lengths[:, None] - 1
    left = place.floor().clamp(min=0).minimum(end)
    low, high = (x.gather(1, i.long()) for i in (left, (left + 1).minimum(end)))
    out = torch.lerp(low, high, (place - left).clamp(0, 1)) * ((place >= 0) & (place <= end))
    out = (out + torch.randn_like(out) * 10 ** (quieter / 20)) * 10 ** (loud / 20)
    new = (end / speed + late).ceil().long()[:, 0].clamp(1, t)
    return out, new


def fit(x: Tensor, lengths: Tensor, packed: bool) -> tuple[Tensor, Tensor | None]:
    """What a model takes: (b,t,1) and lengths, or clips of one length (b,CLIP,1), silent at the end, and none."""
    if packed:
        return x[..., None], lengths
    x = x.masked_fill(torch.arange(x.shape[1], device=x.device) >= lengths[:, None], 0)
    return F.pad(x, (0, max(0, CLIP - x.shape[1])))[:, :CLIP, None], None


def build(mixer: str, parameters: int | None = None) -> SequenceModel:
    """A model with this mixer, of the width whose number of parameters is nearest to `parameters`."""

    def make(d_model):
        extra = {} if mixer == "mamba" else {"mixer": mixer}
        if mixer == "s4":
            extra["discretization"] = "bilinear"
        return SequenceModel(MambaConfig(vocab_size=None, **SIZES | {"d_model": d_model} | extra), **HEARS)

    width = SIZES["d_model"]
    if parameters is not None:
        with torch.device("meta"):
            width = min(range(16, 513, 8), key=lambda m: abs(count(make(m)) - parameters))
    model = make(width)
    model.mamba.dropout = DROPOUT
    return model


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def train(model: SequenceModel, data: Recordings, seconds: float, packed: bool = True, batch: int = BATCH) -> int:
    """Train for so long, after one step in which kernels are compiled; the number of steps."""
    device, on_gpu = data.x.device.type, data.x.is_cuda
    optimizer = torch.optim.AdamW(model.param_groups(WEIGHT_DECAY), lr=LR, betas=(0.9, 0.98), fused=on_gpu)
    lengths, step, start = data.lengths.cpu(), 0, time.perf_counter()
    model.train()
    while (done := (time.perf_counter() - start) / seconds) < 1:
        rows = torch.randint(len(lengths), (batch,))
        longest, rows = int(lengths[rows].max()), rows.to(device)
        x, new = fit(*augment(data.x[rows, :longest], data.lengths[rows]), packed)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * done)) / 2
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            y = model(x, lengths=new).y
        loss = F.cross_entropy(y.float(), data.classes[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step == 1 or step % 100 == 0:
            print(f"  step {step:6}  {done:4.0%}  loss {loss.item():.3f}", file=sys.stderr)
        if step == 1:
            start = time.perf_counter()
    return step


@torch.no_grad()
def right(model: SequenceModel, data: Recordings, packed: bool = True) -> Tensor:
    """Which recordings are recognised: (N,) bool."""
    model.eval()
    found = []
    for x, lengths, classes in zip(*(v.split(50) for v in data), strict=True):
        x, lengths = fit(x[:, : int(lengths.max())], lengths, packed)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            found.append(model(x, lengths=lengths).y.argmax(1) == classes)
    return torch.cat(found)


class SpeechReport(Report):
    row, failed = GpuReport.row, False

    def machine(self) -> dict:
        return gpu_card() if torch.cuda.is_available() else card()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3, help="of training for each mixer")
    parser.add_argument("--mixers", nargs="+", default=["mamba", "s4", "s4d", "gru"])
    parser.add_argument("--data", type=Path, default=SHARED, help="the folder that holds fsdd")
    parser.add_argument("--quick", action="store_true", help="half a minute on a fifth of the recordings")
    parser.add_argument("--save", action="store_true", help="append the results to benchmarks/results/")
    return parser.parse_args()


def main() -> int:
    args = options()
    quiet()
    if not (args.data / "fsdd").is_dir():
        print(f"skipped: no fsdd in {args.data}; set ANYMAMBA_DATA to a folder that has it")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training, test = (recordings(digits(args.data / "fsdd", s)[:: 5 if args.quick else 1], device)
                      for s in ("train", "test"))  # fmt: skip
    seconds = 30 if args.quick else 60 * args.minutes
    report, parameters = SpeechReport("speech"), count(build("mamba"))
    report.add("recordings", f"{len(training.x)} to learn from, {len(test.x)} to test")
    known = any(field.name == "mixer" for field in dataclasses.fields(MambaConfig))
    for mixer in args.mixers:
        if mixer != "mamba" and not known:
            report.add(mixer, "left out: this version has no other mixers")
            continue
        with report.row(mixer):
            torch.manual_seed(0)
            model = build(mixer, None if mixer == "mamba" else parameters).to(device)
            compare(report, mixer, model, training, test, seconds)
    report.close()
    return 1 if report.failed else 0


def compare(report: Report, mixer: str, model: SequenceModel, training: Recordings, test: Recordings, seconds: float):
    """Train, test, one line."""
    packed, start = mixer == "mamba", time.perf_counter()
    steps = train(model, training, seconds, packed)
    took, hits = time.perf_counter() - start, right(model, test, packed)
    share = float(hits.float().mean())
    error = math.sqrt(share * (1 - share) / len(hits))
    target = "   (target ≥ 90 %)" if mixer == "mamba" else ""
    text = f"{share:6.1%} ± {error:.1%} of the test{target}, {count(model):,} parameters, {steps} steps, {took:.0f} s"
    report.add(mixer, text, accuracy=share, error=error, parameters=count(model), steps=steps, seconds=took,
               packed=packed, config=model.config.to_dict() | model.settings)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
