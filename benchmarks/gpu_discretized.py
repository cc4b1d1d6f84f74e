"""The selective scan with each rule of discretisation on the GPU: bf16 in and out, as in `gpu_scan.py`, and beside
Mamba's own rule; forward, forward + backward.

    python benchmarks/gpu_discretized.py [--triton] [--quick] [--save]

--triton: the other rules by the kernels for GPUs of any maker.

Floors as in `gpu_scan.py`. No peer: no other library has a selective scan with another rule. The gate: a row whose
error against the float64 reference is far beyond that of the float32 reference, over some channels, says WRONG.
"""

import torch

from anymamba import reference
from anymamba.ops import selective_scan
from common import median
from gpu_common import GpuReport, options
from gpu_exact import outputs, relative, summary
from gpu_scan import NAMES, floors, inputs, measure

RULES = ("mamba", "zoh", "bilinear", "euler")
SHAPES = [(8, 2048, 2048, 16), (1, 5120, 2048, 16), (1, 2048, 32768, 16), (8, 2048, 2048, 64)]  # b, d, t, n
CHECKED = 2, 64, 300  # rows, channels and steps of the check: the reference is a loop over time


def ours(rule, backend):
    def scan(**v):
        return selective_scan(**v, dt_softplus=True, discretization=rule, backend=backend)[0]

    return scan


def errors(rule, backend, arguments):
    """{"y", "dx", …: (our error, that of the float32 reference)}."""
    rows, channels, steps = CHECKED
    cut = {k: v[:rows, :steps] if v.dim() == 3 else v for k, v in arguments.items()}
    cut = {k: v if k in ("B", "C") else v[:channels] if k == "A" else v[..., :channels] for k, v in cut.items()}
    dy = torch.randn_like(cut["x"])

    def truth(**v):
        return reference.selective_scan(**v, dt_softplus=True, discretization=rule)[0]

    got, plain = outputs(ours(rule, backend), cut, dy), outputs(truth, cut, dy)
    exact = outputs(truth, {k: v.double() for k, v in cut.items()}, dy)
    return {name: (relative(got[name], want), relative(plain[name], want)) for name, want in exact.items()}


def main() -> int:
    args = options(__doc__, triton={"action": "store_true"})
    torch.manual_seed(0)
    report = GpuReport("gpu_discretized")
    for shape in SHAPES[:1] if args.quick else SHAPES:
        usual = [None, None]
        for rule in RULES:
            backend = "triton" if args.triton and rule != "mamba" else "cuda"
            with report.row(f"{shape} {rule}"):
                arguments = inputs(*shape, strided=False)
                if rule == "euler":  # beyond, it blows up, and so does every error, in whoever computes it
                    arguments["A"] = arguments["A"].clamp(min=-0.2)
                accuracy = summary(errors(rule, backend, arguments))
                for i, times in enumerate(measure(ours(rule, backend), arguments)):
                    middle, (moved, exp) = median(times), floors(report, shape, i)
                    usual[i] = usual[i] or middle
                    text = f"{middle / moved:5.1f}× bytes {middle / exp:5.1f}× exp {middle / usual[i]:5.2f}× mamba"
                    report.timed(f"{shape} {rule} {backend} {NAMES[i]}", times, text, over_bytes=middle / moved,
                                 over_exp=middle / exp, of_mamba=middle / usual[i], accuracy=accuracy)  # fmt: skip
                print(f"{'':46} {accuracy}", flush=True)
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
