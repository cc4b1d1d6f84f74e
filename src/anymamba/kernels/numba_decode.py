"""A token through the whole model on the CPU, for a few rows, in one launch.

The threads go through the phases of every block together, and wait only between them:

    norm, in_proj, convolution  →  x_proj  →  dt_proj, scan, gate  →  out_proj, added to the residual stream

then the last norm and the head. Op by op, a token of a 130m model took 1.5 to 1.9 times its matrix products: Python,
torch's dispatcher, threads that start and wait 200 times, A computed again. So it is one launch, and A is kept.

A matrix is dense or of integers with their scales; which one is known when a kernel is compiled.

Activations stay float32 between the products. Axes: b rows, m d_model, d d_inner, n d_state, r dt_rank, w d_conv,
v padded vocabulary.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from numba.extending import overload

from anymamba.kernels import LANES
from anymamba.kernels import numba_launch as launch
from anymamba.kernels import numba_quantized as quantized
from anymamba.kernels.numba_launch import (
    F32,
    F64,
    HEADER,
    I64,
    PHASE,
    STORAGE,
    address,
    finish_phase,
    give_way_address,
    next_item,
    pointer,
)
from anymamba.kernels.numba_linear import products
from anymamba.kernels.numba_math import sigmoid
from anymamba.kernels.numba_norm import add_and_square, scale
from anymamba.kernels.numba_simd import keep_apart, load, store
from anymamba.kernels.numba_step import advance, outputs, step_inputs

MAX_ROWS = 32  # above, torch's matrix products are faster than ours
MOST = 128  # outputs of a work item; their weights stay in the L2 cache while rows of x pass over them

TYPES = STORAGE | quantized.STORAGE
PHASES = 4  # of a block
MATRIX = 2  # places of a matrix in a plan: the addresses of its weights and their scales
# the places of a block's addresses in its row of the plan
(NORM, IN_BIAS, CONV, CONV_BIAS, DT_BIAS, A_MATRIX, D_SKIP, OUT_BIAS, CONV_STATE, SSM_STATE) = range(10)
(IN_PROJ, X_PROJ, DT_PROJ, OUT_PROJ, FIELDS) = range(10, 10 + 5 * MATRIX, MATRIX)
# the places of the parameters of the launch
(PLAN, LAYERS, ROWS, D_MODEL, D_INNER, D_STATE, DT_RANK, D_CONV, RESIDUAL, XZ, PROJECTED, DT, Y, MIXED, NORM_F, LOGITS,
 V, V_ROW, EPS, COUNTERS, GIVE_WAY, THREADS, HEAD) = range(HEADER, HEADER + 23)  # fmt: skip


# ---- matrices -------------------------------------------------------------------------------------------------------


@njit
def _matrix(plan, at, dtype):
    return pointer(plan[at], dtype), pointer(plan[at + 1], F32)


def _products(x, x_at, x_row, matrix, k, first, last, rows, y, y_row):
    """`numba_linear.products` of a `_matrix` of either kind."""


@overload(_products)
def _products_of_kind(x, x_at, x_row, matrix, k, first, last, rows, y, y_row):
    if matrix[0].dtype in quantized.STORAGE.values():

        def multiply(x, x_at, x_row, matrix, k, first, last, rows, y, y_row):
            quantized.quantized_products(x, x_at, x_row, matrix[0], matrix[1], k, first, last, rows, y, y_row)
    else:

        def multiply(x, x_at, x_row, matrix, k, first, last, rows, y, y_row):
            products(x, x_at, x_row, matrix[0], k, first, last, rows, y, y_row)

    return multiply


# ---- the parts of a block -------------------------------------------------------------------------------------------


@njit
def _normed(residual, weight, rows, m, eps, out):
    """The norm of every row: each thread makes its own, which takes less time than to wait for another's."""
    for row in range(rows):
        squares = add_and_square(residual, residual, out, row * m, m, False)
        scale(out, weight, out, row * m, m, np.float32(1 / np.sqrt(squares / m + eps)))


@njit
def _add_bias(y, y_row, bias, first, last, rows):
    for row in range(rows):
        for o in range(first, last):
            y[row * y_row + o] += bias[o]


@njit
def _convolve(x, x_at, state, at, weight, bias, has_bias, c, count, w, past):
    """x = silu(convolution) of `count` channels from c on, which lie at x_at; their last inputs, at `at`, move on."""
    keep_apart()
    kept = w - 1
    for j in range(0, count * kept, LANES):
        store(past, j, load(state, at + j, count * kept - j), LANES)
    for i in range(count - 1, -1, -1):
        total = x[x_at + i] * weight[(c + i) * w + kept]
        if has_bias:
            total += bias[c + i]
        for k in range(kept):
            total += past[i * kept + k] * weight[(c + i) * w + k]
        past[(i + 1) * kept] = x[x_at + i]  # over the oldest of the next channel: seen from one place on, all moved
        x[x_at + i] = total
    for j in range(0, count * kept, LANES):
        store(state, at + j, load(past, j + 1, LANES), count * kept - j)
    for i in range(0, count, LANES):
        v = load(x, x_at + i, count - i)
        store(x, x_at + i, v * sigmoid(v), count - i)


@njit
def _share(outputs, threads, step):
    """Outputs of a work item, a multiple of `step`: long streams of memory, but eight items a thread."""
    return max(step, min(MOST, outputs // (8 * threads)) // step * step)


# ---- the phases: work items of all threads, then a wait for the last of them ----------------------------------------


@njit
def _in_proj(p, q, weight, state, counters, u, past):
    """xz (b,2d) from the residual stream; its x convolved."""
    rows, m, d, w, xz = p[ROWS], p[D_MODEL], p[D_INNER], p[D_CONV], pointer(p[XZ], F32)
    share = _share(2 * d, p[THREADS], LANES)
    items = -(-2 * d // share)
    done, item = 0, next_item(counters)
    if item < items:
        _normed(pointer(p[RESIDUAL], F32), pointer(q[NORM], F32), rows, m, pointer(p[EPS], F64)[0], u)
    while item < items:
        first, last = item * share, min((item + 1) * share, 2 * d)
        _products(u, 0, m, weight, m, first, last, rows, xz, 2 * d)
        if q[IN_BIAS] != 0:
            _add_bias(xz, 2 * d, pointer(q[IN_BIAS], F32), first, last, rows)
        if first < d:
            for row in range(rows):
                _convolve(xz, row * 2 * d + first, state, (row * d + first) * (w - 1), pointer(q[CONV], F32),
                          pointer(q[CONV_BIAS], F32), q[CONV_BIAS] != 0, first, min(last, d) - first, w,
                          past)  # fmt: skip
        done += 1
        item = next_item(counters)
    finish_phase(counters, done, items, p[GIVE_WAY])


@njit
def _x_proj(p, weight, counters):
    """dt, B and C before their projection, (b,r+2n), from x."""
    rows, d, width = p[ROWS], p[D_INNER], p[DT_RANK] + 2 * p[D_STATE]
    x, out, share = pointer(p[XZ], F32), pointer(p[PROJECTED], F32), _share(width, p[THREADS], 4)
    items = -(-width // share)
    done, item = 0, next_item(counters)
    while item < items:
        _products(x, 0, 2 * d, weight, d, item * share, min((item + 1) * share, width), rows, out, width)
        done += 1
        item = next_item(counters)
    finish_phase(counters, done, items, p[GIVE_WAY])


@njit
def _normed_parts(projected, rows, r, n, eps, out):
    """dt, B and C of every row, (b,r+2n), each normed without a weight: each thread makes its own, as in `_normed`."""
    for row in range(rows):
        at = row * (r + 2 * n)
        for first, count in ((at, r), (at + r, n), (at + r + n, n)):
            squares = add_and_square(projected, projected, out, first, count, False)
            by = np.float32(1 / np.sqrt(squares / count + eps))
            for i in range(first, first + count):
                out[i] *= by


@njit
def _scan(p, q, weight, h, counters, s, u, acc, parts):
    """Step sizes, states and y (b,d), gated."""
    rows, d, n, r, width = p[ROWS], p[D_INNER], p[D_STATE], p[DT_RANK], p[DT_RANK] + 2 * p[D_STATE]
    share = _share(d, p[THREADS], LANES)
    items = -(-d // share)
    xz, dt, y, eps = pointer(p[XZ], F32), pointer(p[DT], F32), pointer(p[Y], F32), pointer(p[EPS], F64)[1]
    A, D, bias = pointer(q[A_MATRIX], F32), pointer(q[D_SKIP], F32), pointer(q[DT_BIAS], F32)
    done, item = 0, next_item(counters)
    if eps > 0 and item < items:
        _normed_parts(pointer(p[PROJECTED], F32), rows, r, n, eps, parts)
    projected = np.int64(parts.ctypes.data) if eps > 0 else p[PROJECTED]
    while item < items:
        first, last = item * share, min((item + 1) * share, d)
        _products(pointer(projected, F32), 0, width, weight, r, first, last, rows, dt, d)
        for row in range(rows):
            B, x = pointer(projected + 4 * (row * width + r), F32), row * 2 * d
            C = pointer(projected + 4 * (row * width + r + n), F32)
            for c in range(first, last, LANES):
                count = min(LANES, last - c)
                step_inputs(xz, dt, x, row * d, bias, True, c, count, True, s, u)
                advance(s, u, A, B, C, h, h, True, c, count, n, row * d * n, acc)
                outputs(acc, xz, x, xz, x + d, D, True, True, c, count, y, row * d)
        done += 1
        item = next_item(counters)
    finish_phase(counters, done, items, p[GIVE_WAY])


@njit
def _out_proj(p, q, weight, counters):
    """The residual stream (b,m) plus what the block adds."""
    rows, m, d, share = p[ROWS], p[D_MODEL], p[D_INNER], _share(p[D_MODEL], p[THREADS], 4)
    items = -(-m // share)
    y, mixed, residual = pointer(p[Y], F32), pointer(p[MIXED], F32), pointer(p[RESIDUAL], F32)
    done, item = 0, next_item(counters)
    while item < items:
        first, last = item * share, min((item + 1) * share, m)
        _products(y, 0, d, weight, d, first, last, rows, mixed, m)
        if q[OUT_BIAS] != 0:
            _add_bias(mixed, m, pointer(q[OUT_BIAS], F32), first, last, rows)
        for row in range(rows):
            for o in range(row * m + first, row * m + last):
                residual[o] += mixed[o]
        done += 1
        item = next_item(counters)
    finish_phase(counters, done, items, p[GIVE_WAY])


@njit
def _head(p, weight, counters, u):
    """The logits of the vocabulary without its padding."""
    rows, m, v, logits, share = p[ROWS], p[D_MODEL], p[V], pointer(p[LOGITS], F32), _share(p[V], p[THREADS], 4)
    items = -(-v // share)
    item = next_item(counters)
    if item < items:
        _normed(pointer(p[RESIDUAL], F32), pointer(p[NORM_F], F32), rows, m, pointer(p[EPS], F64)[0], u)
    while item < items:
        _products(u, 0, m, weight, m, item * share, min((item + 1) * share, v), rows, logits, p[V_ROW])
        item = next_item(counters)


@launch.Kernel
def decode_step(dtypes):
    in_type, x_type, dt_type, out_type, head_type, conv_type, ssm_type = dtypes

    def kernel(p):
        u, past = np.empty(p[ROWS] * p[D_MODEL], np.float32), np.empty(MOST * p[D_CONV] + LANES, np.float32)
        parts = np.empty(p[ROWS] * (p[DT_RANK] + 2 * p[D_STATE]), np.float32)
        s, su, acc = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        for layer in range(p[LAYERS]):
            q, at = pointer(p[PLAN] + 8 * layer * FIELDS, I64), p[COUNTERS] + 8 * layer * PHASES * PHASE
            conv, ssm = pointer(q[CONV_STATE], conv_type), pointer(q[SSM_STATE], ssm_type)
            _in_proj(p, q, _matrix(q, IN_PROJ, in_type), conv, pointer(at, I64), u, past)
            _x_proj(p, _matrix(q, X_PROJ, x_type), pointer(at + 8 * PHASE, I64))
            _scan(p, q, _matrix(q, DT_PROJ, dt_type), ssm, pointer(at + 16 * PHASE, I64), s, su, acc, parts)
            _out_proj(p, q, _matrix(q, OUT_PROJ, out_type), pointer(at + 24 * PHASE, I64))
        _head(p, _matrix(p, HEAD, head_type), pointer(p[COUNTERS] + 8 * p[LAYERS] * PHASES * PHASE, I64), u)

    return kernel


# ---- from Python ------------------------------------------------------------------------------------------------


def supports(config, dtype, device):
    """Whether `Step` takes such a model: any of 32 or 16 bits, its matrices perhaps of integers."""
    return dtype in STORAGE


class Step:
    """One token of each row, at each call; the states in `layers` are advanced in place.

    blocks: a `BlockWeights` for each layer, whose matrices, and head (v,m), are tensors or tuples (integers, scales);
    all layers have the same dtypes. embedding (v,m); norm_f (m,); layers: a `LayerState` for each layer, conv (b,d,w-1)
    and ssm (b,d,n) in any of `STORAGE`.
    """

    def __init__(self, blocks, embedding, norm_f, head, config, layers):
        rows, m, d, n, r = layers[0].ssm.shape[0], config.d_model, config.d_inner, config.d_state, config.rank
        self.embedding = embedding
        self.types = (*(TYPES[v.dtype] for v in (*blocks[0].matrices, head)), *(STORAGE[v.dtype] for v in layers[0]))
        matrices = [[*map(_whole, block.matrices)] for block in blocks]
        head, v_row = _whole(head), len(embedding)
        self.residual, self.logits = torch.empty(rows, m), torch.full((rows, v_row), -torch.inf)
        self.counters = torch.empty(len(blocks) * PHASES + 1, PHASE, dtype=torch.int64)
        vectors = [[*_vectors(block), *layer] for block, layer in zip(blocks, layers, strict=True)]
        plan = torch.tensor([[*map(address, own), *(address(v) for matrix in four for v in matrix)]
                             for own, four in zip(vectors, matrices, strict=True)])  # fmt: skip
        between = [torch.empty(rows, k) for k in (2 * d, r + 2 * n, d, d, m)]  # xz, projected, dt, y, mixed
        norm_f, eps = norm_f.float(), torch.tensor([config.norm_eps, config.inner_norm_eps or 0], dtype=torch.float64)
        self.kept = [matrices, vectors, head, plan, between, norm_f, eps]  # the kernel has their addresses only
        self.params = [
            address(plan), len(blocks), rows, m, d, n, r, config.d_conv, *map(address, (self.residual, *between)),
            address(norm_f), address(self.logits), config.vocab_size, v_row, address(eps), address(self.counters),
            give_way_address(), 1, *map(address, head),
        ]  # fmt: skip
        weights = head[0].numel() + sum(weight.numel() for four in matrices for weight, _ in four)
        self.work = weights // LANES  # of a row

    def __call__(self, ids):
        """ids int64 of the first b rows → logits (b,v) float32, -inf where the vocabulary is padded.

        They are overwritten by the next call.
        """
        b = len(ids)
        self.residual[:b].copy_(F.embedding(ids, self.embedding))
        self.counters.zero_()
        self.params[ROWS - HEADER], self.params[THREADS - HEADER] = b, launch.threads()
        launch.launch(decode_step, self.types, launch.threads(), self.params, b * self.work)
        return self.logits[:b]


def _whole(matrix):
    """(weights, scales or None) of a matrix."""
    return matrix if isinstance(matrix, tuple) else (matrix, None)


def _vectors(block):
    """What else a block has, in the order of the plan, in float32; A for exp2."""
    values = (block.norm, block.in_bias, block.conv, block.conv_bias, block.dt_bias, -torch.exp(block.A_log.float()),
              block.D, block.out_bias)  # fmt: skip
    return [v if v is None else v.float() for v in values]
