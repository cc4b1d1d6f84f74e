"""The Triton norm against the reference, on a GPU if there is one, else under Triton's interpreter."""

import pytest
import torch

from anymamba import reference
from anymamba.ops import add_rms_norm
from conftest import GPU_OR_CPU, assert_law, map_tensors, outputs_and_gradients, to_double

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def arguments_of(shape=(2, 9, 37), dtype=torch.float32, residual=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(GPU_OR_CPU)  # noqa: E731
    arguments = {"x": make(*shape).to(dtype), "residual": make(*shape), "weight": make(shape[-1])}
    return arguments if residual else arguments | {"residual": None}


def check_law(arguments, **extra):
    got = outputs_and_gradients(add_rms_norm, arguments, backend="triton", **extra)
    plain = outputs_and_gradients(reference.add_rms_norm, arguments, **extra)
    exact = outputs_and_gradients(reference.add_rms_norm, to_double(arguments), **extra)
    for name in exact:
        assert_law(got[name], plain[name], exact[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 15), (2, 31, 16), (3, 2, 600), (1, 150, 130), (4,), (2, 0, 5)], ids=str
)
def test_shapes(shape, residual, dtype):
    check_law(arguments_of(shape, dtype, residual), dtype=dtype)


def test_more_rows_than_programs():
    check_law(arguments_of((140, 4000)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_another_dtype(x_dtype, dtype):
    arguments = arguments_of(dtype=x_dtype)
    arguments["weight"] = arguments["weight"].to(dtype)
    got = outputs_and_gradients(add_rms_norm, arguments, backend="triton", dtype=dtype)
    want = outputs_and_gradients(reference.add_rms_norm, arguments, dtype=dtype)
    assert (got["y"].dtype, got["final_state"].dtype) == (dtype, torch.float32)
    assert torch.equal(got["final_state"], want["final_state"])
    for name in want:
        scale = float(want[name].abs().max())
        torch.testing.assert_close(got[name], want[name], rtol=1e-2, atol=1e-2 * scale)


def test_weight_and_residual_in_float64():
    arguments = arguments_of()
    arguments |= {k: arguments[k].double() for k in ("weight", "residual")}
    got = outputs_and_gradients(add_rms_norm, arguments, backend="triton")
    assert [got[k].dtype for k in ("y", "dweight", "dresidual")] == [torch.float32, torch.float64, torch.float64]


def test_layouts_and_bad_numbers():
    arguments = arguments_of()
    wide = map_tensors(lambda v: torch.stack([v, v], -1)[..., 1], arguments)
    want = add_rms_norm(**arguments, backend="triton")
    assert all(torch.equal(i, j) for i, j in zip(add_rms_norm(**wide, backend="triton"), want, strict=True))
    arguments["x"][0, 0, 0], arguments["x"][0, 1, 0] = float("nan"), float("inf")
    got, want = (add_rms_norm(**arguments, backend=backend) for backend in ("triton", "reference"))
    for i, j in zip(got, want, strict=True):
        torch.testing.assert_close(i, j, equal_nan=True)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_shared_or_absent(x_dtype):
    """dx and dresidual are one tensor in float32: adding to one must not change the other."""
    arguments = arguments_of((3, 5), x_dtype)
    x, residual, weight = (v.requires_grad_() for v in arguments.values())
    exact = [v.detach().double().requires_grad_() for v in (x, residual, weight)]
    for op, leaves, backend in ((add_rms_norm, (x, residual, weight), {"backend": "triton"}),
                                (reference.add_rms_norm, exact, {})):  # fmt: skip
        for used in ((0,), (1,), (0, 1)):
            outputs = op(*leaves, **backend)
            (sum(outputs[i].double().square().sum() for i in used) + leaves[0].double().sum()).backward()
    for got, want in zip((x, residual, weight), exact, strict=True):
        tolerance = 1e-5 if x_dtype == torch.float32 else 1e-1
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, residual):
    a = arguments_of((2, 3, 17), dtype, residual)
    args = (a["x"], a["residual"], a["weight"], 1e-5, torch.bfloat16, "triton")
    op = torch.ops.anymamba.add_rms_norm.default
    torch.library.opcheck(op, [v.clone().requires_grad_() if torch.is_tensor(v) else v for v in args])
    out, total, inverse = op(*args)
    for dtotal in (None, torch.ones_like(total)):
        back = (torch.ones_like(out), dtotal, total, inverse, a["weight"], dtype, "triton")
        torch.library.opcheck(torch.ops.anymamba.add_rms_norm_backward.default, back)
