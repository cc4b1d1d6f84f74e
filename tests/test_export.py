"""Exported graphs compute what the model computes: as torch programs, and in another runtime from an ONNX file."""

import re
import sys

import numpy as np
import pytest
import torch

from anymamba import AnymambaError, MambaConfig, MambaLM, MambaState, export, quantize
from anymamba.cli.generate import DEFAULT_MODEL
from anymamba.data import load_tokenizer
from anymamba.generate import SamplingConfig, generate
from conftest import run_python

SMALL = {"vocab_size": 61, "d_model": 24, "n_layer": 2, "d_state": 5, "d_conv": 3}


def small(**changes):
    torch.manual_seed(0)
    return MambaLM(MambaConfig(**SMALL | changes))


def calls(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def read(program, ids, *state):
    with torch.no_grad():
        logits, *state = program.module()(ids, *state)
    return logits, state


def assert_reads_like(model, programs, ids):
    """Graphs one after the other, each with the piece of `ids` that it takes, are the model on all of them."""
    v = model.config.vocab_size
    with torch.no_grad():
        want = model(ids)
    state = export.flatten(MambaState.zeros(model.config, len(ids), dtype=model.backbone.norm_f.weight.dtype))
    for program, piece in programs:
        logits, state = read(program, ids[:, piece], *state)
        assert logits.shape == (len(ids), piece.stop - piece.start, v)
        torch.testing.assert_close(logits, want.logits[:, piece, :v], rtol=1e-4, atol=1e-5)
    for got, expected in zip(state, export.flatten(want.state), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("changes", [{}, {"bias": True, "conv_bias": False, "tie_embeddings": False, "d_conv": 1}])
def test_chunk_then_steps_is_the_model(plain, changes):
    model = small(**changes)
    chunk, step = export.chunk(model, 7, 2, plain=plain), export.step(model, 2, plain=plain)
    ours = {name for name in calls(chunk) | calls(step) if name.startswith("anymamba.")}
    names = ("selective_scan", "causal_conv1d", "add_rms_norm")
    assert ours == (set() if plain else {f"anymamba.{name}.default" for name in names})
    programs = [(chunk, slice(0, 7)), (step, slice(7, 8)), (chunk, slice(8, 15))]
    assert_reads_like(model, programs, torch.randint(61, (2, 15)))
    assert model.training  # as it was


def test_quantised_models_have_a_graph_too():
    model = quantize(small())
    assert_reads_like(model, [(export.step(model, plain=True), slice(0, 1))], torch.randint(61, (1, 1)))


def test_a_plain_program_runs_where_there_is_no_anymamba(tmp_path):
    model, ids = small(), torch.tensor([[60]])
    torch.save((ids, *export.flatten(MambaState.zeros(model.config, 1))), tmp_path / "inputs.pt")
    torch.export.save(export.step(model, plain=True), tmp_path / "step.pt2")
    code = ("import sys, torch; sys.modules['anymamba'] = None\n"
            f"program = torch.export.load({str(tmp_path / 'step.pt2')!r}).module()\n"
            f"with torch.no_grad(): logits = program(*torch.load({str(tmp_path / 'inputs.pt')!r}))[0]\n"
            f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})")  # fmt: skip
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        want = model(ids).logits[..., :61]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), want, rtol=1e-4, atol=1e-5)


# ---- ONNX ----


@pytest.fixture(scope="module")
def runtime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def zeros(session):
    return {i.name: np.zeros(i.shape, {"tensor(float)": "float32", "tensor(int64)": "int64"}[i.type])
            for i in session.get_inputs()}  # fmt: skip


def run_onnx(session, feed, ids):
    """Logits of `ids` (1,t); the state in `feed` goes on."""
    out = dict(zip([o.name for o in session.get_outputs()], session.run(None, feed | {"ids": ids}), strict=True))
    logits = out.pop("logits")
    feed.update({name.removeprefix("next_"): v for name, v in out.items()})
    return logits


def test_the_command_and_64_greedy_tokens_in_another_runtime(runtime, command, tmp_path):
    """Of weights in bfloat16: the file computes in float32."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path / "model")
    small(vocab_size=257).bfloat16().save_pretrained(tmp_path / "model")
    path = tmp_path / "step.onnx"
    code, out, errors = command("export", tmp_path / "model", "-o", path)
    assert (code, errors) == (0, "")
    assert re.search(r"^in   ids \(1, 1\) int64, tokens of 'bytes', and the state:$", out, re.M)
    assert "conv_i (1, 48, 2), ssm_i (1, 48, 5) float32 for i = 0 … 1" in out
    assert "logits (1, 1, 257) float32, next_conv_i, next_ssm_i" in out
    model = MambaLM.from_pretrained(tmp_path / "model").float()
    prompt = tokenizer.encode("It was a dark night").tolist()
    greedy = SamplingConfig(temperature=0)
    want = generate(model, [prompt], max_new_tokens=64, sampling=greedy, logprobs=True)[0]

    session = runtime.InferenceSession(str(path))
    feed, said, logprobs, ids = zeros(session), [], [], list(prompt)
    for i in range(len(prompt) + 64):
        logits = run_onnx(session, feed, np.array([[ids[i]]], np.int64))[0, 0].astype("float64")
        if len(said) < 64 and i >= len(prompt) - 1:
            said.append(int(logits.argmax()))
            logprobs.append(float(logits.max() - np.log(np.exp(logits).sum())))
            ids.append(said[-1])
    assert said == want.ids
    assert len(set(said)) > 1
    assert logprobs == pytest.approx(want.logprobs, abs=1e-4)
    for i, layer in enumerate(want.state.layers):
        for kind, v in layer._asdict().items():
            torch.testing.assert_close(torch.from_numpy(feed[f"{kind}_{i}"]), v, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("apart", [False, True], ids=["one file", "weights apart"])
def test_onnx_of_chunks(runtime, tmp_path, monkeypatch, apart):
    if apart:
        monkeypatch.setattr(export, "_MOST_BYTES", 0)
    model, path = small(), tmp_path / "chunk.onnx"
    export.onnx(model, path, length=5, batch_size=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["chunk.onnx", "chunk.onnx.data"][: 1 + apart]
    session = runtime.InferenceSession(str(path))
    names = [f"{kind}_{i}" for i in range(2) for kind in ("conv", "ssm")]
    assert [i.name for i in session.get_inputs()] == ["ids", *names]
    assert [o.name for o in session.get_outputs()] == ["logits", *(f"next_{name}" for name in names)]
    ids, feed = torch.randint(61, (2, 10)), zeros(session)
    with torch.no_grad():
        want = model(ids)
    got = np.concatenate([run_onnx(session, feed, piece.numpy()) for piece in ids.split(5, 1)], 1)
    torch.testing.assert_close(torch.from_numpy(got), want.logits[..., :61], rtol=1e-4, atol=1e-5)
    for name, v in zip(names, export.flatten(want.state), strict=True):
        torch.testing.assert_close(torch.from_numpy(feed[name]), v, rtol=1e-4, atol=1e-5)
    assert next(model.parameters()).dtype == torch.float32


# ---- bad input ----


def test_refusals(tmp_path, monkeypatch):
    model = small()
    with pytest.raises(AnymambaError, match="length=0, but it must be a whole number of at least 1"):
        export.chunk(model, 0)
    with pytest.raises(AnymambaError, match=r"batch_size=1\.5, but it must be"):
        export.step(model, 1.5)
    with pytest.raises(AnymambaError, match="no vocabulary, and the graph is from token ids to logits"):
        export.step(small(vocab_size=None))
    with pytest.raises(AnymambaError, match="a quantised model does not go to ONNX: export the model that it was made"):
        export.onnx(quantize(small()), tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(AnymambaError, match=r"needs onnx and onnxscript .* pip install 'anymamba\[onnx\]'"):
        export.onnx(model, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses(command, tmp_path):
    for arguments, words in (
        ((DEFAULT_MODEL, "-o", tmp_path / "a.pb"), "give a name that ends with .onnx"),
        (("nowhere", "-o", tmp_path / "a.onnx"), "no config.json in nowhere"),
        ((DEFAULT_MODEL, "-o", tmp_path / "a.onnx", "--length", 0), "length=0, but it must be"),
    ):
        code, out, errors = command("export", *arguments)
        assert (code, out) == (2, "")
        assert words in " ".join(errors.split())
    (tmp_path / "b.onnx").write_text("")
    assert "--force to overwrite it" in command("export", DEFAULT_MODEL, "-o", tmp_path / "b.onnx")[2]
    assert [p.name for p in tmp_path.iterdir()] == ["b.onnx"]


def test_complex_numbers_do_not_go_to_onnx(runtime, tmp_path):
    with pytest.raises(AnymambaError, match="mixer='s4d' computes with complex numbers"):
        export.onnx(small(mixer="s4d", d_state=6), tmp_path / "model.onnx")
