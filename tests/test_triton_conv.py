"""The Triton convolution against the reference, on a GPU if there is one, else under Triton's interpreter."""

import contextlib

import pytest
import torch

from anymamba import AnymambaError, explain, ops, reference, registration
from anymamba.ops import causal_conv1d, causal_conv1d_step_
from conftest import (
    GPU_OR_CPU,
    assert_law,
    conv_arguments,
    map_tensors,
    outputs_and_gradients,
    run_python,
    to_double,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def arguments_of(*sizes, **options):
    return map_tensors(lambda v: v.to(GPU_OR_CPU), conv_arguments(*sizes, **options))


def check_law(arguments, backend="triton", **extra):
    extra = map_tensors(lambda v: v.to(GPU_OR_CPU), extra)
    got = outputs_and_gradients(causal_conv1d, arguments, backend=backend, **extra)
    plain = outputs_and_gradients(reference.causal_conv1d, arguments, **extra)
    exact = outputs_and_gradients(reference.causal_conv1d, to_double(arguments), **extra)
    for name in exact:
        assert_law(got[name], plain[name], exact[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w", [1, 2, 4, 5])
@pytest.mark.parametrize("t", [1, 2, 23])
def test_widths_and_lengths(t, w, dtype):
    check_law(arguments_of(2, t, 19, w, dtype=dtype))


@pytest.mark.parametrize("t", [15, 16, 17, 33])
def test_lengths_around_a_tile(t):
    check_law(arguments_of(1, t, 3, 4))


@pytest.mark.parametrize("d", [1, 64, 130])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_sizes(d, activation):
    check_law(arguments_of(2, 7, d, 4, activation=activation))


@pytest.mark.parametrize(("t", "w"), [(1, 12), (5, 9)])
def test_wider_than_a_step_or_the_sequence(t, w):
    check_law(arguments_of(2, t, 6, w))


@pytest.mark.parametrize("without", [("bias",), ("initial_state",), ("bias", "initial_state")], ids="-".join)
def test_optional_arguments(without):
    check_law(arguments_of(2, 18, 6, 4, without=without))


@pytest.mark.parametrize("w", [1, 4])
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("ends", [[0, 40], [0, 1, 3, 29, 40], [0, 0, 7, 7, 7, 40, 40], [0, *range(1, 41)]], ids=len)
def test_packed(ends, states, w):
    arguments = arguments_of(1, 40, 6, w, rows=len(ends) - 1, without=() if states else ("initial_state",))
    check_law(arguments, cu_seqlens=torch.tensor(ends, dtype=torch.int32))


def test_packed_in_bf16():
    arguments = arguments_of(1, 21, 6, 4, rows=3, dtype=torch.bfloat16)
    check_law(arguments, cu_seqlens=torch.tensor([0, 2, 12, 21]))


@pytest.mark.parametrize("packed", [False, True])
def test_half_of_a_projection(packed):
    """x and dy with rows that are apart: the same bits as for dense ones, and no copy of them."""
    dense = arguments_of(1 if packed else 2, 12, 16, 4)
    wide = torch.cat([dense["x"], dense["x"]], -1)
    x = wide.chunk(2, -1)[0]
    extra = {"cu_seqlens": torch.tensor([0, 5, 12], device=x.device)} if packed else {}
    if packed:
        dense["initial_state"] = dense["initial_state"].expand(2, -1, -1)
    want = outputs_and_gradients(causal_conv1d, dense, backend="triton", **extra)

    def half(x, **rest):
        y, final_state = causal_conv1d(torch.cat([x, x], -1).chunk(2, -1)[1], backend="triton", **rest, **extra)
        return torch.cat([y, y], -1).chunk(2, -1)[0], final_state

    got = outputs_and_gradients(half, dense)
    assert all(torch.equal(got[k], want[k]) for k in want)
    y, _ = causal_conv1d(**dense | {"x": x}, backend="triton", **extra)
    assert torch.equal(y, want["y"])


def test_transposed_and_expanded_inputs():
    arguments = arguments_of(2, 9, 6, 4)
    want = causal_conv1d(**arguments, backend="triton")
    turned = map_tensors(lambda v: v if v.dim() < 2 else v.transpose(-1, -2).contiguous().transpose(-1, -2), arguments)
    got = causal_conv1d(**turned, backend="triton")
    assert all(torch.equal(i, j) for i, j in zip(got, want, strict=True))
    leaf = torch.ones((), requires_grad=True, device=GPU_OR_CPU)  # .sum() sends a gradient of stride 0
    causal_conv1d(**arguments | {"x": leaf.expand(2, 9, 6)}, backend="triton")[0].sum().backward()
    exact = torch.ones((), requires_grad=True, dtype=torch.float64, device=GPU_OR_CPU)
    reference.causal_conv1d(**to_double(arguments) | {"x": exact.expand(2, 9, 6)})[0].sum().backward()
    assert leaf.grad == pytest.approx(float(exact.grad), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("x", torch.bfloat16), ("weight", torch.float16), ("weight", torch.float64), ("initial_state", torch.float32)],
)
def test_mixed_dtypes(name, dtype):
    arguments = arguments_of(2, 9, 6, 4, dtype=torch.bfloat16 if name == "initial_state" else torch.float32)
    arguments[name] = arguments[name].to(dtype)
    if name == "x":  # inputs before the first are inputs: they have x's dtype
        arguments["initial_state"] = arguments["initial_state"].to(dtype)
    if dtype == torch.float64:  # the plain loop would compute that in float64
        got = outputs_and_gradients(causal_conv1d, arguments, backend="triton")
        assert (got["y"].dtype, got["dweight"].dtype) == (torch.float32, torch.float64)
    else:
        check_law(arguments)


def test_nothing():
    for b, t, d in ((2, 0, 6), (0, 5, 6), (2, 5, 0)):
        arguments = arguments_of(b, t, d, 4)
        y, final_state = causal_conv1d(**arguments, backend="triton")
        assert (y.shape, final_state.shape) == ((b, t, d), (b, d, 3))
        assert t or torch.equal(final_state, arguments["initial_state"])
        got = outputs_and_gradients(causal_conv1d, arguments, backend="triton")
        assert not got["dweight"].any() or t * b
    check_law(arguments_of(1, 0, 6, 4, rows=2), cu_seqlens=torch.tensor([0, 0, 0]))


@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_state"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_numbers_stay_visible(name, bad):
    arguments = arguments_of(2, 9, 6, 4, activation=None)
    arguments[name][(0,) * arguments[name].dim()] = bad
    got, want = causal_conv1d(**arguments, backend="triton"), reference.causal_conv1d(**arguments)
    for i, j in zip(got, want, strict=True):
        torch.testing.assert_close(i, j, equal_nan=True)


def test_large_numbers_through_the_activation():
    arguments = arguments_of(1, 9, 6, 4)
    for size in (30, 100, 1000):
        check_law(arguments | {"x": arguments["x"] * size})


def test_step():
    arguments = arguments_of(3, 1, 6, 4)
    want, want_state = causal_conv1d(**arguments, backend="triton")
    state, x = arguments.pop("initial_state"), arguments.pop("x")
    got = causal_conv1d_step_(state, x.squeeze(1), **arguments, backend="triton")
    assert torch.equal(got, want.squeeze(1))
    assert torch.equal(state, want_state)


def test_changes_no_argument_and_repeats():
    arguments = arguments_of(2, 40, 6, 4)
    before = map_tensors(torch.clone, arguments)
    first = outputs_and_gradients(causal_conv1d, arguments, backend="triton")
    again = outputs_and_gradients(causal_conv1d, arguments, backend="triton")
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(torch.equal(before[k], v) for k, v in arguments.items() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("cu_seqlens", [None, [0, 2, 2, 5]])
@pytest.mark.parametrize(("w", "without"), [(1, ()), (4, ()), (4, ("bias", "initial_state"))])
def test_opcheck(w, without, cu_seqlens):
    arguments = arguments_of(1, 5, 6, w, rows=1 if cu_seqlens is None else 3, without=without)
    bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=GPU_OR_CPU)
    inputs = [arguments.get(k) for k in ("x", "weight", "bias")]
    args = (*inputs, True, arguments.get("initial_state"), bounds, "triton")
    op = torch.ops.anymamba.causal_conv1d.default
    torch.library.opcheck(op, [v.clone().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
                               for v in args])  # fmt: skip
    y, final_state = op(*args)
    for d_state in (None, torch.ones_like(final_state)):
        torch.library.opcheck(torch.ops.anymamba.causal_conv1d_backward.default, (torch.ones_like(y), d_state, *args))


# ---- the door ----------------------------------------------------------------------------------------------------


@pytest.fixture
def checks(monkeypatch):
    """The offsets whose values were read."""
    seen, real = [], registration.check_bounds
    monkeypatch.setattr(registration, "check_bounds", lambda v, t: seen.append(v.tolist()) or real(v, t))
    return seen


def test_offsets_are_read_once(checks):
    """To read them from a GPU is to wait for it, which no layer after the first should do."""
    arguments = arguments_of(1, 6, 4, 2, without=("initial_state",))
    cu_seqlens = torch.tensor([0, 2, 6], device=GPU_OR_CPU)
    for _ in range(3):
        y, _ = causal_conv1d(**arguments, cu_seqlens=cu_seqlens, backend="triton")
    assert checks == [[0, 2, 6]]
    cu_seqlens[1] = 3
    moved, _ = causal_conv1d(**arguments, cu_seqlens=cu_seqlens, backend="triton")
    assert len(checks) == 2
    assert not torch.equal(y, moved)
    with pytest.raises(AnymambaError, match="end at seqlen = 5"):  # of another length
        causal_conv1d(**arguments | {"x": arguments["x"][:, :5]}, cu_seqlens=cu_seqlens, backend="triton")
    cu_seqlens[1] = 7
    with pytest.raises(AnymambaError, match="never fall"):
        causal_conv1d(**arguments, cu_seqlens=cu_seqlens, backend="triton")


def test_offsets_of_any_kind(checks):
    arguments = arguments_of(1, 6, 4, 2, without=("initial_state",))
    want, _ = causal_conv1d(**arguments, cu_seqlens=torch.tensor([0, 2, 6], device=GPU_OR_CPU), backend="triton")
    short = torch.tensor([0, 2, 6], dtype=torch.int16)
    strided = torch.tensor([0, 9, 2, 9, 6], device=GPU_OR_CPU)[::2]
    with torch.inference_mode():
        made = torch.tensor([0, 2, 6], device=GPU_OR_CPU)
        for cu_seqlens in (short, strided, torch.tensor([0, 2, 6]), made, made):
            y, _ = causal_conv1d(**arguments, cu_seqlens=cu_seqlens, backend="triton")
            assert torch.equal(y, want)
    assert len(checks) == 5


def test_what_the_kernels_do_not_take():
    x = torch.ones(1, 3, 2, device=GPU_OR_CPU)
    with pytest.raises(AnymambaError, match="backend='triton' cannot run here: it takes tensors up to 32 bits"):
        causal_conv1d(x.double(), torch.ones_like(x[0, :2]), backend="triton")
    wide = torch.ones(2, 17, device=GPU_OR_CPU)
    with pytest.raises(
        AnymambaError, match="cannot run here: its kernels take a width up to 16, and that of weight is 17"
    ):
        causal_conv1d(x, wide, backend="triton")
    with pytest.warns(UserWarning, match="a width up to 16") if GPU_OR_CPU == "cuda" else contextlib.nullcontext():
        causal_conv1d(x, wide)


@pytest.mark.skipif(GPU_OR_CPU != "cpu", reason="about machines without a GPU")
def test_where_there_is_no_gpu():
    name, reason = explain("cuda")
    assert name == "reference"
    assert "torch sees no cuda device" in reason
    assert explain("cuda", torch.float64)[0] == "reference"
    x = torch.ones(1, 3, 2)
    with pytest.raises(
        AnymambaError, match=r"backend='cuda' cannot run here: there is no CUDA C.. kernel for causal_conv1d"
    ):
        causal_conv1d(x, torch.ones(2, 2), backend="cuda")
    with pytest.raises(AnymambaError, match="backend='cuda' cannot run here: it needs an NVIDIA GPU, and x is on cpu"):
        ops.selective_scan(x, x, -torch.ones(2, 1), x[..., :1], x[..., :1], backend="cuda")


WITHOUT_INTERPRETER = """
import torch, anymamba
try:
    anymamba.causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 2), backend="triton")
except anymamba.AnymambaError as error:
    print(error)
"""


def test_cpu_tensors_need_the_interpreter():
    done = run_python(WITHOUT_INTERPRETER, TRITON_INTERPRET="0")
    assert "backend='triton' cannot run here: it takes tensors on a GPU, and x is on cpu (with TRITON_INTERPRET=1" in (
        done.stdout
    ), done.stderr


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from anymamba.kernels import triton_conv, triton_norm

def compiled(kernel, pointers, numbers, constants, warps):
    signature = {n: "*bf16" for n in pointers} | {n: "i32" for n in numbers} | {n: "constexpr" for n in constants}
    signature = {n: {"eps": "fp32", "cu_seqlens": "*i32"}.get(n, t) for n, t in signature.items()}
    places = {n: (kernel.arg_names.index(n),) for n in signature}
    assert set(places) == set(kernel.arg_names)
    aligned = [*pointers, *(n for n in numbers if n in ("d", "m") or n.endswith(("_batch", "_row")))]
    source = ASTSource(kernel, signature, {places[n]: v for n, v in constants.items()},
                       {places[n]: [["tt.divisibility", 16]] for n in aligned})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    return set(re.findall(r"(?:ld|st)\\.global\\.v\\d", ptx))

cut = ["x_batch", "x_row", "t", "d", "tiles", "items", "sequences"]
for w in (1, 4):
    for packed in (False, True):
        states = ("state", "cu_seqlens", "dfinal_state", "dstate")
        sizes = {"w": w, "length": 32, "steps": 4, "block": 512, "silu": True, "has_bias": True, "has_state": packed}
        given = states if packed else ()
        absent = {} if packed else dict.fromkeys(states)
        pointers = ["x", "y", "weight", "bias", "final_state", *given[:2]]
        constants = sizes | {"packed": packed} | {n: None for n in absent if n in states[:2]}
        print(compiled(triton_conv._forward, pointers, cut, constants, 4))
        pointers = ["dy", "x", "weight", "bias", "dx", "partial", *given]
        constants = sizes | {"packed": packed, "has_dfinal": packed} | absent
        print(compiled(triton_conv._backward, pointers, ["dy_batch", "dy_row", "dx_row", *cut], constants, 4))
sizes = {"rows": 1, "block": 1024}
print(compiled(triton_norm._forward, ["x", "residual", "weight", "out", "total", "inverse"], ["count", "m", "eps"],
               sizes | {"has_residual": True}, 8))
print(compiled(triton_norm._backward, ["dy", "dtotal", "total", "inverse", "weight", "dx", "dresidual", "partial"],
               ["count", "m"], sizes | {"has_dtotal": True, "has_dresidual": True}, 8))
"""


def test_compiles_for_a_gpu():
    """The interpreter takes more of Python than the compiler does. No GPU is needed to see, nor for wide loads."""
    done = run_python(COMPILE, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    assert all("ld.global.v" in line and "st.global.v" in line for line in lines), done.stdout
