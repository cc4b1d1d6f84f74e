"""What `anymamba.inspect` says of a model is what the model computes."""

import pytest
import torch
import torch.nn.functional as F

from anymamba import AnymambaError, MambaConfig, MambaLM, SamplingConfig, inspect
from anymamba import model as model_module
from anymamba.generate import generate
from anymamba.inspect import parts
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


def test_a_model_that_computes_something_else_is_refused(model, monkeypatch):
    monkeypatch.setattr(MambaConfig, "gate", True, raising=False)
    object.__setattr__(model.backbone.layers[1].mixer.config, "gate", False)
    try:
        with pytest.raises(AnymambaError, match="gate=False, but only True"):
            inspect.capture(model, text())
    finally:
        object.__delattr__(model.backbone.layers[1].mixer.config, "gate")


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
        lambda: inspect.gradient_saliency(model, text()): r"ids are \(1, 37\), but must be \(t,\)",
        lambda: inspect.ablation_saliency(model, [3]): r"must be \(t,\) with t ≥ 2",
        lambda: inspect.gradient_saliency(model, [3, 4], 11): "target 11 is outside the vocabulary of 11",
        lambda: inspect.ablation_saliency(model, [3, 4], tokens=[2]): r"tokens \[2\] of a text with tokens 0 … 1",
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


def test_gaps_in_time_are_not_recorded():
    model, ids = MambaLM(MambaConfig(vocab_size=50, d_model=16, n_layer=1)), torch.arange(10)[None]
    with inspect.recording(model), pytest.raises(AnymambaError, match="delta"):
        model(ids, delta=torch.ones(1, 10))
    assert model(ids, delta=[[1.0] * 10]).logits.shape[:2] == (1, 10)
