"""Both directions: reversing the input swaps them, padding and neighbours change nothing."""

import pytest
import torch

from anymamba import AnymambaError, Bidirectional, MambaConfig, MambaLM

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
