"""From continuous to discrete: the rules against exact solutions, and the scan with them on every backend."""

import math
import types

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch

from anymamba import AnymambaError, MambaConfig, MambaLM, MambaState, checkpoint, explain, export, ops, reference
from anymamba.generate import SamplingConfig, generate
from anymamba.kernels import numba_scan
from anymamba.layers import step
from anymamba.layers.inner import takes
from anymamba.reference.discretize import RULES, discretize, factors
from conftest import (
    OPTIONAL,
    assert_law,
    map_tensors,
    outputs_and_gradients,
    run_python,
    scan_arguments,
    to_double,
)

pytestmark = pytest.mark.usefixtures("poison", "two_threads")
KERNEL_RULES = ("zoh", "bilinear", "euler")
rules = pytest.mark.parametrize("rule", KERNEL_RULES)
backends = pytest.mark.parametrize("backend", ["numba", "triton"])


# ---- the rules -------------------------------------------------------------------------------------------------


def system(dense, number, n=3):
    """A stable A, B for one input, and the two as dense arrays."""
    generator = torch.Generator().manual_seed(1)
    make = lambda *s: torch.randn(*s, generator=generator, dtype=number)  # noqa: E731
    if dense:
        A, B = make(n, n) - 2 * torch.eye(n), make(n, 1)
        return A, B, A.numpy(), B.numpy()[:, 0]
    A, B = -make(n).abs().to(number) - 0.3, make(n)
    A = A + 2j * torch.arange(n) if number.is_complex else A
    return A, B, np.diag(A.numpy()), B.numpy()


def march(A, B, rule, dense, steps, u):
    """h(1) from 0 in so many steps; u: inputs at 0, Δ, 2Δ, …, 1."""
    A_bar, B_bar, B_prev = discretize(A, B, 1 / steps, rule, dense=dense)
    h = torch.zeros(A.shape[0], dtype=A.dtype)
    column = lambda v: v[:, 0] if dense else v  # noqa: E731
    for k in range(1, steps + 1):
        h = (A_bar @ h if dense else A_bar * h) + column(B_bar) * u(k / steps)
        if B_prev is not None:
            h = h + column(B_prev) * u((k - 1) / steps)
    return h.numpy()


def order(A, B, rule, dense, exact, u):
    errors = [np.abs(march(A, B, rule, dense, steps, u) - exact).max() for steps in (64, 128)]
    return math.log2(errors[0] / errors[1]), errors[1]


both_forms = pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
numbers = pytest.mark.parametrize("number", [torch.float64, torch.complex128], ids=str)


@numbers
@both_forms
@pytest.mark.parametrize("rule", RULES)
def test_order_for_a_constant_input(rule, dense, number):
    A, B, dense_A, dense_B = system(dense, number)
    exact = np.linalg.solve(dense_A, (scipy.linalg.expm(dense_A) - np.eye(3)) @ dense_B)
    found, error = order(A, B, rule, dense, exact, lambda t: 1.0)
    if rule == "zoh":
        assert error < 1e-10  # torch's matrix_exp has 6e-12 at some sizes of matrix, where scipy's has 1e-16
    else:
        assert found == pytest.approx({"bilinear": 2, "trapezoidal": 2}.get(rule, 1), abs=0.1)


@numbers
@both_forms
@pytest.mark.parametrize("rule", RULES)
def test_order_for_a_smooth_input(rule, dense, number):
    """Sampled at the ends of the steps: second order only where the input before is used."""
    A, B, dense_A, dense_B = system(dense, number)
    u = lambda t: math.cos(3 * t) + t  # noqa: E731
    exact = scipy.integrate.solve_ivp(lambda t, h: dense_A @ h + dense_B * u(t), (0, 1), np.zeros(3, dense_A.dtype),
                                      rtol=1e-12, atol=1e-13).y[:, -1]  # fmt: skip
    assert order(A, B, rule, dense, exact, u)[0] == pytest.approx(2 if rule == "trapezoidal" else 1, abs=0.15)


def test_bilinear_is_second_order_for_inputs_from_the_middle_of_a_step():
    A, B, dense_A, dense_B = system(True, torch.float64)
    exact = scipy.integrate.solve_ivp(lambda t, h: dense_A @ h + dense_B * math.cos(3 * t), (0, 1), np.zeros(3),
                                      rtol=1e-12, atol=1e-13).y[:, -1]  # fmt: skip
    for rule in ("zoh", "bilinear"):
        errors = [np.abs(march(A, B, rule, True, k, lambda t, k=k: math.cos(3 * (t - 0.5 / k))) - exact).max()
                  for k in (64, 128)]  # fmt: skip
        assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("rule", RULES)
def test_stable_where_the_table_says(rule):
    x, y = torch.linspace(-6, 2, 81), torch.linspace(-4, 4, 81)
    z = torch.complex(*torch.meshgrid(x + 1e-3, y + 1e-3, indexing="ij")).to(torch.complex128)
    z = z[(z - 2).abs() > 1e-2]
    said = (1 + z).abs() <= 1 if rule == "euler" else z.real <= 0
    assert torch.equal(factors(z, rule)[0].abs() <= 1, said)
    far = factors(torch.tensor(-1e4, dtype=torch.float64), rule)[0]
    assert float(far) == pytest.approx({"bilinear": -1, "euler": 1 - 1e4}.get(rule, 0), abs=1e-3)


@both_forms
@pytest.mark.parametrize("rule", RULES)
def test_singular_A_and_batches(rule, dense):
    """A double integrator, dense; 0 on the diagonal. A batch of step sizes is each on its own."""
    A = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).double() if dense else torch.tensor([0.0, -1.0]).double()
    B = torch.tensor([[0.0], [1.0]]).double() if dense else torch.ones(2).double()
    sizes = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    batch = discretize(A, B, sizes if dense else sizes[:, None], rule, dense=dense)
    for i, size in enumerate(sizes):
        one = discretize(A, B, float(size), rule, dense=dense)
        for many, single in zip(batch, one, strict=True):
            if single is not None:
                torch.testing.assert_close(many[i], single)
    if rule == "zoh":
        want = [[2.0], [2.0]] if dense else [2.0, 1 - math.exp(-2)]
        torch.testing.assert_close(one.B_bar, torch.tensor(want, dtype=torch.float64))


@both_forms
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_the_rules(rule, dense):
    A, B = (v.requires_grad_() for v in system(dense, torch.complex128)[:2])
    dt = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def outputs(A, B, dt):
        return tuple(v for v in discretize(A, B, dt, rule, dense=dense) if v is not None)

    assert torch.autograd.gradcheck(outputs, (A, B, dt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_order_hold_near_zero(dtype):
    """Values and slopes to all digits from 1e-30 to 30: by the series, and by numbers of twice the length."""
    size = torch.cat([torch.logspace(-30, 1.4, 200, dtype=torch.float64), torch.tensor([1.0, 0.999999])]).to(dtype)
    z = torch.cat([size, -size, torch.zeros(1, dtype=dtype)]).requires_grad_()
    p = factors(z, "zoh")[1]
    (slope,) = torch.autograd.grad(p.sum(), z)
    long = z.detach().numpy().astype(np.longdouble)
    near = np.abs(long) < 0.5
    far = np.where(near, 1, long)
    terms = [long**k / math.factorial(k + 1) for k in range(26)]
    slopes = [k * long ** (k - 1) / math.factorial(k + 1) for k in range(1, 26)]
    want = np.where(near, sum(terms), np.expm1(far) / far)
    want_slope = np.where(near, sum(slopes), (far * np.exp(far) - np.expm1(far)) / far**2)
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(p.detach().numpy(), want.astype(float), rtol=16 * eps)
    np.testing.assert_allclose(slope.numpy(), want_slope.astype(float), rtol=64 * eps)


def test_what_discretize_refuses():
    A, B = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match="rule='tustin' does not exist: choose one of mamba, zoh, bilinear"):
        discretize(A, B, 0.1, "tustin")
    with pytest.raises(ValueError, match=r"A is \(3,\) and B \(3,\).*leave `dense` out for a diagonal A"):
        discretize(A, B, 0.1, dense=True)
    for dense in (False, True):
        A, B = (torch.zeros(4, 3, 3), torch.ones(3, 1)) if dense else (A, B)
        with pytest.raises(ValueError, match=r"dt \(2,\), but they must broadcast"):
            discretize(A, B, [0.1, 0.2], dense=dense)
    with pytest.raises(ValueError, match="A is a str that makes no tensor"):
        discretize("A", B, 0.1)
    with pytest.raises(ValueError, match="dt is a NoneType that makes no tensor"):
        discretize(A, B, None, dense=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dense", [False, True])
def test_discretize_takes_arrays_lists_and_whole_numbers(rule, dense):
    A, B = ([[-1, 1], [0, -2]], [[1], [2]]) if dense else ([-1, -2], [1, 2])
    want = discretize(torch.tensor(A).double(), torch.tensor(B).double(), torch.tensor([0.5, 0.25]).double(), rule,
                      dense=dense)  # fmt: skip
    for make in (lambda v: v, np.array, lambda v: np.array(v, float), torch.tensor, lambda v: np.array(v) + 0j):
        got = discretize(make(A), make(B), np.array([0.5, 0.25]), rule, dense=dense)
        for a, b in zip(got, want, strict=True):
            assert (a is None and b is None) or torch.allclose(
                a.to(torch.complex128), b.to(torch.complex128), atol=1e-6
            )
    mixed = discretize(np.array(A) * 1j, B, 0.5, rule, dense=dense)  # a real B, as it often is
    assert mixed.A_bar.is_complex()
    still = discretize(A, B, 0, rule, dense=dense)
    assert torch.equal(still.A_bar, torch.eye(2) if dense else torch.ones(2))
    assert float(still.B_bar.abs().max()) == 0


def test_a_mode_without_a_bilinear_step():
    assert discretize([2.0], [1.0], 1.0, "bilinear").A_bar.isinf().all()
    with pytest.raises(ValueError, match="2 is an eigenvalue of dt·A, where the rule bilinear has no step"):
        discretize([[2.0]], [[1.0]], 1.0, "bilinear", dense=True)


# ---- the scan of the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("number", [torch.float64, torch.complex128], ids=str)
def test_the_scan_is_the_recurrence(rule, number):
    """One channel, Δ constant: the same as `discretize` and a loop."""
    arguments = scan_arguments(1, 6, 1, 3, dtype=torch.float64, without=OPTIONAL)
    A = torch.complex(arguments["A"], arguments["A"] * 2) if number.is_complex else arguments["A"]
    arguments |= {"A": A, "B": torch.ones(1, 3).double(), "dt": torch.full((1, 6, 1), 0.3, dtype=torch.float64)}
    arguments["dt_softplus"] = False
    A_bar, B_bar, B_prev = discretize(A[0], torch.ones(3, dtype=number), 0.3, rule)
    h, before = torch.zeros(3, dtype=number), 0.0
    for x in arguments["x"].flatten():
        h = A_bar * h + B_bar * x + (0 if B_prev is None else B_prev * before)
        before = x
    final_state = ops.selective_scan(**arguments, discretization=rule)[1][0, 0]
    torch.testing.assert_close(final_state[:3], h)
    assert final_state.shape == (6 if rule == "trapezoidal" else 3,)


@pytest.mark.parametrize("rule", [r for r in RULES if r != "mamba"])
def test_gradients_of_the_scan(rule):
    arguments = scan_arguments(1, 4, 2, 2, dtype=torch.float64)
    arguments["A"] = arguments["A"] * 20  # on both sides of |z| = 1
    if rule == "trapezoidal":
        arguments["initial_state"] = torch.randn(1, 2, 4).double()
    leaves = {k: v.requires_grad_() for k, v in arguments.items() if isinstance(v, torch.Tensor)}

    def scan(*values):
        given = arguments | dict(zip(leaves, values, strict=True))
        return ops.selective_scan(**given, discretization=rule)

    assert torch.autograd.gradcheck(scan, tuple(leaves.values()))


# ---- the kernels -----------------------------------------------------------------------------------------------


def check_law(backend, rule, arguments, slack=4, **extra):
    """Outputs and every gradient of a kernel within the law."""
    if backend == "triton":
        triton = pytest.importorskip("triton")
        if not triton.knobs.runtime.interpret:
            pytest.skip("Triton's interpreter is off (a GPU?)")
    got = outputs_and_gradients(ops.selective_scan, arguments, backend=backend, discretization=rule, **extra)
    plain = outputs_and_gradients(reference.selective_scan, arguments, discretization=rule, **extra)
    exact = outputs_and_gradients(reference.selective_scan, to_double(arguments), discretization=rule, **extra)
    for name in exact:
        assert_law(got[name], plain[name], exact[name], name, slack)


@rules
@backends
@pytest.mark.parametrize(("b", "t", "d", "n"), [(1, 1, 3, 2), (2, 2, 1, 1), (1, 17, 33, 3), (2, 9, 5, 20)])
def test_sizes(backend, rule, b, t, d, n):
    check_law(backend, rule, scan_arguments(b, t, d, n))


@rules
@pytest.mark.parametrize(("b", "t", "d", "n"), [(2, 63, 37, 16), (1, 200, 15, 5), (9, 40, 48, 4), (1, 70, 5, 65)])
def test_larger_sizes_on_the_cpu(rule, b, t, d, n, launches):
    check_law("numba", rule, scan_arguments(b, t, d, n))
    assert launches == ["discretized_forward", "discretized_backward"]


@pytest.mark.parametrize(("t", "n"), [(20, 16), (70, 3), (5, 64)])
def test_pieces_of_time_and_blocks_in_turn(t, n):
    """Triton: more steps than lie between saved states; 70 channels with n = 64 are several blocks a program."""
    check_law("triton", "zoh", scan_arguments(1, t, 70 if n == 64 else 6, n))


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(backend, dtype):
    check_law(backend, "zoh", scan_arguments(2, 8, 18, 3, dtype=dtype))


@backends
@pytest.mark.parametrize(("groups_B", "groups_C"), [(0, 0), (2, 2), (0, None), (None, 0), (None, 2), (5, 0), (5, 5)])
def test_groups(backend, groups_B, groups_C):
    C = scan_arguments(2, 7, 10, 3, groups=groups_C, seed=1)["C"]
    check_law(backend, "bilinear", scan_arguments(2, 7, 10, 3, groups=groups_B) | {"C": C})


@backends
@pytest.mark.parametrize("without", [*((name,) for name in OPTIONAL), OPTIONAL], ids="-".join)
def test_optional_arguments(backend, without):
    check_law(backend, "zoh", scan_arguments(1, 6, 5, 3, without=without))


@backends
@pytest.mark.parametrize("ends", [[0, 0, 7, 7, 24, 26, 26], [0, 26], [0, *range(20, 27)]], ids=str)
def test_packed(backend, ends):
    check_law(backend, "zoh", scan_arguments(1, 26, 6, 3, rows=len(ends) - 1), cu_seqlens=torch.tensor(ends))


@backends
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
@rules
def test_small_and_large_steps(backend, rule, scale):
    """z = Δ A from 1e-7 to some hundreds; Euler's rule grows beyond all numbers there, so a few steps only."""
    arguments = scan_arguments(1, 3, 5, 3, without=("dt_bias",))
    steps = arguments["dt"].abs() * 0.5 * scale
    # one rounding of 1 + z or of 1 - z/2 is multiplied by every step, and e^z rounds its exponent
    check_law(backend, rule, arguments | {"dt": steps, "dt_softplus": False}, slack=max(8, min(scale, 100)))


@backends
def test_tiny_steps_add_up(backend):
    """600 steps of |z| = 1e-6: what the state keeps, and takes in, to some units in the last place."""
    t = 600 if backend == "numba" else 60
    ones = torch.ones(1, t, 1)
    _, h = ops.selective_scan(ones, ones * 1e-6, -torch.ones(1, 1), ones, ones, initial_state=torch.ones(1, 1, 1),
                              backend=backend, discretization="zoh")  # fmt: skip
    assert float(h) == pytest.approx(1.0, abs=1e-5)  # it is at its rest: A h + B x = 0
    _, h = ops.selective_scan(ones, ones * 1e-6, -torch.ones(1, 1), ones, ones, backend=backend, discretization="zoh")
    assert float(h) == pytest.approx(-math.expm1(-t * 1e-6), rel=1e-5)


@backends
@pytest.mark.parametrize("shape", [(2, 0, 6, 3), (0, 4, 6, 3)], ids=["t=0", "b=0"])
@pytest.mark.parametrize("groups", [None, 0, 2])
def test_of_nothing(backend, shape, groups):
    check_law(backend, "zoh", scan_arguments(*shape, groups=groups))


@pytest.mark.parametrize("backend", ["reference", *("numba", "triton")])
@pytest.mark.parametrize("rule", ["zoh", "trapezoidal"])
@pytest.mark.parametrize("cut", [1, 7])
def test_split_is_whole_and_packed_is_one_by_one(backend, rule, cut):
    backend = "reference" if rule == "trapezoidal" else backend
    arguments = scan_arguments(2, 12, 5, 3)
    if rule == "trapezoidal":
        arguments["initial_state"] = torch.randn(2, 5, 6)
    options = {"discretization": rule, "backend": backend}
    y, h = ops.selective_scan(**arguments, **options)
    timed = ("x", "dt", "B", "C", "z")
    first, middle = ops.selective_scan(**arguments | {k: arguments[k][:, :cut] for k in timed}, **options)
    rest = arguments | {k: arguments[k][:, cut:] for k in timed} | {"initial_state": middle}
    second, last = ops.selective_scan(**rest, **options)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(last, h)
    packed = arguments | {k: arguments[k].flatten(0, 1)[None] for k in timed}
    for got, want in zip(ops.selective_scan(**packed, cu_seqlens=torch.tensor([0, 12, 24]), **options), (y, h),
                         strict=True):  # fmt: skip
        torch.testing.assert_close(got.view(want.shape), want)
    *_, states = ops.selective_scan(**arguments, return_states=cut, **options)
    torch.testing.assert_close(states[:, 0], middle)
    state = arguments["initial_state"].clone()
    token = {k: arguments[k][:, 0] for k in timed} | {k: arguments[k] for k in ("A", "D", "dt_bias", "dt_softplus")}
    torch.testing.assert_close(ops.selective_step_(state, **token, **options), y[:, 0])


@pytest.mark.parametrize(("groups", "cu_seqlens"), [(0, None), (2, torch.tensor([0, 2, 2, 5]))])
def test_opcheck(groups, cu_seqlens, monkeypatch):
    # opcheck compares two runs, also in the slots of `saved` that no chunk writes or reads
    monkeypatch.setattr(numba_scan, "torch", types.SimpleNamespace(**vars(torch) | {"empty": torch.zeros}))
    v = scan_arguments(1, 5, 6, 3, groups=groups, rows=1 if cu_seqlens is None else 3)
    inputs = [v["x"], v["dt"].abs(), v["A"], v["B"], v["C"]]
    op = torch.ops.anymamba.discretized_scan.default
    torch.library.opcheck(op, (*inputs, v["initial_state"], cu_seqlens, "zoh", False, "numba"))
    leaves = [u.requires_grad_() for u in (*inputs, v["initial_state"])]
    torch.library.opcheck(op, (*leaves, cu_seqlens, "zoh", True, "numba"))
    inputs = [u.detach() for u in inputs]
    y, final_state, saved = op(*inputs, None, cu_seqlens, "zoh", True, "numba")
    for d_state in (None, torch.ones_like(final_state)):
        torch.library.opcheck(torch.ops.anymamba.discretized_scan_backward.default,
                              (torch.ones_like(y), d_state, *inputs, cu_seqlens, "zoh", saved, "numba"))  # fmt: skip


def test_the_shape_of_what_triton_saves():
    triton_discretized = pytest.importorskip("anymamba.kernels.triton_discretized")
    if not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off (a GPU?)")
    for b, t, d, n, groups in [(2, 33, 40, 5, 2), (1, 66, 10, 70, 1)]:
        x, A, B = torch.zeros(b, t, d), torch.zeros(d, n), torch.zeros(b, t, groups, n)
        saved = triton_discretized.discretized_scan(x, x, A, B, B, None, None, "zoh", True)[2]
        assert saved.shape == triton_discretized.saved_shape(x.shape, A.shape, groups, b)


def test_what_the_scan_refuses_and_explains():
    arguments = scan_arguments(1, 4, 3, 2)
    with pytest.raises(AnymambaError, match="discretization is 'tustin', but it must be one of mamba, zoh"):
        ops.selective_scan(**arguments, discretization="tustin")
    with pytest.raises(AnymambaError, match="backend='numba' does not compute trapezoidal: use backend=None"):
        ops.selective_scan(**arguments | {"initial_state": None}, discretization="trapezoidal", backend="numba")
    with pytest.raises(AnymambaError, match=r"initial_state is \(1, 3, 2\).* \(1, 3, 4\)"):
        ops.selective_scan(**arguments, discretization="trapezoidal")
    with pytest.raises(AnymambaError, match="backend='cuda' cannot run here: it needs an NVIDIA GPU, and x is on cpu"):
        ops.selective_scan(**arguments, discretization="zoh", backend="cuda")
    with pytest.raises(AnymambaError, match=r"cu_seqlens is \[0, 3\], but it must start at 0"):
        ops.selective_scan(**arguments, discretization="zoh", cu_seqlens=torch.tensor([0, 3]))
    inputs = [arguments[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    with pytest.raises(AnymambaError, match="rule='zoh' with backend='numba', but only the CUDA kernels"):
        torch.ops.anymamba.selective_scan(*inputs, True, None, None, False, "numba", "zoh")
    leaves = map_tensors(lambda v: v.requires_grad_(), arguments)
    y, _ = ops.selective_scan(**leaves, discretization="zoh", backend="numba")
    (first,) = torch.autograd.grad(y.sum(), leaves["dt"], create_graph=True)
    with pytest.raises(AnymambaError, match="discretized_scan cannot be differentiated twice"):
        first.sum().backward()
    assert explain("cpu", torch.float32, "discretized_scan")[0] == "numba"
    assert explain("cpu", torch.float64, "discretized_scan")[0] == "reference"


def test_the_choice_on_a_gpu_names_the_reason(monkeypatch):
    from anymamba import backends as choice

    monkeypatch.setattr(choice, "_missing_triton", lambda device: None)
    monkeypatch.setattr(choice, "_missing_cuda", lambda device: None)
    assert explain("cuda", torch.float32, "discretized_scan")[0] == "cuda"
    assert explain("cuda", torch.float32, "time_invariant_scan")[0] == "triton"
    monkeypatch.setattr(choice, "_missing_cuda", lambda device: "no driver")
    backend, reason = explain("cuda", torch.float32, "discretized_scan")
    assert (backend, "not CUDA C++: no driver" in reason) == ("triton", True)


# ---- models ----------------------------------------------------------------------------------------------------


def small(rule):
    torch.manual_seed(0)
    large_steps = {"dt_min": 0.3, "dt_max": 1}  # at which the rules differ
    return MambaLM(MambaConfig(d_model=32, n_layer=2, d_state=5, vocab_size=31, discretization=rule, **large_steps))


@rules
def test_a_model_reads_in_parts_steps_and_trains(rule):
    model, ids = small(rule), torch.arange(22).view(2, 11) % 31
    usual = small("mamba")
    usual.load_state_dict(model.state_dict())
    with torch.no_grad():
        whole = model(ids).logits
        assert (usual(ids).logits - whole).abs().max() > 1e-4
        state, parts = MambaState.zeros(model.config, 2), []
        for part in (ids[:, :6], *ids[:, 6:].split(1, 1)):
            out = model(part, state=state)
            state = out.state
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    mixer = model.backbone.layers[0].mixer
    xz = torch.randn(2, 11, 2 * mixer.config.d_inner, requires_grad=True)
    assert takes(usual.backbone.layers[0].mixer, xz)
    assert not takes(mixer, xz)
    assert step.block_weights(usual.backbone.layers[0]) is not None
    assert step.block_weights(model.backbone.layers[0]) is None
    assert model.fingerprint() != usual.fingerprint()

    (written,) = generate(model, [ids[0].tolist()], max_new_tokens=4, sampling=SamplingConfig(temperature=0))
    text = torch.tensor([[*ids[0].tolist(), *written.ids]])
    best = model(text).logits[0, 10:-1, :31].argmax(-1)
    assert best.tolist() == written.ids  # each is the best after those before it
    double = small(rule).double()
    double.load_state_dict(model.state_dict())
    for v in (model, double):
        v(ids, labels=ids).loss.backward()
    for (name, p), q in zip(model.named_parameters(), double.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_model_is_exported():
    model, ids = small("zoh").eval(), torch.arange(3)[None]
    state = export.flatten(MambaState.zeros(model.config, 1))
    with torch.no_grad():
        want = model(ids).logits[..., :31]
        for plain in (False, True):
            got = export.chunk(model, 3, plain=plain).module()(ids, *state)[0]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_files_keep_the_rule_or_refuse_it(tmp_path):
    model = small("bilinear")
    model.save_pretrained(tmp_path / "native")
    assert MambaLM.from_pretrained(tmp_path / "native").config.discretization == "bilinear"
    for form in ("hf", "state-spaces"):
        with pytest.raises(AnymambaError, match=f"format {form} is for .*discretization='bilinear'"):
            checkpoint.save(model, tmp_path / form, form)
    pytest.importorskip("gguf")
    with pytest.raises(AnymambaError, match="format gguf is for the published Mamba"):
        checkpoint.save(model, tmp_path / "model.gguf", "gguf")


@pytest.mark.parametrize("bad", ["trapezoidal", "tustin", None])
def test_config_refuses(bad):
    with pytest.raises(AnymambaError, match=r"discretization=.*one of mamba, zoh, bilinear, euler"):
        MambaConfig(discretization=bad)


# ---- compiling for a GPU that is not there ---------------------------------------------------------------------


def compile_kernels():
    """The Triton kernels for sm_90; in a process without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from anymamba.kernels import triton_discretized as kernels

    floats = ("x", "dt", "y", "dy", "dx", "ddt", "A", "B", "C", "first", "last", "saved", "scratch", "dA", "dB", "dC",
              "B_fixed", "C_fixed", "dB_fixed", "dC_fixed", "dfirst")  # fmt: skip
    varying, constant = ("B_fixed", "C_fixed", "dB_fixed", "dC_fixed", "bounds"), ("dB", "dC", "first", "saved")
    forward, backward = kernels.discretized_forward, kernels.discretized_backward
    cases = [(forward, 0, varying), (forward, 1, constant), (backward, 0, varying), (backward, 1, constant),
             (backward, 2, varying)]  # fmt: skip
    for kernel, rule, absent in cases:
        given = {"n": 5, "N": 8, "LANES": 32, "KEEP": 16, "RULE": rule} | dict.fromkeys(absent)
        if kernel is backward and given.pop("saved", ()) is None:
            given["last"] = None  # the gradient of the last state, which there may not be
        given = {k: v for k, v in given.items() if k in kernel.arg_names}
        kinds = dict.fromkeys(floats, "*fp32") | {"bounds": "*i64"}
        signature = {k: "constexpr" if k in given else kinds.get(k, "i32") for k in kernel.arg_names}
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in given.items()})
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})


def test_triton_kernels_compile(tmp_path):
    triton = pytest.importorskip("triton")
    if not hasattr(triton, "compile"):
        pytest.skip("this triton does not compile")
    code = f"import sys; sys.path.insert(0, {str(__file__).rpartition('/')[0]!r}); import test_discretize as t; t.compile_kernels()"  # noqa: E501
    done = run_python(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_matrices_without_dense_are_refused():
    with pytest.raises(ValueError, match="dense=True"):
        discretize(torch.eye(2), torch.ones(2, 1), 0.1)
