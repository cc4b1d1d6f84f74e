"""Time-invariant models: three forms that are one, and the matrices that they begin with."""

import math

import pytest
import torch

from anymamba import ops
from anymamba.reference import discretize, hippo, lti

FORMS = [lti.convolution, lti.chunked]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
rules = pytest.mark.parametrize("rule", ["mamba", "zoh", "bilinear"])


def model(rule="zoh", d=3, n=4, b=2, t=50, dtype=torch.float64, seed=0):
    """x, A_bar, B_bar, C, h: step sizes from those that forget at once to those that keep 16,384 steps."""
    torch.manual_seed(seed)
    A = hippo.s4d_lin(n).expand(d, n)
    dt = torch.logspace(-4, -0.5, d, dtype=torch.float64)
    number = dtype.to_complex()
    B, C, h = (torch.randn(*shape, dtype=torch.complex128) for shape in ((d, n), (d, n), (b, d, n)))
    A_bar, B_bar = discretize(A, B, dt[:, None], rule)[:2]
    return torch.randn(b, t, d, dtype=dtype), *(v.to(number) for v in (A_bar, B_bar, C, h))


def error(got, want):
    return float((got - want).abs().max() / want.abs().max())


@forms
@rules
@pytest.mark.parametrize("t", [1, 2, 63, 128, 129, 500])
def test_every_form_is_the_recurrence(form, rule, t):
    *args, h = model(rule, t=t)
    for state in (None, h):
        (y, after), (want, want_after) = form(*args, state), lti.recurrence(*args, state)
        assert error(y, want) <= 1e-12
        assert error(after, want_after) <= 1e-12


@forms
def test_16384_steps(form):
    *args, h = model(t=16384, b=1)
    (y, after), (want, want_after) = form(*args, h), lti.recurrence(*args, h)
    assert error(y, want) <= 1e-10
    assert error(after, want_after) <= 1e-10


@pytest.mark.parametrize("form", [lti.recurrence, *FORMS], ids=lambda f: f.__name__)
def test_nothing_read(form):
    x, *args, h = model(t=0)
    y, after = form(x, *args, h)
    assert y.shape == (2, 0, 3)
    assert torch.equal(after, h)


@pytest.mark.parametrize(("form", "options"), [(lti.convolution, {}), *((lti.chunked, {"chunk_size": c})
                                                                        for c in (1, 7, 64))])  # fmt: skip
def test_split_anywhere(form, options):
    x, *args, h = model(t=100)
    want, want_after = form(x, *args, h, **options)
    first, h = form(x[:, :37], *args, h, **options)
    second, h = form(x[:, 37:], *args, h, **options)
    assert error(torch.cat([first, second], 1), want) <= 1e-12
    assert error(h, want_after) <= 1e-12


@forms
def test_gradients(form):
    args = [v.requires_grad_() for v in model(t=23)]

    def gradients(f):
        y, h = f(*args)
        return torch.autograd.grad((y.square().sum() + h.abs().square().sum()), args)

    for got, want in zip(gradients(form), gradients(lti.recurrence), strict=True):
        assert error(got, want) <= 1e-11


@pytest.mark.parametrize(("form", "slack"), [(lti.convolution, 1e-5), (lti.chunked, 1e-6)])
def test_float32(form, slack):
    """Errors of powers grow with the power: chunks need small ones only."""
    *args, h = model(t=3000, dtype=torch.float32)
    want, _ = lti.recurrence(*(v.to(torch.promote_types(v.dtype, torch.float64)) for v in (*args, h)))
    y, after = form(*args, h)
    assert (y.dtype, after.dtype) == (torch.float32, torch.complex64)
    plain, _ = lti.recurrence(*args, h)
    assert error(y, want) <= 2 * error(plain, want) + slack


@pytest.mark.parametrize("length", [1, 2, 3, 10, 129])
def test_kernel_is_made_of_powers(length):
    _, A_bar, B_bar, C, _ = model()
    K = lti.kernel(A_bar, B_bar, C, length)
    assert K.shape == (3, length)
    assert error(K, lti.kernel_by_powers(A_bar, B_bar, C, length)) <= 1e-13
    impulse = torch.zeros(1, length, 3, dtype=torch.float64)
    impulse[:, 0] = 1
    assert error(K.T[None], lti.recurrence(impulse, A_bar, B_bar, C)[0]) <= 1e-13


@pytest.mark.parametrize(("rule", "order"), [("zoh", None), ("bilinear", 2), ("mamba", 1)])
def test_discretisation_is_the_differential_equation(rule, order):
    """An input that holds still: zoh is the solution at any step; others get there as steps shrink, at their order."""
    A, B = torch.tensor([[-0.5 + 3j, -2 + 0j]]).to(torch.complex128), torch.ones(1, 2, dtype=torch.complex128)

    def after_a_second(steps):
        A_bar, B_bar = discretize(A, B, 1 / steps, rule)[:2]
        return lti.recurrence(torch.ones(1, steps, 1, dtype=torch.float64), A_bar, B_bar, B)[1][0]

    exact = (torch.exp(A) - 1) / A * B
    if order is None:
        assert error(after_a_second(1), exact) <= 1e-14
        assert error(after_a_second(7), exact) <= 1e-14
    else:
        ratio = error(after_a_second(50), exact) / error(after_a_second(100), exact)
        assert math.log2(ratio) == pytest.approx(order, abs=0.05)


# ---- initial matrices ------------------------------------------------------------------------------------------


def test_legs():
    A, B = hippo.legs(4)
    want = [
        [-1, 0, 0, 0],
        [-(3**0.5), -2, 0, 0],
        [-(5**0.5), -(15**0.5), -3, 0],
        [-(7**0.5), -(21**0.5), -(35**0.5), -4],
    ]
    torch.testing.assert_close(A, torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor([1, 3, 5, 7], dtype=torch.float64).sqrt())
    assert torch.linalg.eigvals(hippo.legs(8)[0]).real.sort().values.tolist() == pytest.approx([*range(-8, 0)])


@pytest.mark.parametrize("n", [2, 8, 64])
def test_legs_is_normal_plus_low_rank(n):
    A, B = hippo.legs(n)
    L, P, B_there, V = hippo.normal_plus_low_rank(n)
    there = V @ (torch.diag(L) - torch.outer(P, P.conj())) @ V.mH
    torch.testing.assert_close(there, A.to(there.dtype), rtol=0, atol=1e-11 * n)
    torch.testing.assert_close(V @ B_there, B.to(V.dtype))
    torch.testing.assert_close(V @ V.mH, torch.eye(n, dtype=V.dtype))
    torch.testing.assert_close(L.real, torch.full((n,), -0.5, dtype=torch.float64))
    torch.testing.assert_close(L.imag, -L.imag.flip(0))  # pairs of conjugates


def test_diagonals():
    torch.testing.assert_close(hippo.s4d_lin(3), torch.tensor([-0.5, -0.5 + 1j * math.pi, -0.5 + 2j * math.pi],
                                                              dtype=torch.complex128))  # fmt: skip
    inv = [-0.5 + 1j * 6 / math.pi * (6 / k - 1) for k in (1, 3, 5)]
    torch.testing.assert_close(hippo.s4d_inv(3), torch.tensor(inv, dtype=torch.complex128))
    assert hippo.s4d_real(3).tolist() == [-1, -2, -3]
    legs = hippo.s4d_legs(32)
    assert (legs.imag > 0).all()
    assert len(legs) == 32
    # the law that S4D-Inv stands for: its largest eigenvalues are about N²/π apart from those that follow
    assert float(legs.imag.max()) == pytest.approx(64 * 64 / math.pi, rel=0.02)
    assert float(hippo.s4d_inv(32).imag.max()) == pytest.approx(float(legs.imag.max()), rel=0.03)


@pytest.mark.parametrize(("b", "t", "d", "n"), [(1, 1, 1, 1), (2, 300, 37, 5), (1, 129, 16, 32), (3, 128, 20, 7)])
@pytest.mark.parametrize("given", [False, True])
def test_the_kernel_is_the_recurrence(b, t, d, n, given, poison):
    """`ops.time_invariant_scan` without gradients on a CPU; with them it is computed in chunks."""
    torch.manual_seed(0)
    A_bar = torch.exp(0.1 * torch.complex(-torch.rand(d, n), 3 * torch.randn(d, n)))
    B_bar, C, h = (torch.randn(*shape, dtype=torch.complex64) for shape in ((d, n), (d, n), (b, d, n)))
    x, h = torch.randn(b, t, d), h if given else None
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lti, "chunked", None)
        patch.setattr(lti, "recurrence", None)  # neither runs
        got = ops.time_invariant_scan(x, A_bar, B_bar, C, h)
    plain = lti.recurrence(x, A_bar, B_bar, C, h)
    wide = [v if v is None else v.to(torch.complex128) for v in (A_bar, B_bar, C, h)]
    exact = lti.recurrence(x.double(), *wide)
    x.requires_grad_()
    chunks = ops.time_invariant_scan(x, A_bar, B_bar, C, h)
    assert chunks[0].requires_grad
    for i, e in enumerate(exact):
        allowed = 2 * (plain[i] - e).abs().max() + 8 * 2**-23 * e.abs().max()
        assert (got[i] - e).abs().max() <= allowed
        assert (chunks[i] - e).abs().max() <= 4 * allowed
