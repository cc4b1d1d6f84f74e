"""The benchmark of spoken digits: what it reads, what it makes of it, and that it trains. Real recordings where there
are some; tones in the same files everywhere."""

import io
import math
import tarfile
import wave

import numpy as np
import pytest
import torch

from anymamba import AnymambaError
from conftest import REPO
from shared_data import shared


@pytest.fixture
def speech(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import speech

    monkeypatch.setattr(speech, "SIZES", {"d_model": 24, "n_layer": 1, "d_state": 4})
    monkeypatch.setattr(speech, "WARM_UP", 5)
    monkeypatch.setattr(speech, "LR", 1e-2)
    return speech


@pytest.fixture
def fsdd(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import fsdd

    return fsdd


def wav(x, width=2, rate=8000):
    """Whole numbers (t, channels) as the bytes of a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(x.shape[1])
        out.setsampwidth(width)
        out.setframerate(rate)
        raw = (x + 128).astype(np.uint8)[..., None] if width == 1 else x.astype("<i4")[..., None].view(np.uint8)
        out.writeframes(raw[..., :width].tobytes())
    return file.getvalue()


def tone(digit, seed):
    """A recording of a digit in a made-up language: its pitch. Of any phase, loudness and length."""
    rng = np.random.default_rng((digit, seed))
    t = int(rng.integers(600, 1000))
    pitch = 200 * 1.35**digit * rng.uniform(0.99, 1.01)
    x = np.sin(2 * math.pi * (pitch / 8000 * np.arange(t) + rng.uniform())) + 0.05 * rng.standard_normal(t)
    return (x * rng.uniform(1000, 20000)).astype(np.int64)[:, None]


@pytest.fixture
def language(tmp_path):
    """The folder of such a data set: ten digits, one speaker, 16 recordings each, of which 5 are for the test."""
    folder = tmp_path / "fsdd"
    folder.mkdir()
    for split, indices in (("train", range(5, 16)), ("test", range(5))):
        with tarfile.open(folder / f"fsdd_{split}.tar.xz", "w:xz") as tar:
            for digit in range(10):
                for i in indices:
                    member, data = tarfile.TarInfo(f"recordings/{digit}_ada_{i}.wav"), wav(tone(digit, i))
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files_of_every_width(fsdd, width, channels):
    top = 2 ** (8 * width - 1)
    x = np.array([[0, -top, top - 1, top // 2, -3, 5][:6]]).T.repeat(channels, 1)
    x[:, -1] //= 2  # the channels differ
    rate, got = fsdd.read_wav(wav(x, width, 11025))
    assert (rate, got.dtype, got.shape) == (11025, np.float32, (6, channels))
    np.testing.assert_allclose(got, x / top, atol=1e-7)


@pytest.mark.parametrize("data", [b"", b"no sound", wav(np.zeros((3, 1), int))[:20]])
def test_what_is_no_wav_file(fsdd, data):
    with pytest.raises(AnymambaError, match=r"one\.wav is no WAV file"):
        fsdd.read_wav(data, "one.wav")


def test_recordings_of_an_archive_and_of_a_folder(fsdd, language, tmp_path):
    train, test = fsdd.digits(language, "train"), fsdd.digits(language, "test")
    assert (len(train), len(test)) == (110, 50)
    assert {one.index for one in test} == set(range(5))
    assert test[7][1:] == (1, "ada", 2)
    np.testing.assert_allclose(test[7].x * 2**15, tone(1, 2)[:, 0])
    loose = tmp_path / "loose"
    for split in ("train", "test"):
        with tarfile.open(language / f"fsdd_{split}.tar.xz") as tar:
            tar.extractall(loose, filter="data")
    for split, found in (("train", train), ("test", test)):
        again = fsdd.digits(loose, split)
        assert [one[1:] for one in again] == [one[1:] for one in found]
        assert all(np.array_equal(a.x, b.x) for a, b in zip(again, found, strict=True))


def test_bad_recordings_are_refused(fsdd, tmp_path):
    with pytest.raises(AnymambaError, match=r"no recordings for test in .*: it needs fsdd_test\.tar\.xz"):
        fsdd.digits(tmp_path, "test")
    (tmp_path / "recordings").mkdir()
    path = tmp_path / "recordings" / "3_ada_1.wav"
    path.write_bytes(wav(np.zeros((9, 2), int)))
    with pytest.raises(AnymambaError, match=r"3_ada_1\.wav: 8000 Hz, 2 channels, but recordings are mono"):
        fsdd.digits(tmp_path, "test")
    path.write_bytes(wav(np.zeros((9, 1), int)))
    path.rename(path.with_name("three.wav"))
    with pytest.raises(AnymambaError, match=r"three\.wav: .* named digit_speaker_index"):
        fsdd.digits(tmp_path, "test")


def test_the_real_recordings(fsdd):
    folder = shared("fsdd")
    train, test = fsdd.digits(folder, "train"), fsdd.digits(folder, "test")
    assert (len(train), len(test)) == (1200, 300)
    assert {(one.speaker, one.index) for one in train}.isdisjoint((one.speaker, one.index) for one in test)
    assert sum(len(one.x) for one in test) / fsdd.RATE == pytest.approx(129.3, abs=0.1)
    assert all(0.003 < np.abs(one.x).max() <= 1 for one in (*train, *test))


def test_recordings_are_padded_and_equally_loud(speech, fsdd, language):
    found = fsdd.digits(language, "test")
    data = speech.recordings(found, "cpu")
    for x, n, one in zip(data.x, data.lengths, found, strict=True):
        assert n == len(one.x)
        assert float(x[:n].square().mean()) == pytest.approx(1, rel=1e-4)
        assert not x[n:].any()


def test_augmented_is_the_same_word(speech):
    """A tone stays one: after each change its pitch is that of the chosen speed, and it ends where its length says."""
    torch.manual_seed(0)
    lengths = torch.tensor([4000, 3000, 2000, 3500] * 5)
    place = torch.arange(4000)
    x = torch.where(place < lengths[:, None], 2**0.5 * torch.sin(2 * math.pi * 0.05 * place), 0)
    got, new = speech.augment(x, lengths)
    assert got.isfinite().all()
    assert int(new.max()) <= got.shape[1]
    pitches = []
    for row, n, before in zip(got, new, lengths, strict=True):
        assert 0.85 * before <= n <= before / 0.85 + 801
        spectrum = torch.fft.rfft(row[: int(n)], 1 << 15).abs()
        pitches.append(float(spectrum.argmax()) / (1 << 15))
        quiet, sound = row[int(n) + 2 :].square().mean(), row[int(n) - 1500 : int(n)].square().mean()
        assert quiet < 0.2 * sound
    assert 0.85 * 0.05 - 1e-3 < min(pitches) < 0.95 * 0.05
    assert 1.05 * 0.05 < max(pitches) < 1.15 * 0.05 + 1e-3


def test_clips_of_one_length(speech, monkeypatch):
    monkeypatch.setattr(speech, "CLIP", 5)
    x, lengths = torch.arange(1.0, 15).view(2, 7), torch.tensor([3, 7])
    assert speech.fit(x, lengths, packed=True)[1] is lengths
    clips, none = speech.fit(x, lengths, packed=False)
    assert clips[..., 0].tolist() == [[1, 2, 3, 0, 0], [8, 9, 10, 11, 12]]
    assert none is None
    assert speech.fit(x[:, :3], lengths.clamp(max=3), packed=False)[0].shape == (2, 5, 1)
    model = speech.build("mamba")
    data = speech.Recordings(x, lengths, torch.tensor([0, 1]))
    clock = iter(range(100))
    monkeypatch.setattr(speech.time, "perf_counter", lambda: next(clock))
    assert speech.train(model, data, 3, packed=False, batch=2) == 3
    assert speech.right(model, data, packed=False).shape == (2,)


def test_other_mixers_get_the_same_size(speech, monkeypatch):
    whole = speech.count(speech.build("mamba"))
    monkeypatch.setattr(speech, "SIZES", speech.SIZES | {"d_model": 64})
    assert speech.count(speech.build("mamba", whole)) == whole


def test_it_learns_a_language_of_tones(speech, fsdd, language, monkeypatch, capsys):
    """A few steps on a language that every machine has; the clock is the number of steps, so that it is the same."""
    monkeypatch.setattr(speech, "HEARS", speech.HEARS | {"patch": 64, "stride": 32, "bidirectional": False})
    train, test = (speech.recordings(fsdd.digits(language, split), "cpu") for split in ("train", "test"))
    clock = iter(range(1000))
    monkeypatch.setattr(speech.time, "perf_counter", lambda: next(clock))
    torch.manual_seed(0)
    model = speech.build("mamba")
    before = float(speech.right(model, test).float().mean())
    steps = speech.train(model, train, seconds=60, batch=32)
    assert 55 <= steps <= 62
    assert before < 0.3
    assert float(speech.right(model, test).float().mean()) > 0.4


def test_the_script(speech, language, monkeypatch, capsys, tmp_path):
    """From the command line to the line of results, and its reason where there is no data."""
    monkeypatch.setattr("sys.argv", ["speech.py", "--data", str(tmp_path / "nowhere")])
    assert speech.main() == 0
    assert (
        capsys.readouterr().out
        == f"skipped: no fsdd in {tmp_path}/nowhere; set ANYMAMBA_DATA to a folder that has it\n"
    )
    monkeypatch.setattr(
        "sys.argv", ["speech.py", "--data", str(language.parent), "--minutes", "0.01", "--mixers", "mamba"]
    )
    monkeypatch.setattr(speech, "quiet", lambda: None)  # a captured output cannot be set to lines
    assert speech.main() == 0
    *_, row, line = capsys.readouterr().out.splitlines()
    assert "of the test   (target ≥ 90 %)" in row
    assert '"benchmark": "speech"' in line
    monkeypatch.setattr(speech, "compare", lambda *_: 1 / 0)
    assert speech.main() == 1
    assert "FAILED ZeroDivisionError" in capsys.readouterr().out
