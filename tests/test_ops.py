"""The kernels against the reference: values and gradients, every dtype, odd sizes, strange inputs and surroundings.

The law: the error against the float64 reference is at most twice that of the plain torch loop in the same dtype.
"""

import itertools
import multiprocessing
import re
import threading
import types

import pytest
import torch

from anymamba import AnymambaError, backends, explain, reference
from anymamba.kernels import numba_scan
from anymamba.ops import add_rms_norm, causal_conv1d, causal_conv1d_step_, linear, selective_scan, selective_step_
from conftest import (
    OPTIONAL,
    assert_law,
    conv_arguments,
    cotangents,
    map_tensors,
    outputs_and_gradients,
    run_python,
    scan_arguments,
    to_double,
)

pytestmark = pytest.mark.usefixtures("poison", "two_threads")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_law(op, arguments, slack=4, **extra):
    """Outputs and every gradient of a kernel within the law."""
    plain_op = getattr(reference, op.__name__)
    got = outputs_and_gradients(op, arguments, backend="numba", **extra)
    plain = outputs_and_gradients(plain_op, arguments, **extra)
    exact = outputs_and_gradients(plain_op, to_double(arguments), **extra)
    for name in exact:
        assert_law(got[name], plain[name], exact[name], name, slack)


# ---- selective scan: values and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "d", "n"), [(1, 130, 3), (2, 37, 16), (63, 17, 20), (500, 15, 1), (500, 34, 16)])
def test_scan_lengths(t, d, n, dtype, launches):
    check_law(selective_scan, scan_arguments(2, t, d, n, dtype=dtype))
    assert launches == ["scan_forward", "scan_backward"]


@pytest.mark.parametrize(("d", "n"), list(itertools.product([1, 15, 16, 17, 37, 130], [1, 3, 16, 20])))
def test_scan_sizes(d, n):
    check_law(selective_scan, scan_arguments(1, 5, d, n, seed=d))


@pytest.mark.parametrize("n", [64, 257])
def test_scan_large_state(n):
    check_law(selective_scan, scan_arguments(1, 70, 5, n))


@pytest.mark.parametrize("b", [1, 3, 8, 9])
def test_scan_batches(b):
    check_law(selective_scan, scan_arguments(b, 40, 48, 4))


@pytest.mark.parametrize("without", [c for k in range(1, 5) for c in itertools.combinations(OPTIONAL, k)], ids="-".join)
def test_scan_optional_arguments(without):
    check_law(selective_scan, scan_arguments(2, 34, 20, 3, without=without))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scan_step_size_without_softplus(dtype):
    arguments = scan_arguments(2, 40, 18, 4, dtype=dtype)
    check_law(selective_scan, arguments | {"dt": arguments["dt"].abs() / 8, "dt_bias": None, "dt_softplus": False})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [0, 1, 2, 4, 40])
def test_scan_groups(groups, dtype):
    check_law(selective_scan, scan_arguments(2, 35, 40, 3, groups=groups, dtype=dtype))


@pytest.mark.parametrize(("groups_B", "groups_C"), [(0, None), (None, 0), (None, 3), (3, None), (0, 3), (1, 3)])
def test_scan_B_and_C_of_different_kinds(groups_B, groups_C):
    arguments = scan_arguments(2, 35, 51, 3, groups=groups_B)
    C = scan_arguments(2, 35, 51, 3, groups=groups_C, seed=1)["C"]
    if groups_B == 1:
        with pytest.raises(ValueError, match=r"C is .* as many groups as B"):
            selective_scan(**arguments | {"C": C})
    else:
        check_law(selective_scan, arguments | {"C": C})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ends", [[0, 90], [0, 1, 3, 66, 90], [0, 0, 7, 7, 7, 90, 90], [0, *range(1, 91)]], ids=str)
def test_scan_packed(ends, dtype):
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    arguments = scan_arguments(1, 90, 33, 4, dtype=dtype, rows=len(ends) - 1)
    check_law(selective_scan, arguments, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("groups", [None, 0, 2])
def test_scan_of_nothing(groups):
    arguments = scan_arguments(2, 0, 6, 3, groups=groups)
    y, final_state = selective_scan(**arguments, backend="numba")
    assert y.shape == (2, 0, 6)
    assert torch.equal(final_state, arguments["initial_state"])
    check_law(selective_scan, arguments)
    empty = torch.tensor([0, 0, 0])
    check_law(selective_scan, scan_arguments(1, 0, 6, 3, groups=groups, rows=2), cu_seqlens=empty)


def test_scan_empty_batch():
    y, final_state = selective_scan(**scan_arguments(0, 4, 6, 3), backend="numba")
    assert (y.shape, final_state.shape) == ((0, 4, 6), (0, 6, 3))


def _slices(v):
    big = torch.zeros(*(2 * s + 1 for s in v.shape), dtype=v.dtype)
    cut = big[tuple(slice(1, None, 2) for _ in v.shape)]
    return cut.copy_(v)


def _transposed(v):
    return v if v.dim() < 2 else v.transpose(-1, -2).contiguous().transpose(-1, -2)


def _rows_apart(v):
    return torch.cat([v, v], -1)[..., : v.shape[-1]]


@pytest.mark.parametrize("layout", [_slices, _transposed, _rows_apart])
@pytest.mark.parametrize("groups", [None, 0, 2])
def test_scan_layouts(layout, groups, launches):
    arguments = scan_arguments(2, 35, 34, 3, groups=groups)
    dense = selective_scan(**arguments, backend="numba")
    strided = selective_scan(**map_tensors(layout, arguments), backend="numba")
    assert all(torch.equal(i, j) for i, j in zip(dense, strided, strict=True))

    def through_layout(**leaves):  # gradients flow through the views, and come in as views
        y, final_state = selective_scan(**map_tensors(layout_of, leaves), backend="numba")
        return layout_of(y), layout_of(final_state)

    layout_of = layout if layout is not _slices else lambda v: v.flip(0).flip(0)
    want = outputs_and_gradients(selective_scan, arguments, backend="numba")
    got = outputs_and_gradients(through_layout, arguments)
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert "scan_backward" in launches


def test_scan_expanded_inputs():
    arguments = scan_arguments(2, 35, 34, 3)
    one = map_tensors(lambda v: v[:1].expand(v.shape), arguments)
    check_law(selective_scan, one)
    leaf = torch.ones((), requires_grad=True)  # the gradient that .sum() sends back has stride 0
    y, _ = selective_scan(**arguments | {"x": leaf.expand(2, 35, 34)}, backend="numba")
    y.sum().backward()
    exact = torch.ones((), dtype=torch.float64, requires_grad=True)
    selective_scan(**to_double(arguments) | {"x": exact.expand(2, 35, 34)})[0].sum().backward()
    assert leaf.grad == pytest.approx(float(exact.grad), rel=1e-5)


@pytest.mark.parametrize(
    "mixed",
    [{"x": torch.bfloat16}, {"dt": torch.bfloat16}, {"B": torch.bfloat16, "C": torch.float16}, {"z": torch.float16},
     {"x": torch.float16, "z": torch.bfloat16}, {"x": torch.bfloat16, "A": torch.bfloat16, "D": torch.bfloat16},
     {"initial_state": torch.bfloat16}, {"dt": torch.float64}],
    ids=str,
)  # fmt: skip
def test_scan_mixed_dtypes(mixed, launches):
    arguments = scan_arguments(2, 20, 18, 3)
    arguments |= {k: arguments[k].to(v) for k, v in mixed.items()}
    y, final_state = selective_scan(**arguments)
    assert (y.dtype, final_state.dtype) == (arguments["x"].dtype, torch.float32)
    assert launches
    if torch.float64 not in mixed.values():  # the plain loop would compute that in float64
        check_law(selective_scan, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("raw", [-30.0, -8.0, 0.0, 8.0, 20.0, 30.0])
def test_scan_large_and_tiny_steps(raw, dtype):
    arguments = scan_arguments(1, 40, 18, 4, dtype=dtype, without=("dt_bias",))
    arguments["dt"] = torch.full_like(arguments["dt"], raw)
    # e^v as 2^(v / ln 2) rounds its exponent, which costs up to |v| units in the last place
    check_law(selective_scan, arguments, slack=max(4, abs(raw)))
    check_law(selective_scan, arguments | {"initial_state": None, "D": None}, slack=max(4, abs(raw)))


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scan_bad_numbers_stay_visible(name, bad):
    """NaN reaches exactly the outputs that it reaches in the reference; an infinity never becomes a wrong number."""
    arguments = scan_arguments(2, 9, 18, 3)
    arguments[name][(0,) * arguments[name].dim()] = bad
    got, want = selective_scan(**arguments, backend="numba"), reference.selective_scan(**arguments)
    assert bad == bad or got[0].isnan().any()
    for i, j in zip(got, want, strict=True):
        if bad != bad:
            assert torch.equal(i.isnan(), j.isnan())
        good = j.isfinite() & i.isfinite()
        torch.testing.assert_close(i[good], j[good], rtol=1e-4, atol=1e-5)
        if name not in ("z", "A", "dt", "dt_bias"):  # through exp an infinity may saturate at 1e38
            assert torch.equal(i.isfinite(), j.isfinite())


def test_scan_changes_no_argument():
    arguments = scan_arguments(2, 9, 18, 3)
    before = map_tensors(torch.clone, arguments)
    y, final_state = selective_scan(**map_tensors(lambda v: v.requires_grad_(), arguments), backend="numba")
    (y.sum() + final_state.sum()).backward()
    assert all(torch.equal(before[k], v) for k, v in arguments.items() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("groups", [None, 0, 2])
@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_scan_states(k, groups, backend):
    """The states on the way are those of shorter scans, and gradients go through them."""
    arguments = scan_arguments(2, 7, 6, 5, groups)
    y, h, states = selective_scan(**arguments, backend=backend, return_states=k)
    assert torch.equal(states[:, -1], h)
    for i, end in enumerate([*range(k, 7, k), 7]):
        cut = {
            n: v[:, :end] if n in ("x", "dt", "z") or (n in "BC" and groups != 0) else v for n, v in arguments.items()
        }
        short_y, short = reference.selective_scan(**cut)
        torch.testing.assert_close(states[:, i], short, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(y[:, :end], short_y, rtol=1e-5, atol=1e-5)
    assert states.shape[1] == i + 1

    x = arguments["x"].requires_grad_()
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad((selective_scan(**arguments, backend=backend, return_states=k)[2] * weights).sum(), x)
    ends = [*range(k, 7, k), 7]
    total = 0
    for i, end in enumerate(ends):
        cut = {
            n: v[:, :end] if n in ("x", "dt", "z") or (n in "BC" and groups != 0) else v for n, v in arguments.items()
        }
        total = total + (reference.selective_scan(**cut)[1] * weights[:, i]).sum()
    torch.testing.assert_close(got, torch.autograd.grad(total, x)[0], rtol=1e-4, atol=1e-5)


def test_scan_states_of_nothing_and_errors():
    arguments = scan_arguments(2, 0, 6, 5)
    y, h, states = selective_scan(**arguments, return_states=4)
    assert (y.shape, h.shape, states.shape) == ((2, 0, 6), (2, 6, 5), (2, 0, 6, 5))
    for k in (0, -1, 2.0, True):
        with pytest.raises(AnymambaError, match=r"return_states=.*whole number"):
            selective_scan(**scan_arguments(), return_states=k)
    packed = scan_arguments(1, 5, rows=2)
    with pytest.raises(AnymambaError, match="one by one"):
        selective_scan(**packed, cu_seqlens=torch.tensor([0, 2, 5]), return_states=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_is_the_scan_of_one(dtype, launches):
    arguments = scan_arguments(3, 1, 18, 3, dtype=dtype)
    want, want_state = selective_scan(**arguments)
    state = arguments.pop("initial_state")
    squeezed = {k: v.squeeze(1) if k in ("x", "dt", "B", "C", "z") else v for k, v in arguments.items()}
    got = selective_step_(state, **squeezed)
    assert torch.equal(got, want.squeeze(1))
    assert torch.equal(state, want_state)
    assert launches == ["scan_step"] * 2


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("dt_bias",), ("initial_state",), OPTIONAL])
@pytest.mark.parametrize(("n", "groups"), [(1, None), (16, 3), (20, None), (33, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_step_kernel(dtype, n, groups, without, launches):
    """One token without gradients has a kernel of its own; it is held to the reference as the scan is."""
    arguments = scan_arguments(3, 1, 18, n, dtype=dtype, groups=groups, without=without)
    got = selective_scan(**arguments)
    assert launches == ["scan_step"]
    plain = selective_scan(**arguments, backend="reference")
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for g, w, e in zip(got, plain, selective_scan(**exact), strict=True):
        assert_law(g, w, e)


# ---- gradients by finite differences ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"])
@pytest.mark.parametrize("groups", [None, 0, 2])
def test_scan_gradient_by_finite_differences(name, groups):
    """The slope along one random direction, from the float64 reference, against the float32 kernel's gradient."""
    arguments = scan_arguments(2, 37, 18, 3, groups=groups)
    gradient = outputs_and_gradients(selective_scan, arguments, backend="numba")["d" + name].double()
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(step):
        moved = to_double(arguments)
        moved[name] = moved[name] + step * direction
        outputs = reference.selective_scan(**moved)
        return sum((c * v).sum() for c, v in zip(cotangents(*outputs), outputs, strict=True))

    h = 1e-5
    slope = (loss(h) - loss(-h)) / (2 * h)
    # float32 rounding of the terms of the dot product, which may cancel
    rounding = torch.finfo(torch.float32).eps * float((gradient * direction).abs().sum())
    assert abs(float((gradient * direction).sum() - slope)) <= 20 * rounding + 1e-7 * abs(float(slope))


# ---- convolution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("t", [1, 2, 63, 130])
def test_conv_widths_and_lengths(t, w, dtype, launches):
    check_law(causal_conv1d, conv_arguments(2, t, 19, w, dtype=dtype))
    assert launches == ["conv_forward", "conv_backward"]


@pytest.mark.parametrize("d", [1, 15, 16, 17, 37, 130])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_conv_sizes(d, activation):
    check_law(causal_conv1d, conv_arguments(2, 9, d, 4, activation=activation))


@pytest.mark.parametrize(("t", "w"), [(1, 100), (63, 70), (64, 65), (150, 100), (3, 7)])
def test_conv_wider_than_a_chunk_or_the_sequence(t, w):
    check_law(causal_conv1d, conv_arguments(2, t, 18, w))


@pytest.mark.parametrize("without", [("bias",), ("initial_state",), ("bias", "initial_state")], ids="-".join)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_conv_optional_arguments(without, activation):
    check_law(causal_conv1d, conv_arguments(2, 70, 18, 4, activation=activation, without=without))


@pytest.mark.parametrize("w", [1, 2, 4, 7])
@pytest.mark.parametrize("ends", [[0, 90], [0, 1, 3, 66, 90], [0, 0, 7, 7, 7, 90, 90], [0, *range(1, 91)]], ids=str)
def test_conv_packed(ends, w):
    arguments = conv_arguments(1, 90, 18, w, rows=len(ends) - 1)
    check_law(causal_conv1d, arguments, cu_seqlens=torch.tensor(ends))


@pytest.mark.parametrize("layout", [_slices, _transposed, _rows_apart])
def test_conv_layouts(layout):
    arguments = conv_arguments(2, 70, 18, 4)
    dense = causal_conv1d(**arguments, backend="numba")
    strided = causal_conv1d(**map_tensors(layout, arguments), backend="numba")
    assert all(torch.equal(i, j) for i, j in zip(dense, strided, strict=True))
    check_law(causal_conv1d, map_tensors(lambda v: v[:1].expand(v.shape), arguments))


def test_conv_mixed_dtypes():
    arguments = conv_arguments(2, 9, 18, 4)
    for name, dtype in [("x", torch.bfloat16), ("weight", torch.float16), ("initial_state", torch.bfloat16)]:
        mixed = arguments | {name: arguments[name].to(dtype)}
        if name == "x":  # inputs before the first are inputs: they have x's dtype
            mixed["initial_state"] = mixed["initial_state"].to(dtype)
        check_law(causal_conv1d, mixed)


def test_conv_of_nothing():
    arguments = conv_arguments(2, 0, 18, 4)
    y, final_state = causal_conv1d(**arguments, backend="numba")
    assert y.shape == (2, 0, 18)
    assert torch.equal(final_state, arguments["initial_state"])
    check_law(causal_conv1d, arguments)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_state"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_conv_bad_numbers_stay_visible(name, bad):
    arguments = conv_arguments(2, 9, 18, 4, activation=None)
    arguments[name][(0,) * arguments[name].dim()] = bad
    for i, j in zip(causal_conv1d(**arguments, backend="numba"), reference.causal_conv1d(**arguments), strict=True):
        torch.testing.assert_close(i, j, equal_nan=True)


@pytest.mark.parametrize("w", [1, 4])
def test_conv_step_is_the_convolution_of_one(w, launches):
    arguments = conv_arguments(3, 1, 18, w)
    want, want_state = causal_conv1d(**arguments)
    state, x = arguments.pop("initial_state"), arguments.pop("x")
    got = causal_conv1d_step_(state, x.squeeze(1), **arguments)
    assert torch.equal(got, want.squeeze(1))
    assert torch.equal(state, want_state)
    assert launches == ["conv_forward"] * 2


# ---- residual add and norm -------------------------------------------------------------------------------------


def norm_arguments(shape=(2, 9, 37), dtype=torch.float32, residual=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    arguments = {"x": make(*shape).to(dtype), "residual": make(*shape), "weight": make(shape[-1])}
    return arguments if residual else arguments | {"residual": None}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 15), (2, 63, 16), (3, 2, 17), (1, 500, 130), (4,), (2, 0, 5)], ids=str
)
def test_norm(shape, residual, dtype, launches):
    check_law(add_rms_norm, norm_arguments(shape, dtype, residual), dtype=dtype)
    assert launches == ["norm_forward", "norm_backward"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_to_another_dtype(dtype):
    for x_dtype in DTYPES:
        got, total = add_rms_norm(**norm_arguments(dtype=x_dtype), dtype=dtype, backend="numba")
        want, want_total = add_rms_norm(**norm_arguments(dtype=x_dtype), dtype=dtype, backend="reference")
        assert (got.dtype, total.dtype) == (dtype, torch.float32)
        assert torch.equal(total, want_total)
        torch.testing.assert_close(got, want)


def test_norm_layouts_and_bad_numbers():
    arguments = norm_arguments()
    strided = {k: _slices(v) for k, v in arguments.items()}
    for i, j in zip(add_rms_norm(**strided, backend="numba"), add_rms_norm(**arguments, backend="numba"), strict=True):
        assert torch.equal(i, j)
    arguments["x"][0, 0, 0], arguments["x"][0, 1, 0] = float("nan"), float("inf")
    got, want = (add_rms_norm(**arguments, backend=backend) for backend in ("numba", "reference"))
    for i, j in zip(got, want, strict=True):
        torch.testing.assert_close(i, j, equal_nan=True)


def test_norm_errors():
    with pytest.raises(AnymambaError, match=re.escape("add_rms_norm: weight is (3,) torch.float32, but it must be")):
        add_rms_norm(Z(2, 4), None, Z(3))
    with pytest.raises(AnymambaError, match=re.escape("residual is (2, 3) torch.float32, but it must have the sha")):
        add_rms_norm(Z(2, 4), Z(2, 3), Z(4))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_norm(dtype, residual):
    a = norm_arguments(dtype=dtype, residual=residual)
    args = (a["x"], a["residual"], a["weight"], 1e-5, torch.bfloat16, "numba")
    op = torch.ops.anymamba.add_rms_norm.default
    torch.library.opcheck(op, args)
    torch.library.opcheck(op, requiring_grad(args))
    out, total, inverse = op(*args)
    for dtotal in (None, torch.ones_like(total)):
        back = (torch.ones_like(out), dtotal, total, inverse, a["weight"], dtype, "numba")
        torch.library.opcheck(torch.ops.anymamba.add_rms_norm_backward.default, back)


# ---- a few rows times a matrix ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "outputs"), [(1, 1), (16, 3), (37, 130), (64, 65), (200, 64)])
@pytest.mark.parametrize("rows", [2, 4, 7, 8])
def test_linear(rows, k, outputs, dtype, launches):
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(1, rows, k, generator=generator).to(dtype)
    weight, bias = torch.randn(outputs, k, generator=generator).to(dtype), torch.randn(outputs).to(dtype)
    with torch.no_grad():
        for b in (None, bias):
            got, plain = linear(x, weight, b), torch.nn.functional.linear(x, weight, b)
            exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            assert_law(got, plain, exact)
            for i in range(rows):
                assert (linear(x[:, i], weight, b)[0] == got[0, i]).all(), "a row does not depend on those beside it"
    assert launches == ["linear_rows"] * (2 + 2 * rows)


def test_linear_where_torch_is_as_good(launches):
    x, weight = torch.randn(1, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    with torch.no_grad():
        for a, w in (
            (x.double(), weight.double()),
            (x.repeat(17, 1).float(), weight.float()),
            (x.repeat(9, 1), weight),
            (x.repeat(65, 1).half(), weight.half()),
            (x[:0], weight),
            (x, torch.randn(8, 5).bfloat16().t()),
        ):
            torch.testing.assert_close(linear(a, w), torch.nn.functional.linear(a, w))
    assert linear(x.requires_grad_(), weight).grad_fn is not None
    with pytest.raises(RuntimeError, match=r"shape|size"), torch.no_grad():
        linear(x[:, :7], weight)
    assert launches == []


# ---- long sums -------------------------------------------------------------------------------------------------


def _ones(*outputs):
    return [torch.ones(v.shape, dtype=torch.float64) for v in outputs]


@pytest.mark.parametrize("op", ["scan", "conv"])
def test_sums_over_many_steps(op):
    """Gradients of D, biases and conv weights are sums over time: rounding must not grow with the length."""
    if op == "scan":
        arguments = scan_arguments(1, 4096, 18, 2, without=("z",))
        check_law(selective_scan, arguments | {"x": arguments["x"] + 1}, cotangents=_ones)
    else:
        arguments = conv_arguments(1, 20_000, 18)
        check_law(causal_conv1d, arguments | {"x": arguments["x"] + 1}, cotangents=_ones)


# ---- determinism and threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 3])
def test_same_bits_at_a_fixed_thread_count(b):
    for op, arguments in [
        (selective_scan, scan_arguments(b, 100, 100, 4)),
        (causal_conv1d, conv_arguments(b, 100, 100)),
    ]:
        first = outputs_and_gradients(op, arguments, backend="numba")
        for _ in range(5):
            again = outputs_and_gradients(op, arguments, backend="numba")
            assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("b", [1, 3])
def test_thread_counts_agree(b):
    arguments = scan_arguments(b, 100, 100, 4)
    plain = outputs_and_gradients(reference.selective_scan, arguments)
    exact = outputs_and_gradients(reference.selective_scan, to_double(arguments))
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        got = outputs_and_gradients(selective_scan, arguments, backend="numba")
        for name in exact:
            assert_law(got[name], plain[name], exact[name], f"{name} with {threads} threads")


# ---- which backend, and why ------------------------------------------------------------------------------------


def test_explain():
    assert explain() == ("numba", "CPU kernels compiled by Numba")
    name, reason = explain(dtype=torch.float64)
    assert name == "reference"
    assert "float64" in reason
    name, reason = explain("meta")
    assert name == "reference"
    assert "no kernel for meta" in reason


def test_explain_where_there_is_a_gpu(monkeypatch):
    why = {"triton": None, "cuda": None}
    monkeypatch.setattr(backends, "_missing_triton", lambda device: why["triton"])
    monkeypatch.setattr(backends, "_missing_cuda", lambda device: why["cuda"])
    assert explain("cuda") == ("cuda", "CUDA C++ kernels compiled by NVRTC")
    assert explain("cuda:1", torch.bfloat16, "causal_conv1d") == ("triton", "GPU kernels compiled by Triton")
    assert explain("xpu") == ("triton", "GPU kernels compiled by Triton")
    assert explain("cuda", torch.float64)[0] == "reference"
    why["cuda"] = "no NVRTC"
    assert explain("cuda") == ("triton", "GPU kernels compiled by Triton; not CUDA C++: no NVRTC")
    why["triton"] = "no compiler"
    assert explain("cuda") == explain("cuda", op="add_rms_norm") == ("reference", "no compiler")


def test_choice_for_sizes_that_kernels_do_not_take(monkeypatch):
    x = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setattr(backends, "_missing_triton", lambda device: None)
    monkeypatch.setattr(backends, "_default", lambda *_: ("cuda", "it is there"))
    monkeypatch.setattr(backends, "_beyond", lambda name, op, n: "too large" if name == "cuda" and n > 9 else None)
    assert [backends.choose(None, x, "selective_scan", n) for n in (9, 10)] == ["cuda", "triton"]
    monkeypatch.setattr(backends, "_missing_triton", lambda device: "nor is Triton")
    with pytest.warns(UserWarning, match="runs its slow reference on cuda: nor is Triton. See `anymamba doctor`"):
        assert backends.choose(None, x, "selective_scan", 10) == "reference"


@pytest.mark.parametrize(("op", "arguments"), [(selective_scan, scan_arguments()), (causal_conv1d, conv_arguments())])
def test_backend_that_ran(op, arguments, launches):
    op(**arguments)
    op(**arguments, backend="numba")
    assert len(launches) == 2
    op(**arguments, backend="reference")
    op(**to_double(arguments))
    assert len(launches) == 2
    with pytest.raises(AnymambaError, match=r"backend='numba' cannot run here: .*float64.*Use backend=None"):
        op(**to_double(arguments), backend="numba")
    with pytest.raises(AnymambaError, match="backend='gpu' does not exist: choose one of reference, numba, triton, cu"):
        op(**arguments, backend="gpu")
    with pytest.raises(AnymambaError, match=r"backend='cuda' cannot run here: .*Use backend=None"):
        op(**arguments, backend="cuda")


def test_float64_is_the_reference():
    arguments = scan_arguments(dtype=torch.float64)
    y, final_state = selective_scan(**arguments)
    want = reference.selective_scan(**arguments)
    assert y.dtype == final_state.dtype == torch.float64
    assert torch.equal(y, want[0])
    assert torch.equal(final_state, want[1])


# ---- errors: what was given, the rule, the cure ----------------------------------------------------------------

Z = torch.zeros
SCAN_ERRORS = [
    ({"x": Z(5, 6)}, "selective_scan: x is (5, 6) torch.float32, but it must be (batch, seqlen, channels); add the"),
    ({"x": Z(2, 5, 6, dtype=torch.int64)}, "x is (2, 5, 6) torch.int64, but it must be a real floating-point tensor"),
    ({"x": Z(2, 5, 6, dtype=torch.complex64)}, "x is (2, 5, 6) torch.complex64, but it must be a real floating-point"),
    ({"A": Z(5, 3)}, "A is (5, 3) torch.float32, but it must be (d, n) with d = 6, the channels of x (2, 5, 6)"),
    ({"A": Z(6)}, "A is (6,) torch.float32, but it must be (d, n)"),
    ({"C": Z(6, 3, dtype=torch.complex64)}, "C is (6, 3) torch.complex64, but it can be complex only where A is"),
    ({"z": Z(2, 5, 6, dtype=torch.complex64)}, "z is (2, 5, 6) torch.complex64, but it must be real"),
    ({"dt": Z(2, 5, 1)}, "dt is (2, 5, 1) torch.float32, but it must have the shape of x, (2, 5, 6)"),
    ({"z": Z(2, 6, 5)}, "z is (2, 6, 5) torch.float32, but it must have the shape of x, (2, 5, 6)"),
    ({"B": Z(2, 3, 5)}, "B is (2, 3, 5) torch.float32, but it must be (b,t,n) = (2, 5, 3), (b,t,g,n) with g a divisor"),
    ({"C": Z(2, 5, 4, 3)}, "C is (2, 5, 4, 3) torch.float32, but it must be (b,t,n) = (2, 5, 3), (b,t,g,n) with g a d"),
    ({"B": Z(2, 5, 0, 3)}, "or (d,n) = (6, 3)"),
    ({"B": Z(2, 5, 2, 3), "C": Z(2, 5, 3, 3)}, "C is (2, 5, 3, 3) torch.float32, but it must have as many groups as"),
    ({"D": Z(6, 1)}, "D is (6, 1) torch.float32, but it must be (6,), one number a channel of x (2, 5, 6)"),
    ({"dt_bias": Z(5)}, "dt_bias is (5,) torch.float32, but it must be (6,)"),
    ({"initial_state": Z(2, 3, 6)}, "initial_state is (2, 3, 6) torch.float32, but it must be (sequences, d, n) ="),
    ({"cu_seqlens": torch.tensor([0, 5])}, "with cu_seqlens the sequences lie end to end in one row: batch must be 1"),
    ({"D": Z(6, device="meta")}, "D is on meta, x on cpu; move them to one device"),
]  # fmt: skip
CONV_ERRORS = [
    ({"x": Z(5, 6)}, "causal_conv1d: x is (5, 6) torch.float32, but it must be (batch, seqlen, channels)"),
    (
        {"weight": Z(6, 1, 4)},
        "weight is (6, 1, 4) torch.float32, but it must be (d, w) with d = 6; a torch Conv1d",
    ),
    ({"weight": Z(6, 0)}, "weight is (6, 0) torch.float32, but it must be (d, w)"),
    ({"bias": Z(4)}, "bias is (4,) torch.float32, but it must be (6,)"),
    ({"activation": "gelu"}, "activation is 'gelu', but it must be None or \"silu\""),
    ({"initial_state": Z(2, 6, 4)}, "initial_state is (2, 6, 4) torch.float32, but it must be (sequences, d, w - 1) ="),
]
PACKED_ERRORS = [
    (torch.tensor([0, 4]), "cu_seqlens is [0, 4], but it must start at 0, never fall, and end at seqlen = 5"),
    (torch.tensor([1, 5]), "cu_seqlens is [1, 5], but it must start at 0"),
    (torch.tensor([0, 3, 2, 5]), "cu_seqlens is [0, 3, 2, 5], but it must start at 0, never fall"),
    (torch.tensor([0]), "cu_seqlens is (1,) torch.int64, but it must be a vector of at least 2 integers"),
    (torch.tensor([0.0, 5.0]), "cu_seqlens is (2,) torch.float32, but it must be a vector of at least 2 integers"),
    (torch.tensor([0, *range(6, 30)]), "cu_seqlens is [0, 6, 7, 8, 9, 10] …, but"),
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("changes", "message"), SCAN_ERRORS)
def test_scan_errors(changes, message, backend):
    with pytest.raises(AnymambaError, match=re.escape(message)):
        selective_scan(**scan_arguments() | changes, backend=backend)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("changes", "message"), CONV_ERRORS)
def test_conv_errors(changes, message, backend):
    with pytest.raises(AnymambaError, match=re.escape(message)):
        causal_conv1d(**conv_arguments() | changes, backend=backend)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("cu_seqlens", "message"), PACKED_ERRORS)
def test_packing_errors(cu_seqlens, message, backend):
    for op, arguments in [(selective_scan, scan_arguments(1)), (causal_conv1d, conv_arguments(1))]:
        del arguments["initial_state"]
        with pytest.raises(AnymambaError, match=re.escape(message)):
            op(**arguments, cu_seqlens=cu_seqlens, backend=backend)


def test_step_errors():
    state, x, weight = Z(2, 6, 3), Z(2, 6), Z(6, 4)
    with pytest.raises(AnymambaError, match=re.escape("initial_state is (3, 6, 3)")):
        causal_conv1d_step_(Z(3, 6, 3), x, weight)
    with pytest.raises(AnymambaError, match=re.escape("A is (5, 3)")):
        selective_step_(state, x, x, Z(5, 3), Z(2, 3), Z(2, 3))


# ---- the operators as torch sees them --------------------------------------------------------------------------


def scan_samples():
    packed = torch.tensor([0, 2, 2, 5])
    yield scan_arguments(2, 5, 6, 3), None
    yield scan_arguments(2, 33, 18, 3, groups=2, dtype=torch.bfloat16), None
    yield scan_arguments(1, 5, 6, 3, groups=0, rows=3, without=("z",)), packed
    yield scan_arguments(2, 5, 6, 3, without=OPTIONAL), None


def scan_tuple(arguments, cu_seqlens, save):
    a = arguments | {"B": arguments["B"].float(), "C": arguments["C"].float()}
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus", "initial_state")
    return (*(a.get(k) for k in names), cu_seqlens, save, "numba")


def requiring_grad(args):
    return tuple(
        v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for v in args
    )


@pytest.mark.parametrize(("arguments", "cu_seqlens"), list(scan_samples()))
def test_opcheck_scan(arguments, cu_seqlens, monkeypatch):
    # opcheck compares two runs, also in the slots of `saved` that no chunk writes or reads
    monkeypatch.setattr(numba_scan, "torch", types.SimpleNamespace(**vars(torch) | {"empty": torch.zeros}))
    op = torch.ops.anymamba.selective_scan.default
    torch.library.opcheck(op, scan_tuple(arguments, cu_seqlens, False))
    args = scan_tuple(arguments, cu_seqlens, True)
    torch.library.opcheck(op, requiring_grad(args))
    y, final_state, saved = op(*args)
    for d_state in (None, torch.ones_like(final_state)):
        torch.library.opcheck(
            torch.ops.anymamba.selective_scan_backward.default,
            (torch.ones_like(y), d_state, *args[:9], cu_seqlens, saved, "numba"),
        )


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 2, 2, 5])])
@pytest.mark.parametrize("w", [1, 4])
@pytest.mark.parametrize("without", [(), ("bias", "initial_state")])
def test_opcheck_conv(without, w, cu_seqlens):
    arguments = conv_arguments(1, 5, 6, w, rows=1 if cu_seqlens is None else 3, without=without)
    names = ("x", "weight", "bias")
    args = (*(arguments.get(k) for k in names), True, arguments.get("initial_state"), cu_seqlens, "numba")
    op = torch.ops.anymamba.causal_conv1d.default
    torch.library.opcheck(op, args)
    torch.library.opcheck(op, requiring_grad(args))
    y, final_state = op(*args)
    for d_state in (None, torch.ones_like(final_state)):
        torch.library.opcheck(torch.ops.anymamba.causal_conv1d_backward.default, (torch.ones_like(y), d_state, *args))


# ---- surroundings ----------------------------------------------------------------------------------------------


def test_call_from_another_thread():
    arguments = scan_arguments(2, 100, 100, 4)
    want = outputs_and_gradients(selective_scan, arguments, backend="numba")
    got = []
    thread = threading.Thread(
        target=lambda: got.append(outputs_and_gradients(selective_scan, arguments, backend="numba"))
    )
    thread.start()
    thread.join(timeout=60)
    plain = outputs_and_gradients(reference.selective_scan, arguments)
    exact = outputs_and_gradients(reference.selective_scan, to_double(arguments))
    for name in want:  # a new thread may have another thread count, and so another order of sums
        assert_law(got[0][name], plain[name], exact[name], name)


def test_calls_from_many_threads_at_once():
    arguments = scan_arguments(2, 100, 100, 4)
    want = selective_scan(**arguments, backend="numba")
    got = []
    work = lambda: got.extend(selective_scan(**arguments, backend="numba") for _ in range(20))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join(timeout=60) for thread in threads]
    assert len(got) == 80
    assert all(torch.equal(y, want[0]) and torch.equal(h, want[1]) for y, h in got)


def _in_child(pipe, arguments):
    y, _ = selective_scan(**arguments, backend="numba")
    pipe.send(y[0, 0].tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_call_after_fork():
    """As a forked data worker would: the threads that the parent had are gone, and nothing may wait for them."""
    arguments = scan_arguments(2, 100, 100, 4)
    y, _ = selective_scan(**arguments, backend="numba")
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_child, args=(there, arguments))
    child.start()
    answered = here.poll(60)
    child.kill() if not answered else child.join(60)
    assert answered, "the forked process hangs"
    assert here.recv() == y[0, 0].tolist()


SMALL_SCAN = """
import torch, anymamba
x = torch.ones(1, 3, 2)
for _ in range(2):
    y, h = anymamba.selective_scan(x, x, -torch.ones(2, 2), torch.ones(1, 3, 2), torch.ones(1, 3, 2))
print(y.sum().item())
"""
EXACT = sum(2 * 2 * (1 - 2.718281828459045**-k) / (1 - 2.718281828459045**-1) for k in (1, 2, 3))


def test_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run_python(SMALL_SCAN, ANYMAMBA_CACHE=str(tmp_path / "file" / "cache"))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(EXACT, rel=1e-5)
    assert "compiling CPU kernels" in done.stderr
    assert "(not cached: the cache folder is not writable (set ANYMAMBA_CACHE))" in done.stderr
    assert done.stderr.count("anymamba:") == 1


def test_cache_folder_is_used(tmp_path):
    folder, written = tmp_path / "new" / "cache", []
    for _ in range(2):
        done = run_python(SMALL_SCAN, ANYMAMBA_CACHE=str(folder))
        assert done.returncode == 0, done.stderr
        written.append({path: path.stat().st_mtime_ns for path in folder.glob("numba-*/**/*.nbc")})
    assert written[0]
    assert written[0] == written[1], "compiled again"


HIDE_NUMBA = """
import sys, warnings
sys.modules["numba"] = None  # as if it were not installed
import torch, anymamba
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    model = anymamba.MambaLM(anymamba.MambaConfig(d_model=16, n_layer=2))
    ids = torch.randint(256, (1, 7))
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
ours = [str(w.message) for w in seen if "anymamba" in str(w.message)]
assert len(ours) == 1, ours
assert "numba is not installed (pip install numba)" in ours[0], ours
assert "numba is not installed" in anymamba.explain()[1]
try:
    anymamba.causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 2), backend="numba")
except anymamba.AnymambaError as error:
    assert "backend='numba' cannot run here: numba is not installed" in str(error), error
else:
    raise SystemExit("no error")
"""


def test_without_numba():
    done = run_python(HIDE_NUMBA)
    assert done.returncode == 0, done.stderr


def test_broken_numba_is_not_called_missing(tmp_path):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('wrong NumPy')")
    done = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport anymamba; print(anymamba.explain())")
    assert "numba is installed but does not work: ImportError: wrong NumPy" in done.stdout, done.stderr


WITHOUT_AVX512 = """
import torch
from anymamba import selective_scan
from anymamba.kernels.numba_math import STEPS
assert STEPS == 1
torch.manual_seed(0)
x, dt, z = torch.randn(2, 63, 37), torch.randn(2, 63, 37), torch.randn(2, 63, 37)
B, C, A = torch.randn(2, 63, 16), torch.randn(2, 63, 16), -torch.rand(37, 16)
inputs = [v.requires_grad_() for v in (x, dt, A, B, C)]
def run(backend, real):
    v = [u.to(real) for u in inputs]
    y, h = selective_scan(*v, z=z.to(real), dt_softplus=True, backend=backend)
    return [y, h, *torch.autograd.grad(y.sum() + h.sum(), inputs)]
for got, want in zip(run("numba", torch.float32), run("reference", torch.float64)):
    assert (got - want).norm() <= 1e-6 * want.norm()
"""


def test_the_path_without_avx512():
    """What processors without AVX-512 run: the polynomial exponential. Where there is none, the other tests did."""
    done = run_python(WITHOUT_AVX512, ANYMAMBA_NO_AVX512="1")
    assert done.returncode == 0, done.stderr


def test_without_openmp_a_thread_pool_runs_the_same(monkeypatch):
    """macOS and Windows have no libgomp: the same work items, on threads of ours."""
    from anymamba.kernels import numba_launch

    arguments = scan_arguments(3, 500, 130, 16)
    want = selective_scan(**arguments)
    used = []
    pool = numba_launch._pool
    monkeypatch.setattr(numba_launch, "_openmp", lambda: None)
    monkeypatch.setattr(numba_launch, "_pool", lambda count: used.append(count) or pool(count))
    got = selective_scan(**arguments)
    assert used == [1]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_differentiating_twice_is_refused():
    arguments = scan_arguments(1, 6, 4, 3)
    x = arguments["x"].requires_grad_()
    y, _ = selective_scan(**arguments, backend="numba")
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(
        AnymambaError, match=r"selective_scan cannot be differentiated twice .* backend='reference' can"
    ):
        torch.autograd.grad(g.square().sum(), x)
