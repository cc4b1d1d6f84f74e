"""Depthwise causal convolution: each channel sees its own last w inputs and nothing later.

Axes: b batch, t time, d channels, w width.
"""

import torch
import torch.nn.functional as F


def causal_conv1d(x, weight, bias=None, *, activation=None, initial_state=None, cu_seqlens=None):
    """y_t = Σ_k weight[:,k] · x_{t-w+1+k} + bias, then silu if asked; the inputs before t=0 are `initial_state`.

    x (b,t,d), weight (d,w), bias (d,), initial_state (b,d,w-1) → y (b,t,d), final_state (b,d,w-1): the last w-1 inputs.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = []
        for s, (i, j) in enumerate(zip(bounds, bounds[1:], strict=False)):
            h0 = None if initial_state is None else initial_state[s : s + 1]
            parts.append(causal_conv1d(x[:, i:j], weight, bias, activation=activation, initial_state=h0))
        y, final_state = zip(*parts, strict=True)
        return torch.cat(y, dim=1), torch.cat(final_state)

    (b, t, d), w = x.shape, weight.shape[1]
    real = torch.promote_types(x.dtype, torch.float32)
    past = x.new_zeros(b, d, w - 1) if initial_state is None else initial_state
    padded = torch.cat([past.transpose(1, 2).to(x.dtype), x], dim=1)  # (b, w-1+t, d)
    y = torch.zeros(b, t, d, dtype=real, device=x.device)
    for k in range(w):
        y = y + weight[:, k].to(real) * padded[:, k : k + t].to(real)
    if bias is not None:
        y = y + bias.to(real)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), padded[:, t:].transpose(1, 2)


def causal_conv1d_step_(state, x, weight, bias=None, *, activation=None):
    """One token: x (b,d); `state` (b,d,w-1) forgets its oldest input and takes x in, in place. Returns y (b,d)."""
    y, new = causal_conv1d(x.unsqueeze(1), weight, bias, activation=activation, initial_state=state)
    state.copy_(new)
    return y.squeeze(1)
