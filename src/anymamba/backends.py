"""Which backend runs an op, and why. See the table in `ops`."""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.kernels import WIDEST

BACKENDS = ("reference", "numba", "triton", "cuda")
SCANS = ("selective_scan", "discretized_scan")  # of which there are CUDA C++ kernels
GPUS = ("cuda", "xpu")  # device types that Triton compiles for; torch calls AMD's "cuda" too


# ---- what cannot run here, and why not -------------------------------------------------------------------------


@functools.cache
def _missing_numba() -> str | None:
    """Why the Numba kernels cannot run here, or None."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install numba)"
    try:
        from anymamba.kernels import numba_ops  # noqa: F401
    except Exception as error:  # a broken install must not look like a missing one: say what happened
        return f"numba is installed but does not work: {type(error).__name__}: {error}"
    return None


@functools.cache
def _missing_triton(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on tensors of this device type, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        import triton

        if device_type in GPUS and not torch.get_device_module(device_type).is_available():
            return f"torch sees no {device_type} device"
        if triton.knobs.runtime.interpret:
            return None
        if device_type not in GPUS:
            return (
                f"it takes tensors on a GPU, and x is on {device_type} (with TRITON_INTERPRET=1 set before Python "
                "starts, Triton's interpreter runs the kernels on the CPU, for tests)"
            )
        triton.runtime.driver.active.get_current_target()  # compiles a stub: fails here if there is no C compiler
    except Exception as error:
        return f"triton is installed but does not work: {type(error).__name__}: {error}"
    return None


@functools.cache
def _missing_cuda(device_type: str) -> str | None:
    """Why the CUDA C++ kernels cannot run on tensors of this device type, or None."""
    if device_type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, and x is on {'an AMD GPU' if device_type == 'cuda' else device_type}"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    try:
        from anymamba.kernels import cuda_scan

        return cuda_scan.missing()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# ---- the choice ------------------------------------------------------------------------------------------------


def explain(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
            op: str = "selective_scan") -> tuple[str, str]:  # fmt: skip
    """(backend, reason): what runs `op` for tensors of this device and dtype when `backend` is None."""
    device = torch.device(device).type
    if device != "cpu" and device not in GPUS:
        return "reference", f"there is no kernel for {device} yet; the plain torch loop is right but slow"
    if dtype == torch.float64:
        return "reference", "float64 is computed by the reference; kernels compute in float32"
    if device == "cpu":
        missing = _missing_numba()
        return ("numba", "CPU kernels compiled by Numba") if missing is None else ("reference", missing)
    no_cuda = None
    if op in (*SCANS, "decode") and device == "cuda" and (no_cuda := _missing_cuda(device)) is None:
        return "cuda", "CUDA C++ kernels compiled by NVRTC"
    if op == "decode":
        return "reference", f"the model's own forward pass: {no_cuda or f'there are no kernels for {device}'}"
    if (missing := _missing_triton(device)) is not None:
        return "reference", missing
    return "triton", "GPU kernels compiled by Triton" + (f"; not CUDA C++: {no_cuda}" if no_cuda else "")


_defaults: dict[tuple, tuple[str, str]] = {}


def _default(device_type: str, dtype: torch.dtype, op: str) -> tuple[str, str]:
    key = (device_type, dtype, op)
    if key not in _defaults:
        _defaults[key] = explain(*key)
    return _defaults[key]


def _cannot(backend: str, device_type: str, dtype: torch.dtype, op: str) -> str | None:
    """Why a backend cannot run `op` on such tensors, or None."""
    if dtype == torch.float64 or (backend == "numba" and device_type != "cpu"):
        place = "CPU tensors" if backend == "numba" else "tensors"
        return f"it takes {place} up to 32 bits, and x is {dtype} on {device_type}"
    if backend == "numba":
        return _missing_numba()
    if backend == "triton":
        return _missing_triton(device_type)
    return _missing_cuda(device_type) if op in SCANS else f"there is no CUDA C++ kernel for {op}"


# to torch.compile the answers are constants (as torch.compiler.assume_constant_result does, without its slow import)
_default._dynamo_marked_constant = True
_cannot._dynamo_marked_constant = True


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def choose(backend: str | None, x: Tensor, op: str, size: int = 1) -> str:
    """The backend that runs `op` on x. Raises AnymambaError if a forced one cannot.

    size: what kernels may have a limit for, the d_state of a scan or the width of a convolution.
    """
    if backend is not None:
        return _forced(backend, x, op, size)
    device = x.device.type
    name, reason = _default(device, x.dtype, op)
    if name == "cuda" and (beyond := _beyond(name, op, size)):
        missing = _cannot("triton", device, x.dtype, op)
        name, reason = ("triton", beyond) if missing is None else ("reference", missing)
    if name == "triton" and (beyond := _beyond(name, op, size)):
        name, reason = "reference", beyond
    if name == "reference" and x.dtype != torch.float64 and not torch.compiler.is_compiling():
        _warn_once(f"anymamba runs its slow reference on {device}: {reason}. See `anymamba doctor`.")
    return name


def _beyond(backend: str, op: str, size: int) -> str | None:
    """Why a backend's kernels do not take a d_state or width, or None."""
    if backend == "cuda":
        from anymamba.kernels import cuda_scan

        return None if cuda_scan.supports(size) else f"its kernels do not take d_state = {size}"
    if backend == "triton" and op == "causal_conv1d" and size > WIDEST:
        return f"its kernels take a width up to {WIDEST}, and that of weight is {size}"
    return None


def _forced(backend, x, op, size):
    if backend not in BACKENDS:
        raise AnymambaError(f"backend={backend!r} does not exist: choose one of {', '.join(BACKENDS)}, or None")
    if backend != "reference" and (why := _cannot(backend, x.device.type, x.dtype, op) or _beyond(backend, op, size)):
        raise AnymambaError(f"backend={backend!r} cannot run here: {why}. Use backend=None")
    return backend
