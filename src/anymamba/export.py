"""A model as a graph for other programs: `torch.export`, and ONNX for runtimes that know nothing of torch.

A recurrent model exports well: one step has the same few tensors in and out however long the text is. All graphs have

| tensor | shape | dtype |
|---|---|---|
| in `ids` | (b,t) | int64 |
| in `conv_i`, `ssm_i` for each layer i, in this order: `flatten(state)` | (b,d,w-1), (b,d,n) | the weights'; float32 |
| out `logits` of the token after each | (b,t,v), v = vocab_size | the weights' |
| out `next_conv_i`, `next_ssm_i` for each layer i | as in | as in |

and zeros are the state before the first token. b and t are fixed when the graph is made.

Axes: b batch, t time, d d_inner, w d_conv, n d_state, v vocabulary.
"""

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from anymamba import reference
from anymamba.errors import AnymambaError
from anymamba.files import write_atomically
from anymamba.layers import QuantizedLinear
from anymamba.model import MambaLM, eval_mode
from anymamba.state import LayerState, MambaState

_MOST_BYTES = 1.5e9  # of weights in one ONNX file: protobuf counts to 2 GiB, and the graph needs room too


def step(model: MambaLM, batch_size: int = 1, *, plain: bool = False) -> torch.export.ExportedProgram:
    """The graph that reads one token: `chunk` with length 1."""
    return chunk(model, 1, batch_size, plain=plain)


def chunk(model: MambaLM, length: int, batch_size: int = 1, *, plain: bool = False) -> torch.export.ExportedProgram:
    """The graph that reads `length` tokens and goes on from a state, as `torch.export.export(strict=True)` gives it.

        program = export.chunk(model, 64)
        logits, *state = program.module()(ids, *export.flatten(MambaState.zeros(model.config, 1)))

    plain: only operators of torch, the scan unrolled over time: runs without anymamba, on any device, and grows with
        length. Otherwise the kernels are nodes of the graph, those of the model's device, and whoever loads a saved
        program imports `anymamba.ops` first.

    Raises AnymambaError for a model without a vocabulary, or sizes below 1.
    """
    for name, size in (("length", length), ("batch_size", batch_size)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise AnymambaError(f"export: {name}={size!r}, but it must be a whole number of at least 1")
    if not model.keeps_state:
        raise AnymambaError("export: this model hears both directions, and the graph goes on from a state: call "
                            "torch.export.export on the model itself")  # fmt: skip
    if model.config.vocab_size is None:
        raise AnymambaError("export: this model has no vocabulary, and the graph is from token ids to logits: call "
                            "torch.export.export on the model itself, with embeddings")  # fmt: skip
    device, dtype = model.device, model.backbone.norm_f.weight.dtype
    ids = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
    before = flatten(MambaState.zeros(model.config, batch_size, device=device, dtype=dtype))
    with eval_mode(model), torch.no_grad():
        program = torch.export.export(_Flat(model), (ids, *before), strict=True)
    return program.run_decompositions(_plain_operators()) if plain else program


def onnx(model: MambaLM, path: str | os.PathLike, *, length: int = 1, batch_size: int = 1) -> None:
    """Write the graph of `chunk` to an ONNX file, with the names of its tensors as above. Needs `anymamba[onnx]`.

        session = onnxruntime.InferenceSession("step.onnx")
        feed = {i.name: numpy.zeros(i.shape, "float32") for i in session.get_inputs()} | {"ids": ids}
        logits, *state = session.run(None, feed)

    Weights and activations are float32, in which every runtime computes. More than 1.5 GB of weights go to a second
    file beside the first, named like it with ".data" at the end.

    Raises AnymambaError where the packages are missing, for a quantised model, an unwritable path, and what `chunk`
    raises.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise AnymambaError(
            f"export to ONNX needs onnx and onnxscript ({error}): pip install 'anymamba[onnx]'"
        ) from None
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise AnymambaError("export: a quantised model does not go to ONNX: export the model that it was made from, "
                            "and let the runtime's own tools quantise that")  # fmt: skip
    if model.config.mixer == "s4d":
        raise AnymambaError("export: mixer='s4d' computes with complex numbers, and ONNX has no operators for them: "
                            "`chunk` exports it for torch")  # fmt: skip
    if any(p.dtype != torch.float32 for p in model.parameters()):
        model = copy.deepcopy(model).float()
    inputs, outputs = _names(model)
    with _quiet():
        program = chunk(model, length, batch_size, plain=True)
        written = torch.onnx.export(program, (), input_names=inputs, output_names=outputs, dynamo=True, verbose=False)
    path = Path(path)
    if sum(v.numel() * v.element_size() for v in program.state_dict.values()) < _MOST_BYTES:
        write_atomically(path, lambda part: written.save(part))
    else:  # whose name stands in the graph, so that it cannot be written elsewhere first
        written.save(path, external_data=True)


def flatten(state: MambaState) -> tuple[Tensor, ...]:
    """The tensors of a state as the graphs take and give them: conv and ssm of the first layer, of the second, …"""
    return tuple(v for layer in state.layers for v in layer)


class _Flat(nn.Module):
    """A model from tensors to tensors."""

    def __init__(self, model: MambaLM):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        layers = tuple(LayerState(*pair) for pair in zip(state[::2], state[1::2], strict=True))
        out = self.model(ids, state=MambaState(layers, ids.new_zeros(ids.shape[0])))
        return out.logits[..., : self.model.config.vocab_size], *flatten(out.state)


def _names(model):
    state = [f"{kind}_{i}" for i in range(model.config.n_layer) for kind in LayerState._fields]
    return ["ids", *state], ["logits", *(f"next_{name}" for name in state)]


def _plain_operators():
    """What each of our operators computes, in operators of torch."""

    def scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, save, backend, rule="mamba"):
        y, final_state = reference.selective_scan(x, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus,
                                                  initial_state=initial_state, cu_seqlens=cu_seqlens,
                                                  discretization=rule)  # fmt: skip
        return y, final_state, A.new_empty(0)

    def discretized(x, dt, A, B, C, initial_state, cu_seqlens, rule, save, backend):
        y, final_state = reference.selective_scan(x, dt, A, B, C, initial_state=initial_state, cu_seqlens=cu_seqlens,
                                                  discretization=rule)  # fmt: skip
        return y, final_state, A.new_empty(0)

    def conv(x, weight, bias, silu, initial_state, cu_seqlens, backend):
        activation = "silu" if silu else None
        return reference.causal_conv1d(x, weight, bias, activation=activation, initial_state=initial_state,
                                       cu_seqlens=cu_seqlens)  # fmt: skip

    def norm(x, residual, weight, eps, dtype, backend):
        normed, total = reference.add_rms_norm(x, residual, weight, eps=eps, dtype=dtype)
        return normed, total, total.new_empty(0)

    ops = torch.ops.anymamba
    return {ops.selective_scan.default: scan, ops.discretized_scan.default: discretized,
            ops.causal_conv1d.default: conv, ops.add_rms_norm.default: norm}  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of packages and interfaces that are not the caller's business."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(before)
