"""Both directions: reversing the input swaps them, padding and neighbours change nothing."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model

from anymamba import AnymambaError, Bidirectional, MambaConfig, MambaLM, export, model
from anymamba.generate import Engine, PrefixCache, generate, read
from anymamba.train import evaluate

CONFIG = MambaConfig(vocab_size=None, d_model=16, n_layer=2, d_state=4)


def make(shared=False, merge="sum", dtype=torch.float32):
    torch.manual_seed(0)
    one, other = (block.mixer for block in MambaLM(CONFIG).to(dtype).backbone.layers)
    return Bidirectional(one, None if shared else other, merge)


def swapped(layer):
    return Bidirectional(layer.anticausal or layer.causal, layer.causal, layer.merge)


def arguments(b=2, t=9):
    g = torch.Generator().manual_seed(1)
    return torch.randn(b, t, 16, generator=g), 3 * torch.rand(b, t, generator=g)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("merge", ["sum", "concat"])
@pytest.mark.parametrize("t", [1, 2, 37])
def test_reversing_the_input_swaps_the_directions(shared, merge, t):
    layer, (u, _) = make(shared, merge), arguments(t=t)
    y, _ = layer(u)
    back, _ = swapped(layer)(u.flip(1))
    back = back.flip(1)
    close(back if merge == "sum" else torch.cat(back.chunk(2, -1)[::-1], -1), y)
    assert y.shape == (2, t, 16 if merge == "sum" else 32)


def test_it_is_the_two_mixers():
    layer, (u, _) = make(merge="concat"), arguments()
    y, state = layer(u)
    close(y[..., :16], layer.causal(u)[0])
    close(y[..., 16:], layer.anticausal(u.flip(1))[0].flip(1))
    assert state is None


def test_gaps_belong_to_pairs_of_neighbours():
    """Backwards the gap between two samples is the same one; reversing samples and gaps swaps the directions."""
    layer, (u, delta) = make(merge="concat"), arguments(t=4)
    y, _ = layer(u, delta=delta)
    turned = delta[:, [0, 3, 2, 1]]
    close(y[..., 16:], layer.anticausal(u.flip(1), delta=turned)[0].flip(1))
    back, _ = swapped(layer)(u.flip(1), delta=turned)
    close(torch.cat(back.flip(1).chunk(2, -1)[::-1], -1), y)
    close(layer(u, delta=torch.ones(2, 4))[0], layer(u)[0])


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("lengths", [[9, 4, 1], [3, 9, 0]])
def test_padding_and_packing_are_one_by_one(lengths, gaps):
    layer, (u, delta) = make(), arguments(b=3)
    options = {"delta": delta} if gaps else {}
    padded, _ = layer(u.clone(), lengths=torch.tensor(lengths), **options)
    rows = [u[i : i + 1, :n] for i, n in enumerate(lengths)]
    together = torch.cat([delta[i : i + 1, :n] for i, n in enumerate(lengths)], 1) if gaps else None
    packed, _ = layer(torch.cat(rows, 1), None, torch.tensor([0, *lengths]).cumsum(0), delta=together)
    packed = packed.split(lengths, 1)
    for i, n in enumerate(lengths):
        assert torch.equal(padded[i, n:], torch.zeros(9 - n, 16))
        if n:
            alone, _ = layer(rows[i], **({"delta": delta[i : i + 1, :n]} if gaps else {}))
            close(padded[i : i + 1, :n], alone)
            close(packed[i], alone)


def test_gradients():
    layer, (u, delta) = make(dtype=torch.float64), arguments(b=1, t=4)
    u, delta = u.double().requires_grad_(), delta.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda u, delta: layer(u, delta=delta)[0], (u, delta), fast_mode=True)


def test_in_a_model_every_position_hears_all():
    model = MambaLM(CONFIG)
    for block in model.backbone.layers:
        block.mixer = Bidirectional(block.mixer)
    u = torch.randn(1, 12, 16, requires_grad=True)
    model(embeddings=u).hidden[0, 5].sum().backward()
    assert (u.grad.abs().sum(-1) > 0).all()


# ---- as the mixers of a language model -------------------------------------------------------------------------


def masked_lm(seed=0, **changes):
    """A model that hears both directions: what is asked of it are tokens in the middle of a text."""
    torch.manual_seed(seed)
    config = CONFIG.replace(vocab_size=19, **changes)
    lm, other = MambaLM(config), MambaLM(config)
    for block, behind in zip(lm.backbone.layers, other.backbone.layers, strict=True):
        block.mixer = Bidirectional(block.mixer, behind.mixer)
    return lm


def texts(b=2, t=11):
    return torch.randint(19, (b, t), generator=torch.Generator().manual_seed(2))


def test_long_texts_are_read_at_once(monkeypatch):
    lm, ids = masked_lm(), texts()
    want = lm(ids)
    monkeypatch.setattr(model, "PIECE", 4)
    with torch.no_grad():
        close(lm(ids).logits, want.logits)
        close(lm(ids, last_only=True).logits, want.logits[:, -1:])
    assert want.state is None


def test_rows_of_a_batch_and_sequences_of_a_row_are_one_by_one():
    lm, ids = masked_lm(), texts(1)
    packed = lm(ids, cu_seqlens=[0, 4, 11]).logits
    close(packed[:, :4], lm(ids[:, :4]).logits)
    close(packed[:, 4:], lm(ids[:, 4:]).logits)
    close(lm(ids, lengths=[4]).logits[:, :4], packed[:, :4])
    for u in (np.array([0, 4, 11]), torch.tensor([0, 4, 11], dtype=torch.int32)):
        close(lm(ids, cu_seqlens=u).logits, packed)


def test_every_parameter_learns_from_a_loss():
    lm, ids = masked_lm(), texts()
    lm(ids, labels=ids.roll(1, 1), lengths=[11, 7]).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in lm.parameters())


def test_compiled_it_is_the_same():
    lm, ids = masked_lm(), texts(1)
    compiled = torch.compile(lm, backend="eager", fullgraph=True)
    close(compiled(ids).logits, lm(ids).logits)
    bounds = torch.tensor([0, 4, 11])
    close(compiled(ids, cu_seqlens=bounds).logits, lm(ids, cu_seqlens=bounds).logits)


def test_its_weights_are_saved_as_the_message_says(tmp_path):
    lm, ids = masked_lm(), texts()
    for form in ("native", "hf"):
        with pytest.raises(AnymambaError, match=r"no format says so.*safetensors.torch.save_model"):
            lm.save_pretrained(tmp_path / form, form)
        assert not (tmp_path / form).exists()
    save_model(lm, tmp_path / "weights.safetensors")
    other = masked_lm(seed=1)
    load_model(other, tmp_path / "weights.safetensors")
    assert torch.equal(other(ids).logits, lm(ids).logits)
    assert other.fingerprint() == lm.fingerprint() != masked_lm(seed=1).fingerprint()


def test_compiled_inside_a_model_it_still_looks_ahead(tmp_path):
    lm, ids = masked_lm(), texts()
    want = lm(ids).logits
    for block in lm.backbone.layers:
        block.mixer = torch.compile(block.mixer, backend="eager")
    out = lm(ids)
    close(out.logits, want)
    assert out.state is None
    with pytest.raises(AnymambaError, match="no format says so"):
        lm.save_pretrained(tmp_path / "model")
    for refused in (lambda: export.chunk(lm, 4), lambda: evaluate(lm, ids[0], context=4, carry=True)):
        with pytest.raises(AnymambaError, match="hears both directions"):
            refused()


def test_it_computes_twice():
    plain, both = MambaLM(CONFIG), MambaLM(CONFIG)
    for block in both.backbone.layers:
        block.mixer = Bidirectional(block.mixer)
    assert both.flops_per_token() == 2 * plain.flops_per_token()


@pytest.mark.parametrize(
    ("call", "who"),
    [
        (lambda lm, state: lm(texts(), state=state), "goes on from no state and keeps none: give it whole texts"),
        (lambda lm, state: lm(texts(), return_states=2), "goes on from no state and keeps none"),
        (lambda lm, state: generate(lm, [[1, 2]]), "generate: this model hears both directions"),
        (lambda lm, state: read(lm, [1, 2]), "read: this model hears both directions"),
        (lambda lm, state: Engine(lm), "Engine: this model hears both directions"),
        (lambda lm, state: PrefixCache(lm).read_batch([torch.tensor([1, 2])]), "this model hears both directions"),
    ],
)
def test_it_is_no_causal_model(call, who):
    state = MambaLM(CONFIG.replace(vocab_size=19))(texts()).state
    with pytest.raises(AnymambaError, match=who):
        call(masked_lm(), state)


def test_what_it_refuses():
    layer, (u, _) = make(), arguments()
    with pytest.raises(AnymambaError, match="merge='max' does not exist: choose one of sum, concat"):
        make(merge="max")
    with pytest.raises(AnymambaError, match="no state to go on from: give it whole sequences"):
        layer(u, layer.causal(u)[1])
    with pytest.raises(AnymambaError, match="no state to go on from"):
        layer(u, return_states=2)
    with pytest.raises(AnymambaError, match=r"lengths .* or cu_seqlens .*, not both"):
        layer(u, None, torch.tensor([0, 9]), lengths=torch.tensor([9, 9]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seqlens": [0, 4]}, r"cu_seqlens is \[0, 4\], but it must start at 0, never fall, and end at seqlen = 9"),
        ({"cu_seqlens": torch.tensor([0, 4, 10])}, "end at seqlen = 9"),
        ({"cu_seqlens": []}, "must be at least 2 integers"),
        ({"cu_seqlens": [0.0, 9.0]}, r"cu_seqlens is \(2,\) torch.float64, but must be at least 2 integers"),
        ({"delta": torch.ones(1, 8)}, r"delta is \(1, 8\) torch.float32, but must be numbers .* \(1, 9\)"),
        ({"delta": "1"}, "delta: a str that makes no tensor"),
        ({"delta": -np.ones((1, 9))}, "delta holds -1.0, but gaps are finite and at least 0"),
        ({"lengths": [10]}, r"lengths are \[10\], but must be 1 integers from 0 to 9"),
        ({"lengths": [9.0]}, "but must be 1 integers"),
        ({"u": torch.zeros(9, 16)}, r"u is \(9, 16\) torch.float32, but must be real numbers"),
        ({"u": torch.zeros(1, 9, 16, dtype=int)}, "torch.int64, but must be real numbers"),
        ({"u": torch.zeros(2, 9, 16), "cu_seqlens": [0, 9]}, "with a batch of 2, but then the sequences"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lengths", [False, True])
def test_bad_input_is_refused(options, message, lengths):
    if lengths and "delta" in options:
        options = options | {"lengths": [7]}
    with pytest.raises(AnymambaError, match=message):
        make()(**({"u": arguments(b=1)[0]} | options))


@pytest.mark.parametrize("mixer", ["s4d", "gru"])
def test_gaps_are_for_mixers_with_step_sizes(mixer):
    one, other = (block.mixer for block in MambaLM(CONFIG.replace(mixer=mixer, d_state=16)).backbone.layers)
    u, delta = arguments()
    for call in (Bidirectional(one, other), one):
        with pytest.raises(AnymambaError, match=f"delta is for mixer='mamba', .* this one is '{mixer}'"):
            call(u, delta=delta)
    y, _ = Bidirectional(one, other)(u[:1], cu_seqlens=[0, 4, 9])
    close(y[:, :4], Bidirectional(one, other)(u[:1, :4])[0])
