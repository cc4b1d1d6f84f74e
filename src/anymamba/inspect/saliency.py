"""Which earlier tokens a prediction rests on. All that they can say to it goes through the state.

Axes: t time, m d_model, v vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anymamba.errors import AnymambaError
from anymamba.inspect.checks import check_state, checked_ids, is_whole, listed
from anymamba.state import MambaState


def gradient_saliency(model: nn.Module, ids, target: int | None = None, *, state: MambaState | None = None) -> Tensor:
    """Gradient × input of the log-probability that `target` follows: (t,) float32, one number a token of `ids` (t,).

    target: a token id; the likeliest if None. Probabilities are over the vocabulary without its padding. state: what
    was read before. To first order it is what the prediction would lose if the token's embedding were 0; memory is that
    of a training step. Raises AnymambaError for a model without a vocabulary, and for ids or a target outside it.
    """
    ids = _check(model, ids, target, state, least=1)
    with torch.inference_mode(False), torch.enable_grad():
        ids = ids.clone()  # of inference_mode autograd would keep nothing
        x = model.backbone.embedding(ids).detach().requires_grad_()
        scores = _log_probabilities(model, model(embeddings=x, state=state, last_only=True).logits)[0]
        score = scores[scores.argmax() if target is None else target]
        (dx,) = torch.autograd.grad(score, x)
    return (dx.float() * x.detach().float()).sum(-1)[0]


@torch.no_grad()
def ablation_saliency(model: nn.Module, ids, target: int | None = None, *, tokens: Sequence[int] | None = None,
                      state: MambaState | None = None, batch_size: int = 16) -> Tensor:  # fmt: skip
    """What the log-probability of `target` loses when a token is left out, exact: (k,) float32, positive if it helped.

    The text is read once; each variant goes on from the state before its gap. k variants take k·t/2 tokens of reading.

    Args:
        target: as `gradient_saliency`; if None the likeliest after the whole text.
        tokens: indices of those left out, one after the other; all k = t if None.
        batch_size: variants read at a time, each with a state of its own.

    Raises AnymambaError as `gradient_saliency`, and for a text of fewer than two tokens or indices outside of it.
    """
    ids = _check(model, ids, target, state, least=2)
    t = ids.shape[1]
    wanted = list(range(t)) if tokens is None else listed(tokens)
    fits = bool(wanted) and all(is_whole(i) and 0 <= i < t for i in wanted)
    if not fits:
        raise AnymambaError(f"ablation_saliency: tokens {wanted}, but the text has tokens 0 … {t - 1}")
    if not is_whole(batch_size) or batch_size < 1:
        raise AnymambaError(
            f"ablation_saliency: batch_size={batch_size!r}, but it must be a whole number of at least 1"
        )
    whole = _log_probabilities(model, model(ids, state=state, last_only=True).logits)[0]
    target = int(whole.argmax()) if target is None else target
    scores, before, at = {}, MambaState.zeros(model.config, 1, device=ids.device, dtype=_dtype(model)), 0
    before = before if state is None else state
    order = sorted(set(wanted))
    for start in range(0, len(order), batch_size):
        group, states = order[start : start + batch_size], []
        for i in group:
            if i > at:
                out = model(ids[:, at:i], state=before, last_only=True)
                before, at = out.state, i
            states.append(before)
        rests = [i for i in group if i < t - 1]
        if rests:
            after = torch.nn.utils.rnn.pad_sequence([ids[0, i + 1 :] for i in rests], batch_first=True)
            lengths = torch.tensor([t - 1 - i for i in rests], device=ids.device)
            logits = model(after, MambaState.cat(states[: len(rests)]), lengths, last_only=True).logits
            scores |= dict(zip(rests, _log_probabilities(model, logits)[:, target], strict=True))
        if group[-1] == t - 1:  # without the last token nothing is left to read: its predecessor predicts
            scores[t - 1] = _log_probabilities(model, out.logits)[0, target]
    return whole[target] - torch.stack([scores[i] for i in wanted])


def _check(model, ids, target, state, least):
    """ids (1,t)."""
    ids = checked_ids("saliency", model, ids, dims=1)
    if len(ids) < least:
        raise AnymambaError(f"saliency: ids are {tuple(ids.shape)}, but must be (t,) with t ≥ {least}: one text")
    if state is not None:
        check_state("saliency", state)
        if state.batch_size != 1:
            raise AnymambaError(f"saliency: a state of {state.batch_size} rows for one text: state.select([0])")
    size = model.config.vocab_size
    if target is not None and (not is_whole(target) or not 0 <= target < size):
        raise AnymambaError(f"saliency: target {target!r} is outside the vocabulary of {size}: give one id")
    return ids[None]


def _log_probabilities(model, logits):
    """(rows,v) of the last token, over the tokens that exist."""
    return logits[:, -1, : model.config.vocab_size].float().log_softmax(-1)


def _dtype(model):
    return model.backbone.norm_f.weight.dtype
