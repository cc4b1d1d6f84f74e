"""The Triton scan against the reference, by Triton's interpreter on CPU tensors: the law, at small odd sizes.

`test_gpu.py` has the real sizes. Here time is cut into chunks that a GPU would not cut: that path is a second scan.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from anymamba import reference
from anymamba.ops import selective_scan
from conftest import (
    OPTIONAL,
    assert_law,
    map_tensors,
    outputs_and_gradients,
    run_python,
    scan_arguments,
    to_double,
)

triton = pytest.importorskip("triton")
from anymamba.kernels import triton_common, triton_scan, triton_scan_backward  # noqa: E402

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton's interpreter is off (a GPU?)")
pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_law(arguments, slack=4, **extra):
    """Outputs and every gradient within the law."""
    got = outputs_and_gradients(selective_scan, arguments, backend="triton", **extra)
    plain = outputs_and_gradients(reference.selective_scan, arguments, **extra)
    exact = outputs_and_gradients(reference.selective_scan, to_double(arguments), **extra)
    for name in exact:
        assert_law(got[name], plain[name], exact[name], name, slack)


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 16 steps, and a record of how many each launch plan had."""
    seen, real = [], triton_common.cut

    def cut(*args):
        seen.append(real(*args)[0])
        return real(*args)

    monkeypatch.setattr(triton_common, "SHORTEST", 16)
    for module in (triton_scan, triton_scan_backward):
        monkeypatch.setattr(module, "cut", cut)
    return seen


# ---- the law ---------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("t", "dtype"), [(1, DTYPES[0]), (1, DTYPES[1]), (2, DTYPES[0]), (2, DTYPES[2]),
                                          (17, DTYPES[1]), (17, DTYPES[2]), (40, DTYPES[0])], ids=str)  # fmt: skip
def test_lengths(t, dtype):
    check_law(scan_arguments(1, t, 7, 4, dtype=dtype))


@interpreted
@pytest.mark.parametrize(("t", "n"), [(18, 1), (18, 3), (18, 16), (9, 20), (5, 64), (5, 257)])
def test_state_sizes(t, n):
    check_law(scan_arguments(1, t, 9, n))


@interpreted
@pytest.mark.parametrize(("b", "d", "n"), [(3, 1, 2), (2, 33, 2), (1, 70, 16)])
def test_batches_and_blocks_of_channels(b, d, n):
    """70 channels with n = 16 are three blocks, 33 with n = 2 are two."""
    check_law(scan_arguments(b, 5, d, n))


@interpreted
@pytest.mark.parametrize(("groups", "dtype"), [(0, DTYPES[1]), (1, DTYPES[0]), (2, DTYPES[1]), (5, DTYPES[0])], ids=str)
def test_groups(groups, dtype):
    check_law(scan_arguments(1, 7, 10, 3, groups=groups, dtype=dtype))


@interpreted
@pytest.mark.parametrize(("groups_B", "groups_C"), [(0, None), (None, 0), (None, 2), (2, None), (0, 2)])
def test_B_and_C_of_different_kinds(groups_B, groups_C):
    C = scan_arguments(1, 7, 10, 3, groups=groups_C, seed=1)["C"]
    check_law(scan_arguments(1, 7, 10, 3, groups=groups_B) | {"C": C})


@interpreted
@pytest.mark.parametrize("without", [*((name,) for name in OPTIONAL), OPTIONAL], ids="-".join)
def test_optional_arguments(without):
    check_law(scan_arguments(1, 6, 5, 3, without=without))


@interpreted
def test_step_size_without_softplus():
    arguments = scan_arguments(1, 6, 5, 3)
    check_law(arguments | {"dt": arguments["dt"].abs() / 8, "dt_bias": None, "dt_softplus": False})


@interpreted
@pytest.mark.parametrize("raw", [-30.0, -8.0, 20.0, 30.0])
def test_large_and_tiny_steps(raw):
    arguments = scan_arguments(1, 6, 5, 3, without=("dt_bias",))
    # e^v as 2^(v / ln 2) rounds its exponent, which costs up to |v| units in the last place
    check_law(arguments | {"dt": torch.full_like(arguments["dt"], raw)}, slack=max(4, abs(raw)))


@interpreted
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ends", [[0, 0, 7, 7, 7, 24, 26, 26], [0, 26], list(range(7))], ids=str)
def test_packed(ends, kind):
    arguments = scan_arguments(1, ends[-1], 6, 3, rows=len(ends) - 1, dtype=DTYPES[kind == torch.int32])
    check_law(arguments, cu_seqlens=torch.tensor(ends, dtype=kind))


@interpreted
def test_mixed_dtypes():
    arguments = scan_arguments(1, 6, 5, 3, dtype=torch.bfloat16)
    types = {"B": torch.float32, "C": torch.float16, "D": torch.bfloat16, "dt_bias": torch.float16}
    check_law(arguments | {k: arguments[k].to(v) for k, v in types.items()})


@interpreted
@pytest.mark.parametrize("groups", [None, 0, 2])
@pytest.mark.parametrize("shape", [(2, 0, 6, 3), (0, 4, 6, 3)], ids=["t=0", "b=0"])
def test_of_nothing(shape, groups):
    arguments = scan_arguments(*shape, groups=groups)
    check_law(arguments)
    _, final_state = selective_scan(**arguments, backend="triton")
    assert torch.equal(final_state, arguments["initial_state"])


@interpreted
def test_empty_packed_sequences_only():
    check_law(scan_arguments(1, 0, 6, 3, rows=2), cu_seqlens=torch.tensor([0, 0, 0]))


# ---- time in chunks --------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("t", "options"), [(70, {}), (48, {"without": ("initial_state", "z")}),
                                            (33, {"groups": 0, "dtype": torch.bfloat16}), (35, {"groups": 2})],
                         ids=["70", "48", "33", "35"])  # fmt: skip
def test_time_in_chunks(t, options, short_chunks):
    check_law(scan_arguments(1, t, 6, 3, **options))
    assert short_chunks == [-(-t // 16)] * 2


@interpreted
def test_time_in_chunks_with_one_gradient_only(short_chunks):
    arguments = scan_arguments(2, 20, 5, 3)
    for used in (0, 1):
        leaves = map_tensors(lambda v: v.clone().requires_grad_(), arguments)
        exact = map_tensors(lambda v: v.requires_grad_(), to_double(arguments))
        selective_scan(**leaves, backend="triton")[used].float().sum().backward()
        reference.selective_scan(**exact)[used].sum().backward()
        for name in ("x", "dt", "A", "B", "initial_state"):
            torch.testing.assert_close(leaves[name].grad.double(), exact[name].grad, rtol=1e-4, atol=1e-5)
    assert set(short_chunks) == {2}


@pytest.mark.parametrize(("programs", "t", "n"), [(1, 32768, 16), (64, 32768, 16), (512, 2048, 16), (3, 5000, 100)])
def test_chunks_cover_time(programs, t, n):
    chunks, length = triton_common.cut(programs, t, n, 2112, None)
    assert length * (chunks - 1) < t <= length * chunks
    assert length % triton_common.keep_every(n) == 0
    assert length >= 4 * n
    assert triton_common.cut(2000, t, n, 2112, None) == (1, t) == triton_common.cut(1, t, n, 2112, torch.tensor([0, t]))


# ---- layouts and repetition ------------------------------------------------------------------------------------


def _slices(v):
    big = torch.zeros(*(2 * s + 1 for s in v.shape), dtype=v.dtype)
    return big[tuple(slice(1, None, 2) for _ in v.shape)].copy_(v)


def _rows_apart(v):
    return torch.cat([v, v + 1], -1)[..., : v.shape[-1]]


@interpreted
@pytest.mark.parametrize("groups", [None, 0, 2])
def test_layouts(groups):
    arguments = scan_arguments(2, 5, 6, 3, groups=groups)
    want = outputs_and_gradients(selective_scan, arguments, backend="triton")
    again = outputs_and_gradients(selective_scan, arguments, backend="triton")
    for layout in (_slices, _rows_apart):

        def through_layout(layout=layout, **leaves):
            return selective_scan(**map_tensors(layout, leaves), backend="triton")

        got = outputs_and_gradients(through_layout, arguments)
        assert all(torch.equal(got[k], want[k]) for k in want)
    assert all(torch.equal(again[k], want[k]) for k in want)


@interpreted
def test_the_shape_of_what_is_saved():
    for b, t, d, n, groups, sequences in [(2, 33, 40, 5, 2, 2), (1, 33, 40, 100, 1, 7)]:
        x, A = torch.empty(b, t, d), torch.empty(d, n)
        B = torch.empty(b, t, groups, n)
        bounds = None if sequences == b else torch.linspace(0, t, sequences + 1).long()
        arguments = (x, x, A, B, B, None, None, None, False, None, bounds)
        assert triton_scan.selective_scan(*arguments, False)[2] is None
        saved = triton_scan.selective_scan(*(v.zero_() if torch.is_tensor(v) and v is not bounds else v
                                             for v in arguments), True)[2]  # fmt: skip
        assert saved.shape == triton_scan.saved_shape(x.shape, A.shape, groups, sequences)


# ---- compiling for a GPU that is not there ---------------------------------------------------------------------

# of the backward kernel, which lives on all 255 registers, some numbers of outside its inner loop may be spilled
SPILLS = {"scan_forward": 0, "scan_adjoint": 0, "chain": 0, "scan_backward": 128}


def compile_kernels(folder):
    """Cubins for sm_90 of the kernels for n = 16 and bf16 activations; in a process without the interpreter."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    N, lanes, warps = triton_common.tile(16, 16)
    common = {"n": 16, "N": N, "LANES": lanes, "SAVED_LANES": lanes, "KEEP": 16, "SOFTPLUS": True,
              "BACK": True, "bounds": None, "B_fixed": None, "C_fixed": None, "dB_fixed": None,
              "dC_fixed": None}  # fmt: skip
    states_only = {"y": None, "z": None, "saved": None}
    cases = [(triton_scan.scan_forward, {"sums": None}), (triton_scan.scan_forward, states_only),
             (triton_common.chain, {}), (triton_scan_backward.scan_adjoint, {}),
             (triton_scan_backward.scan_backward, {})]  # fmt: skip
    for i, (kernel, fixed) in enumerate(cases):
        fixed = {"STEPS": 8 if kernel is triton_scan.scan_forward else 4} | fixed
        given = {k: v for k, v in (common | fixed).items() if k in kernel.arg_names}
        types = {k: "constexpr" if k in given else _type(k) for k in kernel.arg_names}
        unaligned = {p.name for p in kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
        places = {k: (kernel.arg_names.index(k),) for k in kernel.arg_names}
        aligned = {places[k]: [["tt.divisibility", 16]] for k in places if k not in given and k not in unaligned}
        source = ASTSource(kernel, types, {places[k]: v for k, v in given.items()}, aligned)
        options = {"num_warps": warps, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        (Path(folder) / f"{i}.{kernel.__name__}.cubin").write_bytes(compiled.asm["cubin"])


def _type(name):
    if name in ("x", "dt", "z", "y", "dy", "dx", "ddt", "dz"):
        return "*bf16"
    pointers = ("A", "A_again", "B", "B_again", "C", "D", "dt_bias", "added", "sums", "first", "last", "saved",
                "scratch", "dA", "partial", "dD", "dbias", "dinitial")  # fmt: skip
    return "*fp32" if name in pointers else "i32"


def test_kernels_compile_without_spills(tmp_path):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton does not bring NVIDIA's cuobjdump")
    code = f"import test_triton_scan; test_triton_scan.compile_kernels({str(tmp_path)!r})"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(triton_scan.__file__).parents[2])])
    done = run_python(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    cubins = sorted(tmp_path.glob("*.cubin"))
    assert len(cubins) == 5
    for cubin in cubins:
        text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
        spilled = int(re.search(r"STACK:(\d+)", text).group(1))
        assert spilled <= SPILLS[cubin.name.split(".")[1]], f"{cubin.name}: {text}"


def test_offsets_first_seen_in_inference_mode():
    """What is kept of them serves training later."""
    arguments = scan_arguments(1, 6, 4, 3, rows=2)
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int16)
    with torch.inference_mode():
        selective_scan(**arguments, cu_seqlens=cu_seqlens, backend="triton")
    arguments["x"].requires_grad_()
    selective_scan(**arguments, cu_seqlens=cu_seqlens, backend="triton")[0].sum().backward()
    assert arguments["x"].grad is not None
