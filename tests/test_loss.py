"""The loss without the logits of all tokens: equal to cross_entropy of the logits, in chunks, in every dtype."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from anymamba import AnymambaError, MambaConfig, MambaLM
from anymamba.layers import linear_cross_entropy, loss
from conftest import assert_law

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
OP = torch.ops.anymamba.linear_cross_entropy


def arguments(r=300, m=24, v=203, dtype=torch.float32, device="cpu", seed=0):
    random = torch.Generator().manual_seed(seed)
    shapes = (3, r // 3, m), (v, m)
    hidden, weight = (torch.randn(s, generator=random).to(device, dtype).requires_grad_() for s in shapes)
    labels = torch.randint(0, v, (3, r // 3), generator=random)
    labels[0, :7] = labels[2, -3:] = -100
    return hidden, weight, labels.to(device)


def plain(hidden, weight, labels):
    logits = F.linear(hidden, weight).flatten(0, -2)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten())


def with_gradients(f, hidden, weight, labels, scale=3.0):
    hidden, weight = (v.detach().requires_grad_() for v in (hidden, weight))
    value = f(hidden, weight, labels)
    return value.detach(), *torch.autograd.grad(value * scale, (hidden, weight))


@pytest.fixture(params=["one chunk", "chunks"])
def chunks(request, monkeypatch):
    """All tokens at once, or in three uneven chunks, and the CPU's blocks a few rows long."""
    if request.param == "chunks":
        monkeypatch.setattr(loss, "_chunk_rows", lambda tokens, _: max(1, tokens * 3 // 7))
        monkeypatch.setattr(loss, "BLOCK_BYTES", 5_000)
    return request.param


def assert_equals_plain(dtype, device="cpu", **sizes):
    given = arguments(dtype=dtype, device=device, **sizes)
    exact = with_gradients(plain, *(v.double() for v in given[:2]), given[2])
    for name, *values in zip(("loss", "dhidden", "dweight"), with_gradients(linear_cross_entropy, *given),
                             with_gradients(plain, *given), exact, strict=True):  # fmt: skip
        assert_law(*values, what=name, slack=16 if dtype == torch.float64 else 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_equals_cross_entropy(dtype, device, chunks, poison):
    assert_equals_plain(dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [1, 64, 203, 5000])
def test_triton_equals_cross_entropy(dtype, v, chunks, poison, monkeypatch):
    """The GPU's kernel; where there is no GPU, in Triton's interpreter."""
    triton = pytest.importorskip("triton")
    device = DEVICES[-1]
    if device == "cpu":
        if not triton.knobs.runtime.interpret:
            pytest.skip("no GPU, and Triton's interpreter is off")
        monkeypatch.setattr(loss, "GPUS", ("cpu",))
        monkeypatch.setattr(loss, "explain", lambda *_: ("triton", "a test asks for it"))
    calls, real = [], loss._cross_entropy_fused
    monkeypatch.setattr(loss, "_cross_entropy_fused", lambda *a: calls.append(a[0].shape) or real(*a))
    assert_equals_plain(dtype, device, r=30, v=v)
    assert calls


def test_triton_label_outside_makes_the_loss_nan():
    triton = pytest.importorskip("triton")
    from anymamba.kernels import triton_loss

    if DEVICES[-1] == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("no GPU, and Triton's interpreter is off")
    logits = triton_loss.empty_logits(4, 23, torch.float32, torch.device(DEVICES[-1])).zero_()
    labels = torch.tensor([3, 23, -1, -100], device=logits.device)
    losses = triton_loss.cross_entropy_(logits, labels, -100, False)
    assert losses.isnan().tolist() == [False, True, True, False]


def test_logits_are_held_a_chunk_at_a_time(monkeypatch):
    sizes, real = [], loss._room
    monkeypatch.setattr(loss, "_room", lambda rows, v, *rest: sizes.append(rows * v) or real(rows, v, *rest))
    monkeypatch.setattr(loss, "CHUNK_BYTES", 128 * 203 * 4)
    linear_cross_entropy(*arguments(r=3000)).backward()
    assert sizes == [125 * 203]
    monkeypatch.undo()
    assert [loss._chunk_rows(16384, 2 * 50280), loss._chunk_rows(1024, 4 * 50280)] == [2432, 1024]
    assert [loss._chunk_rows(0, 8), loss._chunk_rows(5, 1 << 30), loss._chunk_rows(300, 1 << 30)] == [1, 1, 1]


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed(needs):
    hidden, weight, labels = arguments()
    out = OP(hidden.flatten(0, 1), weight, labels.flatten(), *needs)
    assert [bool(v.numel()) for v in out[2:]] == list(needs)
    for v, need in zip((hidden, weight), needs, strict=True):
        v.requires_grad_(need)
    value = linear_cross_entropy(hidden, weight, labels)
    assert value.requires_grad == any(needs)
    if any(needs):
        value.backward()
    assert [v.grad is not None for v in (hidden, weight)] == list(needs)


def test_evaluation_makes_no_gradients(monkeypatch):
    given, seen = arguments(), []
    real = loss._cross_entropy_
    monkeypatch.setattr(loss, "_cross_entropy_", lambda *a: seen.append(a[2]) or real(*a))
    with torch.no_grad():
        value = linear_cross_entropy(*given)
    assert seen == [False]
    torch.testing.assert_close(value, plain(*given).detach())


@pytest.mark.parametrize("device", DEVICES)
def test_no_label_counts(device):
    hidden, weight, labels = arguments(device=device)
    for some in (torch.full_like(labels, -100), labels[:, :0]):
        value, dhidden, dweight = with_gradients(linear_cross_entropy, hidden[:, : some.shape[1]], weight, some)
        assert value.isnan()
        assert not dhidden.any()
        assert not dweight.any()


@pytest.mark.parametrize("bad", [203, -1])
def test_label_outside_the_vocabulary(bad):
    hidden, weight, labels = arguments()
    labels[1, 2] = bad
    with pytest.raises(AnymambaError, match=f"label {bad} is outside the vocabulary of 203"):
        linear_cross_entropy(hidden, weight, labels)


def test_finite_differences():
    hidden, weight, _ = arguments(r=6, m=3, v=5, dtype=torch.float64)
    labels = torch.tensor([[1, 4], [0, -100], [2, 2]])
    assert torch.autograd.gradcheck(lambda *v: linear_cross_entropy(*v, labels), (hidden, weight))


def test_backward_twice_and_no_second_derivative():
    hidden, weight, labels = arguments()
    value = linear_cross_entropy(hidden, weight, labels)
    once = torch.autograd.grad(value, (hidden, weight), retain_graph=True)
    value.backward(retain_graph=True)
    value.backward()
    torch.testing.assert_close((hidden.grad, weight.grad), tuple(2 * v for v in once))
    with pytest.raises(AnymambaError, match="cannot be differentiated twice"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), weight, create_graph=True)


def test_autocast():
    """bf16 products of float32 weights; the gradient of the weights is float32."""
    hidden, weight, labels = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(linear_cross_entropy, hidden, weight, labels)
        want = with_gradients(plain, hidden, weight, labels)
    assert [v.dtype for v in got] == [torch.float32] * 3
    exact = with_gradients(plain, hidden.double(), weight.double(), labels)
    for values in zip(got, want, exact, strict=True):
        assert_law(*values)
    assert not torch.equal(got[1], with_gradients(linear_cross_entropy, hidden, weight, labels)[1])


def test_operator():
    hidden, weight, labels = arguments(r=9)
    for needs in ((True, True), (False, True)):
        given = [v.detach().requires_grad_(need) for v, need in zip((hidden.flatten(0, 1), weight), needs, strict=True)]
        opcheck(OP.default, (*given, labels.flatten(), *needs))


# ---- in a model ------------------------------------------------------------------------------------------------


def full_logits(model, ids, labels):
    logits = model.lm_head(model(ids).hidden)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["fp32", "bf16", "autocast", "autocast+recompute"])
def test_model(tied, how):
    """Tied embeddings get the gradients of both uses, and all that is around the loss stays as it was."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=50, d_model=32, n_layer=2, tie_embeddings=tied))
    ids, labels = torch.randint(50, (2, 2, 17))
    labels[0, 5:] = -100
    if how == "bf16":
        model = model.bfloat16()
    other = copy.deepcopy(model)
    model.recompute = "recompute" in how
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in how):
        got, want = model(ids, labels=labels).loss, full_logits(other, ids, labels)
    torch.testing.assert_close(got, want, rtol=1e-5 if how == "fp32" else 1e-3, atol=0)
    got.backward()
    want.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        error = float((p.grad - q.grad).norm() / q.grad.norm())
        assert error <= (1e-5 if how == "fp32" else 2e-2), name


def test_a_head_that_something_listens_to_is_called():
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=50, d_model=32, n_layer=1, tie_embeddings=False))
    ids, calls = torch.randint(50, (2, 9)), []
    want = model(ids, labels=ids).loss
    assert loss.is_bare(model.lm_head)
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(ids, labels=ids).loss, want)
    assert calls == [1]
    handle.remove()
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    assert not loss.is_bare(model.lm_head)
    torch.testing.assert_close(model(ids, labels=ids).loss, want)
