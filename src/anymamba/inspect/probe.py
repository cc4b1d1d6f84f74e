"""Needle tests: what can still be read out of the state after k tokens (a linear probe).

Axes: b texts, t time, f features of a state (d·n), v kinds of tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anymamba.errors import AnymambaError
from anymamba.inspect.checks import checked_ids, choose_layers, is_finite, is_whole, listed


@dataclass(frozen=True, eq=False)
class Recall:
    """How often a linear probe names the token read k steps ago, on texts that it was not fitted to."""

    lags: tuple[int, ...]
    layers: tuple[int, ...]
    accuracy: Tensor  # (layers,lags)
    chance: Tensor  # (lags,) of always naming the most frequent token


@torch.no_grad()
def recall(model: nn.Module, ids, lags: int | Sequence[int], *, layers: int | Iterable[int] | None = None,
           ridge: float = 1e-2, share: float = 0.75, batch_size: int = 64) -> Recall:  # fmt: skip
    """Fit a ridge regression from each layer's SSM state at the end of a text to the token read k steps before.

    Args:
        ids: (b,t) one text a row, of few kinds of tokens and many rows: chance is what a probe without data shows.
        lags: the k, 0 is the last token. layers: which, all if None. ridge: strength, relative to the features' mean
            square. share: of the rows that the probe is fitted to, the first ones; the others test it.

    The state alone is probed, not the last inputs that the convolution keeps; of any kind of mixer that has one. Raises
    AnymambaError for lags outside the text, too few rows, layers that do not exist, or a model without a vocabulary.
    """
    ids = checked_ids("recall", model, ids, dims=2)
    b, t = ids.shape
    lags, chosen = tuple(listed(lags)), tuple(choose_layers(model, layers))
    fitted = int(b * share) if is_finite(share) else 0
    if not 1 <= fitted < b or not is_finite(ridge) or ridge <= 0 or not is_whole(batch_size) or batch_size < 1:
        raise AnymambaError(f"recall: ids {tuple(ids.shape)}, {share=}, {ridge=}, {batch_size=}: need rows (b,t) to "
                            "fit and to test, a share of them between 0 and 1, a ridge above 0")  # fmt: skip
    if not lags or not all(is_whole(k) and 0 <= k < t for k in lags):
        raise AnymambaError(f"recall: lags {lags}, but texts of {t} tokens have lags 0 … {t - 1}")
    states = {i: [] for i in chosen}
    for part in ids.split(batch_size):
        out = model(part, last_only=True).state.layers
        for i in chosen:
            states[i].append(out[i].ssm.flatten(1))
    kinds = [ids[:, t - 1 - k].unique(return_inverse=True)[1] for k in lags]
    accuracy = torch.stack([_probe(torch.cat(states.pop(i)), kinds, fitted, ridge) for i in chosen])
    chance = torch.stack([(y[fitted:] == y[:fitted].mode().values).float().mean() for y in kinds])
    return Recall(lags, chosen, accuracy, chance)


def _probe(x, kinds, fitted, ridge):
    """Accuracy (lags,) of probes from features x (b,f) to each of `kinds` (b,)."""
    x = x.double()
    mean, spread = x[:fitted].mean(0), x[:fitted].std(0, correction=0)
    x = (x - mean) / spread.clamp(min=1e-12)
    train, test = x[:fitted], x[fitted:]
    # rows × rows instead of features × features: a state has more numbers than there are texts
    gram = train @ train.T
    gram.diagonal().add_(ridge * x.shape[1])
    weights = torch.linalg.solve(gram, (test @ train.T).T).T  # (tests,fitted)
    out = []
    for y in kinds:
        targets = torch.nn.functional.one_hot(y[:fitted], int(y.max()) + 1).double()
        center = targets.mean(0)
        guess = (weights @ (targets - center) + center).argmax(-1)
        out.append((guess == y[fitted:]).float().mean())
    return torch.stack(out)
