"""The selective scan (Mamba, arXiv 2312.00752, section 3.2 and algorithm 2) as a loop over time.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t        A is discretised exactly, B by Euler's rule, unless another is named
    y_t = C_t · h_t + D x_t,   times silu(z_t) if there is a gate z

A complex A stands for itself and its conjugate: C_t · h_t is then twice the real part of that product.

Axes: b batch, t time, d channels, n state, g groups of channels that share B and C.
"""

import torch
import torch.nn.functional as F

from anymamba.reference.discretize import factors


def selective_scan(x, dt, A, B, C, D=None, z=None, *, dt_bias=None, dt_softplus=False, initial_state=None,
                   cu_seqlens=None, discretization="mamba"):  # fmt: skip
    """Outputs y (b,t,d) and the last state (b,d,n). See `anymamba.ops.selective_scan` for every argument."""
    if cu_seqlens is not None:  # sequences laid end to end in a batch of one: scan each on its own
        bounds = cu_seqlens.tolist()
        y, final_state = [], []
        for s, (i, j) in enumerate(zip(bounds, bounds[1:], strict=False)):
            cut = [v[:, i:j] if v is not None and v.dim() > 2 else v for v in (x, dt, A, B, C, D, z)]
            h0 = None if initial_state is None else initial_state[s : s + 1]
            y_s, h = selective_scan(*cut, dt_bias=dt_bias, dt_softplus=dt_softplus, initial_state=h0,
                                    discretization=discretization)  # fmt: skip
            y.append(y_s)
            final_state.append(h)
        return torch.cat(y, dim=1), torch.cat(final_state)

    b, t, d = x.shape
    real = torch.promote_types(x.dtype, torch.float32)  # 16-bit inputs are computed in float32
    number = real.to_complex() if A.is_complex() else real
    out_dtype, A = x.dtype, A.to(number)
    x, dt = x.to(real), dt.to(real)
    if dt_bias is not None:
        dt = dt + dt_bias.to(real)
    if dt_softplus:
        dt = F.softplus(dt)
    B, C = per_channel(B.to(number), b, t, d), per_channel(C.to(number), b, t, d)
    looks_back = discretization == "trapezoidal"  # its state is h, then the last B x
    h = A.new_zeros(b, d, A.shape[1] * (1 + looks_back)) if initial_state is None else initial_state.to(number)
    h, before = h.chunk(2, -1) if looks_back else (h, None)

    y = []
    for i in range(t):
        A_bar, p = factors(dt[:, i, :, None] * A, discretization)  # (b,d,n)
        B_bar_x = (dt[:, i] * x[:, i])[:, :, None] * (B[:, i] * p)
        if looks_back:
            h = h + dt[:, i, :, None] / 2 * before
            before = x[:, i, :, None] * B[:, i]
        h = A_bar * h + B_bar_x
        y_i = (h * C[:, i]).sum(-1)
        y.append(2 * y_i.real if A.is_complex() else y_i)
    y = torch.stack(y, dim=1) if y else x

    if D is not None:
        y = y + D.to(real) * x
    if z is not None:
        y = y * F.silu(z.to(real))
    return y.to(out_dtype), torch.cat([h, before], -1) if looks_back else h


def per_channel(B, b, t, d):
    """B or C with an axis that broadcasts over channels: (b,t,n), (b,t,g,n) or constant (d,n) → (b,t,1 or d,n)."""
    if B.dim() == 2:
        return B.expand(b, t, *B.shape)
    if B.dim() == 3:
        return B.unsqueeze(2)
    return B.repeat_interleave(d // B.shape[2], dim=2)


def selective_step_(state, x, dt, A, B, C, D=None, z=None, *, dt_bias=None, dt_softplus=False, discretization="mamba"):
    """One token: x, dt, z (b,d); B, C (b,n) or (b,g,n). Writes the new state into `state` (b,d,n), returns y (b,d)."""
    x, dt, B, C, z = (v if v is None else v.unsqueeze(1) for v in (x, dt, B, C, z))
    y, h = selective_scan(x, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus, initial_state=state,
                          discretization=discretization)  # fmt: skip
    state.copy_(h)
    return y.squeeze(1)
