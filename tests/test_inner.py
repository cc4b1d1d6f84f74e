"""`mamba_inner`, the middle of the mixer as one node of autograd, against the mixer's own forward pass."""

import pytest
import torch

from anymamba import AnymambaError, MambaConfig, MambaLM
from anymamba.layers import MambaMixer, inner, mamba
from conftest import GPU_OR_CPU, REPO, assert_law, cotangents, run_python

pytestmark = pytest.mark.usefixtures("poison")
SIZES = {"plain": {}, "odd": {"d_model": 13, "d_state": 5, "d_conv": 3, "dt_rank": 3}, "bias": {"bias": True},
         "no conv bias": {"conv_bias": False}, "wide states": {"d_state": 48}}  # fmt: skip


def mixer_of(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    mixer = MambaMixer(MambaConfig(**({"d_model": 24} | changes)), device=GPU_OR_CPU)
    for v in mixer.parameters():
        torch.nn.init.normal_(v, std=0.3)
    return mixer.to(dtype)


def everything(mixer, u, *rest, fused=True):
    """Outputs, states and every gradient of a mixer, with or without the one node."""
    called = []
    with pytest.MonkeyPatch.context() as patch:
        run = inner.mamba_inner
        patch.setattr(mamba, "mamba_inner", lambda *a: called.append(1) or run(*a))
        if not fused:
            patch.setattr(mamba, "takes", lambda *_: False)
        u = u.detach().clone().requires_grad_()
        y, state = mixer(u, *rest)
    assert bool(called) == fused
    out = {"y": y, "conv": state.conv, "ssm": state.ssm}
    leaves = {"u": u} | {k: v for k, v in mixer.named_parameters() if v.requires_grad}
    if rest and rest[0] is not None:
        leaves |= {"conv before": rest[0][0], "ssm before": rest[0][1]}
    values = tuple(out.values())
    total = sum((c * v.double()).sum() for c, v in zip(cotangents(*values), values, strict=True))
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return {k: v.detach() for k, v in out.items()} | {f"d {k}": g for k, g in zip(leaves, gradients, strict=True)}


def state_of(mixer, rows, dtype):
    c = mixer.config
    conv = torch.randn(rows, c.d_inner, c.d_conv - 1, dtype=dtype, device=GPU_OR_CPU, requires_grad=True)
    real = torch.promote_types(dtype, torch.float32)
    return conv, torch.randn(rows, c.d_inner, c.d_state, dtype=real, device=GPU_OR_CPU, requires_grad=True)


def check(mixer, dtype, u, bounds=None, rows=None):
    before = None if rows is None else state_of(mixer, rows, dtype)
    got, plain = (everything(mixer, u, before, bounds, fused=f) for f in (True, False))
    wide = mixer_of(torch.float64, **{k: getattr(mixer.config, k) for k in mixer.config.to_dict()})
    wide.load_state_dict(mixer.state_dict())
    if before is not None:
        before = tuple(v.detach().double().requires_grad_() for v in before)
    exact = everything(wide, u.double(), before, bounds, fused=False)
    for name, v in exact.items():
        assert_law(got[name], plain[name], v.double(), name, slack=16)
    for name in ("y", "conv", "ssm"):
        assert torch.equal(got[name], plain[name]), name


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_mixer(sizes, dtype):
    mixer = mixer_of(dtype, **sizes)
    u = torch.randn(2, 37, mixer.config.d_model, device=GPU_OR_CPU).to(dtype)
    check(mixer, dtype, u)
    check(mixer, dtype, u, rows=2)


def test_packed_sequences():
    mixer = mixer_of()
    u = torch.randn(1, 29, 24, device=GPU_OR_CPU)
    check(mixer, torch.float32, u, torch.tensor([0, 3, 3, 20, 29], device=GPU_OR_CPU), rows=4)


def test_autocast():
    mixer = mixer_of()
    u = torch.randn(2, 20, 24, device=GPU_OR_CPU)
    with torch.autocast(GPU_OR_CPU, torch.bfloat16):
        got, plain = (everything(mixer, u, fused=f) for f in (True, False))
    for name, v in plain.items():
        assert got[name].dtype == v.dtype
        assert (got[name] - v).float().norm() <= 0.01 * v.float().norm(), name


def test_frozen_weights_and_gradients_of_one_output():
    mixer = mixer_of()
    u = torch.randn(2, 9, 24, device=GPU_OR_CPU)
    every = everything(mixer, u)
    for frozen in (mixer.x_proj.weight, mixer.conv1d.weight, mixer.A_log, mixer.in_proj.weight):
        frozen.requires_grad_(False)
    some = everything(mixer, u)
    assert all(torch.equal(v, every[k]) for k, v in some.items())
    assert "d A_log" not in some
    for i in (0, 1):  # of the states alone
        gradients = []
        for fused in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(mamba, "takes", inner.takes if fused else lambda *_: False)
                v = u.clone().requires_grad_()
                gradients.append(torch.autograd.grad(mixer(v)[1][i].square().sum(), v)[0])
        torch.testing.assert_close(*gradients)


def test_whoever_listens_is_heard():
    """A hook, an adapter or a replaced forward on a part of the mixer turns the one node off."""
    mixer, u = mixer_of(), torch.randn(1, 5, 24, device=GPU_OR_CPU)
    xz = mixer.in_proj(u)
    assert inner.takes(mixer, xz)
    for part in (mixer.x_proj, mixer.dt_proj, mixer.conv1d):
        for listen in (part.register_forward_hook, part.register_full_backward_hook):
            handle = listen(lambda *_: None)
            assert not inner.takes(mixer, xz)
            handle.remove()
        part.forward = part.forward
        assert not inner.takes(mixer, xz)
        del part.forward
    with torch.no_grad():
        assert not inner.takes(mixer, xz)
    assert not inner.takes(mixer.double(), xz.double())


def test_states_that_do_not_fit():
    mixer, u = mixer_of(), torch.randn(2, 5, 24, device=GPU_OR_CPU)
    conv, ssm = state_of(mixer, 2, torch.float32)
    for state in ((conv[:1], ssm), (conv, ssm[:1])):
        with pytest.raises(AnymambaError, match="initial_state"):
            mixer(u, state)


def test_training_with_recomputation_is_the_same():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = MambaLM(MambaConfig.preset("tiny")).to(GPU_OR_CPU)
        model.recompute = recompute
        ids = torch.arange(64, device=GPU_OR_CPU)[None]
        model(ids, labels=ids + 1).loss.backward()
        gradients.append([v.grad for v in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.skipif(GPU_OR_CPU == "cuda", reason="the GPU runs them in the tests above")
def test_triton_kernels_write_into_rows_of_a_wider_array():
    pytest.importorskip("triton")
    code = """
import pytest, test_inner
from anymamba import ops
from anymamba.layers import inner
ops.choose = inner.choose = lambda _, x, *__: "reference" if x.dtype == test_inner.torch.float64 else "triton"
mixer = test_inner.mixer_of(d_model=5, d_state=3, d_conv=3)
u = test_inner.torch.randn(2, 7, 5)
test_inner.check(mixer, u.dtype, u, rows=2)
test_inner.check(mixer, u.dtype, u[:1], test_inner.torch.tensor([0, 3, 7]), rows=2)
print("equal")
"""
    done = run_python(code, TRITON_INTERPRET="1", PYTHONPATH=f"{REPO / 'src'}:{REPO / 'tests'}")
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]
