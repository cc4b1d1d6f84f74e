"""The head and the loss as one operator, which never holds the logits of all tokens.

A chunk of tokens at a time: logits = h Wᵀ; their loss; the logits become their own gradient in place; dh = dlogits W;
dW += dlogitsᵀ h. So the gradients are made in the forward pass, and backward only scales them.

Axes: r tokens, m d_model, v vocabulary (padded).
"""

import functools

import torch
from torch import Tensor, nn
from torch.library import define, impl, register_autograd, register_fake

from anymamba.backends import GPUS, explain
from anymamba.errors import AnymambaError
from anymamba.layers.linear import Linear, is_watched
from anymamba.layers.norm import compute_dtype

IGNORE = -100  # labels that are not counted
CHUNK_BYTES = 1 << 28  # of logits at a time: few and large matrix products, and little memory
BLOCK_BYTES = 1 << 21  # of logits that the CPU works on at a time: they stay in its cache

define(
    "anymamba::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor labels, bool needs_dhidden, bool needs_dweight)"
    " -> (Tensor loss, Tensor count, Tensor dhidden, Tensor dweight)",
)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits = hidden weightᵀ over the labels that are not -100, without holding the logits.

    Args:
        hidden: (…,m); weight: (v,m); labels: (…) int64. The products are computed in the dtype of hidden, or of
            autocast; softmax, loss and the sum of dW in float32 (float64 for float64 inputs).

    Returns the loss, a scalar of that precision; NaN where no label counts. Gradients reach hidden and weight once:
    they cannot be differentiated again. Raises AnymambaError for labels outside the vocabulary; on a GPU, where looking
    would stop it, such a label makes the loss NaN.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1]).to(compute_dtype(hidden.device.type, hidden.dtype))
    needs = (torch.is_grad_enabled() and v.requires_grad for v in (hidden, weight))
    return torch.ops.anymamba.linear_cross_entropy(hidden, weight, labels.reshape(-1), *needs)[0]


def is_bare(head: nn.Module) -> bool:
    """Whether `head` is a plain linear layer, whose weight is all that it does: nothing replaces or listens to it."""
    plain = type(head) in (nn.Linear, Linear) and head.bias is None and type(head.weight) in (nn.Parameter, Tensor)
    return plain and not is_watched(head)


@impl("anymamba::linear_cross_entropy", "default")
def _loss_and_gradients(hidden, weight, labels, needs_dhidden, needs_dweight):
    """The gradients are those of the sum of losses: to divide them by the count here would underflow in float16."""
    tokens, v = len(hidden), len(weight)
    if labels.device.type == "cpu":
        _check_labels(labels, v)
    real = torch.promote_types(hidden.dtype, torch.float32)
    fused = hidden.device.type in GPUS and explain(hidden.device, hidden.dtype, "cross_entropy")[0] == "triton"
    dhidden = torch.empty_like(hidden if needs_dhidden else hidden[:0])
    dweight = torch.zeros_like(weight if needs_dweight else weight[:0], dtype=real)
    losses = torch.empty(tokens, dtype=real, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        W, rows = weight.to(hidden.dtype), _chunk_rows(tokens, v * hidden.element_size())
        room = _room(min(rows, tokens), v, hidden, fused)
        for r in range(0, tokens, rows):
            h, dlogits = hidden[r : r + rows], room[: min(rows, tokens - r)]
            torch.mm(h, W.T, out=dlogits)
            loss_of = _cross_entropy_fused if fused else _cross_entropy_
            losses[r : r + rows] = loss_of(dlogits, labels[r : r + rows], needs_dhidden or needs_dweight)
            if needs_dhidden:
                torch.mm(dlogits, W, out=dhidden[r : r + rows])
            if needs_dweight:
                _add_product(dweight, dlogits.T, h)
    count = (labels != IGNORE).sum()
    return losses.sum() / count, count, dhidden, dweight.to(weight.dtype)


def _check_labels(labels, v):
    counted = labels[labels != IGNORE]
    wrong = counted[(counted < 0) | (counted >= v)]
    if len(wrong):
        raise AnymambaError(f"label {int(wrong[0])} is outside the vocabulary of {v}: labels are token ids, or -100 "
                            "where they do not count")  # fmt: skip


def _chunk_rows(tokens, row_bytes):
    """Tokens a chunk: chunks of one size, and a multiple of the tiles of matrix products."""
    chunks = -(-tokens * row_bytes // CHUNK_BYTES) or 1
    rows = -(-tokens // chunks)
    return max(1, rows if rows < 128 else -(-rows // 128) * 128)


def _room(rows, v, hidden, fused):
    if fused:
        from anymamba.kernels import triton_loss

        return triton_loss.empty_logits(rows, v, hidden.dtype, hidden.device)
    return hidden.new_empty(rows, v)


def _cross_entropy_fused(logits, labels, gradient):
    from anymamba.kernels import triton_loss

    return triton_loss.cross_entropy_(logits, labels, IGNORE, gradient)


def _cross_entropy_(logits, labels, gradient):
    """losses (r,); with `gradient` the logits (r,v) are overwritten by the gradient of their sum."""
    real = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(len(logits), dtype=real, device=logits.device)
    step = max(1, BLOCK_BYTES // (logits.shape[1] * real.itemsize))
    for r in range(0, len(logits), step):
        block, ignored = logits[r : r + step], labels[r : r + step, None] == IGNORE
        at = labels[r : r + step, None].masked_fill(ignored, 0)
        log_p = torch.log_softmax(block, 1, dtype=real)
        losses[r : r + step] = log_p.gather(1, at).neg_().masked_fill_(ignored, 0)[:, 0]
        if gradient:
            p = log_p.exp_()
            p.scatter_add_(1, at, torch.full_like(at, -1, dtype=real))
            block.copy_(p.masked_fill_(ignored, 0))
    return losses


def _add_product(total, a, b):
    """total += a b; total has the precision of float32 at least, whatever a and b have."""
    if total.dtype == b.dtype:
        total.addmm_(a, b)
    elif _adds_in_float32(b.device, b.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


@functools.cache
def _adds_in_float32(device, dtype) -> bool:
    """Whether torch can add a product of 16-bit matrices to a float32 matrix: newer ones can, on CUDA."""
    one = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(one.float(), one, one, out_dtype=torch.float32, out=one.float())
    except (RuntimeError, TypeError):
        return False
    return True


@register_fake("anymamba::linear_cross_entropy")
def _(hidden, weight, labels, needs_dhidden, needs_dweight):
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    dhidden, dweight = (torch.empty_like(v) if needs else v.new_empty(0, v.shape[1])
                        for v, needs in ((hidden, needs_dhidden), (weight, needs_dweight)))  # fmt: skip
    return loss, labels.new_empty(()), dhidden, dweight


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.needs = inputs[3:]
    ctx.save_for_backward(*output[1:])


def _vjp(ctx, dloss, *_):
    if torch.is_grad_enabled():
        raise AnymambaError("the loss cannot be differentiated twice: use F.cross_entropy(model.lm_head(out.hidden)"
                            ".flatten(0, 1), labels.flatten()), or call backward without create_graph")  # fmt: skip
    count, *gradients = ctx.saved_tensors
    scale = None if dloss is None else dloss / count.clamp(min=1)
    return *(g * scale if needs and scale is not None else None
             for g, needs in zip(gradients, ctx.needs, strict=True)), None, None, None  # fmt: skip


register_autograd("anymamba::linear_cross_entropy", _vjp, setup_context=_setup)
