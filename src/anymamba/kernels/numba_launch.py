"""Compiling and launching Numba kernels: once, cached on disk, on torch's own threads.

A kernel here is a function of one pointer to int64 parameters (addresses and sizes). It fetches work items from an
atomic counter in parameter 0 until `items` (parameter 1) are done, so any number of threads can run the same call.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import sys
import tempfile
from typing import ClassVar

import numba
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

F32, F64, I64 = types.float32, types.float64, types.int64
STORAGE = {torch.float32: F32, torch.bfloat16: types.int16, torch.float16: types.uint16}
SMALL = 1 << 16  # operations that take about as long as waking a thread
HEADER = 2  # parameters before the kernel's own: the counter and the number of items

_in_forked_child = False


def _after_fork():
    # OpenMP's and our pool's threads did not come along, and waiting for them would never end.
    global _in_forked_child
    _in_forked_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@intrinsic
def next_item(typingctx, params):
    """The next work item, counted up atomically across threads."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", args[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(params), codegen


def _second(builder, counters):
    return builder.gep(counters, [ir.Constant(ir.IntType(64), 1)], source_etype=ir.IntType(64))


@intrinsic
def _add_done(typingctx, counters, count):
    """Add to counters[1]. What this thread wrote before is seen by whoever sees the new value."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", _second(builder, args[0]), args[1], "seq_cst")

    return types.int64(counters, types.int64), codegen


@intrinsic
def _done(typingctx, counters):
    """counters[1], which other threads add to."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(_second(builder, args[0]), "seq_cst", 8, typ=ir.IntType(64))

    return types.int64(counters), codegen


@intrinsic
def _call(typingctx, address):
    """Call the C function at an address, which takes nothing; its answer, if any, is ignored."""

    def codegen(context, builder, sig, args):
        function = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(address), codegen


@intrinsic
def pointer(typingctx, address, dtype):
    """The address as a typed pointer."""
    ty = types.CPointer(dtype.dtype)

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(ty))

    return ty(address, dtype), codegen


PHASE = 8  # int64 of a phase's counters: a cache line of its own, so that threads that wait disturb no others
_PATIENCE = 2000  # looks, some microseconds: longer than a phase's last items take when no thread was put aside


@njit
def finish_phase(counters, done, items, give_way):
    """Wait until all of a phase's items are done, of which this thread did `done`.

    counters: [next item, items done]. No thread waits for another to arrive, only for items that one has begun, so any
    number of threads, even one, gets through. A thread that the system put aside holds an item: then the others give
    way (`give_way_address()`) instead of spinning in its place.
    """
    if done > 0:
        _add_done(counters, done)
    looks = 0
    while _done(counters) < items:
        looks += 1
        if looks > _PATIENCE:
            _call(give_way)


# ---- compilation -----------------------------------------------------------------------------------------------


def _cache_dir():
    """A folder named after the kernels' sources, so that no edit or upgrade meets a stale binary; None: no place.

    Numba itself looks only at the file that defines a function, not at the functions that it inlines.
    """
    digest = hashlib.sha256()
    for source in sorted(pathlib.Path(__file__).parent.glob("numba_*.py")):
        digest.update(source.read_bytes())
    variant = os.environ.get("ANYMAMBA_NO_AVX512")
    digest.update(f"{numba.__version__} {sys.version_info[:2]} {variant}".encode())
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "anymamba"
    root = pathlib.Path(os.environ.get("ANYMAMBA_CACHE") or default)
    folder = root / f"numba-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


@contextlib.contextmanager
def _numba_cache(folder):
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder or "")
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


class Kernel:
    """A Numba kernel, compiled at its first launch (or by `warmup`) for each storage type it is used with.

    `build(dtype)` returns the Python function `f(params: int64*)`.
    """

    registry: ClassVar[list] = []

    def __init__(self, build):
        self.build, self.name, self.compiled = build, build.__name__, {}
        Kernel.registry.append(self)

    def get(self, dtype):
        if dtype not in self.compiled:
            folder = _cache_dir()
            # Numba does not tell beforehand whether it will compile or load, so a marker of ours does
            marker = folder and folder / f"{self.name}-{dtype}.compiled".replace(" ", "")
            if marker is None or not marker.exists():
                _announce(folder)
            with _numba_cache(folder):
                fn = numba.cfunc(types.void(types.CPointer(I64)), nopython=True, cache=folder is not None)(
                    self.build(dtype)
                )
            if marker:
                marker.touch()
            self.compiled[dtype] = (fn, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(fn.address))  # fn keeps the code alive
        return self.compiled[dtype][1]


@functools.cache
def _announce(folder):
    where = f"cached in {folder}" if folder else "not cached: the cache folder is not writable (set ANYMAMBA_CACHE)"
    print(f"anymamba: compiling CPU kernels, some seconds, once per machine ({where})", file=sys.stderr, flush=True)


# ---- launching -------------------------------------------------------------------------------------------------


@functools.cache
def _openmp():
    """libgomp as torch loaded it, or None.

    After each of torch's parallel regions its idle threads spin for milliseconds. Threads of our own would share
    the cores with them and run at half speed (measured: 17 ms instead of 9 for a scan after a linear layer), so we
    run on those very threads where we can reach them.
    """
    path = pathlib.Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    try:
        library = ctypes.CDLL(str(path), mode=getattr(os, "RTLD_NOLOAD", 0) | ctypes.DEFAULT_MODE)
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.restype = None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return parallel


@functools.cache
def _pool(threads):
    return concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="anymamba")


def threads():
    """How many threads a launch uses: torch's number, one in a forked child."""
    return 1 if _in_forked_child else torch.get_num_threads()


def launch(kernel, dtype, items, params, work=SMALL):
    """Run work items 0 … items-1 of a kernel; `params` are integers: addresses (`address(t)`), sizes, flags.

    `work`: about how many vector-lane operations there are; a small launch stays on the calling thread.
    """
    function = kernel.get(dtype)
    buffer = (ctypes.c_int64 * (HEADER + len(params)))(0, items, *params)
    workers = 1 if work < SMALL else min(threads(), items)
    if workers <= 1:
        function(ctypes.addressof(buffer))
    elif _openmp():
        _openmp()(ctypes.cast(function, ctypes.c_void_p), ctypes.addressof(buffer), workers, 0)
    else:
        tasks = [_pool(workers - 1).submit(function, ctypes.addressof(buffer)) for _ in range(workers - 1)]
        function(ctypes.addressof(buffer))
        for task in tasks:
            task.result()


@functools.cache
def give_way_address():
    """The address of the system's function by which a thread lets another run."""
    function = ctypes.windll.kernel32.SwitchToThread if os.name == "nt" else ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value


def address(tensor):
    """The tensor's data pointer, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def rows(tensor, channels):
    """The tensor as (rows, channels) with unit stride in the channels: a view where strides allow, else a copy."""
    if tensor is None:
        return None
    flat = tensor.reshape(-1, channels)
    return flat if flat.stride(-1) == 1 or channels == 1 else flat.contiguous()
