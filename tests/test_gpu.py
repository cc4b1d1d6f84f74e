"""The kernels on a real GPU: the law with real sizes, surroundings (graphs, autocast, compile, devices), limits.

    python -m pytest tests/test_gpu.py

`test_ops.py` holds the kernels to the same law in small. Where torch sees no GPU all of this is skipped.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from anymamba import AnymambaError, MambaConfig, MambaLM, MambaMixer, explain, ops, reference
from conftest import (
    assert_law,
    conv_arguments,
    cotangents,
    map_tensors,
    outputs_and_gradients,
    scan_arguments,
    to_double,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"),
    pytest.mark.usefixtures("poisoned"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = {"scan": ops.selective_scan, "conv": ops.causal_conv1d, "norm": ops.add_rms_norm}
BACKENDS = {"scan": ("cuda", "triton"), "conv": ("triton",), "norm": ("triton",)}
both = pytest.mark.parametrize("backend", BACKENDS["scan"])
every = pytest.mark.parametrize(("op", "backend"), [(op, b) for op, backends in BACKENDS.items() for b in backends])


@pytest.fixture
def poisoned():
    """NaN in every torch.empty, also on the GPU; torch's own operations need not be deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def clean():
    torch.use_deterministic_algorithms(False)


def norm_arguments(*shape, dtype=torch.float32, residual=True):
    generator = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
    return {"x": make(*shape).to(dtype), "residual": make(*shape) if residual else None, "weight": make(shape[-1])}


MAKE = {"scan": scan_arguments, "conv": conv_arguments, "norm": norm_arguments}


def on_gpu(arguments, device="cuda"):
    return map_tensors(lambda v: v.to(device), arguments)


def gpu_cotangents(*outputs):
    return [c.to(outputs[0].device) for c in cotangents(*outputs)]


results = functools.partial(outputs_and_gradients, cotangents=gpu_cotangents)


@functools.lru_cache(maxsize=4)  # the backends of a case share the slow loops
def expected(op, sizes, options, extra):
    """Arguments on the GPU, what plain torch makes of them, and what float64 does."""
    arguments = on_gpu(MAKE[op](*sizes, **dict(options)))
    plain = getattr(reference, OPS[op].__name__)
    extra = {k: torch.tensor(v, device="cuda") if isinstance(v, tuple) else v for k, v in extra}
    return arguments, extra, results(plain, arguments, **extra), results(plain, to_double(arguments), **extra)


def compute(op, backend, arguments, **extra):
    try:
        return results(OPS[op], arguments, backend=backend, **extra)
    except AnymambaError as error:
        if "cannot run here" in str(error):
            pytest.skip(str(error))
        raise


def check_law(op, backend, *sizes, extra=(), slack=4, **options):
    arguments, extra, plain, exact = expected(op, sizes, tuple(options.items()), tuple(extra))
    got = compute(op, backend, arguments, **extra)
    for name, want in exact.items():
        assert_law(got[name], plain[name], want, name, slack)


# ---- the law ---------------------------------------------------------------------------------------------------


def test_which_backend_runs():
    for dtype in DTYPES:
        assert explain("cuda", dtype)[0] in BACKENDS["scan"]
        assert explain("cuda", dtype, op="causal_conv1d")[0] == explain("cuda", dtype, op="add_rms_norm")[0] == "triton"
    assert explain("cuda", torch.float64)[0] == "reference"


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("b", "t", "d", "n"),
    [(1, 1, 1, 1), (2, 2, 130, 3), (3, 63, 37, 16), (1, 500, 1536, 16), (2, 301, 257, 20), (1, 1025, 65, 16)],
)
def test_scan_sizes(backend, b, t, d, n, dtype):
    check_law("scan", backend, b, t, d, n, dtype=dtype)


@both
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 20, 32, 64, 100, 128, 256, 257])
def test_scan_state_sizes(backend, n):
    check_law("scan", backend, 2, 70, 48, n, dtype=torch.bfloat16 if n % 2 else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("n", [1, 16, 64])
def test_scan_on_a_gpu_with_little_shared_memory(n, dtype, monkeypatch):
    from anymamba.kernels import cuda_scan

    monkeypatch.setattr(cuda_scan, "_shared_limit", lambda _: 99 << 10)  # of sm_86 and sm_89
    check_law("scan", "cuda", 2, 70, 264, n, dtype=dtype)


@pytest.mark.parametrize("groups", [0, 2])
def test_scan_in_pieces_of_time(groups):
    from anymamba.kernels import cuda_scan

    assert cuda_scan.forward_plan(1, 2100, 24, 20)[0] > 1
    assert cuda_scan.backward_plan(1, 2100, 24, 20)[0] > 1
    check_law("scan", "cuda", 1, 2100, 24, 20, groups=groups, dtype=torch.bfloat16)


@both
@pytest.mark.parametrize("groups", [0, 1, 2, 8, 96])
def test_scan_groups(backend, groups):
    check_law("scan", backend, 2, 131, 96, 16, groups=groups, dtype=torch.bfloat16)


@both
@pytest.mark.parametrize("without", [("D",), ("z",), ("dt_bias",), ("initial_state",), ("D", "z", "dt_bias")], ids=str)
def test_scan_optional_arguments(backend, without):
    check_law("scan", backend, 2, 134, 72, 16, without=without)


@both
@pytest.mark.parametrize("ends", [(0, 300), (0, 1, 3, 66, 300), (0, 0, 7, 7, 300, 300), tuple(range(301))], ids=len)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_scan_packed(backend, dtype, ends):
    check_law("scan", backend, 1, 300, 66, 16, rows=len(ends) - 1, dtype=dtype, extra=[("cu_seqlens", ends)])


@both
@pytest.mark.parametrize("raw", [-30.0, 0.0, 20.0, 30.0])
def test_scan_large_and_tiny_steps(backend, raw):
    arguments = on_gpu(scan_arguments(1, 90, 34, 16, without=("dt_bias",)))
    arguments["dt"] = torch.full_like(arguments["dt"], raw)
    got = compute("scan", backend, arguments)
    plain, exact = (results(reference.selective_scan, a) for a in (arguments, to_double(arguments)))
    for name, want in exact.items():
        assert_law(got[name], plain[name], want, name, slack=max(4, abs(raw)))


@both
@pytest.mark.parametrize("shape", [(2, 0, 6, 3), (0, 4, 6, 3)])
def test_scan_of_nothing(backend, shape):
    got = compute("scan", backend, on_gpu(scan_arguments(*shape)))
    assert got["y"].shape == shape[:3]
    assert all(got["d" + k].shape == v.shape for k, v in scan_arguments(*shape).items() if torch.is_tensor(v))


@every
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_layouts(op, backend, dtype):
    """Halves of projections, slices, expanded rows: the same bits as dense tensors, values and gradients."""
    arguments = on_gpu({"scan": lambda: scan_arguments(2, 133, 64, 16, dtype=dtype),
                        "conv": lambda: conv_arguments(2, 133, 64, dtype=dtype),
                        "norm": lambda: norm_arguments(2, 133, 64, dtype=dtype)}[op]())  # fmt: skip

    def apart(v):
        return torch.cat([v, v + 1], -1)[..., : v.shape[-1]]

    def every_second(v):
        return torch.stack([v, v + 1], -1)[..., 0]

    want = compute(op, backend, arguments)
    for layout in (apart, every_second):
        f = lambda layout=layout, **leaves: OPS[op](**map_tensors(layout, leaves), backend=backend)  # noqa: E731
        got = results(f, arguments)
        assert all(torch.equal(got[k], want[k]) for k in want), layout.__name__


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w", [1, 2, 3, 4, 7])
def test_conv(w, dtype):
    check_law("conv", "triton", 2, 201, 130, w, dtype=dtype)
    check_law("conv", "triton", 1, 3, 17, w, dtype=dtype, activation=None)
    packed = (0, 0, 1, 2, 66, 66, 201)
    check_law("conv", "triton", 1, 201, 37, w, dtype=dtype, rows=6, extra=[("cu_seqlens", packed)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 501, 768), (7, 130), (2, 9, 2560), (2, 3, 5000), (2, 0, 5)], ids=str)
def test_norm(shape, dtype):
    for residual in (True, False):
        check_law("norm", "triton", *shape, dtype=dtype, residual=residual)


@pytest.mark.parametrize("backend", [None, *BACKENDS["scan"]])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(backend, kept):
    """As under autocast and in a bf16 model: B, C, D and the step bias in types of their own; gradients likewise."""
    low = scan_arguments(2, 130, 64, 16, dtype=torch.bfloat16)
    low |= {k: low[k].to(kept) for k in ("D", "dt_bias")}
    arguments = on_gpu(low | {"C": low["C"].float()})
    got = compute("scan", backend, arguments)
    plain, exact = (results(reference.selective_scan, a) for a in (arguments, to_double(arguments)))
    for name, want in exact.items():
        assert_law(got[name], plain[name], want, name)


# ---- laws of time ----------------------------------------------------------------------------------------------


@both
def test_split_is_whole(backend):
    arguments = on_gpu(scan_arguments(2, 777, 96, 16))
    whole = compute("scan", backend, arguments)
    timed = ("x", "dt", "z", "B", "C")
    for cut in (1, 64, 500, 776):
        first = {k: v[:, :cut] if k in timed else v for k, v in arguments.items()}
        y1, state = ops.selective_scan(**first, backend=backend)
        rest = {k: v[:, cut:] if k in timed else v for k, v in arguments.items()} | {"initial_state": state}
        y2, state = ops.selective_scan(**rest, backend=backend)
        for got, want in ((torch.cat([y1, y2], 1), whole["y"]), (state, whole["final_state"])):
            assert (got - want).abs().max() <= 4e-6 * want.abs().max()


@both
def test_step_by_step_is_whole(backend):
    arguments = on_gpu(scan_arguments(2, 33, 96, 16, dtype=torch.bfloat16))
    whole = compute("scan", backend, arguments)
    state = arguments.pop("initial_state").clone()
    for i in range(33):
        now = {k: v[:, i] if k in ("x", "dt", "z", "B", "C") else v for k, v in arguments.items()}
        y = ops.selective_step_(state, **now, backend=backend)
        assert (y - whole["y"][:, i]).abs().max() <= 2**-7 * whole["y"].abs().max()
    assert (state - whole["final_state"]).abs().max() <= 1e-5 * state.abs().max()


@every
def test_same_bits_every_time(op, backend):
    arguments = on_gpu({"scan": lambda: scan_arguments(2, 2050, 520, 16, dtype=torch.bfloat16),
                        "conv": lambda: conv_arguments(4, 2050, 520, dtype=torch.bfloat16),
                        "norm": lambda: norm_arguments(4, 2050, 520, dtype=torch.bfloat16)}[op]())  # fmt: skip
    first = compute(op, backend, arguments)
    for _ in range(4):
        again = compute(op, backend, arguments)
        assert all(torch.equal(first[k], again[k]) for k in first)


@both
def test_long_text(backend):
    """A single row of many chunks against the walk over time; sums over 20,000 steps."""
    check_law("scan", backend, 1, 20_000, 24, 4, without=("initial_state",))


# ---- surroundings ----------------------------------------------------------------------------------------------


def test_operators_as_torch_sees_them(clean):
    """opcheck: schemas, shapes for tracing, autograd."""
    a = on_gpu(scan_arguments(2, 70, 40, 16, dtype=torch.bfloat16))
    c = on_gpu(conv_arguments(2, 70, 40, dtype=torch.bfloat16))
    v = on_gpu(norm_arguments(2, 70, 40, dtype=torch.bfloat16))
    scan = a | {"cu_seqlens": None, "save": True, "backend": explain("cuda", torch.bfloat16)[0]}
    values = [
        ("selective_scan", scan | {"rule": "mamba"}),
        ("selective_scan", scan | {"rule": "zoh"}),
        ("causal_conv1d", c | {"silu": True, "cu_seqlens": None, "backend": "triton"}),
        ("add_rms_norm", v | {"eps": 1e-5, "dtype": torch.bfloat16, "backend": "triton"}),
    ]
    for name, given in values:
        op = getattr(torch.ops.anymamba, name).default
        args = [given[x.name] for x in op._schema.arguments]
        leaves = [x.requires_grad_() if torch.is_tensor(x) else x for x in args]
        # test_aot_dispatch_dynamic would compare slots of `saved` that nobody writes
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, tuple(leaves), test_utils=tests)


@every
def test_cuda_graph(op, backend, clean):
    """Forward and backward are captured, and a replay computes with what the inputs hold by then."""
    make = {"scan": lambda seed: scan_arguments(2, 300, 64, 16, seed=seed), "norm": lambda seed: norm_arguments(9, 64),
            "conv": lambda seed: conv_arguments(2, 300, 64, seed=seed)}[op]  # fmt: skip
    arguments = on_gpu(make(0))
    compute(op, backend, arguments)  # skips where it cannot run, and compiles
    leaves = map_tensors(lambda v: v.requires_grad_(), arguments)
    wanted = [v for v in leaves.values() if torch.is_tensor(v)]

    def call():
        y, end = OPS[op](**leaves, backend=backend)
        return y, end, *torch.autograd.grad(y.sum() + end.sum(), wanted)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        for v, new in zip(wanted, (v for v in make(1).values() if torch.is_tensor(v)), strict=True):
            v.copy_(new * 1.5)
    graph.replay()
    for got, want in zip(captured, call(), strict=True):
        assert torch.equal(got, want)


@every
def test_nothing_waits_for_the_gpu(op, backend, clean):
    """No copy to the host and no synchronisation in forward or backward, packed sequences included."""
    cases = [{"scan": scan_arguments(2, 70, 40, 16), "conv": conv_arguments(2, 70, 40), "norm": norm_arguments(9, 64)}]
    if op != "norm":
        cases.append({"scan": scan_arguments(1, 70, 40, 16, rows=2), "conv": conv_arguments(1, 70, 40, rows=2)})
    for i, case in enumerate(cases):
        arguments = on_gpu(case[op])
        extra = {"cu_seqlens": torch.tensor([0, 30, 70], device="cuda")} if i else {}
        compute(op, backend, arguments, **extra)
        leaves = map_tensors(lambda v: v.requires_grad_(), arguments)
        before = torch.cuda.get_sync_debug_mode()
        try:
            torch.cuda.set_sync_debug_mode("error")
            y, end = OPS[op](**leaves, **extra, backend=backend)
            (y.sum() + end.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.fixture(scope="module")
def mixer():
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=64, n_layer=2, vocab_size=100), device="cuda")
    return model.backbone.layers[0].mixer


def mixer_gradients(mixer: MambaMixer, u, run=None, **autocast):
    with torch.autocast("cuda", torch.bfloat16, **autocast):
        y, _ = (mixer if run is None else run)(u)
    parameters = dict(mixer.named_parameters())
    return y.detach(), dict(zip(parameters, torch.autograd.grad(y.float().square().mean(), [*parameters.values()]),
                                strict=True))  # fmt: skip


def test_autocast(mixer, clean):
    u = torch.randn(2, 200, 64, device="cuda")
    want, d_want = mixer_gradients(mixer, u, enabled=False)
    got, d_got = mixer_gradients(mixer, u)
    assert (got.dtype, want.dtype) == (torch.bfloat16, torch.float32)
    assert (got - want).norm() <= 0.02 * want.norm()
    for name, d in d_got.items():
        assert d.dtype == torch.float32
        assert (d - d_want[name]).norm() <= 0.05 * d_want[name].norm(), name


def test_compile(mixer, clean):
    """One graph, without breaks, and the same numbers; also for another length."""
    compiled = torch.compile(mixer, fullgraph=True)
    for t in (64, 91):
        u = torch.randn(2, t, 64, device="cuda")
        got, d_got = mixer_gradients(mixer, u, compiled, enabled=False)
        want, d_want = mixer_gradients(mixer, u, enabled=False)
        assert (got - want).norm() <= 1e-4 * want.norm()
        assert all((d_got[k] - d_want[k]).norm() <= 1e-3 * d_want[k].norm() for k in d_want)


def test_recomputing_blocks_changes_nothing(clean):
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=64, n_layer=3, vocab_size=100), device="cuda")
    ids = torch.randint(0, 100, (2, 150), device="cuda")
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model(ids, labels=ids).loss.backward()
        gradients.append({k: p.grad.clone() for k, p in model.named_parameters()})
    for name, g in gradients[0].items():  # the embedding's gradient is summed in any order
        torch.testing.assert_close(gradients[1][name], g, rtol=1e-4, atol=1e-6)


def test_model_agrees_with_the_cpu(clean):
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=64, n_layer=2, vocab_size=100))
    ids = torch.randint(0, 100, (3, 140))
    want = model(ids, labels=ids)
    model.cuda()
    got = model(ids.cuda(), labels=ids.cuda())
    assert abs(got.loss.item() - want.loss.item()) <= 1e-5
    with torch.no_grad():
        lengths = torch.tensor([140, 7, 33], device="cuda")
        padded = model(ids.cuda(), lengths=lengths, padding_side="left")
        alone = model(ids[1:2, -7:].cuda())
        assert (padded.logits[1, -7:] - alone.logits[0]).abs().max() <= 1e-4
        half = model(ids[:, :61].cuda())
        rest = model(ids[:, 61:].cuda(), half.state)
        assert (rest.logits - model(ids.cuda()).logits[:, 61:]).abs().max() <= 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one GPU")
@every
def test_second_device(op, backend):
    """Tensors on another GPU than the current one."""
    sizes = {"scan": (2, 133, 64, 16), "conv": (2, 133, 64), "norm": (2, 133, 64)}[op]
    want = compute(op, backend, on_gpu(MAKE[op](*sizes), "cuda:0"))
    with torch.cuda.device(0):
        got = compute(op, backend, on_gpu(MAKE[op](*sizes), "cuda:1"))
        assert torch.cuda.current_device() == 0
    for name, v in got.items():
        assert v.device == torch.device("cuda:1")
        torch.testing.assert_close(v.to("cuda:0"), want[name])


# ---- limits ----------------------------------------------------------------------------------------------------


def room(gib):
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] >= gib * 2**30


@both
def test_memory_does_not_hold_the_states(backend, clean):
    """Forward and backward, in units of x: y, dx, ddt, dz are 4; saved states and the rest at most 4 more."""
    compute("scan", backend, on_gpu(scan_arguments(1, 9, 8, 16)))
    used = []
    for t in (2048, 4096, 8192):
        leaves = map_tensors(lambda v: v.requires_grad_(),
                             {k: v.cuda() for k, v in scan_arguments(1, t, 1536, 16, dtype=torch.bfloat16).items()
                              if torch.is_tensor(v)})  # fmt: skip
        dy = torch.randn_like(leaves["x"])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y, _ = ops.selective_scan(**leaves, dt_softplus=True, backend=backend)
        kept = torch.autograd.grad(y, list(leaves.values()), dy)
        used.append((torch.cuda.max_memory_allocated() - before) / (2 * t * 1536))
        del y, kept
    assert 4 <= used[2] <= 8
    assert used[2] <= 1.1 * used[1]


T, D, N = (1 << 21) + 5, 1025, 16  # T·D > 2^31
NEAR = 1500  # of a state nothing is left after two thirds: the smallest decay rate is 1 and steps are about 0.05


def cat_of(make, *shape):
    """A large random tensor, made piece by piece."""
    out = torch.empty(*shape, device="cuda", dtype=torch.bfloat16)
    for piece in out.split(1 << 18, 1):
        piece.copy_(make(piece.shape))
    return out


def normal(shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


@both
def test_scan_of_more_than_2_to_the_31(backend, clean):
    """The last outputs and gradients are those of a scan of the last steps alone; the first, of the first."""
    compute("scan", backend, on_gpu(scan_arguments(1, 9, 8, 16)))
    if not room(64):
        pytest.skip("less than 64 GiB of GPU memory are free")
    torch.manual_seed(0)
    x, z = cat_of(normal, 1, T, 2 * D).split(D, -1)  # halves of a projection, as in the mixer
    A, bias = -torch.arange(1.0, N + 1, device="cuda").repeat(D, 1), torch.full((D,), -3.0, device="cuda")
    v = {"x": x, "dt": cat_of(lambda s: normal(s) / 4, 1, T, D), "A": A, "B": cat_of(normal, 1, T, N),
         "C": cat_of(normal, 1, T, N), "z": z, "dt_bias": bias}  # fmt: skip
    dy = cat_of(normal, 1, T, D)
    whole = limited("scan", backend, v, dy)
    timed = {k for k, u in v.items() if u.dim() == 3}
    for part in (slice(T - NEAR, T), slice(0, NEAR)):
        alone = limited("scan", backend, {k: u[:, part] if k in timed else u for k, u in v.items()}, dy[:, part])
        for name in ("y", *("d" + k for k in timed)):
            got, want = whole[name][:, part], alone[name]
            keep = slice(0, NEAR // 3) if part.start == 0 else slice(-NEAR // 3, None)  # far from what was cut off
            assert_near(got[:, keep], want[:, keep], f"{name} at {part}")


def assert_near(got, want, what):
    """A wrong place in memory shows as an error of the order of the values; roundings do not matter here."""
    assert (got.double() - want.double()).norm() <= 5e-3 * want.double().norm(), what


def limited(op, backend, arguments, dy):
    """Output and gradients of the timed arguments, without the second output's and without copies."""
    leaves = {k: v.detach().requires_grad_() for k, v in arguments.items()}
    extra = {"dt_softplus": True} if op == "scan" else {"activation": "silu"} if op == "conv" else {}
    y = OPS[op](**leaves, **extra, backend=backend)[0]
    names = [k for k, v in leaves.items() if v.dim() == 3]
    return {"y": y.detach()} | {
        "d" + k: g for k, g in zip(names, torch.autograd.grad(y, [leaves[k] for k in names], dy), strict=True)
    }


def test_conv_of_more_than_2_to_the_31(clean):
    if not room(48):
        pytest.skip("less than 48 GiB of GPU memory are free")
    v = {"x": cat_of(normal, 1, T, 2 * D).split(D, -1)[0], "weight": torch.randn(D, 4, device="cuda")}
    dy = cat_of(normal, 1, T, D)
    whole = limited("conv", "triton", v, dy)
    alone = limited("conv", "triton", v | {"x": v["x"][:, -99:]}, dy[:, -99:])
    for name, v in alone.items():
        assert_near(whole[name][:, -90:], v[:, -90:], name)


def test_norm_of_more_than_2_to_the_31(clean):
    if not room(64):
        pytest.skip("less than 64 GiB of GPU memory are free")
    x, weight = cat_of(normal, 1, T, D), torch.randn(D, device="cuda")
    residual = torch.zeros(1, T, D, device="cuda")
    residual[:, -99:] = 1
    dy = cat_of(normal, 1, T, D)
    arguments = {"x": x, "residual": residual, "weight": weight}
    whole = limited("norm", "triton", arguments, dy)
    cut = {k: v[:, -99:] if v.dim() == 3 else v for k, v in arguments.items()}
    alone = limited("norm", "triton", cut, dy[:, -99:])
    for name, v in alone.items():
        assert_near(whole[name][:, -99:], v, name)
    want = F.rms_norm(x[:, -1].float() + 1, (D,), weight, 1e-5)
    torch.testing.assert_close(whole["y"][:, -1].float(), want, rtol=1e-2, atol=1e-2)
