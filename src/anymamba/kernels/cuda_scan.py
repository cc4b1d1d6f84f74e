"""Selective scan in CUDA C++, forward and backward: `cuda_scan*.cu`, compiled by NVRTC.

Here is what the host does: allocate, launch what `cuda_plans` chose, give gradients their shapes.
"""

import functools

import torch

from anymamba.kernels.cuda_launch import load, missing
from anymamba.kernels.cuda_plans import backward_plan, chunk_length, forward_plan, pieces_of, saved_shape

__all__ = ["missing", "saved_shape", "selective_scan", "selective_scan_backward", "supports"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIDEST = 64  # largest d_state; beyond, B and C of a chunk do not fit the shared memory of smaller GPUs
RULES = {"mamba": 0, "zoh": 1, "bilinear": 2, "euler": 3}  # of discretisation, see reference/discretize.py


def supports(n: int) -> bool:
    """Whether the kernels take this d_state."""
    return 1 <= n <= WIDEST


# ---- shared memory ---------------------------------------------------------------------------------------------


def _pitch(columns, size):
    return -(-columns * size // 16) * 16 + 16


def _tiles(p, rows, x, matrices, activations):
    size = activations * _pitch(p["CB"], x.element_size()) * rows
    return size + sum(_pitch(v.shape[-1], v.element_size()) * rows for v in matrices if v.dim() == 4)


def _matrices(p, rows, matrices):
    size, V = p["K"] * p["L"], min(4, p["K"])
    return sum(16 if v.dim() == 2 else size // V * (rows * V + 4) * 4 for v in matrices)


def _forward_bytes(p, x, matrices, activations):
    """Of `struct Shared` of cuda_scan.cu and of cuda_scan_pieces.cu."""
    T, CB = p["T"], p["CB"]
    ring = 3 * _tiles(p, T, x, matrices, activations) + 2 * _pitch(CB, x.element_size()) * T
    return ring + 2 * CB * (T + 2) * 8 + 2 * _matrices(p, T, matrices) + 32


def _backward_bytes(p, x, matrices, activations):
    """Of `struct Shared` of cuda_scan_backward.cu."""
    K, L, T, CB, chunk = p["K"], p["L"], p["T"], p["CB"], chunk_length(matrices[0].shape[-1])
    width = sum(K * L for v in matrices if v.dim() == 4)
    tensor = x.dtype != torch.float32 and width and K > 1 and 1 < L <= 8
    rows = CB * L // 32 * (8 // L if tensor else 1)
    sums = rows * (T + 2) * width or 4
    between = (chunk // T - 1) * CB * L * K or 4
    ready = CB * (chunk + 1) * 16
    return 2 * _tiles(p, chunk, x, matrices, activations) + ready + _matrices(p, chunk, matrices) + 4 * (sums + between)


# ---- arguments of the kernels ----------------------------------------------------------------------------------


def _rows(v):
    """v (b,t,d) itself if its channels lie side by side, else a copy. Kernels take strides of 32 bits."""
    return v if v is None or (v.stride(2) == 1 and v.stride(1) < 1 << 31) else v.contiguous()


def _matrix(v):
    """B or C as (b,t,g,n) with neighbouring n, or constant (d,n)."""
    v = v.unsqueeze(2) if v.dim() == 3 else v
    # a copy is small, and reading what does not lie on 16 bytes costs up to twice the time of the scan
    return v if v.dim() == 4 and v.stride(3) == 1 and _wide_matrix(v) else v.contiguous()


def _float(v):
    return None if v is None else v.float().contiguous()


def _at(v):
    """Address of a tensor's data, 0 for None."""
    return 0 if v is None else v.data_ptr()


def _strided(v):
    return (0, 0, 0) if v is None else (v.data_ptr(), v.stride(0), v.stride(1))


def _strided_matrix(v):
    if v.dim() == 2:
        return v.data_ptr(), 0, 0, 0
    return v.data_ptr(), v.stride(0), v.stride(1), v.stride(2) if v.shape[2] > 1 else 0


def _wide(per_row, *tensors):
    """Whether rows can be read 16 bytes at a time: each starts on such a boundary and is that long."""
    for v in tensors:
        if v is not None:
            size = v.element_size()
            if per_row * size % 16 or v.data_ptr() % 16 or v.stride(0) * size % 16 or v.stride(1) * size % 16:
                return 0
    return 1


def _wide_matrix(*matrices):
    for v in matrices:
        if v.dim() == 4 and (v.stride(2) * v.element_size() % 16 or not _wide(v.shape[3], v)):
            return 0
    return 1


@functools.cache
def _shared_limit(device):
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class _Call:
    """What the launches of one call share."""

    def __init__(self, x, A, B, C, z, dt_softplus, cu_seqlens, rule, backward):
        (self.b, self.t, self.d), self.n, self.x = x.shape, A.shape[1], x
        self.sequences = self.b if cu_seqlens is None else cu_seqlens.numel() - 1
        self.groups = max(v.shape[2] if v.dim() == 4 else 1 for v in (B, C))
        choose = backward_plan if backward else forward_plan
        pieces, self.plan = choose(self.sequences, self.t, self.d, self.n, cu_seqlens is not None)
        self.pieces, self.step = pieces_of(self.t, pieces)
        self.total = (self.d,) if rule == "mamba" else (self.d, self.n)  # what says how a piece decays: scan_chain
        if rule != "mamba" and backward:
            self.plan = self.plan | {"KEEP": 0}  # more than the decays is computed again
        self.defines = {
            "XTYPE": TYPES[x.dtype], "BTYPE": TYPES[B.dtype], "CTYPE": TYPES[C.dtype], "N": self.n,
            "RULE": RULES[rule], "CHUNK": chunk_length(self.n),
            "HAS_Z": int(z is not None), "DT_SOFTPLUS": int(dt_softplus),
            "BCONST": int(B.dim() == 2), "CCONST": int(C.dim() == 2),
            "PACKED": 0 if cu_seqlens is None else cu_seqlens.element_size(), "WIDE_BC": _wide_matrix(B, C),
        }  # fmt: skip

    def fit(self, plan, size, *args):
        """The plan, with fewer channels a block if this device has not enough shared memory, and its size in bytes."""
        limit = _shared_limit(self.x.device)
        while (shared := size(plan, *args)) > limit and plan["CB"] * plan["L"] > 32:
            plan = plan | {"CB": plan["CB"] // 2, "BLOCKS": 2 * plan["BLOCKS"]}
        return plan, shared

    def blocks(self, plan):
        """Of channels in a group."""
        return -(-(self.d // self.groups) // plan["CB"])

    def load(self, file, name, plan, **defines):
        return load(file, name, tuple((self.defines | plan | defines).items()), self.x.device)

    def launch(self, file, name, plan, shared, args, **defines):
        kernel = self.load(file, name, plan, **defines, SHARED=shared)
        count = self.groups * self.blocks(plan) * self.sequences * self.pieces
        kernel.launch((count, 1, 1), plan["CB"] * plan["L"], shared, args)

    def chain(self, plan, own, total, A, first, backward):
        """What each piece begins with."""
        starts = torch.empty_like(own)
        kernel = self.load("cuda_scan_pieces.cu", "scan_chain", plan, SHARED=1 << 20, WIDE=0)
        grid = (min(-(-self.b * self.d * self.n // 256), 65_535), 1, 1)
        args = (_at(own), _at(total), _at(A), _at(first), _at(starts), self.b, self.pieces, self.d, int(backward))
        kernel.launch(grid, 256, 0, args)
        return starts

    def empty(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)


# ---- forward ---------------------------------------------------------------------------------------------------


def selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens, save, rule="mamba"):
    """y (b,t,d), final_state (s,d,n) and, to `save` for backward, states along the way. See `ops.selective_scan`."""
    x, dt, z, B, C, A = _rows(x), _rows(dt), _rows(z), _matrix(B), _matrix(C), A.contiguous()
    D, dt_bias, initial_state = _float(D), _float(dt_bias), _float(initial_state)
    call = _Call(x, A, B, C, z, dt_softplus, cu_seqlens, rule, False)
    b, t, d, n, s = call.b, call.t, call.d, call.n, call.sequences
    y = torch.empty((b, t, d), dtype=x.dtype, device=x.device)
    saved = call.empty(*saved_shape(x.shape, A.shape, call.groups, s)) if save else call.empty(0)
    final = call.empty(s, call.pieces, d, n)
    if final.numel() == 0:
        return y, final.view(s, d, n), saved
    plan, shared = call.fit(call.plan, _forward_bytes, x, (B, C), 2 if z is None else 3)
    wide = _wide(d // call.groups, x, dt, z, y)

    def run(starts, y, final, saved, total):
        call.launch(
            "cuda_scan.cu", "scan_forward", plan, shared,
            (*_strided(x), *_strided(dt), *_strided(z), _at(A), *_strided_matrix(B), *_strided_matrix(C), _at(D),
             _at(dt_bias), _at(starts), _at(cu_seqlens), _at(y), _at(final), _at(saved), _at(total),
             t, d, call.groups, call.pieces, call.step),
            WIDE=wide, SAVE=int(saved is not None), STATE_ONLY=int(total is not None),
        )  # fmt: skip

    if call.pieces > 1:
        own, total = torch.empty_like(final), call.empty(s, call.pieces, *call.total)
        run(None, None, own, None, total)
        initial_state = call.chain(plan, own, total, A, initial_state, False)
    run(initial_state, y, final, saved if save else None, None)
    return y, _piece(final, -1), saved


# ---- backward --------------------------------------------------------------------------------------------------


def selective_scan_backward(dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, cu_seqlens, saved,
                            dz_out=None, rule="mamba"):  # fmt: skip
    """Gradients of everything that forward took, in its order; None for what was absent.

    `dz_out` (b,t,d): where dz is written, rows of a wider array perhaps.
    """
    like_B, like_C, like_D, like_bias = B, C, D, dt_bias
    x, dt, z, dy, B, C, A = _rows(x), _rows(dt), _rows(z), _rows(dy), _matrix(B), _matrix(C), A.contiguous()
    D, dt_bias, dfinal_state = _float(D), _float(dt_bias), _float(dfinal_state)
    call = _Call(x, A, B, C, z, dt_softplus, cu_seqlens, rule, True)
    b, t, d, n, s = call.b, call.t, call.d, call.n, call.sequences * call.pieces
    plan, shared = call.fit(call.plan, _backward_bytes, x, (B, C), 3 if z is None else 4)
    dx, ddt = (torch.empty((b, t, d), dtype=x.dtype, device=x.device) for _ in range(2))
    dz = None if z is None else torch.empty_like(dx) if dz_out is None else dz_out
    parts, dinitial = (call.empty(s, d, n), call.empty(s, d), call.empty(s, d)), call.empty(s, d, n)
    make = torch.empty if dinitial.numel() else torch.zeros  # without steps nothing is summed
    dA, dD, dbias = (make(v.shape[1:], dtype=v.dtype, device=v.device) for v in parts)
    fixed = [call.empty(s, d, n) if v.dim() == 2 else None for v in (B, C)]
    new = torch.Tensor.new_empty if d else torch.Tensor.new_zeros  # without channels nothing is summed
    varying = [None if v.dim() == 2 else new(v, (b, t, call.groups, n)) for v in (B, C)]
    partial = call.empty(call.groups * call.blocks(plan), b * t, sum(n for v in (B, C) if v.dim() == 4))
    if dinitial.numel():
        wide = _wide(d // call.groups, x, dt, z, dy, dx, dz)
        if call.pieces > 1:
            dfinal_state = _piece_gradients(call, dy, dfinal_state, dt, A, C, z, dt_bias, wide)
        call.launch(
            "cuda_scan_backward.cu", "scan_backward", plan, shared,
            (*_strided(x), *_strided(dt), *_strided(z), *_strided(dy), _at(A), *_strided_matrix(B),
             *_strided_matrix(C), _at(D), _at(dt_bias), _at(dfinal_state), _at(cu_seqlens), _at(saved),
             _at(dx), _at(ddt), _at(dz), d, d if dz is None else dz.stride(1), _at(parts[0]), _at(fixed[0]),
             _at(fixed[1]), _at(partial), _at(parts[1]), _at(parts[2]), _at(dinitial), t, d, call.groups, call.pieces,
             call.step, b * t),
            WIDE=wide,
        )  # fmt: skip
        kernel = call.load("cuda_scan_backward.cu", "scan_collect", plan, SHARED=shared, WIDE=wide)
        grid = (min(-(-max(b * t * call.groups * partial.shape[2], d * n) // 256), 1 << 20), 1, 1)
        sums = (*map(_at, (partial, *varying)), b * t, call.groups, call.blocks(plan), *map(_at, parts))
        kernel.launch(grid, 256, 0, (*sums, _at(dA), _at(dD), _at(dbias), s, d))
    dB, dC = (_restore(*g) for g in zip(varying, fixed, (like_B, like_C), strict=True))
    dD, dbias = (None if v is None else g.to(v.dtype) for v, g in ((like_D, dD), (like_bias, dbias)))
    return dx, ddt, dA, dB, dC, dD, dz, dbias, _piece(dinitial.view(call.sequences, call.pieces, d, n), 0)


def _piece_gradients(call, dy, dfinal_state, dt, A, C, z, dt_bias, wide):
    """The gradient of the state after each piece."""
    _, plan = forward_plan(call.sequences * call.pieces, call.step, call.d, call.n, True)
    plan, shared = call.fit(plan, _forward_bytes, dt, (C,), 2 if z is None else 3)
    own, total = call.empty(call.b, call.pieces, call.d, call.n), call.empty(call.b, call.pieces, *call.total)
    call.launch(
        "cuda_scan_pieces.cu", "scan_gradients", plan, shared,
        (*_strided(dt), *_strided(z), *_strided(dy), _at(A), *_strided_matrix(C), _at(dt_bias), _at(own), _at(total),
         call.t, call.d, call.groups, call.pieces, call.step),
        WIDE=wide,
    )  # fmt: skip
    return call.chain(plan, own, total, A, dfinal_state, True)


def _piece(v, which):
    """That piece of each sequence, with memory of its own: whoever keeps it should not keep all pieces."""
    return v[:, 0] if v.shape[1] == 1 else v[:, which].clone(memory_format=torch.contiguous_format)


def _restore(varying, fixed, like):
    """The gradient of B or C in its own shape and dtype."""
    if fixed is not None:
        return fixed.sum(0).to(like.dtype)
    groups = like.shape[2] if like.dim() == 4 else 1
    if varying.shape[2] > groups:
        varying = varying.float().sum(2, keepdim=True).to(like.dtype)
    return varying.view(like.shape)
