"""Three minutes of `anymamba train` on tinyshakespeare's characters: nats a character on the last 10 %.

    python benchmarks/shakespeare.py PATH/TO/input.txt [--save]

The text is the 1,115,394 bytes of karpathy/char-rnn's data/tinyshakespeare/input.txt.
Everything is the command's default. Peer, measured elsewhere on such a machine:
nanoGPT's CPU recipe stretched to three minutes, 1.67.
"""

import tempfile
import time
from pathlib import Path

from anymamba.errors import AnymambaError
from anymamba.train import TrainConfig, train
from common import Report, arguments, quiet


def main():
    quiet()
    if len(arguments()) != 1:
        raise AnymambaError("give the path of tinyshakespeare's input.txt")
    report = Report("shakespeare")
    report.roofline()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = train(TrainConfig(data=tuple(arguments()), minutes=3, out=str(Path(folder) / "run")))
        seconds = time.perf_counter() - start
    config = TrainConfig()
    tokens = result.step * config.batch_size * config.seqlen
    report.add("trained", f"{result.step} steps, {tokens / 1e6:.2f} M characters, {seconds:.0f} s in all",
               steps=result.step, tokens=tokens, seconds=seconds)  # fmt: skip
    nats = result.evaluation.nats
    report.add("held-out nats a character", f"{nats:8.4f}   (target ≤ 1.60), {result.evaluation.tokens} characters",
               nats=nats, bits_per_byte=result.evaluation.bits_per_byte)  # fmt: skip
    report.close()


if __name__ == "__main__":
    main()
