"""Compiling and launching CUDA C++ kernels: NVRTC at run time, cached on disk, on torch's current stream.

A kernel is an `extern "C" __global__` function of a .cu file beside this module. Every parameter is 8 bytes wide, a
pointer or a long long, so that a launch is a tuple of Python integers. The sources include none but the .cuh files
beside them: CUDA's own headers come with its toolkit, and most machines have no more than NVRTC, which torch brings.
NVRTC and the driver are called through NVIDIA's cuda-bindings, which torch for CUDA requires too.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib
import sys
import tempfile
import threading

import torch

HERE = pathlib.Path(__file__).parent
OPTIONS = ("--std=c++17", "-default-device")
OLDEST = 80  # Ampere: the sources convert bfloat16 and copy to shared memory asynchronously
DEFAULT_SHARED = 48 << 10  # bytes of dynamic shared memory that a kernel may have without asking


# ---- what is there ---------------------------------------------------------------------------------------------


@functools.cache
def missing():
    """Why CUDA C++ kernels cannot run here, and the command that cures it if one does; None: they can."""
    if torch.version.hip:
        return "this torch is for AMD GPUs"
    if not torch.version.cuda:
        return "this torch is built without CUDA (https://pytorch.org/get-started has the pip command of one with)"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if reason := compiler_missing():
        return reason
    built, runs = _nvrtc_version(), _driver_version()
    if built[0] > runs[0]:
        return f"NVRTC is version {_dotted(built)}, but the driver runs CUDA up to {_dotted(runs)}: {_cure(runs[0])}"
    try:
        for device in range(torch.cuda.device_count()):
            _arch(device)
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def compiler_missing():
    """Why CUDA C++ cannot be compiled here, with the command that cures it; None: it can. Needs no GPU."""
    major = int((torch.version.cuda or "13").split(".")[0])
    try:
        found = importlib.util.find_spec("cuda.bindings.nvrtc")
    except ModuleNotFoundError:
        found = None
    if found is None:
        return f"cuda-bindings is not installed: {_cure(major)}"
    try:
        _nvrtc_version()
    except Exception as error:  # cuda-bindings has had several types for a library that it cannot find
        return f"NVRTC cannot be loaded ({str(error).strip().splitlines()[0]}): {_cure(major)}"
    return None


def _cure(major):
    nvrtc = "nvidia-cuda-nvrtc-cu12" if major == 12 else f"'nvidia-cuda-nvrtc=={major}.*'"
    return f"pip install 'cuda-bindings=={major}.*' {nvrtc}"


def _check(outcome, doing):
    """What a call of CUDA's bindings returned after its status, which is 0 unless it failed."""
    status, *values = outcome
    if status != 0:
        raise RuntimeError(f"{doing}: {status.name}")
    return values[0] if len(values) == 1 else values


@functools.cache
def _nvrtc_version():
    from cuda.bindings import nvrtc

    return tuple(_check(nvrtc.nvrtcVersion(), "NVRTC's version"))


def _driver_version():
    from cuda.bindings import driver

    version = _check(driver.cuDriverGetVersion(), "the driver's version")
    return version // 1000, version % 1000 // 10


def _dotted(version):
    return ".".join(map(str, version))


@functools.cache
def _arch(device):
    """What to compile for: the device's architecture, or the newest of its generation that NVRTC knows."""
    from cuda.bindings import nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    known = _check(nvrtc.nvrtcGetSupportedArchs(), "NVRTC's architectures")
    fits = [arch for arch in known if arch // 10 == major and OLDEST <= arch <= major * 10 + minor]
    if not fits:
        name, version = torch.cuda.get_device_name(device), _dotted(_nvrtc_version())
        needed = f"sm_{OLDEST} or newer, of those that NVRTC {version} knows (up to sm_{max(known)})"
        raise RuntimeError(f"{name} is sm_{major}{minor}; the kernels need {needed}")
    own = "a" if (major, minor) == (9, 0) else ""  # what only Hopper has: cuda_decode_wide.cu needs it
    return f"sm_{max(fits)}{own}"


# ---- compilation -----------------------------------------------------------------------------------------------


def compile(source, name, defines, arch, headers=()):
    """The source as machine code (a cubin) for `arch` ("sm_90"); needs NVRTC but no GPU.

    `name`: the file's, for messages. `defines`: (macro, value) pairs. `headers`: (file name, text) pairs. Raises
    RuntimeError with the compiler's log if the source is wrong or NVRTC does not know the architecture.
    """
    from cuda.bindings import nvrtc

    text, options = _expand(source, name, defines).encode(), [option.encode() for option in (*OPTIONS, f"-arch={arch}")]
    names, texts = ([pair[i].encode() for pair in headers] for i in (0, 1))
    program = _check(nvrtc.nvrtcCreateProgram(text, name.encode(), len(names), texts, names), name)
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status[0] != 0:
            log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program), name))
            _check(nvrtc.nvrtcGetProgramLog(program, log), name)
            said = log.decode(errors="replace").strip("\0\n")
            _check(status, f"{said}\ncompiling {name} for {arch} with {dict(defines)}")
        cubin = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program), name))
        _check(nvrtc.nvrtcGetCUBIN(program, cubin), name)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def _expand(source, name, defines):
    # Not options (-D): those would also hold in what NVRTC includes by itself, where T and N are template parameters.
    return "".join(f"#define {macro} {value}\n" for macro, value in defines) + f'#line 1 "{name}"\n{source}'


def read(file):
    """(source, headers) of a .cu file beside this module: its text and every .cuh file in its folder."""
    path = HERE / file
    headers = [(header.name, header.read_text(encoding="utf-8")) for header in sorted(path.parent.glob("*.cuh"))]
    return path.read_text(encoding="utf-8"), headers


def compile_cached(source, name, defines, arch, headers=()):
    """`compile`, or what an earlier process stored of it."""
    key = repr((_expand(source, name, defines), headers, OPTIONS, arch, _nvrtc_version()))
    path = _cache_dir() / f"{pathlib.Path(name).stem}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    try:
        stored = path.read_bytes()
        digest, cubin = stored[:32], stored[32:]
        if digest == hashlib.sha256(cubin).digest():
            return cubin
    except OSError:
        pass
    _announce(path.parent)
    cubin = compile(source, name, defines, arch, headers)
    _store(path, hashlib.sha256(cubin).digest() + cubin)
    return cubin


def _cache_dir():
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "anymamba"
    return pathlib.Path(os.environ.get("ANYMAMBA_CACHE") or default) / "cuda"


@functools.cache
def _announce(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            where = f"cached in {folder}"
    except OSError:
        where = "not cached: the cache folder is not writable (set ANYMAMBA_CACHE)"
    print(f"anymamba: compiling CUDA kernels, some seconds, once per machine ({where})", file=sys.stderr, flush=True)


def _store(path, content):
    # Written aside and renamed, so that no other process reads half a file. No place to write: no cache.
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(aside, path)
    except OSError:
        if aside:
            pathlib.Path(aside).unlink(missing_ok=True)


# ---- loading and launching -------------------------------------------------------------------------------------

_kernels = {}
_lock = threading.Lock()


def load(file, name, defines, device):
    """The kernel `name` of a .cu file beside this module, compiled with these preprocessor definitions.

    `defines`: a tuple of (macro, value). `device`: a torch CUDA device. Compiled and loaded at the first call, looked
    up in a dictionary afterwards. Raises RuntimeError if it does not compile or load.
    """
    kernel = _kernels.get((file, name, defines, device.index))
    if kernel is not None:
        return kernel
    current = torch.cuda.current_device()  # asked in any case: it initialises CUDA, and refuses in a forked child
    index = current if device.index is None else device.index
    with _lock, torch.cuda.device(index):
        key = file, name, defines, index
        if key not in _kernels:  # it may be there by now: another thread was first, or the device had no index
            _make_context_current(index)
            _kernels[key] = Kernel(_library(file, defines, _arch(index)), name, index)
        return _kernels[key]


@functools.cache
def _library(file, defines, arch):
    """A compiled file, loaded: its kernels run on every device of that architecture."""
    from cuda.bindings import driver

    source, headers = read(file)
    cubin = compile_cached(source, pathlib.Path(file).name, defines, arch, headers)
    doing = f"loading {file} from NVRTC {_dotted(_nvrtc_version())} with a driver for CUDA {_dotted(_driver_version())}"
    return _check(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0), doing)


class Kernel:
    """A kernel on one device; `registers` and `local_bytes` (spills) are per thread, `shared_bytes` per block."""

    def __init__(self, library, name, index):
        from cuda.bindings import driver

        self.name, self.index = name, index
        self._shared, self._local = DEFAULT_SHARED, threading.local()
        kernel = _check(driver.cuLibraryGetKernel(library, name.encode()), f"finding {name}")
        # The function of this context: loaded now, where the kernel would be at a launch, which may be captured.
        self._function = _check(driver.cuKernelGetFunction(kernel), f"loading {name}")
        self._launch, attribute = driver.cuLaunchKernel, driver.CUfunction_attribute
        self._overlaps = int(_arch(index)[3:5]) >= 90
        self.registers = self._attribute(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS)
        self.local_bytes = self._attribute(attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)
        self.shared_bytes = self._attribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)

    def launch(self, grid, block, shared, args, overlap=False):
        """Launch on the device's current torch stream.

        `grid`: 3 integers. `block`: threads. `shared`: bytes of dynamic shared memory. `args`: the kernel's parameters
        as integers, always as many. `overlap`: it may start, where the GPU can, once every block of the kernel before
        it lets it (griddepcontrol), and waits by itself. Raises RuntimeError with the driver's error.
        """
        index = self.index
        if torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                return self.launch(grid, block, shared, args, overlap)
        if shared + self.shared_bytes > self._shared:
            self._allow(shared)
        try:
            values, pointers = self._local.parameters
        except AttributeError:
            values, pointers = self._parameters(len(args))
        values[:] = args
        # what torch.cuda.current_stream(index).cuda_stream is, without making a stream object for it
        stream = torch._C._cuda_getCurrentRawStream(index)
        if overlap and self._overlaps:
            return self._launch_early(grid, block, shared, stream, pointers)
        call = self._function, *grid, block, 1, 1, shared, stream, pointers, 0
        (status,) = self._launch(*call)
        if status == 0:
            return
        if status.name == "CUDA_ERROR_INVALID_CONTEXT":  # this thread has not used the GPU yet
            _make_context_current(index)
            (status,) = self._launch(*call)
        _check((status,), f"launching {self.name}: grid {grid}, {block} threads, {shared} bytes of shared memory")

    def _launch_early(self, grid, block, shared, stream, pointers):
        from cuda.bindings import driver

        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes, config.hStream, config.attrs, config.numAttrs = shared, stream, [early], 1
        _check(driver.cuLaunchKernelEx(config, self._function, pointers, 0), f"launching {self.name}: grid {grid}")

    def _parameters(self, count):
        # An array of values and one of their addresses for every thread: the driver's call lets other threads run.
        local = self._local
        values = (ctypes.c_int64 * count)()
        start = ctypes.addressof(values)
        local.addresses = (ctypes.c_void_p * count)(*range(start, start + 8 * count, 8))
        local.parameters = values, ctypes.addressof(local.addresses)
        return local.parameters

    def _attribute(self, attribute):
        from cuda.bindings import driver

        return _check(driver.cuFuncGetAttribute(attribute, self._function), self.name)

    def _allow(self, shared):
        from cuda.bindings import driver

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        doing = f"{shared} bytes of shared memory for {self.name}"
        _make_context_current(self.index)  # a thread that has not used CUDA yet has none
        _check(driver.cuFuncSetAttribute(self._function, attribute, shared), doing)
        self._shared = shared + self.shared_bytes


def tensor_map(matrix, rows):
    """Describes a bfloat16 matrix on a GPU, (r,c), for copies of boxes of `rows` × 64: 128 bytes, as int64 (16,) on it.

    Rows lie in shared memory as tensor cores read them (128-byte swizzle); what is outside the matrix becomes 0.
    """
    from cuda.bindings import driver as d

    size, box = [d.cuuint64_t(v) for v in reversed(matrix.shape)], [d.cuuint32_t(v) for v in (64, rows)]
    made = _check(d.cuTensorMapEncodeTiled(
        d.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, matrix.data_ptr(), size,
        [d.cuuint64_t(matrix.stride(0) * 2)], box, [d.cuuint32_t(1)] * 2,
        d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    ), "describing a matrix")  # fmt: skip
    words = b"".join(int(v).to_bytes(8, "little") for v in made.opaque)
    return torch.frombuffer(bytearray(words), dtype=torch.int64).to(matrix.device)


def _make_context_current(index):
    """Makes torch's context, the device's primary one, that of this thread."""
    from cuda.bindings import driver

    doing = f"the context of cuda:{index}"
    device = _check(driver.cuDeviceGet(index), doing)
    _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(device), doing)), doing)
