"""Weights as integers: the packing, the kernel against what it stands for, a whole model against its original."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

import anymamba
from anymamba.cli.generate import DEFAULT_MODEL
from anymamba.config import MambaConfig
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.errors import AnymambaError
from anymamba.generate import SamplingConfig, generate
from anymamba.layers import MambaMixer, QuantizedLinear, quantize
from anymamba.model import MambaLM
from anymamba.ops import FEW_ROWS, quantized_linear
from anymamba.reference import dequantize_weight, quantize_weight
from conftest import assert_law

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of "
bits = pytest.mark.parametrize("bits", [8, 4])
kinds = pytest.mark.parametrize("kind", ["int8", "int4"])


def weight_of(outputs, inputs, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def tiny(**changes):
    torch.manual_seed(0)
    return MambaLM(MambaConfig(d_model=48, n_layer=2, vocab_size=61, **changes))


@pytest.fixture(scope="module")
def books():
    return MambaLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def quantized(books):
    return {kind: quantize(copy.deepcopy(books), kind) for kind in ("int8", "int4")}


# ---- packing ---------------------------------------------------------------------------------------------------


@bits
@pytest.mark.parametrize("inputs", [1, 16, 31, 32, 37, 64, 65, 200])
def test_round_trip_is_within_half_a_step(inputs, bits):
    weight, top = weight_of(5, inputs), 2 ** (bits - 1) - 1
    weight[3] = 0
    whole, scale = quantize_weight(weight, bits)
    back = dequantize_weight(whole, scale, inputs, torch.float32)
    group = inputs if bits == 8 else 64
    assert scale.shape == (5, -(-inputs // group))
    assert whole.dtype == (torch.int8 if bits == 8 else torch.uint8)
    for i in range(0, inputs, group):
        part = weight[:, i : i + group]
        step = part.abs().amax(1, keepdim=True) / (top + 1)
        assert torch.allclose(step, scale[:, i // group, None].abs())
        beyond = part / scale[:, i // group, None] > top  # only as far below as the largest is above 0, or the reverse
        assert ((back[:, i : i + group] - part).abs() <= torch.where(beyond, 1.0001, 0.5001) * step).all()
    assert (back[3] == 0).all()


@bits
@pytest.mark.parametrize("sign", [1, -1])
def test_what_fits_the_integers_comes_back_exactly(sign, bits):
    top = 2 ** (bits - 1) - 1
    weight = torch.arange(-top - 1, top + 1).repeat(8)[:128].float()[None] / 4 * sign
    weight[:, ::64] = (-top - 1) / 4 * sign  # every group holds its largest
    for dtype in (torch.float32, torch.float64):
        assert (dequantize_weight(*quantize_weight(weight, bits), 128, dtype) == weight.to(dtype)).all()


# ---- the kernel ------------------------------------------------------------------------------------------------


@bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (48, 3), (37, 130), (128, 65), (200, 64)])
def test_kernel_is_the_product_of_the_widened_weight(inputs, outputs, dtype, bits, launches, poison, two_threads):
    whole, scale = quantize_weight(weight_of(outputs, inputs), bits)
    bias = torch.randn(outputs).to(dtype)
    exact_weight = dequantize_weight(whole, scale, inputs, torch.float64)
    with torch.no_grad():
        for rows in range(1, 10):
            x = weight_of(rows, inputs, seed=rows).to(dtype)
            for b in (None, bias):
                got = quantized_linear(x[None], whole, scale, b)[0]
                plain = F.linear(x, exact_weight.to(dtype), b)
                assert_law(got, plain, F.linear(x.double(), exact_weight, None if b is None else b.double()))
    assert launches == ["quantized_rows"] * 18


@bits
def test_a_row_of_several_is_that_row_alone(bits):
    whole, scale = quantize_weight(weight_of(70, 100), bits)
    x = weight_of(7, 100, seed=1)
    with torch.no_grad():
        together = quantized_linear(x, whole, scale)
        assert all((quantized_linear(x[i : i + 1], whole, scale)[0] == together[i]).all() for i in range(7))


@bits
def test_many_rows_and_float64_take_the_widened_weight(bits, launches):
    whole, scale = quantize_weight(weight_of(70, 100), bits)
    with torch.no_grad():
        for x in (torch.randn(FEW_ROWS[whole.dtype].stop, 100), torch.randn(2, 100).double(), torch.randn(0, 100)):
            exact = F.linear(x.double(), dequantize_weight(whole, scale, 100, torch.float64))
            torch.testing.assert_close(quantized_linear(x, whole, scale), exact.to(x.dtype))
    assert launches == []


# ---- models ----------------------------------------------------------------------------------------------------


def test_what_is_quantised(books, quantized):
    for kind, model in quantized.items():
        found = {name: m.bits for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        big = 8 if kind == "int8" else 4
        assert len(found) == 4 * model.config.n_layer + 1
        assert all(n == (8 if name.endswith(("x_proj", "dt_proj")) else big) for name, n in found.items())
        assert not any(p.requires_grad for p in model.parameters())
        assert (model.backbone.embedding.weight == books.backbone.embedding.weight).all()
        assert model.num_params() == books.num_params()
        assert model.num_params(embedding=False) == books.num_params(embedding=False)
    parts = [m.bytes_per_step() for m in (books, quantized["int8"], quantized["int4"])]
    assert 0.25 < parts[1] / parts[0] < 0.35
    assert 0.14 < parts[2] / parts[0] < 0.25


def nats(model, ids):
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float()
    return F.cross_entropy(logits, ids[0, 1:])


@pytest.mark.parametrize(("kind", "loss", "agreement"), [("int8", 0.005, 0.97), ("int4", 0.05, 0.85)])
def test_predicts_what_the_original_predicts(books, quantized, kind, loss, agreement):
    ids = torch.tensor([ByteTokenizer().encode(TEXT * 4).tolist()])
    assert abs(nats(quantized[kind], ids) - nats(books, ids)) < loss
    with torch.no_grad():
        same = quantized[kind](ids).logits.argmax(-1) == books(ids).logits.argmax(-1)
    assert same.float().mean() > agreement


@kinds
def test_generates(books, quantized, kind, launches):
    """Greedily what the original does, most of the way: the first token that differs changes the rest."""
    tokenizer, options = ByteTokenizer(), {"sampling": SamplingConfig(temperature=0), "max_new_tokens": 24}
    prompts = [tokenizer.encode(TEXT[: 10 * i]).tolist() for i in range(5, 9)]
    want, got = ([c.ids for c in generate(model, prompts, **options)] for model in (books, quantized[kind]))
    assert launches.count("decode_step") == 2 * 24
    assert "quantized_rows" in launches  # after reading the prompts
    agree = [next((i for i, pair in enumerate(zip(a, b, strict=True)) if len(set(pair)) > 1), 24)
             for a, b in zip(want, got, strict=True)]  # fmt: skip
    assert sum(agree) >= (60 if kind == "int8" else 20), agree


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_sizes_and_steps_equal_reading_at_once(kind, dtype):
    model = quantize(tiny(bias=True, tie_embeddings=False).to(dtype), kind)
    ids = torch.randint(0, 61, (3, 40))
    with torch.no_grad():
        whole, state, steps = model(ids), None, []
        for i in range(40):
            out = model(ids[:, i : i + 1], state)
            state = out.state
            steps.append(out.logits)
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.05}
    torch.testing.assert_close(torch.cat(steps, 1), whole.logits, **tolerance)


def test_a_mixer_alone():
    config = MambaConfig(d_model=48, n_layer=1)
    mixer = MambaMixer(config)
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    u = torch.randn(2, 9, 48)
    want = mixer(u)[0].detach()
    torch.testing.assert_close(quantize(mixer)(u)[0], want, atol=0.05 * float(want.abs().max()), rtol=0)


def test_scales_stay_float32():
    model = quantize(tiny()).bfloat16()
    scale = model.lm_head.scale.clone()
    assert model.half().lm_head.scale.dtype == torch.float32
    assert (model.lm_head.scale == scale).all()
    assert model.lm_head.weight.dtype == torch.int8


def test_fingerprints_tell_the_kinds_apart(books, quantized):
    prints = {m.fingerprint() for m in (books, *quantized.values())}
    assert len(prints) == 3
    assert quantize(copy.deepcopy(books), "int8").fingerprint() in prints


def test_the_loss_of_a_quantised_head_is_its_own(quantized):
    model, ids = quantized["int4"], torch.randint(0, 256, (1, 30))
    with torch.no_grad():
        out = model(ids[:, :-1], labels=ids[:, 1:])
        want = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, want)


# ---- what cannot be done ---------------------------------------------------------------------------------------


def test_refusals(tmp_path):
    model = tiny()
    with pytest.raises(AnymambaError, match=r"kind='int3' does not exist: choose one of int8, int4"):
        quantize(model, "int3")
    with pytest.raises(AnymambaError, match=r"on meta, and its kernels run on a CPU: model\.cpu\(\) first"):
        quantize(copy.deepcopy(model).to("meta"))
    with pytest.raises(AnymambaError, match="has no anymamba Linear layers"):
        quantize(torch.nn.Linear(3, 3))
    assert anymamba.quantize(model) is model
    with pytest.raises(AnymambaError, match="quantised already: load it again"):
        quantize(model, "int4")
    with pytest.raises(AnymambaError, match="for inference only: train the model that it was made from"):
        model.train()
    with pytest.raises(AnymambaError, match=r"cannot be saved: .* quantise after loading"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(AnymambaError, match="no gradients go through quantised weights"):
        model(embeddings=torch.randn(1, 3, 48, requires_grad=True))
    with pytest.raises(AnymambaError, match=r"x is \(2, 47\), but this layer needs \(…, 48\)"):
        model.lm_head(torch.randn(2, 47))
    assert model.eval()(torch.tensor([[1, 2]])).logits.isfinite().all()


@kinds
def test_commands(kind, command, tmp_path):
    code, out, _ = command("generate", "--prompt", "It was a dark", "--greedy", "--max-new-tokens", 8,
                           "--quantize", kind)  # fmt: skip
    assert code == 0
    assert out.startswith("It was a dark")
    assert len(out) > len("It was a dark\n")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 2)
    losses = []
    for extra in ((), ("--quantize", kind)):
        code, out, _ = command("eval", DEFAULT_MODEL, text, "--json", *extra)
        assert code == 0
        losses.append(json.loads(out)["nats_per_token"])
    assert 0 < abs(losses[1] - losses[0]) < 0.1
    code, _, errors = command("eval", DEFAULT_MODEL, text, "--quantize", "int3")
    assert code == 2
    assert "int3" in errors
