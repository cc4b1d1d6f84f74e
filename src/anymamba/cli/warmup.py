"""`anymamba warmup`: compile the kernels that a model will use, before it is used."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anymamba import ops
from anymamba.checkpoint import load_config
from anymamba.cli.doctor import kernels
from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.generate.decode import Decoder
from anymamba.model import MambaLM
from anymamba.train.hardware import choose_device

DESCRIPTION = """Compile the kernels of a model ahead of time, for every backend that runs here; they are kept on disk.

examples:
  anymamba warmup                                         what mamba-130m needs on this machine's GPU, or CPU
  anymamba warmup --preset 2.8b --dtype bf16
  anymamba warmup --config runs/NAME --device cpu
  anymamba warmup --batch-size 8 --seqlen 4096            a GPU's kernels depend on the shape: give yours
"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Options:
    preset: str = "130m"  # sizes of the model: tiny, small, 130m, 370m, 790m, 1.4b, 2.8b
    config: str | None = None  # in place of a preset: a model or run
    device: str = "auto"  # cpu, cuda, or auto: a GPU if there are kernels for it
    dtype: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16")  # what activations are computed in
    batch_size: int = 1
    seqlen: int | None = None  # tokens; 2048 on a GPU and 64 on a CPU, where it makes no difference, if none


def main(argv: list[str]) -> int:
    import tyro

    options = tyro.cli(Options, prog="anymamba warmup", args=argv, description=DESCRIPTION)
    device = choose_device(options.device)
    if options.config is not None:
        config = load_config(options.config)
    else:
        config = MambaConfig.preset(options.preset)
    seqlen = options.seqlen if options.seqlen is not None else 64 if device.type == "cpu" else 2048
    for name, value in (("batch_size", options.batch_size), ("seqlen", seqlen)):
        if value < 1:
            raise AnymambaError(f"--{name.replace('_', '-')} {value}, but it must be at least 1")
    begin = time.perf_counter()
    failed = [warm(config, device, name, options.batch_size, seqlen) for name in options.dtype]
    print(f"done in {time.perf_counter() - begin:.1f} s")
    return 1 if any(failed) else 0


def warm(config: MambaConfig, device: torch.device, name: str, b: int, t: int) -> bool:
    """Compile for one dtype, a line each; whether something did not work."""
    dtype, failed = DTYPES[name], False
    for op in CALLS:
        for backend in kernels(device.type, dtype, op):
            calls = CALLS[op](config, device, dtype, b, t, backend)
            said, good = _timed(lambda calls=calls: [call() for call in calls])
            failed |= not good
            print(f"  {op:<16} {device.type:<5} {name:<5} {backend:<10} {said}", flush=True)
    said, good = _timed(lambda: _model(config, device, dtype, b, t))
    print(f"  {'two layers':<16} {device.type:<5} {name:<5} {'':<10} {said}", flush=True)
    return failed or not good


def _timed(work: Callable) -> tuple[str, bool]:
    """Seconds of the work, or why it cannot be done here, and whether that is well."""
    start = time.perf_counter()
    try:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except AnymambaError as problem:
        return f"skipped: {problem}", "cannot run here" in str(problem)
    except Exception as problem:  # whatever a broken install does, the others are still compiled
        return f"FAILED {type(problem).__name__}: {problem}", False
    return f"{time.perf_counter() - start:6.2f} s", True


# ---- small passes, with arguments laid out as in a layer -------------------------------------------------------


def _both(function: Callable, *arguments: Tensor | None) -> Callable:
    """A call that runs forward and backward."""

    def run():
        leaves = [v if v is None else v.detach().requires_grad_() for v in arguments]
        outputs = function(*leaves)
        sum(y.float().sum() for y in outputs).backward()

    return run


def _forward(function: Callable, *arguments: Tensor | None) -> Callable:
    return torch.no_grad()(lambda: function(*arguments))


def _scan(config, device, dtype, b, t, backend) -> Iterator[Callable]:
    d, n, r = config.d_inner, config.d_state, config.rank

    def scan(x, dt, A, B, C, D, z, bias, h0):
        return ops.selective_scan(x, dt, A, B, C, D, z, dt_bias=bias, dt_softplus=True, initial_state=h0,
                                  backend=backend)  # fmt: skip

    A, D, bias, h0 = (torch.ones(*s, device=device) for s in ((d, n), (d,), (d,), (b, d, n)))
    for length in (t, 1):
        x, dt = (torch.ones(b, length, d, device=device, dtype=dtype) for _ in range(2))
        z = torch.ones(b, length, 2 * d, device=device, dtype=dtype).chunk(2, -1)[1]
        _, B, C = torch.ones(b, length, r + 2 * n, device=device, dtype=dtype).split([r, n, n], -1)
        if length > 1:
            yield _both(scan, x, dt, -A, B, C, D, z, bias, None)
        yield _forward(scan, x, dt, -A, B, C, D, z, bias, h0)


def _conv(config, device, dtype, b, t, backend) -> Iterator[Callable]:
    d, w = config.d_inner, config.d_conv

    def conv(x, weight, bias, h0):
        return ops.causal_conv1d(x, weight, bias, activation="silu", initial_state=h0, backend=backend)

    for kept in {torch.float32, dtype}:  # of the weights: float32 where autocast lowers the activations
        weight = torch.ones(d, w, device=device, dtype=kept)
        bias = torch.ones(d, device=device, dtype=kept) if config.conv_bias else None
        h0 = torch.ones(b, d, w - 1, device=device, dtype=dtype)
        for length in (t, 1):
            x = torch.ones(b, length, 2 * d, device=device, dtype=dtype).chunk(2, -1)[0]
            if length > 1:
                yield _both(conv, x, weight, bias, None)
            yield _forward(conv, x, weight, bias, h0)


def _norm(config, device, dtype, b, t, backend) -> Iterator[Callable]:
    m = config.d_model

    def norm(x, residual, weight):
        return ops.add_rms_norm(x, residual, weight, dtype=dtype, backend=backend)

    residual = torch.ones(b, t, m, device=device)
    for kept in {torch.float32, dtype}:
        weight = torch.ones(m, device=device, dtype=kept)
        yield _both(norm, torch.ones(b, t, m, device=device, dtype=dtype), residual, weight)
        yield _both(norm, torch.ones(b, t, m, device=device, dtype=kept), None, weight)  # of the first layer


CALLS = {"selective_scan": _scan, "causal_conv1d": _conv, "add_rms_norm": _norm}


def _model(config: MambaConfig, device: torch.device, dtype: torch.dtype, b: int, t: int) -> None:
    """Two layers as they are trained, as they read a prompt, and as they go on from it token by token."""
    small = config.replace(n_layer=2, vocab_size=None if config.vocab_size is None else 256)
    model = MambaLM(small, device=device)

    def inputs(length):
        if small.vocab_size is None:
            kept = model.backbone.norm_f.weight.dtype
            return {"embeddings": torch.ones(b, length, small.d_model, device=device, dtype=kept)}
        return {"ids": torch.ones(b, length, dtype=torch.int64, device=device)}

    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if small.vocab_size is None:
            loss = model(**inputs(t)).hidden.float().mean()
        else:
            loss = model(**inputs(t), labels=inputs(t)["ids"]).loss
    loss.backward()
    model = model.to(dtype)
    with torch.inference_mode():
        state = model(**inputs(t), last_only=True).state
        model(**inputs(1), state=state, last_only=True)
        if small.vocab_size is not None:
            Decoder(model).step(inputs(1)["ids"][:, 0], state)
