"""The scan with other discretisations on a real GPU: the law with real sizes, and surroundings.

    python -m pytest tests/test_gpu_discretize.py

`test_discretize.py` holds the same kernels to the law in small, by Triton's interpreter.
"""

import math

import pytest
import torch

from anymamba import MambaConfig, MambaLM, explain, ops, reference
from conftest import OPTIONAL, assert_law, map_tensors, outputs_and_gradients, scan_arguments, to_double

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
rules = pytest.mark.parametrize("rule", ["zoh", "bilinear", "euler"])
backends = pytest.mark.parametrize("backend", ["cuda", "triton"])


@pytest.fixture(autouse=True)
def poisoned():
    """NaN in every torch.empty, also on the GPU; torch's own operations need not be deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(arguments):
    return map_tensors(lambda v: v.to("cuda"), arguments)


def check_law(rule, backend, arguments, slack=4, **extra):
    arguments, options = on_gpu(arguments), {"discretization": rule} | on_gpu(extra)
    got = outputs_and_gradients(ops.selective_scan, arguments, backend=backend, **options)
    plain = outputs_and_gradients(reference.selective_scan, arguments, **options)
    exact = outputs_and_gradients(reference.selective_scan, to_double(arguments), **options)
    for name in exact:
        assert_law(got[name], plain[name], exact[name], name, slack)


@rules
@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("b", "t", "d", "n"), [(2, 500, 130, 16), (1, 63, 37, 3), (3, 1, 64, 64), (1, 100, 40, 257)])
def test_sizes(rule, backend, dtype, b, t, d, n):
    if backend == "cuda" and n > 64:
        pytest.skip("the CUDA kernels take a d_state up to 64")
    arguments = scan_arguments(b, t, d, n, dtype=dtype)
    if rule == "euler":  # which blows up where |1 + z| > 1, in every implementation
        arguments["A"] = arguments["A"].clamp(min=-0.2)
    check_law(rule, backend, arguments)


@rules
@pytest.mark.parametrize(("n", "dtype"), [(4, torch.float32), (16, torch.bfloat16), (64, torch.float32)], ids=str)
def test_pieces_of_time(rule, n, dtype):
    """Few channels and a long text: time is cut, and what a piece begins with is found first."""
    from anymamba.kernels.cuda_plans import backward_plan, forward_plan

    assert min(forward_plan(1, 2000, 40, n)[0], backward_plan(1, 2000, 40, n)[0]) > 1
    arguments = scan_arguments(1, 2000, 40, n, dtype=dtype)
    if rule == "euler":
        arguments["A"] = arguments["A"].clamp(min=-0.2)
    check_law(rule, "cuda", arguments)


@backends
@pytest.mark.parametrize("groups", [0, 1, 2, 20])
def test_groups(backend, groups):
    check_law("zoh", backend, scan_arguments(2, 70, 80, 16, groups=groups))


@backends
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_a_constant_B_and_no_options(rule, backend):
    arguments = scan_arguments(2, 70, 80, 16, without=OPTIONAL)
    check_law(rule, backend, arguments | {"B": torch.randn(80, 16)})


@backends
@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_states_that_stay_or_grow(rule, backend):
    arguments = scan_arguments(1, 40, 24, 16)
    arguments["A"][:, 0], arguments["A"][:, 1] = 0.0, 0.3
    check_law(rule, backend, arguments)


@backends
def test_more_blocks_than_one_a_program(backend):
    check_law("zoh", backend, scan_arguments(1, 70, 200, 64))


@backends
@pytest.mark.parametrize("ends", [[0, 0, 7, 7, 100, 150, 150], [0, 150], list(range(0, 151, 10))], ids=str)
def test_packed(backend, ends):
    arguments = scan_arguments(1, 150, 48, 16, rows=len(ends) - 1)
    check_law("bilinear", backend, arguments, cu_seqlens=torch.tensor(ends))


@rules
@backends
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
def test_small_and_large_steps(rule, backend, scale):
    arguments = scan_arguments(1, 3, 40, 16, without=("dt_bias",))
    steps = arguments["dt"].abs() * 0.5 * scale
    check_law(rule, backend, arguments | {"dt": steps, "dt_softplus": False}, slack=max(8, min(scale, 100)))


@backends
def test_tiny_steps_add_up(backend):
    """What a hundred thousand steps of z = -1e-6 leave of a state: no bias of a step adds up."""
    t = 100_000
    x, dt = torch.zeros(1, t, 1, device="cuda"), torch.full((1, t, 1), 1e-6, device="cuda")
    one = torch.ones(1, 1, device="cuda")
    _, h = ops.selective_scan(x, dt, -one, one, one, initial_state=one[None], backend=backend, discretization="zoh")
    exact = math.exp(-float(dt[0, 0, 0].double()) * t)
    # z is a few units in the last place of 1: each step rounds by up to half of one
    assert float(h) == pytest.approx(exact, rel=t * 2**-24)


def test_two_runs_are_the_same():
    arguments = on_gpu(scan_arguments(2, 300, 130, 16))
    first, second = (outputs_and_gradients(ops.selective_scan, arguments, discretization="zoh") for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("n", [16, 80])  # for CUDA C++, beyond it for Triton
def test_the_default_compiles_whole(n):
    assert explain("cuda", torch.bfloat16, "discretized_scan")[0] == "cuda"
    leaves = map_tensors(lambda v: v.requires_grad_(), on_gpu(scan_arguments(2, 40, 64, n)))
    compiled = torch.compile(ops.selective_scan, fullgraph=True)
    got, want = (scan(**leaves, discretization="zoh") for scan in (compiled, ops.selective_scan))
    torch.testing.assert_close(got, want)
    for one, other in zip(*(torch.autograd.grad(v[0].sum(), leaves["A"]) for v in (got, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@rules
def test_a_model_trains_as_on_the_cpu(rule):
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=64, n_layer=2, vocab_size=61, discretization=rule))
    ids = torch.randint(61, (2, 65))
    model(ids, labels=ids).loss.backward()
    want = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    model.to("cuda")
    model(ids.cuda(), labels=ids.cuda()).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.cpu(), want[name], rtol=2e-3, atol=1e-5, msg=name)
