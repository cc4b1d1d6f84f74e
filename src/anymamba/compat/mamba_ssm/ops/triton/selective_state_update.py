"""mamba-ssm's step of one token on `ops.selective_step_`.

Axes: b batch, h heads, p headdim, d = h·p channels, n state, g groups.
"""

from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.ops import selective_step_


def selective_state_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                           D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
                           dt_softplus: bool = False, state_batch_indices: Tensor | None = None) -> Tensor:  # fmt: skip
    """One token of the selective scan; `state` is advanced in place.

    Args:
        state: (b,d,n) or (b,h,p,n); x, dt, z: (b,d) or (b,h,p); A: (d,n) or (h,p,n); D, dt_bias: (d,) or (h,p).
            Numbers that all channels of a head share, as in Mamba-2, are expanded.
        B, C: (b,n) or (b,g,n), h divisible by g.
        state_batch_indices: (b,) for each row of x its row in state, which may have more.

    Returns y like x. Raises AnymambaError for shapes that do not fit.
    """
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, None)


def selective_state_update_ref(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                               D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
                               dt_softplus: bool = False) -> Tensor:  # fmt: skip
    """`selective_state_update` by plain torch."""
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, None, "reference")


def _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, indices, backend):
    shape = tuple(state.shape[1:-1])  # (d,) or (h,p)
    if len(shape) not in (1, 2):
        raise AnymambaError(f"selective_state_update: state is {tuple(state.shape)}, but it must be (batch, dim, "
                            "dstate) or (batch, nheads, headdim, dstate)")  # fmt: skip
    expected = {"x": (x, (len(x), *shape)), "dt": (dt, (len(x), *shape)), "z": (z, (len(x), *shape)),
                "A": (A, (*shape, state.shape[-1])), "D": (D, shape), "dt_bias": (dt_bias, shape)}  # fmt: skip
    for name, (v, want) in expected.items():
        if v is not None and v.shape != want:
            raise AnymambaError(f"selective_state_update: {name} is {tuple(v.shape)}, but with a state "
                                f"{tuple(state.shape)} it must be {want}; expand what heads share")  # fmt: skip
    if B.dim() == 3 and shape[0] % B.shape[1]:
        raise AnymambaError(f"selective_state_update: B is {tuple(B.shape)}, but its groups must divide {shape[0]}, "
                            "the heads of the state")  # fmt: skip
    # channels of a head lie side by side, and so do the heads of a group: the scan needs no notion of heads
    x, dt, z = (v if v is None else v.flatten(1) for v in (x, dt, z))
    A, D, dt_bias = (v if v is None else v.flatten(0, len(shape) - 1) for v in (A, D, dt_bias))
    rows = state if indices is None else state.index_select(0, indices)
    h = rows.flatten(1, len(shape)).clone()  # kernels want it dense, and `state` may be any view
    y = selective_step_(h, x, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=dt_softplus, backend=backend)
    if indices is None:
        state.copy_(h.view(state.shape))
    else:
        state.index_copy_(0, indices.long(), h.view(rows.shape))
    return y.unflatten(1, shape)
