"""The reference against arithmetic by hand, an independent closed form in NumPy, recorded values of the official
kernels, and finite differences: everything else is held to it."""

import functools
import json
import lzma
import math

import numpy as np
import pytest
import torch

from anymamba import ops, reference
from conftest import conv_arguments, map_tensors, scan_arguments
from shared_data import shared

# ---- by hand ---------------------------------------------------------------------------------------------------


def column(*values):
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1)


def test_scan_by_hand():
    """A = -1, Δ = ln 2 then ln 4: the state is halved, then quartered. B = 1, C = 2, D = 10."""
    dt = column(math.log(2), math.log(4))
    A, D = torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([10.0], dtype=torch.float64)
    start = torch.tensor([[[8.0]]], dtype=torch.float64)
    y, h = reference.selective_scan(column(1, 3), dt, A, column(1, 1), column(2, 2), D, initial_state=start)
    h1 = 4 + math.log(2)
    h2 = h1 / 4 + 3 * math.log(4)
    torch.testing.assert_close(y, column(2 * h1 + 10, 2 * h2 + 30))
    torch.testing.assert_close(h, torch.tensor([[[h2]]], dtype=torch.float64))


def test_gate_and_softplus_by_hand():
    """softplus(ln(e - 1) - 5 + 5) = 1 and silu(0) = 0, silu(ln 3) = 3/4 · ln 3."""
    raw, z = column(math.log(math.e - 1) - 5, math.log(math.e - 1) - 5), column(0, math.log(3))
    A, bias = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)
    ones = column(1, 1)
    y, h = reference.selective_scan(column(2, 5), raw, A, ones, ones, z=z, dt_bias=bias, dt_softplus=True)
    torch.testing.assert_close(y, column(0, 7 * 0.75 * math.log(3)))
    assert h.item() == pytest.approx(7)


def test_groups_share_B_and_C():
    """Channels 0, 1 read group 0 and channels 2, 3 group 1."""
    x, dt, A = torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.zeros(4, 1)
    B = torch.tensor([2.0, 3.0]).view(1, 1, 2, 1)
    C = torch.tensor([5.0, 7.0]).view(1, 1, 2, 1)
    assert reference.selective_scan(x, dt, A, B, C)[0].flatten().tolist() == [10, 10, 21, 21]
    constant = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert reference.selective_scan(x, dt, A, constant, constant)[0].flatten().tolist() == [1, 4, 9, 16]


def test_convolution_by_hand():
    x, weight = column(1, 2, 3), torch.tensor([[100.0, 10.0, 1.0]], dtype=torch.float64)
    y, final_state = reference.causal_conv1d(x, weight, torch.tensor([0.5]).double())
    assert y.flatten().tolist() == [1.5, 12.5, 123.5]
    assert final_state.tolist() == [[[2, 3]]]
    y, final_state = reference.causal_conv1d(x[:, :1], weight, initial_state=torch.tensor([[[8.0, 9.0]]]).double())
    assert y.flatten().tolist() == [891]
    assert final_state.tolist() == [[[9, 1]]]
    silu = reference.causal_conv1d(column(math.log(3)), torch.ones(1, 1).double(), activation="silu")[0]
    assert silu.item() == pytest.approx(0.75 * math.log(3))


def test_rms_norm_by_hand():
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    y = reference.rms_norm(x, torch.tensor([1.0, 2.0]).double(), eps=0)
    torch.testing.assert_close(y, torch.tensor([3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]).double())


# ---- a closed form, without a recurrence -----------------------------------------------------------------------


def closed_form(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, initial_state=None):
    """h_t = exp(A Σ_{r≤t} Δ_r) h_0 + Σ_{s≤t} exp(A Σ_{s<r≤t} Δ_r) Δ_s B_s x_s, channel by channel, in NumPy."""
    (b, t, d), n = x.shape, A.shape[1]
    delta = dt + (0 if dt_bias is None else dt_bias)
    delta = np.logaddexp(0, delta) if dt_softplus else delta
    clock = np.cumsum(delta, axis=1)
    y, h = np.zeros((b, t, d)), np.zeros((b, d, n))
    for row in range(b):
        for c in range(d):
            read = lambda v: v[None, c] if v.ndim == 2 else v[row] if v.ndim == 3 else v[row, :, c * v.shape[2] // d]  # noqa: E731, B023  # fmt: skip
            pushed = delta[row, :, c, None] * read(B) * x[row, :, c, None]  # (t, n)
            age = clock[row, :, None, c] - clock[row, None, :, c]  # (t, s)
            past = np.where(np.tri(t, dtype=bool)[:, :, None], np.exp(np.minimum(age, age.max())[..., None] * A[c]), 0)
            states = np.einsum("tsn,sn->tn", past, pushed)
            if initial_state is not None:
                states = states + np.exp(clock[row, :, c, None] * A[c]) * initial_state[row, c]
            y[row, :, c] = (states * read(C)).sum(-1)
            h[row, c] = states[-1]
    y = y if D is None else y + D * x
    return (y if z is None else y * z / (1 + np.exp(-z))), h


@pytest.mark.parametrize("groups", [None, 0, 1, 2, 3, 6])
@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("dt_bias",), ("initial_state",), ("D", "z", "dt_bias")])
def test_scan_closed_form(groups, without):
    arguments = scan_arguments(2, 11, 6, 3, groups=groups, dtype=torch.float64, without=without)
    want = closed_form(**map_tensors(torch.Tensor.numpy, arguments))
    got = reference.selective_scan(**arguments)
    for i, j in zip(got, want, strict=True):
        np.testing.assert_allclose(i.numpy(), j, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("w", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("t", [1, 3, 12])
def test_convolution_against_numpy(t, w):
    arguments = conv_arguments(2, t, 3, w, dtype=torch.float64, activation=None)
    y, final_state = reference.causal_conv1d(**arguments)
    for row in range(2):
        for c in range(3):
            line = np.concatenate([arguments["initial_state"][row, c].numpy(), arguments["x"][row, :, c].numpy()])
            kernel = arguments["weight"][c].numpy()[::-1]
            want = np.convolve(line, kernel, "valid") + arguments["bias"][c].item()
            np.testing.assert_allclose(y[row, :, c].numpy(), want, rtol=1e-12, atol=1e-12)
            np.testing.assert_array_equal(final_state[row, c].numpy(), line[len(line) - w + 1 :])


# ---- recorded from the official kernels ------------------------------------------------------------------------


@functools.cache
def goldens():
    with lzma.open(shared("mamba_goldens/mamba_reference_cases.json.xz"), "rt") as file:
        return json.load(file)


def tensors(entry):
    made = {}
    for name, v in entry.items():
        if "data_real" in v:
            made[name] = torch.complex(torch.tensor(v["data_real"]), torch.tensor(v["data_imag"]))
        else:
            made[name] = torch.tensor(v["data"], dtype=getattr(torch, v["dtype"]))
    return made


def largest_error(got, want):
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


# "full" has A of both signs, and its state grows a thousandfold
SCANS = {"full": (True, 2e-6), "minimal": (False, 1e-6), "time_varying_3d": (True, 1e-6),
         "minimal_fp16": (False, 1e-3), "minimal_bf16": (False, 4e-3)}  # fmt: skip


def time_last(v):
    """The official layout (b,d,t) or (b,n,t) to ours, (b,t,·)."""
    return v.transpose(1, 2) if v.dim() == 3 else v


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("case", SCANS)
def test_golden_scan(case, backend):
    """Recorded on a GPU in float32 or 16 bits: allowed is a unit or two in the last place of the largest value."""
    softplus, tolerance = SCANS[case]
    entry = goldens()["selective_scan"][case]
    given, want = tensors(entry["inputs"]), tensors(entry["outputs"])
    x, dt, z = (None if given.get(k) is None else time_last(given[k]) for k in ("u", "delta", "z"))
    y, final_state = ops.selective_scan(
        x, dt, given["A"], time_last(given["B"]), time_last(given["C"]), given.get("D"), z,
        dt_bias=given.get("delta_bias"), dt_softplus=softplus, backend=backend,
    )  # fmt: skip
    assert largest_error(y.transpose(1, 2), want["y"]) < tolerance
    if case == "full":  # with constant B and C the official kernel keeps the state without its factor B
        assert largest_error(final_state / given["B"], want["last_state"]) < 2e-6


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_golden_grouped_scan_first_channel(backend):
    """Three channels over two groups do not divide: only channel 0 of the recording means anything."""
    entry = goldens()["selective_scan"]["grouped_time_varying"]
    given, want = tensors(entry["inputs"]), tensors(entry["outputs"])
    first = {k: given[k][:, :1].transpose(1, 2) for k in ("u", "delta")}
    B, C = (given[k][:, 0].transpose(1, 2) for k in ("B", "C"))
    y, _ = ops.selective_scan(first["u"], first["delta"], given["A"][:1], B, C, dt_bias=given["delta_bias"][:1],
                              dt_softplus=True, backend=backend)  # fmt: skip
    assert largest_error(y.transpose(1, 2), want["y"][:, :1]) < 1e-6


def test_golden_complex_scan():
    """B and C are recorded as reals, the two parts of a number side by side in time."""
    entry = goldens()["selective_scan"]["complex_A_packed_BC"]
    given, want = tensors(entry["inputs"]), tensors(entry["outputs"])
    B, C = (torch.complex(given[k][:, :, 0::2], given[k][:, :, 1::2]).transpose(1, 2) for k in ("B", "C"))
    y, _ = ops.selective_scan(time_last(given["u"]), time_last(given["delta"]), given["A"], B, C)
    assert largest_error(y.transpose(1, 2), want["y"]) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize(("case", "softplus", "tolerance"), [("baseline_full", True, 1e-6), ("grouped", False, 2e-5)])
def test_golden_step(case, softplus, tolerance, backend):
    entry = goldens()["selective_state_update"][case]
    given, want = tensors(entry["inputs"]), tensors(entry["outputs"])
    heads = case == "grouped"  # (b, heads, headdim, …) there, one channel axis here; B and C (b, g, n) in both
    flat = lambda v, axis: v.flatten(axis, axis + 1) if heads else v  # noqa: E731
    state = flat(given["state"], 1).clone()
    y = ops.selective_step_(
        state, flat(given["x"], 1), flat(given["dt"], 1), flat(given["A"], 0), given["B"], given["C"], given.get("D"),
        given.get("z"), dt_bias=flat(given["dt_bias"], 0), dt_softplus=softplus, backend=backend,
    )  # fmt: skip
    assert largest_error(y, flat(want["y"], 1)) < tolerance
    assert largest_error(state, flat(want["updated_state"], 1)) < tolerance


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_golden_convolution(backend):
    entry = goldens()["dw_causal_conv"]["channels_first_silu"]
    given, want = tensors(entry["inputs"]), tensors(entry["outputs"])
    y, _ = ops.causal_conv1d(time_last(given["x"]), given["weight"], given["bias"], activation="silu", backend=backend)
    assert largest_error(y.transpose(1, 2), want["y"]) < 1e-6


# ---- gradients by finite differences ---------------------------------------------------------------------------


def leaves_of(arguments):
    return {k: v.requires_grad_() for k, v in arguments.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("cu_seqlens", [None, [0, 2, 2, 3]], ids=str)
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("groups", [None, 0, 2])
def test_scan_gradients(groups, softplus, cu_seqlens):
    """Every argument, initial_state among them, through y and final_state."""
    rows = None if cu_seqlens is None else 3
    arguments = scan_arguments(1 if rows else 2, 3, 4, 2, groups=groups, dtype=torch.float64, rows=rows)
    if not softplus:
        arguments |= {"dt": arguments["dt"].abs() / 8, "dt_bias": arguments["dt_bias"].abs() / 8, "dt_softplus": False}
    leaves = leaves_of(arguments)
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens)

    def scan(*values):
        moved = arguments | dict(zip(leaves, values, strict=True))
        return reference.selective_scan(**moved, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(scan, tuple(leaves.values()))


@pytest.mark.parametrize("groups", [None, 0, 2])
def test_complex_scan_gradients(groups):
    """Through the complex state both ways; the others stay real."""
    arguments = scan_arguments(2, 3, 4, 2, groups=groups, dtype=torch.float64)
    for name in ("A", "B", "C", "initial_state"):
        arguments[name] = torch.complex(arguments[name], arguments[name].flip(0).sin())
    leaves = leaves_of(arguments)

    def scan(*values):
        return ops.selective_scan(**arguments | dict(zip(leaves, values, strict=True)))

    y, final_state = scan(*leaves.values())
    assert (y.dtype, final_state.dtype) == (torch.float64, torch.complex128)
    assert torch.autograd.gradcheck(scan, tuple(leaves.values()))


def test_complex_scan_in_parts_and_packed():
    arguments = scan_arguments(2, 7, 4, 3)
    for name in ("A", "B", "C", "initial_state"):
        arguments[name] = torch.complex(arguments[name], arguments[name].flip(0).sin())
    y, h = ops.selective_scan(**arguments)
    assert h.dtype == torch.complex64
    cut = lambda i, j: arguments | {k: arguments[k][:, i:j] for k in ("x", "dt", "B", "C", "z")}  # noqa: E731
    first, state = ops.selective_scan(**cut(0, 4))
    second, state = ops.selective_scan(**cut(4, 7) | {"initial_state": state})
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(state, h)
    packed = arguments | {k: arguments[k].flatten(0, 1)[None] for k in ("x", "dt", "B", "C", "z")}
    for got, want in zip(ops.selective_scan(**packed, cu_seqlens=torch.tensor([0, 7, 14])), (y, h), strict=True):
        torch.testing.assert_close(got.view(want.shape), want)


def test_kernels_refuse_a_complex_state_matrix():
    arguments = scan_arguments() | {"A": torch.ones(6, 3, dtype=torch.complex64)}
    with pytest.raises(ValueError, match=r"backend='numba' does not compute a complex A: use backend=None"):
        ops.selective_scan(**arguments, backend="numba")


@pytest.mark.parametrize("cu_seqlens", [None, [0, 2, 2, 5]], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("w", [1, 3, 7])
def test_convolution_gradients(w, activation, cu_seqlens):
    rows = None if cu_seqlens is None else 3
    arguments = conv_arguments(1, 5, 2, w, dtype=torch.float64, rows=rows, activation=activation)
    leaves = leaves_of(arguments)
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens)

    def conv(*values):
        return reference.causal_conv1d(**arguments | dict(zip(leaves, values, strict=True)), cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(conv, tuple(leaves.values()))


def test_rms_norm_gradients():
    x, weight = torch.randn(2, 3, 4).double().requires_grad_(), torch.randn(4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: reference.rms_norm(x, w), (x, weight))


# ---- the steps and 16 bits -------------------------------------------------------------------------------------


def test_steps_are_the_scan_of_one():
    arguments = scan_arguments(3, 1, 6, 2, groups=2, dtype=torch.float64)
    want, want_state = reference.selective_scan(**arguments)
    state = arguments.pop("initial_state")
    token = {k: v.squeeze(1) if k in ("x", "dt", "B", "C", "z") else v for k, v in arguments.items()}
    assert torch.equal(reference.selective_step_(state, **token), want.squeeze(1))
    assert torch.equal(state, want_state)

    arguments = conv_arguments(3, 1, 6, 4, dtype=torch.float64)
    want, want_state = reference.causal_conv1d(**arguments)
    state, x = arguments.pop("initial_state"), arguments.pop("x")
    assert torch.equal(reference.causal_conv1d_step_(state, x.squeeze(1), **arguments), want.squeeze(1))
    assert torch.equal(state, want_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_of_16_bit_inputs_is_float32(dtype):
    y, final_state = reference.selective_scan(**scan_arguments(dtype=dtype))
    assert (y.dtype, final_state.dtype) == (dtype, torch.float32)
    y, final_state = reference.causal_conv1d(**conv_arguments(dtype=dtype))
    assert (y.dtype, final_state.dtype) == (dtype, dtype)
