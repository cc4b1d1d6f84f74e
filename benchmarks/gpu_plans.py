"""The tables that plans of the CUDA scan are made from: 2048 steps with 1, 2, … blocks on every multiprocessor.

    python benchmarks/gpu_plans.py [--quick] [--save]

Prints milliseconds for the tables FORWARD … BACKWARD_WIDE of src/anymamba/kernels/cuda_plans.py, measured anew: n = 16
for d_state up to 32, n = 64 beyond; bf16, with everything that a layer has.
"""

from unittest import mock

import torch

from anymamba.kernels import cuda_plans, cuda_scan
from common import median
from gpu_common import GpuReport, graph_times, options
from gpu_scan import inputs

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def forced(layout):
    """No choice but this layout, for the whole of time."""
    return lambda *_: (1, layout)


def forward(layout, arguments):
    with mock.patch.object(cuda_scan, "forward_plan", forced(layout)):
        return graph_times(lambda: cuda_scan.selective_scan(*arguments, True, None, None, False), 0.05)


def backward(layout, arguments):
    saved = cuda_scan.selective_scan(*arguments, True, None, None, True)[2]
    dy = torch.randn_like(arguments[0])
    with mock.patch.object(cuda_scan, "backward_plan", forced(layout)):
        return graph_times(lambda: cuda_scan.selective_scan_backward(dy, None, *arguments, True, None, saved), 0.05)


def row(report, table, key, times, n, layout, measure):
    multiprocessors, found = report.card["gpu"]["multiprocessors"], []
    for count in range(1, len(times) + 1):
        values = inputs(count, multiprocessors * layout["CB"], 2048, n, strided=True, rank=64)
        found.append(round(median(measure(layout, [values[name] for name in NAMES])) * 1e3, 3))
    report.add(f"{table} {key}", f"{found}  (in use: {list(times)})", ms=found, in_use=list(times), layout=layout)


def main() -> int:
    args = options(__doc__)
    report = GpuReport("gpu_plans")
    for table, n in (("FORWARD", 16), ("FORWARD_WIDE", 64), ("BACKWARD", 16), ("BACKWARD_WIDE", 64)):
        for key, times in list(getattr(cuda_plans, table).items())[: 1 if args.quick else None]:
            with report.row(f"{table} {key}"):
                if table.startswith("FORWARD"):
                    row(report, table, key, times, n, cuda_plans.forward_layout(n, key, len(times)), forward)
                else:
                    row(report, table, key, times, n, cuda_plans.backward_layout(n, *key, len(times)), backward)
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
