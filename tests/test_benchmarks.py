"""What the benchmarks measure with: their own scan in plain torch, their errors, their picture. No GPU is needed."""

import json
import os
import subprocess
import sys

import pytest
import torch

from anymamba import reference, selective_scan
from conftest import REPO, scan_arguments

FOLDER = REPO / "benchmarks"
GPU = sorted(path.name for path in FOLDER.glob("gpu_*.py") if path.stem not in ("gpu_common", "gpu_exact"))


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_exact

    return gpu_exact


def arguments(*sizes, dtype=torch.float32):
    found = scan_arguments(*sizes, dtype=dtype, without=("initial_state",))
    del found["dt_softplus"]
    return found


@pytest.mark.parametrize("sizes", [(2, 1, 5, 4), (1, 2, 3, 1), (2, 37, 9, 3), (1, 300, 6, 16)])
def test_chunked_scan_is_the_reference(exact, sizes):
    values = {k: v.double() for k, v in arguments(*sizes).items()}
    dy = torch.randn(sizes[:3], dtype=torch.float64)
    got = exact.outputs(exact.chunked_scan, values, dy)
    want = exact.outputs(lambda **v: reference.selective_scan(**v, dt_softplus=True)[0], values, dy)
    for name, v in want.items():
        torch.testing.assert_close(got[name], v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scan_errors(exact, dtype):
    def scan(**v):
        return selective_scan(**v, dt_softplus=True)[0]

    values = arguments(2, 130, 33, 16, dtype=dtype)
    found = exact.scan_errors(scan, values)
    assert set(found) == {"y", "dx", "ddt", "dA", "dB", "dC", "dD", "dz", "ddt_bias"}
    assert "WRONG" not in exact.summary(found)
    assert "WRONG" in exact.summary(exact.scan_errors(lambda **v: scan(**v) * 1.01, values))
    assert "WRONG" in exact.summary(
        exact.scan_errors(lambda **v: scan(**v | {"B": v["B"].detach()}) + v["B"].mean(), values)
    )
    assert "WRONG" in exact.summary({"y": (float("nan"), 1.0)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", GPU)
def test_gpu_benchmarks_say_what_they_need(name):
    env = os.environ | {"PYTHONPATH": str(REPO / "src")}
    done = subprocess.run([sys.executable, FOLDER / name], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "torch sees no CUDA GPU here: nothing to measure\n")


def test_picture_of_the_lengths(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(FOLDER))
    import plot_length

    rows = {f"{name} t={t}": {"curve": name, "t": t, "ns": t / 1e3 if name[0] == "F" else 7.0, "bytes": 4e3}
            for name in ("scan", "FlashAttention") for t in (2048, 16384, 131072)}  # fmt: skip
    result = {"card": {"gpu": {"name": "a GPU"}}, "rows": rows | {"machine": {"copy": 1.0}, "scan t=9": {"error": "x"}}}
    (tmp_path / "r.jsonl").write_text("{}\n" + json.dumps(result) + "\n")
    monkeypatch.setattr(plot_length, "RESULTS", tmp_path / "r.jsonl")
    monkeypatch.setattr(plot_length, "DOCS", tmp_path)
    assert plot_length.main() == 0
    first = (tmp_path / "gpu_length.svg").read_bytes()
    assert (tmp_path / "gpu_length.png").stat().st_size > 10_000
    plot_length.main()
    assert (tmp_path / "gpu_length.svg").read_bytes() == first
    monkeypatch.setattr(plot_length, "RESULTS", tmp_path / "none")
    assert plot_length.main() == 1


def test_llama_is_skipped_with_a_reason(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import common
    import cpu_llama

    monkeypatch.setattr(cpu_llama.importlib.util, "find_spec", lambda name: None)
    assert cpu_llama.peers(common.Report("cpu_llama"), ["fp32"], "nowhere") == {}
    assert "llama_cpp and gguf not installed (pip install llama-cpp-python gguf)" in capsys.readouterr().out
