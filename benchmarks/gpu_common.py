"""What every GPU benchmark shares: the GPU's card and roofline, timing of CUDA-graph replays, rows of a report.

A time is the median over replays of a captured call. Before each replay, not timed, twice the L2 cache is written, so
that nothing is found there; all replays are queued at once, so that the host's launches hide behind the GPU's work.
"""

import argparse
import contextlib
import functools
import gc
import statistics
import subprocess
import traceback
from collections.abc import Callable

import torch

from common import Report, card, median, versions

EXP_PER_CLOCK = 16  # exponentials a streaming multiprocessor starts a clock (sm_70 … sm_90)


def options(doc: str, **extra) -> argparse.Namespace:
    """The command line: --save, --quick, and `extra`, keyword arguments of `add_argument` by option name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the results to benchmarks/results/")
    parser.add_argument("--quick", action="store_true", help="few rows and rounds: does it run?")
    for name, settings in extra.items():
        flag = name if "nargs" in settings and settings["nargs"] == "*" else "--" + name.replace("_", "-")
        parser.add_argument(flag, **settings)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "torch sees no CUDA GPU here: nothing to measure\n")
    return args


# ---- the machine -----------------------------------------------------------------------------------------------


def _smi(*fields: str) -> list[str]:
    """What nvidia-smi says of the current GPU; "" for each field if it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits",
               f"--id={torch.cuda.current_device()}"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        values = [v.strip() for v in done.stdout.strip().splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, IndexError):
        return [""] * len(fields)
    return values if len(values) == len(fields) else [""] * len(fields)


def gpu_card() -> dict:
    """`card` of the host, and the GPU: name, driver, clocks in MHz, power limit in W."""
    properties = torch.cuda.get_device_properties()
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.max.mem", "power.limit")
    smi = dict(
        zip(("driver", "sm_clock", "max_sm_clock", "max_memory_clock", "power_limit"), _smi(*names), strict=True)
    )
    gpu = {"name": properties.name, "multiprocessors": properties.multi_processor_count,
           "memory": properties.total_memory, "l2": properties.L2_cache_size, "cuda": torch.version.cuda}  # fmt: skip
    packages = versions("torch", "triton", "cuda-core", "numpy", "transformers", "mamba_ssm", "causal_conv1d")
    return card() | {"gpu": gpu | smi, "versions": packages}


class GpuReport(Report):
    """A report that begins with the GPU's roofline and outlives a row that fails."""

    def __init__(self, name: str):
        super().__init__(name)
        self.failed = False
        self.roofline()

    def machine(self) -> dict:
        return gpu_card()

    def title(self) -> str:
        gpu = self.card["gpu"]
        return f"{gpu['name']}, driver {gpu['driver']}, {gpu['max_sm_clock']} MHz, CUDA {gpu['cuda']}"

    def roofline(self) -> None:
        gpu = self.card["gpu"]
        self.bandwidth, self.matmul = copy_bandwidth(), matmul_rate()
        self.exponentials = gpu["multiprocessors"] * EXP_PER_CLOCK * float(gpu["max_sm_clock"] or 1980) * 1e6
        text = f"copy {self.bandwidth / 1e12:.2f} TB/s, bf16 product {self.matmul / 1e12:.0f} TFLOP/s, "
        text += f"{self.exponentials / 1e12:.2f} T exp/s by the clock"
        self.add("machine", text, copy=self.bandwidth, matmul=self.matmul, exp=self.exponentials)

    @contextlib.contextmanager
    def row(self, key: str):
        """Around the work of one row: an error becomes a line, the next rows are still measured, memory is freed."""
        try:
            yield
        except Exception as error:
            self.failed = True
            where = traceback.extract_tb(error.__traceback__)[-1]
            first = (str(error).strip().splitlines() or [""])[0][:200]
            self.add(key, f"FAILED {type(error).__name__}: {first} ({where.filename}:{where.lineno})", error=str(error))
        finally:
            release()

    def timed(self, key: str, times: list[float], text: str = "", **values) -> None:
        """One line: median (min–max) in ms and what `text` makes of it."""
        low, high, middle = min(times) * 1e3, max(times) * 1e3, median(times) * 1e3
        line = f"{middle:9.4f} ms ({low:.4f}–{high:.4f})  {text}"
        self.add(key, line, ms=middle, low=low, high=high, rounds=len(times), **values)

    def close(self) -> int:
        """Write the results; the exit code."""
        self.card["gpu"]["sm_clock_at_end"] = _smi("clocks.sm")[0]
        super().close()
        return 1 if self.failed else 0


def verdict(value: float, target: float) -> str:
    """How a value that should be small stands to its target."""
    return f"(target ≤ {target:g}: {'met' if value <= target else 'NOT MET'})"


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


# ---- timing ----------------------------------------------------------------------------------------------------


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size // 4, dtype=torch.int32, device="cuda")


def flush() -> None:
    """Fill the L2 cache with something else."""
    _flush_buffer().zero_()


def event_times(call: Callable, rounds: int) -> list[float]:
    """Seconds on the GPU of each of `rounds` calls, all queued before the first is waited for."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for _ in range(10):  # a head start for the host
        flush()
    for start, end in pairs:
        flush()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def capture(call: Callable, warm: int = 2) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call, after some that compile; what the call returns lives as long as the graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            call()
    torch.cuda.current_stream().wait_stream(side)
    release()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.kept = call()
    return graph


def rounds_for(seconds_each: float, budget: float, least: int = 5, most: int = 50) -> int:
    return max(least, min(most, int(budget / max(seconds_each, 1e-6))))


def graph_times(call: Callable, budget: float = 0.4) -> list[float]:
    """Seconds of each replay of `call` as a CUDA graph; as many replays as fit the budget, 5 to 50."""
    graph = capture(call)
    first = statistics.median(event_times(graph.replay, 3))
    times = event_times(graph.replay, rounds_for(first, budget))
    del graph
    return times


def eager_times(call: Callable, budget: float = 0.4, warm: int = 2, least: int = 3) -> list[float]:
    """Seconds of each call as Python issues it: the GPU waits wherever the host is slower."""
    for _ in range(warm):
        call()
    first = event_times(call, 1)[0]
    return event_times(call, rounds_for(first, budget, least))


# ---- what the GPU can do ---------------------------------------------------------------------------------------


def copy_times(size: int) -> list[float]:
    """Seconds to read `size` / 2 bytes and write as many, by a kernel: in a graph a copy goes to the copy engine."""
    x = torch.randn(size // 4, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return graph_times(lambda: torch.neg(x, out=y), 0.1)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of 1 GiB."""
    return (1 << 31) / median(copy_times(1 << 31))


def matmul_rate(size: int = 8192) -> float:
    """Operations a second of a product of two bf16 matrices of random numbers."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median(graph_times(lambda: a @ b, 0.1))
