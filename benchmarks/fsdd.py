"""Spoken digits: the Free Spoken Digit Dataset (Jakobovski et al.), 8 kHz, six speakers, read as waveforms.

The folder holds `fsdd_train.tar.xz` and `fsdd_test.tar.xz`, or their files in `recordings/`, named
`{digit}_{speaker}_{index}.wav`. By the data's own rule the indices 0 to 4 of each digit and speaker are the test.
"""

import io
import tarfile
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from anymamba.errors import AnymambaError

RATE = 8000
TEST = range(5)  # indices of the test


class Digit(NamedTuple):
    x: np.ndarray  # (t,) float32 in [-1, 1)
    digit: int
    speaker: str
    index: int


def read_wav(data: bytes, name: str = "the file") -> tuple[int, np.ndarray]:
    """Sampling rate and samples (t, channels), float32 in [-1, 1), of a WAV file of 8, 16, 24 or 32 bits.

    Raises AnymambaError for what is no such file.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    except (wave.Error, EOFError) as error:
        raise AnymambaError(f"{name} is no WAV file of whole numbers ({error}): convert it to 16-bit PCM") from None
    if width == 1:  # the only width without a sign
        x = raw.astype(np.float32) / 128 - 1
    else:  # into the upper bytes of 32-bit integers
        whole = np.zeros((len(raw) // width, 4), np.uint8)
        whole[:, 4 - width :] = raw[: len(raw) // width * width].reshape(-1, width)
        x = whole.view("<i4")[:, 0].astype(np.float32) / 2**31
    return rate, x[: len(x) // channels * channels].reshape(-1, channels)


def digits(folder: Path, split: str) -> list[Digit]:
    """The recordings of "train" or "test", in order of their names.

    Raises AnymambaError if there are none, or if one is no 8 kHz mono WAV file of such a name.
    """
    found = []
    for name, data in sorted(_files(folder, split)):
        rate, x = read_wav(data, name)
        parts = name.removesuffix(".wav").split("_")
        if len(parts) != 3 or not (parts[0].isdigit() and parts[2].isdigit()) or (rate, x.shape[1]) != (RATE, 1):
            raise AnymambaError(f"{name}: {rate} Hz, {x.shape[1]} channels, but recordings are mono at {RATE} Hz, "
                                "named digit_speaker_index.wav")  # fmt: skip
        if (int(parts[2]) in TEST) == (split == "test"):
            found.append(Digit(x[:, 0], int(parts[0]), parts[1], int(parts[2])))
    if not found:
        raise AnymambaError(f"no recordings for {split} in {folder}: it needs fsdd_{split}.tar.xz or recordings/*.wav")
    return found


def _files(folder, split) -> Iterator[tuple[str, bytes]]:
    archive = folder / f"fsdd_{split}.tar.xz"
    if not archive.exists():
        yield from ((path.name, path.read_bytes()) for path in (folder / "recordings").glob("*.wav"))
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".wav"):
                yield Path(member.name).name, tar.extractfile(member).read()
