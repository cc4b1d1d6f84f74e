"""What `anymamba.inspect` says of a model is what the model computes."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anymamba import AnymambaError, MambaConfig, MambaLM, SamplingConfig, SequenceModel, inspect
from anymamba import model as model_module
from anymamba.generate import Engine, PrefixCache, Request, generate
from anymamba.inspect import attention, parts
from anymamba.inspect.capture import SCAN
from anymamba.layers import quantize
from anymamba.reference import selective_scan

SMALL = {"vocab_size": 11, "d_model": 24, "n_layer": 3, "d_state": 5}


def make(seed=0, **changes):
    torch.manual_seed(seed)
    model = MambaLM(MambaConfig(**SMALL | changes))
    with torch.no_grad():  # as after training: layers that say something, step sizes that differ by token
        for block in model.backbone.layers:
            block.mixer.x_proj.weight.mul_(4)
        model.backbone.embedding.weight.mul_(40)
    return model


@pytest.fixture(scope="module")
def model():
    return make()


def text(b=1, t=37, seed=0, v=11):
    return torch.randint(0, v, (b, t), generator=torch.Generator().manual_seed(seed))


def relative(got, exact):
    return float((got - exact).detach().abs().max() / exact.detach().abs().max())


# ---- capture ----


@pytest.mark.parametrize("changes", [{}, {"inner_norm_eps": 1e-6}, {"bias": True, "conv_bias": False}])
def test_what_is_kept_is_what_the_scan_takes_and_gives(changes):
    model, ids = make(**changes), text(b=2)
    start = model(text(b=2, t=3, seed=5)).state
    trace = inspect.capture(model, ids, state=start, keep=parts.PARTS)
    with torch.no_grad():
        plain = model(ids, state=start)
    torch.testing.assert_close(trace.output.logits, plain.logits[:, -1:])
    for i, layer in trace.layers.items():
        got, final = selective_scan(layer.x, layer.dt, layer.A, layer.B, layer.C, layer.D, layer.z,
                                    initial_state=layer.state)  # fmt: skip
        assert relative(got, layer.y) < 1e-5
        assert relative(final, plain.state.layers[i].ssm) < 1e-5
        assert torch.equal(layer.state, start.layers[i].ssm)
        assert torch.equal(layer.out, model.backbone.layers[i].mixer.out_proj(layer.y).detach())
        block = model.backbone.layers[i]
        assert relative(block.norm(layer.residual)[0] @ block.mixer.in_proj.weight.T[:, :48], layer.conv_in) < 1e-5 or (
            "bias" in changes
        )


def test_only_what_is_asked_for_is_kept_and_no_hook_stays(model):
    trace = inspect.capture(model, text(), layers=[-1, 0], keep="dt")
    assert list(trace.layers) == [2, 0]
    for layer in trace.layers.values():
        kept = [part for part in parts.PARTS if getattr(layer, part) is not None]
        assert kept == ["dt"]
        assert layer.dt.untyped_storage().nbytes() == layer.dt.nbytes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(AnymambaError, match="recorded without B, C: add them to keep"):
        inspect.hidden_attention(layer)


def test_pieces_and_training_and_decoding_are_recorded(model, monkeypatch):
    ids = text(t=23)
    whole = inspect.capture(model, ids).layers[1]
    monkeypatch.setattr(model_module, "PIECE", 7)
    in_pieces = inspect.capture(model, ids).layers[1]
    with inspect.recording(model, 1) as training:
        model(ids, labels=ids).loss.backward()
    with torch.no_grad(), inspect.recording(model, 1) as decoding:
        state = None
        for i in range(23):
            state = model(ids[:, i : i + 1], state=state).state
    for part in SCAN:
        for other in (in_pieces, training.layer(1), decoding.layer(1)):
            torch.testing.assert_close(getattr(other, part), getattr(whole, part), rtol=1e-4, atol=1e-5)


def test_quantised_and_16_bit_models_are_recorded():
    integers = make()
    quantize(integers, "int8")
    for model in (integers, make().bfloat16()):
        layer = inspect.capture(model, text()).layers[0]
        got = selective_scan(layer.x, layer.dt, layer.A, layer.B, layer.C, layer.D, layer.z)[0]
        assert layer.dt.dtype == torch.float32
        assert relative(got.float(), layer.y.float()) < (1e-5 if layer.y.dtype == torch.float32 else 2e-2)


def test_bad_requests(model):
    for call, message in {
        lambda: inspect.capture(model, text(), layers=[3]): r"layers are \[3\], but the model has layers 0 … 2",
        lambda: inspect.capture(model, text(), keep=["dt", "h"]): r"keep=\['dt', 'h'\], but parts are residual, ",
        lambda: _run_packed(model): "rows of several lengths",
        lambda: _empty(model): "nothing is recorded of layer 0",
    }.items():
        with pytest.raises(AnymambaError, match=message):
            call()


def _run_packed(model):
    with inspect.recording(model):
        model(text(b=2), lengths=torch.tensor([3, 9]))


def _empty(model):
    with inspect.recording(model) as seen:
        seen.layer(0)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"mixer": "gru"}, "mixer='gru'"), ({"mixer": "s4d", "d_state": 6}, "mixer='s4d'"),
     ({"discretization": "bilinear"}, "discretization='bilinear'")],
)  # fmt: skip
def test_a_model_that_computes_something_else_is_refused(changes, what):
    other = MambaLM(MambaConfig(**{"vocab_size": 11, "d_model": 24, "n_layer": 1} | changes))
    for call in (lambda: inspect.capture(other, text()), lambda: _patched(other, "y", abs)):
        with pytest.raises(AnymambaError, match=f"layer 0 is of {what}, .* can be looked into. recall, edit_state"):
            call()


# ---- other models ----

VARIANTS = [
    {"gate": False}, {"use_conv": False}, {"selective": "dt"}, {"selective": "B,C"}, {"selective": "C,dt"},
    {"selective": "", "use_conv": False}, {"discretization": "zoh"}, {"discretization": "zoh", "selective": "C"},
]  # fmt: skip


def make_variant(changes):
    """A trained-looking model of any part left out."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(**{"vocab_size": 11, "d_model": 24, "n_layer": 2, "d_state": 5} | changes))
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(40)
        for block in model.backbone.layers:
            for name, value in block.mixer.named_parameters():
                if name in ("x_proj.weight", "B", "C"):
                    value.mul_(3).add_(0.1 * torch.randn_like(value))
                if name in ("dt_bias", "dt_proj.bias"):
                    value.add_(2)  # steps so long that the rules of discretization differ
    return model


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_ablations_are_seen_as_they_compute(changes):
    model, ids = make_variant(changes), text(b=2, t=23)
    start = model(text(b=2, t=4, seed=5)).state
    trace = inspect.capture(model, ids, state=start)
    gate, rule = model.config.gate, model.config.discretization
    inputs = [block.mixer for block in model.backbone.layers]
    for i, layer in trace.layers.items():
        assert (layer.z is None) == (not gate)
        if layer.x is None:  # selective="": nothing reads x but the scan
            assert changes["selective"] == ""
            with inspect.recording(model, i, keep="conv_in") as seen:
                model(ids, state=start)
            layer = dataclasses.replace(layer, x=F.silu(seen.layer(i).conv_in))
        constant = [name for name in ("B", "C") if name not in model.config.selective]
        for name in ("B", "C"):
            v = getattr(layer, name)
            assert v.shape == ((2, 23, 48, 5) if name in constant else (2, 23, 5))
            assert v.untyped_storage().nbytes() == 4 * 5 * (48 if name in constant else 2 * 23)  # not of every token
        B, C = (getattr(inputs[i], name) if name in constant else getattr(layer, name) for name in ("B", "C"))
        y, final = selective_scan(layer.x, layer.dt, layer.A, B, C, layer.D, layer.z, initial_state=layer.state,
                                  discretization=rule)  # fmt: skip
        assert relative(y, layer.y) < 1e-5
        M = inspect.hidden_attention(layer, range(48), row=1, skip=True)
        got = torch.einsum("dij,jd->id", M, layer.x[1]) + inspect.carried(layer, row=1)
        assert relative(got * (F.silu(layer.z[1]) if gate else 1), layer.y[1]) < 2e-5
        h = layer.state
        for j in range(23):
            one = slice(j, j + 1)
            h = inspect.forget_factor(layer, one)[:, 0] * h + inspect.write(layer, one)[:, 0]
        assert relative(h, final) < 1e-5
        torch.testing.assert_close(inspect.write_strength(layer), inspect.write(layer).norm(dim=-1))
        blocks = inspect.attention_blocks(layer, 23, [0, 47], row=1)
        torch.testing.assert_close(blocks, inspect.hidden_attention(layer, [0, 47], row=1))
        few = inspect.attention_blocks(layer, 5, row=1)
        torch.testing.assert_close(few[1, 0], inspect.hidden_attention(layer, row=1)[5:10, :5].mean())
        torch.testing.assert_close(few, inspect.attention_blocks(layer, 5, range(48), row=1).mean(0))


def test_what_a_model_does_not_have_is_named():
    ungated, fixed = make_variant({"gate": False}), make_variant({"selective": ""})
    for call, message in {
        lambda: inspect.capture(ungated, text(), keep="z"): "part 'z': a model with gate=False has no z",
        lambda: _patched(ungated, "z", abs): "gate=False has no z",
        lambda: inspect.hidden_attention(inspect.capture(ungated, text()).layers[0], gate=True): "recorded without z",
        lambda: inspect.capture(fixed, text(), keep=["x"]): "part 'x': nothing is computed from x with selective=''",
        lambda: _patched(fixed, "dt", abs): "part 'dt' does not depend on the input here",
    }.items():
        with pytest.raises(AnymambaError, match=message):
            call()


def test_parts_of_ablations_are_patched():
    model, ids = make_variant({"gate": False, "use_conv": False, "selective": "C,dt"}), text()
    for part in ("conv_in", "dt", "C", "y", "state"):
        theirs = getattr(inspect.capture(model, text(seed=7), keep=[part]).layers[1], part)
        theirs = theirs + 1 if part == "state" else theirs
        with inspect.patch(model, 1, part, theirs):
            seen = inspect.capture(model, ids, layers=1, keep=[part]).layers[1]
            patched = model(ids).logits
        assert not torch.allclose(model(ids).logits, patched, atol=1e-4)
        torch.testing.assert_close(getattr(seen, part), theirs, rtol=1e-4, atol=1e-5)


# ---- hidden attention ----


@pytest.mark.parametrize("t", [1, 2, 37, 300])
def test_hidden_attention_times_the_input_is_the_layers_output(model, t):
    ids = text(b=2, t=t)
    for i, layer in inspect.capture(model, ids).layers.items():
        M = inspect.hidden_attention(layer, range(48), row=1, skip=True, gate=True)
        assert relative(torch.einsum("dij,jd->id", M, layer.x[1]), layer.y[1]) < 1e-5, i
        assert not M.triu(1).any()


def test_with_a_state_from_before_the_rest_is_what_it_carries_on(model):
    start = model(text(t=50, seed=3)).state
    layer = inspect.capture(model, text(), state=start).layers[1]
    M = inspect.hidden_attention(layer, range(48), skip=True)
    y = torch.einsum("dij,jd->id", M, layer.x[0])
    assert relative(y * F.silu(layer.z[0]), layer.y[0]) > 0.01
    assert relative((y + inspect.carried(layer)) * F.silu(layer.z[0]), layer.y[0]) < 1e-5


def test_rows_channels_and_mean_are_parts_of_the_whole(model, monkeypatch):
    layer = inspect.capture(model, text()).layers[2]
    M = inspect.hidden_attention(layer, range(48))
    assert torch.equal(inspect.hidden_attention(layer, 7), M[7])
    torch.testing.assert_close(inspect.hidden_attention(layer), M.mean(0))
    monkeypatch.setattr("anymamba.inspect.attention.ELEMENTS", 100)  # several rows and channels at a time no more
    torch.testing.assert_close(inspect.hidden_attention(layer, [9, 3], tokens=slice(30, 35)), M[[9, 3], 30:35])
    torch.testing.assert_close(inspect.hidden_attention(layer, tokens=slice(-4, None)), M.mean(0)[-4:])
    with pytest.raises(AnymambaError, match=r"channels are \[48\], but the layer has channels 0 … 47"):
        inspect.hidden_attention(layer, 48)
    with pytest.raises(AnymambaError, match="row 1 of a batch of 1"):
        inspect.hidden_attention(layer, row=1)


@pytest.mark.parametrize("size", [1, 5, 10, 37, 100])
def test_blocks_are_means_of_the_whole(model, size):
    layer = inspect.capture(model, text()).layers[1]
    M, t, c = inspect.hidden_attention(layer, range(48)), 37, -(-37 // size)
    got = inspect.attention_blocks(layer, size, [4, 20])
    p = -(-t // c)
    assert got.shape == (2, p, p)
    assert p <= size
    causal = torch.ones(t, t).tril()
    for i in range(p):
        for j in range(p):
            block = (slice(i * c, (i + 1) * c), slice(j * c, (j + 1) * c))
            pairs = causal[block].sum().clamp(min=1)
            want = M[[4, 20]][(slice(None), *block)].sum((1, 2)) / pairs
            torch.testing.assert_close(got[:, i, j], want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(inspect.attention_blocks(layer, size),
                               inspect.attention_blocks(layer, size, range(48)).mean(0))  # fmt: skip


def test_a_row_of_a_long_text_takes_little_memory(model):
    """20,000 tokens: the whole matrix of one channel would be 1.6 GB."""
    layer = inspect.capture(model, text(t=20_000), layers=0, keep=["dt", "B", "C", "x", "y", "z"]).layers[0]
    M = inspect.hidden_attention(layer, 5, tokens=slice(19_990, None), skip=True, gate=True)
    assert relative(M @ layer.x[0, :, 5], layer.y[0, 19_990:, 5]) < 1e-4
    assert inspect.attention_blocks(layer, 50).shape == (50, 50)


# ---- memory ----


def test_forgetting_and_writing_make_the_states(model):
    trace = inspect.capture(model, text(t=9), return_states=1)
    layer, states = trace.layers[1], trace.output.states.layers[1].ssm[0]
    h = torch.zeros_like(states[0])
    for i in range(9):
        one = slice(i, i + 1)
        h = inspect.forget_factor(layer, one)[0, 0] * h + inspect.write(layer, one)[0, 0]
        torch.testing.assert_close(h, states[i], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(inspect.write_strength(layer), inspect.write(layer).norm(dim=-1))


def test_horizons(model):
    layer = inspect.capture(model, text(t=400)).layers[0]
    exact = inspect.horizon_of(layer, 20)
    shares = inspect.forget_factor(layer, slice(21, None))[0].cumprod(0)  # after 1, 2, … tokens
    under = shares < 1 / torch.e
    want = torch.where(under.any(0), under.float().argmax(0) + 1.0, torch.inf)
    assert (exact == want).float().mean() > 0.999  # apart from rounding at exactly 1/e
    even = inspect.LayerTrace(0, layer.A, layer.D, dt=torch.full_like(layer.dt, 0.05))
    h = inspect.horizon(even)
    fits = h < 370
    assert (inspect.horizon_of(even, 20)[fits] - h[fits]).abs().max() <= 1.001
    assert inspect.horizon_of(even, 399).isinf().all()
    with pytest.raises(AnymambaError, match="token 400, but the text has tokens 0 … 399"):
        inspect.horizon_of(layer, 400)


# ---- saliency ----


def test_ablation_is_the_text_without_the_token(model):
    ids, start = text(t=13)[0], model(text(t=4, seed=9)).state
    whole = model(ids[None], state=start).logits[0, -1, :11].log_softmax(-1)
    target = int(whole.argmax())
    got = inspect.ablation_saliency(model, ids, state=start, batch_size=5)
    for i in range(13):
        without = torch.cat([ids[:i], ids[i + 1 :]])
        want = whole[target] - model(without[None], state=start).logits[0, -1, :11].log_softmax(-1)[target]
        assert abs(float(got[i] - want)) < 1e-4
    some = inspect.ablation_saliency(model, ids.tolist(), target, tokens=[12, 3], state=start, batch_size=1)
    torch.testing.assert_close(some, got[[12, 3]], rtol=1e-3, atol=1e-4)


def test_gradient_times_input_is_the_derivative_by_the_tokens_scale(model):
    model, ids = make().double(), text(t=9)[0]
    got = inspect.gradient_saliency(model, ids, 4)
    x, step = model.backbone.embedding(ids[None]).detach(), 1e-5
    for i in range(9):
        scores = []
        for s in (1 + step, 1 - step):
            scaled = x.clone()
            scaled[:, i] *= s
            scores.append(model(embeddings=scaled).logits[0, -1, :11].log_softmax(-1)[4])
        assert abs(float(got[i] - (scores[0] - scores[1]) / (2 * step))) < 1e-4
    assert model.backbone.embedding.weight.grad is None


def test_saliency_refuses(model):
    for call, message in {
        lambda: inspect.gradient_saliency(model, text()): r"ids are \(1, 37\) torch.int64, but must be \(t,\)",
        lambda: inspect.ablation_saliency(model, [3]): r"must be \(t,\) with t ≥ 2",
        lambda: inspect.gradient_saliency(model, [3, 4], 11): "target 11 is outside the vocabulary of 11",
        lambda: inspect.ablation_saliency(model, [3, 4], tokens=[2]): r"tokens \[2\], but the text has tokens 0 … 1",
    }.items():
        with pytest.raises(AnymambaError, match=message):
            call()


# ---- needles ----


def test_a_probe_finds_what_the_state_holds_and_no_more():
    model = make(vocab_size=4, n_layer=2)
    ids = text(b=600, t=40, v=4)
    keeps = inspect.recall(model, ids, [0, 1, 35], layers=[0, 1])
    assert keeps.layers == (0, 1)
    assert keeps.accuracy[0, :2].min() > 0.8
    assert (keeps.chance - 0.25).abs().max() < 0.1
    with torch.no_grad():
        for block in model.backbone.layers:  # steps so large that nothing lasts
            block.mixer.dt_proj.bias.fill_(30.0)
    forgets = inspect.recall(model, ids, [0, 35])
    assert forgets.accuracy[0, 0] > 0.8
    assert (forgets.accuracy[:, 1] - 0.25).abs().max() < 0.12
    with pytest.raises(AnymambaError, match="texts of 40 tokens have lags 0 … 39"):
        inspect.recall(model, ids, [40])
    with pytest.raises(AnymambaError, match="need rows"):
        inspect.recall(model, ids[:1], [1])


@pytest.mark.parametrize("mixer", ["s4d", "rnn", "lstm", "gru"])
def test_every_kind_of_state_is_probed_edited_and_mixed(mixer):
    torch.manual_seed(0)
    other = MambaLM(MambaConfig(vocab_size=4, d_model=24, n_layer=2, mixer=mixer))
    ids = text(b=300, t=20, v=4)
    found = inspect.recall(other, ids, 0)
    assert found.accuracy.shape == (2, 1)
    assert found.accuracy[0, 0] > 0.8
    a, b = (other(ids[i : i + 1]).state for i in (0, 1))
    swapped = inspect.edit_state(a, lambda h: b.layers[1].ssm, layers=1)
    assert torch.equal(swapped.layers[1].ssm, inspect.mix_states(a, b, 1).layers[1].ssm)
    assert inspect.gradient_saliency(other, ids[0]).isfinite().all()
    ablated = inspect.ablation_saliency(other, ids[0], 2, tokens=3)
    without = torch.cat([ids[0, :3], ids[0, 4:]])
    want = [other(v[None]).logits[0, -1, :4].log_softmax(-1)[2] for v in (ids[0], without)]
    torch.testing.assert_close(ablated[0], want[0] - want[1], rtol=1e-3, atol=1e-4)


# ---- surgery ----


@pytest.mark.parametrize("part", ["residual", "conv_in", "dt", "B", "C", "z", "y", "out", "state"])
def test_a_patch_puts_one_runs_part_into_another(model, part):
    start = model(text(t=4, seed=1)).state
    theirs = getattr(inspect.capture(model, text(seed=7), keep=parts.PARTS, state=start).layers[1], part)
    plain = model(text()).logits
    with inspect.patch(model, 1, part, theirs):
        seen = inspect.capture(model, text(), layers=1, keep=[part]).layers[1]
        patched = model(text()).logits
    torch.testing.assert_close(getattr(seen, part), theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(patched, plain, atol=1e-3)
    assert torch.equal(model(text()).logits, plain)
    mine = getattr(inspect.capture(model, text(), keep=[part]).layers[1], part)
    with inspect.patch(model, 1, part, mine):  # its own part changes nothing
        torch.testing.assert_close(model(text()).logits, plain, rtol=1e-4, atol=1e-4)


def test_a_patched_residual_is_the_other_run_from_there_on(model):
    other = text(seed=7)
    theirs = inspect.capture(model, other, layers=0, keep=["residual"]).layers[0].residual
    with inspect.patch(model, 0, "residual", theirs):
        torch.testing.assert_close(model(text()).logits, model(other).logits)


def test_a_patch_of_some_tokens_in_pieces_too(model, monkeypatch):
    ids = text(t=23)
    with inspect.patch(model, [0, 2], "out", lambda v: 0 * v, tokens=slice(5, 16)):
        whole = inspect.capture(model, ids, keep=["out"])
    monkeypatch.setattr(model_module, "PIECE", 7)
    with inspect.patch(model, [0, 2], "out", torch.zeros(1, 11, 24), tokens=slice(5, 16)):
        pieces = inspect.capture(model, ids, keep=["out"])
    for i, layer in whole.layers.items():
        zero = (layer.out[0] == 0).all(-1).nonzero().flatten().tolist()
        assert zero == (list(range(5, 16)) if i != 1 else [])
        torch.testing.assert_close(pieces.layers[i].out, layer.out, rtol=1e-4, atol=1e-5)


def test_dt_of_any_size_from_zero_on_can_be_put_in(model):
    start, ids = model(text(t=4, seed=1)).state, text()
    dt = inspect.capture(model, ids, layers=1, keep="dt").layers[1].dt.clone()
    dt[:, 5:20] = 0
    dt[:, 20] = 1e-30
    dt[:, 21] = 200
    with inspect.patch(model, 1, "dt", dt):
        trace = inspect.capture(model, ids, state=start, return_states=1)
    assert torch.equal(trace.layers[1].dt == 0, dt == 0)
    torch.testing.assert_close(trace.layers[1].dt, dt, rtol=1e-4, atol=0)
    before, *passed = trace.output.states.layers[1].ssm[0, 4:20]
    assert all(torch.equal(h, before) for h in passed)  # not a bit changes
    scale = torch.ones(1, 37, 1, requires_grad=True)
    mask = (torch.arange(37) % 3 > 0)[None, :, None]
    with inspect.patch(model, 1, "dt", lambda v: v * mask * scale):
        loss = model(ids, labels=ids).loss
        (slope,) = torch.autograd.grad(loss, scale)
        model(ids, labels=ids).loss.backward()
    assert ((slope != 0) == mask).all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf")])
def test_dt_that_cannot_be_is_refused_with_its_value(model, bad):
    def edit(v):
        v = v.clone()
        v[0, 3, 2] = bad
        return v

    with pytest.raises(AnymambaError, match=f"dt holds {bad}, but step sizes are finite and at least 0"):
        _patched(model, "dt", edit)


def test_a_refused_call_leaves_a_patch_as_it_was(model):
    """The count of where in the text a call is must not be off afterwards."""
    zeros = torch.zeros(1, 37, 24)
    with inspect.patch(model, 1, "out", zeros):
        for bad in ({"lengths": torch.tensor([5])}, {"ids": None}, {"ids": [3]}, {"state": 3}):
            with pytest.raises((AnymambaError, AttributeError)):
                model(**{"ids": text()} | bad)
        assert not inspect.capture(model, text(), keep="out").layers[1].out.any()


def test_a_generated_text_is_recorded_as_one(model):
    prompt = text(t=23)[0].tolist()
    options = {"max_new_tokens": 7, "sampling": SamplingConfig(temperature=0)}
    for more in ({}, {"prefill_chunk": 10}, {"cache": PrefixCache(model, every=5)}):
        with inspect.recording(model, keep=parts.PARTS) as seen:
            (completion,) = generate(model, [prompt], **options, **more)
        whole = inspect.capture(model, [prompt + completion.ids], keep=parts.PARTS)
        for i, layer in whole.layers.items():
            for part in parts.PARTS:  # generate has read its last token, too
                torch.testing.assert_close(getattr(seen.layer(i), part), getattr(layer, part), rtol=1e-4, atol=1e-4)
    with inspect.recording(model, -1) as seen:
        generate(model, [prompt, prompt[::-1]], max_new_tokens=3)
    assert seen.layer(-1).dt.shape == (2, 26, 48)
    with inspect.recording(model) as seen:
        with pytest.raises(AnymambaError, match="rows of several lengths"):
            generate(model, [prompt, prompt[:5]], max_new_tokens=3)
        model(text(b=2))
        model(text(b=1))
        with pytest.raises(AnymambaError, match="calls of 2 and of 1 rows do not join in time"):
            seen.layer(0)
    with inspect.recording(model) as seen:
        model(text())
        model(text(seed=1))
    with pytest.raises(AnymambaError, match=r"run on a second text.*record each apart"):
        seen.layer(0)


def test_a_text_of_an_engine_is_recorded(model):
    prompt = text(t=23)[0].tolist()
    with inspect.recording(model, 1) as seen:
        (completion,) = Engine(model).submit(Request(prompt=prompt, max_new_tokens=4)).result()
    got = seen.layer(1).dt
    want = inspect.capture(model, [prompt + completion.ids]).layers[1].dt
    assert got.shape[1] >= 26
    torch.testing.assert_close(got, want[:, : got.shape[1]], rtol=1e-4, atol=1e-4)


def test_saliency_in_inference_mode_and_for_a_target_of_torchs(model):
    ids = text()[0]
    want = inspect.gradient_saliency(model, ids, 5)
    with torch.inference_mode():
        got = inspect.gradient_saliency(model, ids + 0, torch.tensor(5))
    torch.testing.assert_close(got, want)


def test_zero_order_hold_takes_a_few_channels_at_a_time(monkeypatch):
    layer = inspect.capture(make(discretization="zoh"), text()).layers[0]
    M, blocks = inspect.hidden_attention(layer), inspect.attention_blocks(layer, 5)
    monkeypatch.setattr("anymamba.inspect.attention.ELEMENTS", 37 * 5 * 3)  # three channels
    seen, real = [], attention.taken_in
    monkeypatch.setattr(attention, "taken_in", lambda *v, **k: seen.append(len(k["channels"])) or real(*v, **k))
    torch.testing.assert_close(inspect.attention_blocks(layer, 5), blocks)
    assert max(seen) == 3
    torch.testing.assert_close(inspect.hidden_attention(layer), M)


def test_every_call_of_generate_begins_a_patch_anew(model):
    prompt, calls = text()[0].tolist(), []

    def note(v):
        calls.append(v.shape[1])
        return v

    with inspect.patch(model, 0, "y", note, tokens=slice(0, 1)):
        generate(model, [prompt], max_new_tokens=3, prefill_chunk=30)
    assert calls == [1] * 5  # of 30 and 7 tokens of the prompt, and 3 times one


def test_patches_and_edits_reach_generation(model):
    options = {"max_new_tokens": 6, "sampling": SamplingConfig(temperature=0)}
    prompt = text()[0].tolist()
    plain = generate(model, [prompt], **options)[0].ids
    with inspect.patch(model, 2, "residual", lambda v: v.roll(3, -1)):
        changed = generate(model, [prompt], **options)[0].ids
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1, :11].argmax()))
    assert changed == ids[-6:]
    assert changed != plain
    assert generate(model, [prompt], **options)[0].ids == plain


def test_states_are_edited_and_mixed(model):
    a, b = (model(text(seed=s)).state for s in (1, 2))
    cleared = inspect.edit_state(a, torch.zeros_like, layers=[-1])
    assert not cleared.layers[2].ssm.any()
    assert a.layers[2].ssm.any()
    assert cleared.layers[0].ssm is a.layers[0].ssm
    mixed = inspect.mix_states(a, b, 0.25, layers=1)
    torch.testing.assert_close(mixed.layers[1].ssm, 0.75 * a.layers[1].ssm + 0.25 * b.layers[1].ssm)
    assert torch.equal(mixed.layers[0].conv, a.layers[0].conv)
    ends = [inspect.mix_states(a, b, w) for w in (0.0, 1.0)]
    assert torch.equal(model(text(), state=ends[1]).logits, model(text(), state=b).logits)
    assert torch.equal(model(text(), state=ends[0]).logits, model(text(), state=a).logits)


def test_surgery_refuses(model):
    a = model(text()).state
    zeros = torch.zeros(1, 5, 24)
    for call, message in {
        lambda: _patched(model, "x", zeros): "'x' cannot be replaced",
        lambda: _patched(model, "out", zeros): r"\(1, 5, 24\) for 37 tokens of out",
        lambda: _patched(model, "out", zeros, tokens=slice(35, 40)): "tokens 35 … 39 of out, but the text has 37",
        lambda: _patched(model, "out", zeros[..., :3], tokens=slice(0, 5)): r"\(1, 5, 3\) in place of out, which is",
        lambda: _patched(model, "out", zeros, tokens=slice(-5, None)): "a slice from the front",
        lambda: _patched(model, "y", zeros, lengths=torch.tensor([5])): "with lengths or cu_seqlens",
        lambda: _patched(make(inner_norm_eps=1e-6), "B", zeros): "B of layer 0 is normed",
        lambda: inspect.edit_state(a, lambda h: h[:, :1]): r"\(1, 1, 5\) for a state of \(1, 48, 5\)",
        lambda: inspect.edit_state(a, abs, layers=3): "the state has layers 0 … 2",
        lambda: inspect.mix_states(a, a.fork(2), 0.5): "1 and 2 rows",
    }.items():
        with pytest.raises(AnymambaError, match=message):
            call()


def _patched(model, part, value, tokens=None, **options):
    with inspect.patch(model, 0, part, value, tokens=tokens):
        model(text(), **options)


def test_gaps_in_time_are_neither_recorded_nor_patched(model):
    gaps = torch.full((1, 37), 2.0)
    with inspect.recording(model), pytest.raises(AnymambaError, match=r"gaps in time \(delta\)"):
        model(text(), delta=gaps)
    with pytest.raises(AnymambaError, match=r"dt with gaps in time \(delta\), which would multiply it"):
        _patched(model, "dt", abs, delta=gaps)
    with inspect.patch(model, 0, "C", lambda v: 0 * v), torch.no_grad():  # what gaps do not change
        assert not torch.allclose(model(text(), delta=gaps).logits, model(text()).logits)


def test_blocks_that_run_twice_are_refused(model):
    model.recompute = True
    try:
        with inspect.recording(model), pytest.raises(AnymambaError, match=r"model\.recompute = False"):
            model(text())
        with pytest.raises(AnymambaError, match=r"model\.recompute = False"):
            _patched(model, "y", abs)
        assert inspect.capture(model, text()).layers  # without gradients they do not
    finally:
        model.recompute = False


# ---- models of measurements ----


def make_sequence(**options):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=None, d_model=16, n_layer=2)
    return SequenceModel(config, inputs=3, outputs=4, **options)


def test_a_sequence_model_is_seen_and_patched():
    model, x = make_sequence(pool=None, patch=2), torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    trace = inspect.capture(model, x)
    torch.testing.assert_close(trace.output.y, model(x).y)
    assert trace.layers[1].dt.shape == (2, 15, 32)
    within = inspect.capture(model.mamba, model.patches(x, None))
    torch.testing.assert_close(within.layers[1].y, trace.layers[1].y)
    later = inspect.capture(model, x[:, 20:], state=model(x[:, :20]).state)
    torch.testing.assert_close(later.layers[1].y, trace.layers[1].y[:, 10:], rtol=1e-4, atol=1e-5)
    with inspect.patch(model, 1, "out", torch.zeros(1, 3, 16), tokens=slice(4, 7)):
        seen = inspect.capture(model, x, keep="out").layers[1]
    assert (seen.out == 0).all(-1)[0].nonzero().flatten().tolist() == [4, 5, 6]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    both = make_sequence(bidirectional=True)
    for call, message in {
        lambda: inspect.capture(both, x): "layer 0 is Bidirectional and hears both directions",
        lambda: inspect.capture(model, x.tolist()): "a list for a model that reads features",
        lambda: inspect.capture(model.mamba, x.long()): "a torch.int64 for a model that reads features",
        lambda: inspect.capture(model, x, return_states=3): "return_states is for a MambaLM",
        lambda: inspect.capture(model, x[..., :2]): r"must be real numbers \(batch ≥ 1, seqlen ≥ 1, 3\)",
        lambda: inspect.recall(model, text(b=9), 1): "recall: this model has no vocabulary",
    }.items():
        with pytest.raises(AnymambaError, match=message):
            call()


# ---- what people pass ----


@pytest.fixture(scope="module")
def layer(model):
    return inspect.capture(model, text(b=2)).layers[1]


TRACE_CALLS = {
    "hidden_attention": inspect.hidden_attention, "carried": inspect.carried, "horizon": inspect.horizon,
    "attention_blocks": lambda trace, **options: inspect.attention_blocks(trace, 5, **options),
    "horizon_of": lambda trace, **options: inspect.horizon_of(trace, 3, **options),
    "forget_factor": inspect.forget_factor, "write": inspect.write, "write_strength": inspect.write_strength,
}  # fmt: skip


@pytest.mark.parametrize("name", TRACE_CALLS)
def test_functions_of_a_trace_refuse(model, layer, name):
    call = TRACE_CALLS[name]
    with pytest.raises(AnymambaError, match=r"a Trace, but must be a LayerTrace: .* trace.layers\[0\]"):
        call(inspect.capture(model, text()))
    for other in (None, layer.dt, {}):
        with pytest.raises(AnymambaError, match=f"a {type(other).__name__}, but must be a LayerTrace"):
            call(other)
    with pytest.raises(AnymambaError, match="recorded without"):
        call(dataclasses.replace(layer, dt=None))
    if name in ("hidden_attention", "carried", "horizon", "attention_blocks", "horizon_of"):
        for row in (2, -3, 1.0, "0", None, True):
            with pytest.raises(AnymambaError, match=f"row {row!r} of a batch of 2: rows are 0 … 1"):
                call(layer, row=row)
        call(layer, row=-1)
    if name in ("hidden_attention", "carried", "forget_factor", "write"):
        for tokens in (3, [1, 2], slice(0.0, 3), slice(None, None, -1), torch.tensor([1])):
            with pytest.raises(AnymambaError, match=r"must be a slice that goes forwards: slice\(3, 4\) is token 3"):
                call(layer, tokens=tokens)
    if name in ("hidden_attention", "attention_blocks"):
        for channels in ([], [48], [-49], 1.0, [0.5], "a", True, [[1]]):
            with pytest.raises(AnymambaError, match=r"channels are .*, but the layer has channels 0 … 47"):
                call(layer, channels=channels)
        some = call(layer, channels=[47, 0])
        for channels in (torch.tensor([-1, 0]), np.array([47, 0]), (47, -48)):
            assert torch.equal(call(layer, channels=channels), some)


def test_bad_arguments_of_every_kind(model, layer):
    ids, a = text(b=8), model(text()).state
    for call, message in {
        lambda: inspect.capture(torch.nn.Linear(2, 2), ids): "a Linear cannot be looked into: give a MambaLM",
        lambda: inspect.capture(None, ids): "a NoneType cannot be looked into",
        lambda: inspect.capture(model, ids, layers=1.5): r"layers are \[1.5\], but the model has layers 0 … 2",
        lambda: inspect.capture(model, ids, layers=[]): r"layers are \[\], but",
        lambda: inspect.capture(model, ids, layers="0"): r"layers are \['0'\], but",
        lambda: inspect.capture(model, ids, keep=5): r"keep=\[5\], but parts are",
        lambda: inspect.capture(model, ids, keep=[]): r"keep=\[\], but parts are",
        lambda: inspect.capture(model, ids, state=a.layers): "capture: the state is a tuple, but must be a MambaState",
        lambda: inspect.capture(model, ids[0]): r"ids are \(37,\) torch.int64",
        lambda: inspect.capture(model, "text"): "a str that makes no tensor",
        lambda: inspect.capture(model, ids.float()): "must be integers",
        lambda: inspect.attention_blocks(layer, 0): "size=0, but it must be a whole number of at least 1",
        lambda: inspect.attention_blocks(layer, 2.0): "size=2.0, but",
        lambda: inspect.horizon_of(layer, 1.0): "token 1.0, but the text has tokens 0 … 36",
        lambda: inspect.horizon_of(layer, -1): "token -1, but",
        lambda: inspect.gradient_saliency(
            model, [0.5, 1]
        ): r"ids are \(2,\) torch.float64, but must be \(t,\) of whole",
        lambda: inspect.gradient_saliency(model, "text"): "saliency: ids: a str that makes no tensor",
        lambda: inspect.gradient_saliency(model, [3, 11111]): "saliency: id 11111 is outside the vocabulary",
        lambda: inspect.gradient_saliency(model, []): r"ids are \(0,\)",
        lambda: inspect.gradient_saliency(model, [3, 4], 1.0): "target 1.0 is outside the vocabulary of 11",
        lambda: inspect.gradient_saliency(model, [3, 4], state=3): "saliency: the state is a int",
        lambda: inspect.gradient_saliency(model, [3, 4], state=a.fork(2)): "a state of 2 rows for one text",
        lambda: inspect.gradient_saliency(None, [3, 4]): "a NoneType cannot be looked into",
        lambda: inspect.ablation_saliency(model, [3, 4], tokens=1.0): r"tokens \[1.0\], but the text has tokens 0 … 1",
        lambda: inspect.ablation_saliency(model, [3, 4], batch_size=0): "batch_size=0",
        lambda: inspect.ablation_saliency(model, [3, 4], batch_size="2"): "batch_size='2'",
        lambda: inspect.recall(model, ids[0], 3): r"recall: ids are \(37,\) torch.int64, but must be \(b,t\)",
        lambda: inspect.recall(model, ids, 37): r"lags \(37,\), but texts of 37 tokens have lags 0 … 36",
        lambda: inspect.recall(model, ids, [1.0]): r"lags \(1.0,\), but",
        lambda: inspect.recall(model, ids, []): r"lags \(\), but",
        lambda: inspect.recall(model, ids, 1, ridge="a"): "ridge='a'",
        lambda: inspect.recall(model, ids, 1, share=None): "share=None",
        lambda: inspect.recall(model, ids, 1, batch_size=0): "batch_size=0",
        lambda: inspect.recall(model, ids, 1, layers=9): "the model has layers 0 … 2",
        lambda: inspect.edit_state(a, lambda h: None): r"edit_state: a NoneType for a state of \(1, 48, 5\)",
        lambda: inspect.edit_state(a, 0): "edit=0, but it must be a function",
        lambda: inspect.edit_state(a, abs, layers="0"): r"layers are \['0'\], but the state has layers 0 … 2",
        lambda: inspect.edit_state(a.layers, abs): "edit_state: the state is a tuple",
        lambda: inspect.mix_states(a, a, "1"): "weight='1', but it must be a finite number",
        lambda: inspect.mix_states(a, a, float("nan")): "weight=nan",
        lambda: inspect.mix_states(a, None, 0.5): "mix_states: the state is a NoneType",
        lambda: inspect.mix_states(a, a.to(ssm_dtype=torch.bfloat16), 0.5): "dtypes or devices",
        lambda: _patched(model, ["y"], abs): r"\['y'\] cannot be replaced",
        lambda: _patched(model, "y", 3.0): "a float for y: give a tensor, or a function",
        lambda: _patched(model, "y", np.zeros(3)): "a ndarray for y",
        lambda: _patched(model, "y", lambda v: None): r"a NoneType in place of y, which is \(1, 37, 48\)",
        lambda: _patched(model, "state", lambda v: 0): "a int in place of state",
        lambda: _patched(model, "y", abs, tokens=3): r"it must be a slice from the front, .* slice\(3, 4\) is token 3",
        lambda: _patched(model, "y", abs, tokens=slice(0.0, 2)): "a slice from the front",
    }.items():
        with pytest.raises(AnymambaError, match=message):
            call()
