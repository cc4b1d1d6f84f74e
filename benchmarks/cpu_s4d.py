"""S4D and S4 on the CPU: b=1 t=16384 d=256, 64 numbers of state a channel (32 pairs), float32, forward. Convolution
against the recurrence, a loop of torch over time.

    python benchmarks/cpu_s4d.py [--save]

Each includes discretisation and the state after the last token. "compiled" is what `S4DMixer` runs without gradients,
"chunks" with them, "Fourier" the convolution by fast Fourier transforms, "kernel" what the latter needs first; "S4" is
what `S4Mixer` runs, a state matrix that is not diagonal. Also how many parameters a block of each mixer has. The gate:
all agree, else nothing is timed.
"""

import torch

from anymamba import MambaConfig, ops
from anymamba.layers import Block
from anymamba.reference import dense, discretize, dplr, hippo, lti
from common import Report, arguments, measure, median, quiet, spread

b, t, d, n = 1, 16384, 256, 64


def inputs():
    torch.manual_seed(0)
    A = hippo.s4d_lin(n // 2).to(torch.complex64).expand(d, -1)
    dt = torch.exp(torch.empty(d).uniform_(-6.9, -2.3))
    C = torch.randn(d, n // 2, dtype=torch.complex64)
    return torch.randn(b, t, d), A, dt, C


def forms(x, A, dt, C):
    def run(form):
        @torch.no_grad()
        def f():
            A_bar, B_bar, _ = discretize(A, torch.ones_like(A), dt[:, None], "zoh")
            return form(A_bar, B_bar)

        return f

    return {
        "compiled": run(lambda A_bar, B_bar: ops.time_invariant_scan(x, A_bar, B_bar, C)),
        "chunks": run(lambda A_bar, B_bar: lti.chunked(x, A_bar, B_bar, C)),
        "Fourier": run(lambda A_bar, B_bar: lti.convolution(x, A_bar, B_bar, C)),
        "kernel": run(lambda A_bar, B_bar: lti.kernel(A_bar, B_bar, C, t)),
        "recurrence": run(lambda A_bar, B_bar: lti.recurrence(x, A_bar, B_bar, C)),
    }


def s4(x, form):
    """S4 with as many numbers of state."""
    a, omega, P, B = (v.float().expand(d, -1) for v in dplr.legs(n))
    dt, C = torch.exp(torch.linspace(-6.9, -2.3, d)), torch.ones(d, n)
    return torch.no_grad()(lambda: form(x, *dplr.bilinear_real(a, omega, P, B, dt), C))


def check(got, want):
    for one, exact in zip(got, want, strict=True):
        error = ((one - exact).norm() / exact.norm()).item()
        assert error < 1e-4, f"they disagree: {error}"


def parameters(report):
    for mixer in ("mamba", "s4", "s4d", "rnn", "gru", "lstm"):
        count = sum(p.numel() for p in Block(MambaConfig(d_model=d, mixer=mixer)).parameters())
        report.add(f"parameters of a block, {mixer}", f"{count:9,}   d_model={d}, all else default", parameters=count)


def main():
    quiet()
    if arguments():
        raise SystemExit(f"cpu_s4d takes --save alone, not {' '.join(arguments())}")
    report = Report("cpu_s4d")
    report.roofline()
    x, *constants = inputs()
    timed = forms(x, *constants)
    want = timed["recurrence"]()
    for name in ("compiled", "chunks", "Fourier"):
        check(timed[name](), want)
    check(s4(x[:, :500], dense.chunked)(), s4(x[:, :500], dense.recurrence)())  # the loop takes long
    timed["S4"] = s4(x, dense.chunked)
    times = measure(timed, rounds=5)
    for name, values in times.items():
        report.add(f"forward, {name}, ms", spread(values), median=median(values))
    report.compare("compiled vs recurrence", times, "compiled", "recurrence", "≥ 20")
    report.compare("chunks vs recurrence", times, "chunks", "recurrence", "≥ 20")
    report.compare("Fourier vs recurrence", times, "Fourier", "recurrence", "≥ 20")
    parameters(report)
    report.close()


if __name__ == "__main__":
    main()
