"""mamba-ssm's and causal-conv1d's functions on our ops, against loops written here from their documented signatures.

Axes: b batch, d channels, t time, n state, g groups; channels come first.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from anymamba import AnymambaError
from anymamba.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from anymamba.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref
from anymamba.compat.mamba_ssm.ops.selective_scan_interface import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from anymamba.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from anymamba.compat.mamba_ssm.ops.triton.selective_state_update import (
    selective_state_update,
    selective_state_update_ref,
)
from test_reference import goldens, largest_error, tensors

scans = pytest.mark.parametrize("scan", [selective_scan_fn, selective_scan_ref])


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape)))


def exact(v):
    return v.to(torch.complex128 if v.is_complex() else torch.float64)


def close(got, want, dtype=None, tolerance=2e-5):
    assert got.shape == want.shape
    assert got.dtype == (dtype or torch.float32)
    if want.numel():
        limit = tolerance * max(float(want.detach().abs().max()), 1e-3)
        assert float((exact(got) - want).detach().abs().max()) <= limit


def check(f, loop, arguments, outputs=1):
    """f's outputs and the gradients of all its tensors are those of the loop in float64."""
    leaves, wanted = {}, {}
    for name, v in arguments.items():
        if isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()):
            leaves[name], wanted[name] = v.clone().requires_grad_(), exact(v).requires_grad_()
    got, want = f(**arguments | leaves), loop(**arguments | wanted)
    got, want = (v if outputs > 1 else (v,) for v in (got, want))
    assert len(got) == len(want) == outputs
    totals = []
    for values in (got, want):
        weights = [random(*v.shape, seed=9).to(v.dtype) for v in values]
        totals.append(sum((w * v).sum() for w, v in zip(weights, values, strict=True)))
    for a, b in zip(got, want, strict=True):
        close(a, b, dtype=torch.complex64 if b.is_complex() else torch.float32)
    ours, theirs = (
        torch.autograd.grad(total.real, list(v.values())) for total, v in zip(totals, (leaves, wanted), strict=True)
    )
    for name, a, b in zip(leaves, ours, theirs, strict=True):
        assert b.numel() == 0 or float((exact(a) - b).abs().max()) <= 1e-4 * float(b.abs().max()), name


# ---- selective_scan_fn -----------------------------------------------------------------------------------------


def scan_loop(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    (b, d, t), n = u.shape, A.shape[1]

    def at(v, i):
        """B or C of step i for each channel, (b,d,n)."""
        if v.dim() == 2:
            return v[None]
        if A.is_complex() and not v.is_complex():
            v = torch.complex(v[..., 0::2], v[..., 1::2])
        if v.dim() == 3:
            return v[:, None, :, i]
        return v[..., i].repeat_interleave(d // v.shape[1], dim=1)

    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = torch.log1p(torch.exp(delta))
    h, ys = torch.zeros(b, d, n, dtype=A.dtype), []
    for i in range(t):
        step = delta[:, :, i, None]
        h = torch.exp(step * A) * h + step * at(B, i) * u[:, :, i, None]
        y = (h * at(C, i)).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(ys, -1)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * z * torch.sigmoid(z)
    return (y, h) if return_last_state else y


def of_kind(kind, b, d, t, n, seed, is_complex=False):
    """B or C: constant, varying, in groups; of complex numbers as such or as pairs of reals."""
    shape = {"constant": (d, n), "varying": (b, n, t), "grouped": (b, 2, n, t), "one group": (b, 1, n, t)}[
        kind.split(", ")[0]
    ]
    if not is_complex:
        return random(*shape, seed=seed)
    v = torch.complex(random(*shape, seed=seed), random(*shape, seed=seed + 1))
    return torch.view_as_real(v).flatten(-2) if kind.endswith("pairs") else v


def scan_arguments(b=2, d=6, t=7, n=3, B="varying", C="varying", is_complex=False):
    A = -torch.exp(random(d, n, seed=1))
    if is_complex:
        A = torch.complex(A, random(d, n, seed=2, scale=3))
    return {"u": random(b, d, t, seed=3), "delta": random(b, d, t, seed=4, scale=0.5) - 1, "A": A,
            "B": of_kind(B, b, d, t, n, 5, is_complex), "C": of_kind(C, b, d, t, n, 7, is_complex), "D": random(d),
            "z": random(b, d, t, seed=8), "delta_bias": random(d, seed=9), "delta_softplus": True}  # fmt: skip


KINDS = ("constant", "varying", "grouped")


@scans
@pytest.mark.parametrize(("B", "C"), list(itertools.product(KINDS, KINDS)))
@pytest.mark.parametrize("state", [False, True])
def test_scan(scan, B, C, state):
    check(scan, scan_loop, scan_arguments(B=B, C=C) | {"return_last_state": state}, 1 + state)


@scans
@pytest.mark.parametrize("sizes", [(1, 4, 1, 1), (3, 10, 63, 5), (2, 2, 2, 17), (1, 34, 33, 16)])
@pytest.mark.parametrize("kind", ["varying", "one group"])
def test_scan_sizes(scan, sizes, kind):
    check(scan, scan_loop, scan_arguments(*sizes, B=kind, C=kind) | {"return_last_state": True}, 2)


@scans
@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")], ids=str)
@pytest.mark.parametrize("softplus", [False, True])
def test_scan_options(scan, without, softplus):
    arguments = {k: v for k, v in scan_arguments().items() if k not in without} | {"delta_softplus": softplus}
    if not softplus:
        arguments |= {k: arguments[k].abs() * 0.2 for k in ("delta", "delta_bias") if k in arguments}
    check(scan, scan_loop, arguments)


COMPLEX = ("constant", "varying", "varying, pairs", "grouped", "grouped, pairs")


@scans
@pytest.mark.parametrize(("B", "C"), [*zip(COMPLEX, COMPLEX, strict=True), ("constant", "varying, pairs"),
                                      ("grouped, pairs", "constant")])  # fmt: skip
@pytest.mark.parametrize("state", [False, True])
def test_complex_scan(scan, B, C, state):
    arguments = scan_arguments(B=B, C=C, is_complex=True, t=5) | {"return_last_state": state}
    check(scan, scan_loop, arguments, 1 + state)


def test_complex_scan_of_real_numbers_is_twice_the_real_one():
    arguments = scan_arguments() | {"D": None, "z": None}
    as_complex = arguments | {k: torch.complex(arguments[k], torch.zeros_like(arguments[k])) for k in "ABC"}
    close(selective_scan_fn(**as_complex), 2 * exact(selective_scan_fn(**arguments)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scan_in_16_bits(dtype):
    arguments = scan_arguments(t=20)
    low = arguments | {k: arguments[k].to(dtype) for k in ("u", "delta", "B", "C", "z")}
    y, state = selective_scan_fn(**low, return_last_state=True)
    want, last = scan_loop(**{k: exact(v) if isinstance(v, torch.Tensor) else v for k, v in low.items()},
                           return_last_state=True)  # fmt: skip
    close(y, want, dtype=dtype, tolerance=torch.finfo(dtype).eps)
    close(state, last)


@scans
def test_scan_of_any_strides(scan):
    arguments = scan_arguments()
    wide = {k: v.repeat_interleave(2, -1)[..., ::2] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    wide["u"] = arguments["u"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(scan(**wide), scan(**arguments), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"u": random(6, 7)}, r"u is \(6, 7\), but it must be \(batch, dim, seqlen\)"),
    ({"delta": random(2, 6, 1)}, r"delta is \(2, 6, 1\), but it must be \(batch, dim, seqlen\) like u, \(2, 6, 7\)"),
    ({"z": random(2, 7, 6)}, r"z is \(2, 7, 6\), but it must be"),
    ({"B": random(2, 7, 3)}, r"B is \(2, 7, 3\), but it must be \(dim, dstate\), \(batch, dstate, seqlen\)"),
    ({"C": random(2, 1, 2, 3, 7)}, r"C is \(2, 1, 2, 3, 7\), but it must be"),
    ({"B": random(2, 4, 3, 7)}, r"with g a divisor of d = 6"),
    ({"A": random(6, 3).to(torch.complex64)}, r"B is \(2, 3, 7\).*end in 2 · seqlen = 14"),
    ({"B": random(2, 3, 7).to(torch.complex64)}, r"it can be complex only where A is complex, and A is real"),
    ({"D": random(6).to(torch.complex64)}, r"D is \(6,\) torch.complex64, but it must be real"),
])  # fmt: skip
def test_scan_errors(changes, message):
    with pytest.raises(AnymambaError, match=message):
        selective_scan_fn(**scan_arguments() | changes)


@scans
@pytest.mark.parametrize(
    ("case", "softplus"), [("full", True), ("time_varying_3d", True), ("complex_A_packed_BC", False)]
)
def test_golden_scans(scan, case, softplus):
    """Recorded from the official kernels, by their own names."""
    entry = goldens()["selective_scan"][case]
    y = scan(**tensors(entry["inputs"]), delta_softplus=softplus)
    assert largest_error(y, tensors(entry["outputs"])["y"]) < 2e-6


# ---- selective_state_update ------------------------------------------------------------------------------------


def update_loop(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """(y, new state), with loops over rows and heads."""
    if state.dim() == 3:
        one = lambda v, axis: v if v is None else v.unsqueeze(axis)  # noqa: E731
        y, h = update_loop(one(state, 1), one(x, 1), one(dt, 1), one(A, 0), B, C, one(D, 0), one(z, 1), one(dt_bias, 0),
                           dt_softplus)  # fmt: skip
        return y[:, 0], h[:, 0]
    y, h = torch.empty_like(x), torch.empty_like(state)
    B, C = (v if v.dim() == 3 else v[:, None] for v in (B, C))
    heads_a_group = state.shape[1] // B.shape[1]
    for row, head in itertools.product(range(len(x)), range(state.shape[1])):
        step = dt[row, head] + (0 if dt_bias is None else dt_bias[head])
        step = (F.softplus(step) if dt_softplus else step)[:, None]
        b, c = B[row, head // heads_a_group], C[row, head // heads_a_group]
        h[row, head] = torch.exp(step * A[head]) * state[row, head] + step * b * x[row, head][:, None]
        y[row, head] = h[row, head] @ c + (0 if D is None else D[head] * x[row, head])
    return (y if z is None else y * F.silu(z)), h


def update_arguments(b=2, heads=None, p=6, n=3, groups=None, rows=None):
    shape = (p,) if heads is None else (heads, p)
    bc = (b, n) if groups is None else (b, groups, n)
    return {"state": random(rows or b, *shape, n), "x": random(b, *shape, seed=1), "dt": random(b, *shape, seed=2) - 1,
            "A": -torch.exp(random(*shape, n, seed=3)), "B": random(*bc, seed=4), "C": random(*bc, seed=5),
            "D": random(*shape, seed=6), "z": random(b, *shape, seed=7), "dt_bias": random(*shape, seed=8),
            "dt_softplus": True}  # fmt: skip


def check_update(update, arguments, **options):
    given = {k: v.clone() if k == "state" else v for k, v in arguments.items()}
    want, state = update_loop(**{k: exact(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    y = update(**given, **options)
    close(y, want)
    close(given["state"], state)


updates = pytest.mark.parametrize("update", [selective_state_update, selective_state_update_ref])


@updates
@pytest.mark.parametrize("sizes", [{}, {"b": 1, "p": 33, "n": 1}, {"groups": 1}, {"heads": 4, "p": 5},
                                   {"heads": 4, "groups": 2, "p": 3, "n": 17}, {"heads": 6, "groups": 6, "p": 1},
                                   {"heads": 3, "groups": 1, "p": 7, "b": 3}], ids=str)  # fmt: skip
def test_update(update, sizes):
    check_update(update, update_arguments(**sizes))


@updates
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("without", [("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")], ids=str)
@pytest.mark.parametrize("softplus", [False, True])
def test_update_options(update, without, softplus, heads):
    arguments = {k: v for k, v in update_arguments(heads=heads).items() if k not in without}
    check_update(update, arguments | {"dt_softplus": softplus})


@updates
def test_update_of_heads_that_share_numbers(update):
    """As Mamba-2's step calls it: A, dt, dt_bias and D of a head are one number, expanded."""
    h, p, n = 4, 5, 8
    arguments = update_arguments(heads=h, p=p, n=n, groups=2)
    arguments["A"] = -torch.exp(random(h))[:, None, None].expand(h, p, n)
    arguments["dt"] = random(2, h, seed=2)[:, :, None].expand(2, h, p)
    arguments |= {k: random(h, seed=3)[:, None].expand(h, p) for k in ("dt_bias", "D")}
    check_update(update, arguments)


def test_update_of_chosen_rows():
    arguments = update_arguments(b=2, heads=2, rows=5)
    index, before = torch.tensor([3, 0], dtype=torch.int32), arguments["state"].clone()
    want, state = update_loop(**{k: exact(v[index] if k == "state" else v) if isinstance(v, torch.Tensor) else v
                                 for k, v in arguments.items()})  # fmt: skip
    close(selective_state_update(**arguments, state_batch_indices=index), want)
    close(arguments["state"][index], state)
    assert torch.equal(arguments["state"][[1, 2, 4]], before[[1, 2, 4]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_update_in_16_bits(dtype):
    arguments = update_arguments()
    low = arguments | {k: arguments[k].to(dtype) for k in ("state", "x", "dt", "B", "C", "z")}
    want, state = update_loop(**{k: exact(v) if isinstance(v, torch.Tensor) else v for k, v in low.items()})
    close(selective_state_update(**low), want, dtype=dtype, tolerance=torch.finfo(dtype).eps)
    close(low["state"], state, dtype=dtype, tolerance=torch.finfo(dtype).eps)


def test_update_writes_into_a_view():
    arguments = update_arguments(heads=2)
    whole = torch.full((*arguments["state"].shape[:-1], 6), math.nan)
    whole[..., ::2] = arguments["state"]
    _, state = update_loop(**{k: exact(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    selective_state_update(**arguments | {"state": whole[..., ::2]})
    close(whole[..., ::2], state)
    assert whole[..., 1::2].isnan().all()


@pytest.mark.parametrize(("changes", "message"), [
    ({"state": random(2, 6)}, r"state is \(2, 6\), but it must be \(batch, dim, dstate\) or \(batch, nheads, headdim"),
    ({"x": random(2, 5)}, r"x is \(2, 5\), but with a state \(2, 4, 6, 3\) it must be \(2, 4, 6\)"),
    ({"A": random(4, 3)}, r"A is \(4, 3\), but .* it must be \(4, 6, 3\); expand what heads share"),
    ({"dt_bias": random(4)}, r"dt_bias is \(4,\), but .* it must be \(4, 6\)"),
    ({"B": random(2, 3, 3)}, r"B is \(2, 3, 3\), but its groups must divide 4, the heads of the state"),
])  # fmt: skip
def test_update_errors(changes, message):
    with pytest.raises(AnymambaError, match=message):
        selective_state_update(**update_arguments(heads=4, groups=2) | changes)


@pytest.mark.parametrize(("case", "softplus", "tolerance"), [("baseline_full", True, 1e-6), ("grouped", False, 2e-5)])
def test_golden_updates(case, softplus, tolerance):
    entry = goldens()["selective_state_update"][case]
    given, want = tensors(entry["inputs"]), tensors(entry["outputs"])
    assert largest_error(selective_state_update(**given, dt_softplus=softplus), want["y"]) < tolerance
    assert largest_error(given["state"], want["updated_state"]) < tolerance


# ---- causal_conv1d ---------------------------------------------------------------------------------------------


def conv_loop(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, activation=None,
              final_states_out=None):  # fmt: skip
    (b, d, t), w = x.shape, weight.shape[1]
    past = torch.zeros(b, d, w - 1, dtype=x.dtype) if initial_states is None else initial_states
    line, rows = torch.cat([past, x], -1), []
    for row in range(b):
        steps = []
        for i in range(t):
            total = torch.zeros(d, dtype=x.dtype) if bias is None else bias
            for k in range(w):
                source = i - (w - 1) + k
                same = seq_idx is None or seq_idx[row, max(source, 0)] == seq_idx[row, i]
                total = total + (weight[:, k] * line[row, :, i + k] if same else 0)
            total = total if activation is None else total * torch.sigmoid(total)
            steps.append(total * 0 if seq_idx is not None and seq_idx[row, i] < 0 else total)
        rows.append(torch.stack(steps, -1))
    y = torch.stack(rows)
    return (y, line[:, :, t:]) if return_final_states else y


def conv_arguments(b=2, d=6, t=7, w=4, **options):
    return {"x": random(b, d, t, seed=1), "weight": random(d, w, seed=2), "bias": random(d, seed=3),
            "initial_states": random(b, d, w - 1, seed=4)} | options  # fmt: skip


convolutions = pytest.mark.parametrize("conv", [causal_conv1d_fn, causal_conv1d_ref])


@convolutions
@pytest.mark.parametrize("sizes", [(2, 6, 7, 4), (1, 1, 1, 2), (3, 33, 63, 3), (2, 5, 2, 7), (2, 4, 5, 1)])
@pytest.mark.parametrize("final", [False, True])
def test_convolution(conv, sizes, final):
    check(conv, conv_loop, conv_arguments(*sizes, return_final_states=final, activation="silu"), 1 + final)


@convolutions
@pytest.mark.parametrize("without", [(), ("bias",), ("initial_states",), ("bias", "initial_states")], ids=str)
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_convolution_options(conv, without, activation):
    arguments = {k: v for k, v in conv_arguments(activation=activation).items() if k not in without}
    check(conv, conv_loop, arguments)


@convolutions
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("w", [1, 2, 4])
def test_convolution_of_sequences_in_a_row(conv, w, initial):
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [5, 6, 6, 6, 6, -1, -1]], dtype=torch.int32)
    arguments = conv_arguments(w=w, activation="silu", seq_idx=seq_idx)
    if not initial:
        del arguments["initial_states"]
        arguments["bias"] = None
    check(conv, conv_loop, arguments)


@convolutions
def test_convolution_writes_final_states(conv):
    out = torch.full((2, 6, 3), math.nan)
    arguments = conv_arguments(return_final_states=True)
    y, final = conv(**arguments, final_states_out=out)
    assert final is out
    assert torch.equal(out, arguments["x"][:, :, -3:])
    channels_last = arguments["x"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(conv(**arguments | {"x": channels_last})[0], y)


UPDATES = pytest.mark.parametrize("update", [causal_conv1d_update, causal_conv1d_update_ref])


@UPDATES
@pytest.mark.parametrize(("k", "t"), [(3, 1), (4, 1), (9, 1), (3, 2), (4, 7), (9, 4), (3, None), (4, None)])
@pytest.mark.parametrize("activation", [None, "swish"])
def test_convolution_update(update, k, t, activation):
    """Any number of tokens, any length of the state: what a convolution over all inputs gives."""
    state, x = random(2, 6, k, seed=5), random(2, 6, t or 1, seed=6)
    weight, bias = random(6, 4), random(6) if k != 9 else None
    line = exact(torch.cat([state, x], -1))
    want = conv_loop(line, exact(weight), None if bias is None else exact(bias), activation=activation)[:, :, k:]
    y = update(x if t else x[:, :, 0], state, weight, bias, activation)
    close(y, want if t else want[:, :, 0])
    close(state, line[:, :, x.shape[2] :])


@UPDATES
@pytest.mark.parametrize("k", [3, 4, 8])
@pytest.mark.parametrize("t", [1, 2, 3])
def test_convolution_update_in_a_ring(update, k, t):
    """Rows that have read different numbers of tokens; token i lies at i mod k."""
    lines, weight, bias = random(2, 6, 14, seed=5), random(6, 4), random(6)
    read = torch.tensor([5, 11], dtype=torch.int32)
    state = torch.full((2, 6, k), math.nan)
    for row, count in enumerate(read.tolist()):
        for i in range(count - k, count):
            state[row, :, i % k] = lines[row, :, i]
    x = torch.stack([lines[row, :, count : count + t] for row, count in enumerate(read.tolist())])
    want = conv_loop(exact(lines), exact(weight), exact(bias), activation="silu")
    y = update(x, state, weight, bias, "silu", cache_seqlens=read)
    for row, count in enumerate(read.tolist()):
        close(y[row], want[row, :, count : count + t])
        for i in range(count + t - k, count + t):
            assert torch.equal(state[row, :, i % k], lines[row, :, i])


def test_convolution_update_of_chosen_rows():
    state, x, weight = random(5, 6, 4, seed=5), random(2, 6, seed=6), random(6, 4)
    before, index = state.clone(), torch.tensor([4, 1], dtype=torch.int32)
    own = before[index].clone()
    want = causal_conv1d_update(x, own, weight)
    close(causal_conv1d_update(x, state, weight, conv_state_indices=index), exact(want))
    assert torch.equal(state[index], own)
    assert torch.equal(state[[0, 2, 3]], before[[0, 2, 3]])


def test_convolution_update_keeps_the_dtype_of_the_state():
    state, x = random(2, 6, 4).bfloat16(), random(2, 6, seed=6)
    y = causal_conv1d_update(x, state, random(6, 4))
    assert (y.dtype, state.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(state[:, :, -1], x.bfloat16())


@pytest.mark.parametrize(("call", "message"), [
    (lambda: causal_conv1d_fn(random(6, 7), random(6, 4)), r"x is \(6, 7\), but it must be \(batch, dim, seqlen\)"),
    (lambda: causal_conv1d_fn(random(2, 6, 7), random(6, 1, 4)), r"weight is \(6, 1, 4\), but it must be \(dim, w"),
    (lambda: causal_conv1d_fn(random(2, 6, 7), random(6, 4), activation="gelu"), "activation='gelu', but it must"),
    (lambda: causal_conv1d_fn(random(2, 6, 7), random(6, 4), seq_idx=torch.zeros(2, 7), return_final_states=True),
     "return_final_states with seq_idx"),
    (lambda: causal_conv1d_fn(random(2, 6, 7), random(6, 4), seq_idx=torch.zeros(7)), r"seq_idx is \(7,\), but it"),
    (lambda: causal_conv1d_update(random(2, 6), random(2, 6, 2), random(6, 4)), r"\(2, 6, 2\), but .* k ≥ w - 1 = 3"),
    (lambda: causal_conv1d_update(random(2, 6), random(3, 6, 4), random(6, 4)), r"conv_state is \(3, 6, 4\), but"),
    (lambda: causal_conv1d_update(random(2, 6), random(2, 6, 4), random(6, 4), activation="relu"), "activation='relu'"),
])  # fmt: skip
def test_convolution_errors(call, message):
    with pytest.raises(AnymambaError, match=message):
        call()


# ---- mamba_inner_fn --------------------------------------------------------------------------------------------


def inner_loop(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A,
               B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True,
               b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-6):  # fmt: skip
    def norm(v, weight):  # over axis 1
        return v if weight is None else v / (v.square().mean(1, keepdim=True) + b_c_dt_rms_eps).sqrt() * weight[:, None]

    def varying(rows, bias, weight):
        v = torch.einsum("kd,bdt->bkt", rows, x)
        v = norm(v if bias is None else v + bias[:, None], weight)
        return torch.complex(v[:, 0::2], v[:, 1::2]) if A.is_complex() else v

    d, r, n = xz.shape[1] // 2, delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    x, z = xz[:, :d], xz[:, d:]
    x = conv_loop(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    delta = torch.einsum("dr,rk,bkt->bdt", delta_proj_weight, x_proj_weight[:r], x)
    B = varying(x_proj_weight[r : r + n], B_proj_bias, b_rms_weight) if B is None else B
    C = varying(x_proj_weight[-n:], C_proj_bias, c_rms_weight) if C is None else C
    y = scan_loop(x, norm(delta, dt_rms_weight), A, B, C, D, z, delta_bias, delta_softplus)
    out = torch.einsum("md,bdt->btm", out_proj_weight, y)
    return out if out_proj_bias is None else out + out_proj_bias


def inner_arguments(b=2, d=6, t=5, n=3, r=2, m=4, w=4, is_complex=False, **changes):
    A = -torch.exp(random(d, n, seed=1))
    states = n
    if is_complex:
        A, states = torch.complex(A, random(d, n, seed=2)), 2 * n
    return {"xz": random(b, 2 * d, t), "conv1d_weight": random(d, 1, w), "conv1d_bias": random(d, seed=3),
            "x_proj_weight": random(r + 2 * states, d, scale=0.4), "delta_proj_weight": random(d, r, seed=4),
            "out_proj_weight": random(m, d, seed=5), "out_proj_bias": random(m, seed=6), "A": A, "D": random(d, seed=7),
            "delta_bias": random(d, seed=8)} | changes  # fmt: skip


both = pytest.mark.parametrize("inner", [mamba_inner_fn, mamba_inner_ref])


@both
@pytest.mark.parametrize("changes", [
    {}, {"t": 1}, {"w": 2, "n": 1, "t": 33}, {"is_complex": True}, {"delta_softplus": False, "delta_bias": None},
    {"conv1d_bias": None, "out_proj_bias": None, "D": None},
    {"B_proj_bias": random(3), "C_proj_bias": random(3, seed=1)},
    {"is_complex": True, "B_proj_bias": random(6), "C_proj_bias": random(6, seed=1)},
    {"B": random(2, 3, 5)}, {"C": random(6, 3)}, {"B": random(6, 3), "C": random(2, 2, 3, 5)},
])  # fmt: skip
def test_inner(inner, changes):
    check(inner, inner_loop, inner_arguments(**changes))


def test_inner_norms():
    weights = {"b_rms_weight": random(3), "c_rms_weight": random(3, seed=1), "dt_rms_weight": random(6, seed=2)}
    for keys in ([k] for k in weights):
        check(mamba_inner_fn, inner_loop, inner_arguments(**{k: weights[k] for k in keys}))
    check(mamba_inner_fn, inner_loop, inner_arguments(**weights, b_c_dt_rms_eps=0.3))
    arguments = inner_arguments(**weights)
    for level in (0, 1):
        assert torch.equal(mamba_inner_fn(**arguments, checkpoint_lvl=level), mamba_inner_fn(**arguments))


@pytest.mark.parametrize(("changes", "message"), [
    ({"checkpoint_lvl": 2}, "checkpoint_lvl=2, but it must be 0 or 1"),
    ({"x_proj_weight": random(7, 6)}, r"x_proj_weight is \(7, 6\), but it needs rows for delta, 2, and 3 each"),
    ({"B": random(6, 3), "b_rms_weight": random(3)}, "b_rms_weight is for a B of x_proj, and B is given"),
])  # fmt: skip
def test_inner_errors(changes, message):
    with pytest.raises(AnymambaError, match=message):
        mamba_inner_fn(**inner_arguments() | changes)


# ---- norms -----------------------------------------------------------------------------------------------------


def norm_loop(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, rowscale=None, prenorm=False,
              is_rms_norm=False, residual_in_fp32=False):  # fmt: skip
    total = x * (1 if rowscale is None else rowscale[..., None]) + (0 if x1 is None else x1)
    total = total + (0 if residual is None else residual)
    centred = total if is_rms_norm else total - total.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    outs = [unit * w + (0 if b is None else b) for w, b in ((weight, bias), (weight1, bias1)) if w is not None]
    outs += [total] if prenorm else []
    return tuple(outs) if len(outs) > 1 else outs[0]


NORMS = [
    ({}, 1), ({"prenorm": True}, 2), ({"residual": random(2, 3, 5, seed=1)}, 1), ({"bias": None, "eps": 0.2}, 1),
    ({"residual": random(2, 3, 5, seed=1), "prenorm": True, "bias": None}, 2),
    ({"rowscale": random(2, 3), "residual": random(2, 3, 5, seed=1)}, 1),
    ({"x1": random(2, 3, 5, seed=2), "prenorm": True}, 2), ({"weight1": random(5, seed=3)}, 2),
    ({"weight1": random(5, seed=3), "bias1": random(5, seed=4), "x1": random(2, 3, 5, seed=2), "prenorm": True}, 3),
]  # fmt: skip


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize(("changes", "outputs"), NORMS)
def test_norms(is_rms_norm, changes, outputs):
    arguments = {"x": random(2, 3, 5), "weight": random(5), "bias": random(5, seed=1)} | changes
    check(layer_norm_fn, norm_loop, arguments | {"is_rms_norm": is_rms_norm}, outputs)
    if is_rms_norm:
        check(rms_norm_fn, lambda **v: norm_loop(**v, is_rms_norm=True), arguments, outputs)


@pytest.mark.parametrize("residual", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("in_fp32", [False, True])
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_norm_dtypes(residual, in_fp32, is_rms_norm):
    x = random(3, 8).bfloat16()
    given = None if residual is None else random(3, 8, seed=1).to(residual)
    out, total = layer_norm_fn(x, random(8), None, residual=given, prenorm=True, residual_in_fp32=in_fp32,
                               is_rms_norm=is_rms_norm)  # fmt: skip
    assert out.dtype == torch.bfloat16
    assert total.dtype == (residual or (torch.float32 if in_fp32 else torch.bfloat16))


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_norm_dropout(is_rms_norm):
    x, x1, weight = torch.ones(50, 40), torch.full((50, 40), 100.0), torch.ones(40)
    torch.manual_seed(0)
    out, out1, total, mask, mask1 = layer_norm_fn(x, weight, None, x1=x1, weight1=2 * weight, dropout_p=0.25,
                                                  prenorm=True, is_rms_norm=is_rms_norm,
                                                  return_dropout_mask=True)  # fmt: skip
    assert 0.2 < 1 - mask.float().mean() < 0.3
    assert not torch.equal(mask, mask1)
    torch.testing.assert_close(total, (mask * 1.0 + mask1 * 100.0) / 0.75)
    close(out, norm_loop(exact(total), exact(weight), None, is_rms_norm=is_rms_norm))
    torch.testing.assert_close(out1, 2 * out)
    assert layer_norm_fn(x, weight, None, is_rms_norm=is_rms_norm, return_dropout_mask=True)[1:] == (None, None)


def test_rms_norm_module():
    norm = RMSNorm(8, eps=0.1, dropout_p=0.5)
    assert (list(norm.state_dict()), norm.bias, norm.weight.tolist()) == (["weight"], None, [1.0] * 8)
    x, residual = random(3, 8), random(3, 8, seed=1)
    want = norm_loop(exact(x), torch.ones(8).double(), None, exact(residual), eps=0.1, prenorm=True, is_rms_norm=True)
    for got, expected in zip(norm.eval()(x, residual, prenorm=True, residual_in_fp32=True), want, strict=True):
        close(got, expected)
    assert not torch.allclose(norm.train()(x), norm.eval()(x))


@pytest.mark.parametrize(("changes", "message"), [
    ({"weight": random(4)}, r"weight is \(4,\), but for x \(2, 3, 5\) it must be \(5,\)"),
    ({"residual": random(3, 5)}, r"residual is \(3, 5\), but for x \(2, 3, 5\) it must be \(2, 3, 5\)"),
    ({"rowscale": random(2, 3), "x1": random(2, 3, 5)}, "rowscale scales x only, and there is an x1"),
    ({"bias1": random(5)}, "bias1 without weight1"),
])  # fmt: skip
def test_norm_errors(changes, message):
    with pytest.raises(AnymambaError, match=message):
        layer_norm_fn(**{"x": random(2, 3, 5), "weight": random(5), "bias": None} | changes)
