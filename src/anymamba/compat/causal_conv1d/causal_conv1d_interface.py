"""causal-conv1d's functions on `ops.causal_conv1d`. Axes: b batch, d channels, t time, w width; channels come first."""

import torch
from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.ops import causal_conv1d


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
                     initial_states: Tensor | None = None, return_final_states: bool = False,
                     final_states_out: Tensor | None = None, activation: str | None = None):  # fmt: skip
    """Depthwise causal convolution of x (b,d,t) with weight (d,w) and bias (d,), then silu if asked for.

    Args:
        seq_idx: (b,t) integers, equal within a sequence: where they change, the next sequence of the row begins.
            Negative ones are padding, whose output is 0.
        initial_states: (b,d,w-1) inputs before the first.
        return_final_states: also gives the last w-1 inputs (b,d,w-1), written to `final_states_out` if that is given;
            not with seq_idx.
        activation: None, "silu" or "swish", its other name.

    Returns out (b,d,t), or (out, final states). Raises AnymambaError for shapes that do not fit.
    """
    return _convolve(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation, None)


def causal_conv1d_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_states: Tensor | None = None,
                      return_final_states: bool = False, final_states_out: Tensor | None = None,
                      activation: str | None = None, seq_idx: Tensor | None = None):  # fmt: skip
    """`causal_conv1d_fn` by plain torch, with another order of arguments."""
    return _convolve(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation,
                     "reference")  # fmt: skip


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
                         activation: str | None = None, cache_seqlens: Tensor | None = None,
                         conv_state_indices: Tensor | None = None) -> Tensor:  # fmt: skip
    """The next token or tokens x, (b,d) or (b,d,t); `conv_state` takes them in, in place.

    Args:
        conv_state: (b,d,k), k ≥ w-1: the last k inputs, newest last.
        cache_seqlens: (b,) tokens read before: conv_state is then a ring, in which token i lies at i mod k.
        conv_state_indices: (b,) for each row of x its row in conv_state, which may have more.

    Returns out like x. Raises AnymambaError for shapes that do not fit.
    """
    return _update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, None)


def causal_conv1d_update_ref(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
                             activation: str | None = None, cache_seqlens: Tensor | None = None) -> Tensor:  # fmt: skip
    """`causal_conv1d_update` by plain torch."""
    return _update(x, conv_state, weight, bias, activation, cache_seqlens, None, "reference")


def _convolve(x, weight, bias, seq_idx, initial_states, return_final, final_out, activation, backend):
    _check_dims("causal_conv1d_fn", x=(x, 3), weight=(weight, 2))
    activation = _activation(activation)
    if seq_idx is not None:
        if return_final:
            raise AnymambaError("causal_conv1d_fn: return_final_states with seq_idx: a row may hold many sequences, so "
                                "it has no one final state; convolve them one by one")  # fmt: skip
        return _packed(x, weight, bias, seq_idx, initial_states, activation, backend)
    y, final = causal_conv1d(x.transpose(1, 2), weight, bias, activation=activation, initial_state=initial_states,
                             backend=backend)  # fmt: skip
    if not return_final:
        return y.transpose(1, 2)
    return y.transpose(1, 2), final if final_out is None else final_out.copy_(final)


def _packed(x, weight, bias, seq_idx, initial_states, activation, backend):
    """Rows that hold several sequences each, laid end to end in one."""
    (b, d, t), w = x.shape, weight.shape[1]
    if seq_idx.shape != (b, t):
        raise AnymambaError(f"causal_conv1d_fn: seq_idx is {tuple(seq_idx.shape)}, but it must be (b,t) = {(b, t)}")
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    bounds = torch.cat([starts, starts.new_tensor([b * t])])
    if initial_states is not None:  # belong to the first sequence of each row
        before = initial_states.new_zeros(len(starts), d, w - 1)
        initial_states = before.index_copy(0, torch.searchsorted(starts, torch.arange(b, device=x.device) * t),
                                           initial_states)  # fmt: skip
    y, _ = causal_conv1d(x.transpose(1, 2).reshape(1, b * t, d), weight, bias, activation=activation,
                         initial_state=initial_states, cu_seqlens=bounds, backend=backend)  # fmt: skip
    return y.view(b, t, d).masked_fill((seq_idx < 0)[:, :, None], 0).transpose(1, 2)


def _update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, backend):
    if x.dim() == 2:
        return _update(x[:, :, None], conv_state, weight, bias, activation, cache_seqlens, conv_state_indices,
                       backend)[:, :, 0]  # fmt: skip
    _check_dims("causal_conv1d_update", x=(x, 3), conv_state=(conv_state, 3), weight=(weight, 2))
    (b, d, t), w, k = x.shape, weight.shape[1], conv_state.shape[2]
    rows = conv_state if conv_state_indices is None else conv_state.index_select(0, conv_state_indices)
    if rows.shape != (b, d, k) or k < w - 1:
        raise AnymambaError(f"causal_conv1d_update: conv_state is {tuple(rows.shape)}, but it must be (b,d,k) = "
                            f"{(b, d)} and k ≥ w - 1 = {w - 1}, what the weight looks back on")  # fmt: skip
    if cache_seqlens is None:
        before, after = rows[:, :, k - (w - 1) :], torch.cat([rows, x.to(rows.dtype)], 2)[:, :, t:]
    else:
        before = rows.gather(2, _ring(cache_seqlens, range(1 - w, 0), k, d))
        kept = x[:, :, -k:].to(rows.dtype)  # of more than the ring holds the last stay
        after = rows.scatter(2, _ring(cache_seqlens, range(t - kept.shape[2], t), k, d), kept)
    y, _ = causal_conv1d(x.transpose(1, 2), weight, bias, activation=_activation(activation), initial_state=before,
                         backend=backend)  # fmt: skip
    if conv_state_indices is None:
        conv_state.copy_(after)
    else:
        conv_state.index_copy_(0, conv_state_indices.long(), after)
    return y.transpose(1, 2)


def _ring(read, offsets, k, d):
    """Where in a ring of k places the tokens at `read` (b,) + offsets lie: (b,d,len(offsets))."""
    offsets = torch.tensor(offsets, dtype=torch.long, device=read.device)
    return ((read.long()[:, None] + offsets) % k)[:, None].expand(-1, d, -1)


def _activation(name):
    if name not in (None, "silu", "swish"):
        raise AnymambaError(f'causal_conv1d: activation={name!r}, but it must be None, "silu" or "swish"')
    return None if name is None else "silu"


def _check_dims(op, **tensors):
    layouts = {"x": "(batch, dim, seqlen)", "conv_state": "(batch, dim, state_len)", "weight": "(dim, width)"}
    for name, (v, dims) in tensors.items():
        if v.dim() != dims:
            raise AnymambaError(f"{op}: {name} is {tuple(v.shape)}, but it must be {layouts[name]}")
