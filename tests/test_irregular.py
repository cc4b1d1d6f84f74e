"""Gaps in time: what is exact, and that states, packing, padding, pieces and gradients keep their laws with them."""

import pytest
import torch
import torch.nn.functional as F

from anymamba import AnymambaError, MambaConfig, MambaLM, MambaMixer, model, reference
from anymamba.layers.irregular import gap_steps

SMALL = MambaConfig(vocab_size=23, d_model=24, n_layer=2, d_state=5)


def make_model(seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    model = MambaLM(SMALL.replace(**changes)).to(dtype)
    with torch.no_grad():  # larger than at initialisation: steps must matter
        for block in model.backbone.layers:
            block.mixer.dt_proj.bias.add_(2)
            block.mixer.x_proj.weight.mul_(3)
    return model


def arguments(b=2, t=13, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(23, (b, t), generator=g), 3 * torch.rand(b, t, generator=g)


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def assert_states(a, b, tolerance=2e-5):
    for one, other in zip(a.layers, b.layers, strict=True):
        close(one.conv, other.conv, tolerance)
        close(one.ssm, other.ssm, tolerance)
    assert torch.equal(a.seen, b.seen)


# ---- what gaps mean --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 2, 63])
@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_gaps_of_one_change_nothing(t, kind):
    model, (ids, _) = make_model(), arguments(t=t)
    usual, gaps = model(ids), model(ids, delta=torch.ones(2, t, dtype=kind))
    close(gaps.logits, usual.logits)
    assert_states(gaps.state, usual.state)


@torch.no_grad()
def test_a_gap_everywhere_is_a_clock_of_another_rate():
    """Δ times c in the whole model is A times c and B times c: the same weights, changed by hand."""
    model, other, (ids, _), c = make_model(dtype=torch.float64), make_model(dtype=torch.float64), arguments(), 2.5
    r, n = SMALL.rank, SMALL.d_state
    for block in other.backbone.layers:
        block.mixer.A_log.add_(torch.tensor(c).log())
        block.mixer.x_proj.weight[r : r + n].mul_(c)
    got = model(ids, delta=torch.full((2, 13), c)).logits
    close(got, other(ids).logits, 1e-6)
    assert float((got - model(ids).logits).abs().max()) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("d_conv", [1, 4])
def test_silence_may_be_left_out(d_conv):
    """Two steps without input are one step of both gaps, to the last digits: exp((p + q)ΔA) = exp(pΔA) exp(qΔA).

    It holds where the model's own step size is the same in both, which silence in a mixer without a convolution bias
    gives, once the convolution has forgotten what was before.
    """
    torch.manual_seed(0)
    mixer = make_model(dtype=torch.float64, conv_bias=False, d_conv=d_conv).backbone.layers[0].mixer
    sound, silence = torch.randn(1, 6, 24, dtype=torch.float64), torch.zeros(1, d_conv + 1, 24, dtype=torch.float64)
    _, before = mixer(torch.cat([sound, silence], 1))
    _, two = mixer(silence[:, :2], before, delta=torch.tensor([[1.5, 0.25]]))
    _, one = mixer(silence[:, :1], before, delta=torch.tensor([[1.75]]))
    torch.testing.assert_close(one.ssm, two.ssm, atol=1e-14, rtol=1e-13)
    steps = F.softplus(mixer.dt_proj.bias)[:, None] * -torch.exp(mixer.A_log)
    torch.testing.assert_close(one.ssm[0], before.ssm[0] * torch.exp(1.75 * steps), atol=1e-14, rtol=1e-13)
    assert float((one.ssm - before.ssm).abs().max()) > 1e-3


@torch.no_grad()
def test_a_gap_of_zero_leaves_the_state():
    """What comes at the same moment moves the convolution alone."""
    mixer = make_model().backbone.layers[0].mixer
    u = torch.randn(2, 9, 24)
    _, before = mixer(u)
    _, after = mixer(u, before, delta=torch.zeros(2, 9))
    assert torch.equal(after.ssm, before.ssm)
    close(after.conv, before.conv)


def test_mixer_is_the_equation():
    """Δ of the docstring in the reference scan, with everything around it written out."""
    mixer = make_model(dtype=torch.float64).backbone.layers[0].mixer
    u, delta = torch.randn(2, 7, 24, dtype=torch.float64), torch.rand(2, 7)
    x, z = mixer.in_proj(u).chunk(2, -1)
    x, _ = reference.causal_conv1d(x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, activation="silu")
    low, B, C = mixer.x_proj(x).split([SMALL.rank, 5, 5], -1)
    dt = delta.double()[..., None] * F.softplus(low @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    y, h = reference.selective_scan(x, dt, -torch.exp(mixer.A_log), B, C, mixer.D, z)
    got, state = mixer(u, delta=delta)
    close(got, mixer.out_proj(y), 1e-12)
    close(state.ssm, h, 1e-12)


# ---- laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_split_is_whole(cut):
    model, (ids, delta) = make_model(), arguments()
    whole, first = model(ids, delta=delta), model(ids[:, :cut], delta=delta[:, :cut])
    rest = model(ids[:, cut:], state=first.state, delta=delta[:, cut:])
    close(torch.cat([first.logits, rest.logits], 1), whole.logits)
    assert_states(rest.state, whole.state)


@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_and_padded_are_one_by_one(side):
    model, (ids, delta), lengths = make_model(), arguments(b=3, t=11), [11, 4, 7]
    real = [slice(None, n) if side == "right" else slice(11 - n, None) for n in lengths]
    alone = [model(ids[i : i + 1, cut], delta=delta[i : i + 1, cut]) for i, cut in enumerate(real)]
    holes = torch.full_like(delta, float("nan"))  # in the padding there may be anything
    for i, cut in enumerate(real):
        holes[i, cut] = delta[i, cut]
    padded = model(ids, lengths=torch.tensor(lengths), delta=holes, padding_side=side)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    packed = model(*(torch.cat([ids[i, cut] for i, cut in enumerate(real)])[None],), cu_seqlens=ends,
                   delta=torch.cat([delta[i, cut] for i, cut in enumerate(real)])[None])  # fmt: skip
    for i, out in enumerate(alone):
        close(padded.logits[i : i + 1, real[i]], out.logits)
        close(packed.logits[:, ends[i] : ends[i + 1]], out.logits)
        assert_states(padded.state.select([i]), out.state)
        assert_states(packed.state.select([i]), out.state)


def test_states_on_the_way(monkeypatch):
    language, (ids, delta) = make_model(), arguments()
    out = language(ids, delta=delta, return_states=5)
    assert_states(out.states.after(10), language(ids[:, :10], delta=delta[:, :10]).state)
    with torch.no_grad():
        whole = language(ids, delta=delta)
        monkeypatch.setattr(model, "PIECE", 8)
        pieces = language(ids, delta=delta)
    close(pieces.logits, whole.logits)
    assert_states(pieces.state, whole.state)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_differences(recompute):
    model, (ids, delta) = make_model(dtype=torch.float64), arguments(b=1, t=5)
    model.recompute, delta = recompute, delta.double().requires_grad_()
    head = torch.randn(1, 5, 24, dtype=torch.float64)

    def loss(delta):
        out = model(ids, delta=delta)
        return (out.hidden * head).sum() + out.state.layers[1].ssm.sum()

    assert torch.autograd.gradcheck(loss, delta)
    loss(delta).backward()
    assert float(delta.grad.abs().min()) > 0


def test_kernels_and_reference_agree():
    """float32 by the kernels of this machine against float64 by the loop, forward and backward."""
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(1)
        model, (ids, delta) = make_model(dtype=dtype), arguments(t=130)
        delta = delta.to(dtype).requires_grad_()
        out = model(ids, delta=delta, labels=ids.roll(-1, 1))
        out.loss.backward()
        results.append([out.hidden.detach(), delta.grad, model.backbone.layers[0].mixer.A_log.grad])
    for low, exact in zip(*results, strict=True):
        close(low.double(), exact, 1e-4 * float(exact.abs().max()))


def test_sixteen_bits_keep_the_gaps():
    """Gaps are not rounded to the dtype of the activations: 1000 and 1001 are one number in bfloat16."""
    steps = [gap_steps(torch.zeros(1, 1, 3, dtype=torch.bfloat16), torch.zeros(3), torch.tensor([[g]]))
             for g in (1000.0, 1001.0)]  # fmt: skip
    assert steps[0].dtype == torch.float32
    assert (steps[1] > steps[0]).all()
    model, (ids, delta) = make_model(), arguments()
    close(model.bfloat16()(ids, delta=delta).logits.float(), make_model()(ids, delta=delta).logits, 0.05)


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (torch.ones(2, 12), r"delta is \(2, 12\) torch.float32, but must be numbers \(batch, seqlen\) = \(2, 13\)"),
        (torch.ones(2, 13, 1), r"delta is \(2, 13, 1\)"),
        (torch.ones(2, 13, dtype=torch.bool), "torch.bool, but must be numbers"),
        (torch.full((2, 13), -0.5), "delta holds -0.5, but gaps are finite and at least 0"),
        (torch.full((2, 13), float("nan")), "delta holds nan"),
        (torch.full((2, 13), float("inf")), "delta holds inf"),
    ],
)
def test_bad_gaps_are_refused(delta, message):
    model, (ids, _) = make_model(), arguments()
    with pytest.raises(AnymambaError, match=message):
        model(ids, delta=delta)
    with pytest.raises(AnymambaError, match=message):
        MambaMixer(SMALL)(torch.zeros(2, 13, 24), delta=delta)
