"""Which backend runs an op, and why. See the table in `ops`."""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from anymamba.errors import AnymambaError

BACKENDS = ("reference", "numba", "triton", "cuda")
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
    if op == "selective_scan" and device == "cuda" and (no_cuda := _missing_cuda(device)) is None:
        return "cuda", "CUDA C++ kernels compiled by NVRTC"
    if (missing := _missing_triton(device)) is not None:
        return "reference", missing
    return "triton", "GPU kernels compiled by Triton" + (f"; not CUDA C++: {no_cuda}" if no_cuda else "")


_defaults: dict[tuple, tuple[str, str]] = {}


def _default(device_type: str, dtype: torch.dtype, op: str) -> tuple[str, str]:
    key = (device_type, dtype, op)
    if key not in _defaults:
        _defaults[key] = explain(*key)
    return _defaults[key]


# to torch.compile the answer is a constant (as torch.compiler.assume_constant_result does, without its slow import)
_default._dynamo_marked_constant = True


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def choose(backend: str | None, x: Tensor, op: str, n: int = 1) -> str:
    """The backend that runs `op` on x; n is the scan's d_state. Raises AnymambaError if a forced one cannot."""
    if backend is not None:
        return _forced(backend, x, op, n)
    device = x.device.type
    name, reason = _default(device, x.dtype, op)
    if name == "cuda" and not _cuda_supports(n):
        name, reason = "triton", _missing_triton(device)
        name = "triton" if reason is None else "reference"
    if name == "reference" and x.dtype != torch.float64 and not torch.compiler.is_compiling():
        _warn_once(f"anymamba runs its slow reference on {device}: {reason}. See `anymamba doctor`.")
    return name


def _cuda_supports(n: int) -> bool:
    from anymamba.kernels import cuda_scan

    return cuda_scan.supports(n)


def _forced(backend, x, op, n):
    if backend not in BACKENDS:
        raise AnymambaError(f"backend={backend!r} does not exist: choose one of {', '.join(BACKENDS)}, or None")
    if backend == "reference":
        return backend
    device, why = x.device.type, None
    if x.dtype == torch.float64 or (backend == "numba" and device != "cpu"):
        place = "CPU tensors" if backend == "numba" else "tensors"
        why = f"it takes {place} up to 32 bits, and x is {x.dtype} on {x.device}"
    elif backend == "numba":
        why = _missing_numba()
    elif backend == "triton":
        why = _missing_triton(device)
    elif op != "selective_scan":
        why = f"there is no CUDA C++ kernel for {op}"
    else:
        why = _missing_cuda(device)
        if why is None and not _cuda_supports(n):
            why = f"its kernels do not take d_state = {n}"
    if why is not None:
        raise AnymambaError(f"backend={backend!r} cannot run here: {why}. Use backend=None")
    return backend
