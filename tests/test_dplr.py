"""S4: diagonal plus low rank against plain matrices, in complex and in real numbers, and the mixer that learns it."""

import math

import numpy as np
import pytest
import scipy.signal
import torch

from anymamba import MambaConfig, MambaLM
from anymamba.layers.init import init_mixer
from anymamba.layers.mixers import make_mixer
from anymamba.reference import dense, discretize, dplr, hippo

F64 = torch.float64
sizes = pytest.mark.parametrize("n", [2, 8, 64])


def error(got, want):
    return float((got - want).abs().max() / want.abs().max())


def steps(d):
    """From those that remember thousands of steps to those that forget at once."""
    return torch.logspace(-3.5, 0, d, dtype=F64)


# ---- the matrix ------------------------------------------------------------------------------------------------


@sizes
def test_legs_in_real_numbers(n):
    """A, B and the stable eigenvalues -1 … -n, found again through the orthogonal basis."""
    A, B = hippo.legs(n)
    V = hippo.normal_plus_low_rank(n)[3][:, n // 2 :]
    Q = math.sqrt(2) * torch.stack([V.real, -V.imag], -1).flatten(1)
    a, omega, P, B_there = dplr.legs(n)
    assert (a > 0).all()
    assert (omega > 0).all()
    torch.testing.assert_close(Q @ Q.T, torch.eye(n, dtype=F64))
    assert error(Q @ dplr.matrix(a, omega, P) @ Q.T, A) <= 1e-12
    assert error(Q @ B_there, B) <= 1e-12
    if n <= 8:  # of more the eigenvalues cannot be computed, which is why there is a low rank
        values = torch.linalg.eigvals(dplr.matrix(a, omega, P)).real.sort().values
        assert values.tolist() == pytest.approx([*range(-n, 0)])


@sizes
def test_a_step_costs_no_matrix(n):
    """Woodbury against the inverse of the whole matrix, torch's and scipy's."""
    A, B = hippo.legs(n)
    L, P, B_there, V = hippo.normal_plus_low_rank(n)
    dt = steps(4)
    want = discretize(A, B[:, None], dt, "bilinear", dense=True)
    A_bar, B_bar = dplr.bilinear(L, P, B_there, dt)
    assert error(V @ A_bar @ V.mH, want.A_bar) <= 1e-12
    assert error(V @ B_bar[..., None], want.B_bar) <= 1e-12
    ours, theirs = [], (np.eye(n), np.zeros((n, 1)))
    for step in dt.tolist():
        ours.append(scipy.signal.cont2discrete((A.numpy(), B[:, None].numpy(), *theirs), step, "bilinear")[:2])
    for got, there in zip((V @ A_bar @ V.mH, V @ B_bar[..., None]), zip(*ours, strict=True), strict=True):
        assert error(got.real, torch.from_numpy(np.stack(there))) <= 1e-12
    torch.manual_seed(0)
    h, x = torch.randn(4, n, dtype=L.dtype), torch.randn(4, dtype=F64)
    assert error(dplr.step(h, x, L, P, B_there, dt), (A_bar @ h[..., None])[..., 0] + B_bar * x[:, None]) <= 1e-12


@sizes
def test_the_rule_in_real_numbers(n):
    torch.manual_seed(0)
    dt = steps(5)
    for a, omega, P, B in (dplr.legs(n), drawn(5, n)):
        want = discretize(dplr.matrix(a, omega, P), B[..., None].expand(5, n, 1), dt, "bilinear", dense=True)
        A_bar, B_bar = dplr.bilinear_real(a, omega, P, B, dt)
        assert error(A_bar, want.A_bar) <= 1e-12
        assert error(B_bar, want.B_bar[..., 0]) <= 1e-12


@pytest.mark.parametrize("length", [1, 2, 63, 64, 1000, 4096])
@pytest.mark.parametrize("step", [1e-3, 0.1])
def test_the_kernel_is_that_of_powers(length, step):
    """n = 64, no power of A but one; even lengths have z = -1 among their roots of unity."""
    A, B = hippo.legs(64)
    L, P, B_there, V = hippo.normal_plus_low_rank(64)
    C = torch.randn(64, dtype=F64, generator=torch.Generator().manual_seed(0))
    A_bar, power, _ = discretize(A, B[:, None], step, "bilinear", dense=True)
    want = []
    for _ in range(length):
        want.append(C @ power[:, 0])
        power = A_bar @ power
    K = dplr.kernel(L, P, B_there, C.to(V.dtype) @ V, torch.tensor(step, dtype=F64), length)
    assert error(K, torch.stack(want).to(K.dtype)) <= 1e-11


def drawn(d, n):
    """a, ω, P, B as training might leave them: of any size, with a hardly above 0 or far from it."""
    normal = lambda *s: 10 * torch.randn(*s, dtype=F64)  # noqa: E731
    return torch.exp(0.3 * normal(d, n // 2)), normal(d, n // 2), normal(d, n), normal(d, n)


@pytest.mark.parametrize("rule", ["mamba", "zoh", "bilinear"])
def test_stable_whatever_is_learned(rule):
    """No step makes a state longer; a low rank of the other sign would."""
    torch.manual_seed(0)
    a, omega, P, B = drawn(200, 6)
    dt = torch.exp(torch.empty(200, dtype=F64).uniform_(-7, 0))

    def longest(A):
        return torch.linalg.matrix_norm(discretize(A, B[..., None], dt, rule, dense=True).A_bar, 2)

    A = dplr.matrix(a, omega, P)
    assert longest(A).max() <= 1 + 1e-12
    assert torch.linalg.eigvals(A + 2 * P[..., :, None] * P[..., None, :]).real.max() > 1


# ---- in chunks of time -----------------------------------------------------------------------------------------


def model(d=3, n=6, b=2, t=50, dtype=F64):
    """x, A_bar, B_bar, C, h."""
    torch.manual_seed(0)
    a, omega, P, B = (v.expand(d, -1) for v in dplr.legs(n))
    x, C, h = (torch.randn(*shape, dtype=F64) for shape in ((b, t, d), (d, n), (b, d, n)))
    return [v.to(dtype) for v in (x, *dplr.bilinear_real(a, omega, P, B, steps(d)), C, h)]


@pytest.mark.parametrize("t", [0, 1, 2, 63, 64, 65, 200, 4096])
def test_chunks_are_the_recurrence(t):
    *args, h = model(t=t)
    for state in (None, h):
        got, want = dense.chunked(*args, state), dense.recurrence(*args, state)
        assert got[0].shape == (2, t, 3)
        assert all(error(i, j) <= 1e-11 for i, j in zip(got, want, strict=True) if j.any())
    one, half = dense.chunked(*args, h, chunk_size=1), dense.chunked(*args, h, chunk_size=32)
    assert all(error(i, j) <= 1e-11 for i, j in zip(one, half, strict=True) if j.numel())


def test_the_recurrence_is_that_of_scipy():
    x, A_bar, B_bar, C, _ = model(b=1, d=1)
    system = scipy.signal.dlti(A_bar[0].numpy(), B_bar[0, :, None].numpy(), C.numpy(), [[0]], dt=1)
    _, y, _ = scipy.signal.dlsim(system, torch.cat([x[0], x[0, :1]]).numpy())  # reads the state before each input
    assert error(dense.recurrence(x, A_bar, B_bar, C)[0][0], torch.from_numpy(y[1:])) <= 1e-12


def test_chunks_have_the_state_after_the_end_of_each_row():
    *args, h = model(b=7, t=150)
    lengths = torch.tensor([0, 1, 63, 64, 65, 149, 150])
    y, after = dense.chunked(*args, h, lengths)
    for i, length in enumerate(lengths.tolist()):
        x, *rest = args
        want, end = dense.recurrence(x[i : i + 1, :length], *rest, h[i : i + 1])
        assert error(after[i : i + 1], end) <= 1e-11
        torch.testing.assert_close(y[i : i + 1, :length], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", [1, 23, 130])
def test_gradients_of_chunks(t):
    args = [v.requires_grad_() for v in model(t=t)]

    def gradients(form):
        y, h = form(*args)
        return torch.autograd.grad(y.square().sum() + h.cos().sum(), args)

    for got, want in zip(gradients(dense.chunked), gradients(dense.recurrence), strict=True):
        assert error(got, want) <= 1e-11


@pytest.mark.parametrize("t", [63, 3000])
def test_float32(t):
    *args, h = model(d=16, n=16, b=1, t=t, dtype=torch.float32)
    exact = dense.recurrence(*(v.double() for v in (*args, h)))
    for got, plain, want in zip(dense.chunked(*args, h), dense.recurrence(*args, h), exact, strict=True):
        assert got.dtype == torch.float32
        assert error(got, want) <= 2 * error(plain, want) + 2**-21


# ---- the mixer -------------------------------------------------------------------------------------------------


def mixer(d_model=4, **changes):
    torch.manual_seed(0)
    config = MambaConfig(d_model=d_model, **{"mixer": "s4", "discretization": "bilinear"} | changes)
    made = make_mixer(config).double()
    with torch.no_grad():
        init_mixer(made, config)
    return made


def test_the_mixer_is_the_convolution_with_the_kernel_of_the_paper():
    """Its real blocks and chunks against complex numbers, roots of unity and a Fourier transform."""
    m = mixer(d_state=8, gate=False, use_conv=False)
    with torch.no_grad():
        for p in (m.A_log, m.A_imag, m.P, m.B):
            p.add_(0.3 * torch.randn_like(p))  # no longer LegS
        u = torch.randn(2, 150, 4, dtype=F64)
        x = torch.nn.functional.silu(m.in_proj(u)).transpose(1, 2)

        def pairs(v):  # a real vector in the basis of all n conjugates
            v = torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous()) / math.sqrt(2)
            return torch.cat([v, v.conj()], -1)

        L = torch.complex(-m.A_log.exp(), m.A_imag)
        K = dplr.kernel(torch.cat([L, L.conj()], -1), pairs(m.P), pairs(m.B), pairs(m.C).conj(), m.log_dt.exp(), 150)
        assert K.imag.abs().max() <= 1e-12 * K.real.abs().max()
        y = torch.fft.irfft(torch.fft.rfft(x, 300) * torch.fft.rfft(K.real, 300), 300)[..., :150]
        assert error(m(u)[0], m.out_proj((y + m.D[:, None] * x).transpose(1, 2))) <= 1e-11


def test_without_its_low_rank_s4_is_s4d():
    """State, outputs and parameters have the same meaning: B = 1, and y = 2 Re(C h) read by real numbers."""
    config = MambaConfig(vocab_size=23, d_model=16, n_layer=2, mixer="s4d", s4d_init="legs", discretization="bilinear")
    torch.manual_seed(0)
    diagonal = MambaLM(config).double()
    full = MambaLM(config.replace(mixer="s4", s4d_init="lin")).double()
    weights = diagonal.state_dict()
    for name, v in full.state_dict().items():
        if name.endswith(".C"):
            weights[name] = 2 * (weights[name] * torch.tensor([1.0, -1.0])).flatten(-2)
        elif name.endswith(".B"):
            weights[name] = torch.tensor([1.0, 0.0]).repeat(8).expand_as(v)
        elif name.endswith(".P"):
            weights[name] = torch.zeros_like(v)
    full.load_state_dict(weights)
    ids = torch.randint(23, (2, 100))
    got, want = full(ids), diagonal(ids)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-10, atol=1e-11)
    for i, j in zip(got.state.layers, want.state.layers, strict=True):
        torch.testing.assert_close(i.ssm, j.ssm, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        full.backbone.layers[0].mixer.P[:, 0] = 1
    assert error(full(ids).logits, want.logits) > 1e-3


@pytest.mark.parametrize("rule", ["mamba", "zoh", "bilinear"])
def test_gradients_are_finite_differences(rule):
    m = mixer(d_model=2, d_state=4, expand=1, discretization=rule)
    names, values = zip(*m.named_parameters(), strict=True)
    u = torch.randn(2, 5, 2, dtype=F64, requires_grad=True)
    bounds = torch.tensor([0, 2, 5])

    def run(u, *values):
        parameters = dict(zip(names, values, strict=True))
        y, state = torch.func.functional_call(m, parameters, (u,))
        packed, after = torch.func.functional_call(m, parameters, (u[:1], None, bounds))
        return y, state.ssm, packed, after.ssm

    assert torch.autograd.gradcheck(run, (u, *values), fast_mode=True)


def test_stable_after_steps_far_too_large():
    """Training moves every part of A, and the state stays bounded."""
    m = mixer(d_model=4, d_state=8)
    optimizer = torch.optim.Adam(m.parameters(), lr=0.3)
    before = {name: p.detach().clone() for name, p in m.named_parameters()}
    u = torch.randn(2, 100, 4, dtype=F64)
    for _ in range(5):
        y, _ = m(u)
        optimizer.zero_grad()
        (y - u.roll(20, 1)).square().mean().backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) and not torch.equal(p, before[name]) for name, p in m.named_parameters())
    with torch.no_grad():
        h = m(u)[1].ssm
        for _ in range(3):  # nothing comes in: no state grows
            longer, h = h.norm(dim=-1), m._ssm(torch.zeros(2, 500, 8, dtype=F64), h, None)[1]
            assert (h.norm(dim=-1) <= longer).all()


def test_flops_are_those_of_the_recurrence():
    m = mixer(d_state=8, gate=False, use_conv=False)
    assert m.flops_per_token() == 2 * (4 * 8 + 8 * 4) + 8 * (2 * 8 * 8 + 2 * 8 + 2 * 8)
