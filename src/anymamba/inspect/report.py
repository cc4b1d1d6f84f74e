"""One page that shows what a model does with a text: step sizes, hidden attention, memory horizons. It loads nothing.

Axes: t time, d channels, n d_state, p blocks of tokens.
"""

import base64
import html
import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from anymamba.errors import AnymambaError
from anymamba.inspect.attention import attention_blocks
from anymamba.inspect.capture import LayerTrace, capture
from anymamba.inspect.checks import checked_ids
from anymamba.inspect.memory import horizon, write_strength

CHANNELS = 7  # shown beside the mean of all: from the one that forgets first to the one that keeps longest
SIDE = 128  # squares of a map, at most
MAP_BYTES = 2_500_000  # of all maps together: base64 makes a third more of it, and a page stays under 5 MB
TRACE_BYTES = 1 << 29  # of layers recorded in one run; more take more runs
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class LayerSummary:
    """What the page shows of a layer."""

    dt: Tensor  # (t,) step size, mean over channels
    write: Tensor  # (t,) length of what is written, mean over channels
    horizon: Tensor  # memory horizons in tokens at QUANTILES of all channels and states
    channels: tuple[int, ...]  # those with maps of their own
    channel_horizon: Tensor  # (channels,) the middle of each one's states
    maps: Tensor  # (1 + channels,p,p) hidden attention: the mean of all channels, then theirs


def summarise(model: nn.Module, ids, *, channels: int = CHANNELS, side: int = SIDE,
              on_layer: Callable[[], None] | None = None) -> list[LayerSummary]:  # fmt: skip
    """What a text (t,) does in each layer; maps have at most `side` blocks each way. on_layer is called after each.

    Raises AnymambaError for a text that is not (t,) with t ≥ 1, and as `capture` does.
    """
    ids = checked_ids("summarise", model, ids, dims=1)
    if len(ids) == 0:
        raise AnymambaError("summarise: ids are (0,), but must be (t,) with t ≥ 1: one text")
    count = len(model.backbone.layers)
    if not model.config.selects:
        raise AnymambaError("summarise: with selective='' no step, B or C depends on the text, and what goes into the "
                            "scan cannot be seen; hidden_attention of a captured layer gives its map")  # fmt: skip
    together = max(1, TRACE_BYTES // (8 * len(ids) * model.config.d_inner))
    out = []
    for start in range(0, count, together):
        group = range(start, min(start + together, count))
        trace = capture(model, ids[None], layers=group, keep=("dt", "B", "C", "x"))
        for i in group:
            with _one_thread():
                out.append(_summarise_layer(trace.layers[i], channels, side))
            if on_layer is not None:
                on_layer()
    return out


@contextmanager
def _one_thread():
    """Many small operations: threads that wait for each other at each of them cost far more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _summarise_layer(layer: LayerTrace, channels: int, side: int) -> LayerSummary:
    horizons = horizon(layer)
    middles = horizons.median(-1).values
    order = middles.argsort()
    chosen = order[torch.linspace(0, len(order) - 1, min(channels, len(order))).long().to(order.device)]
    maps = [attention_blocks(layer, side)[None]]
    if len(chosen):
        maps.append(attention_blocks(layer, side, chosen.tolist()))
    return LayerSummary(
        layer.dt[0].mean(-1).cpu(), write_strength(layer)[0].mean(-1).float().cpu(),
        torch.quantile(horizons.flatten().cpu(), torch.tensor(QUANTILES)), tuple(chosen.tolist()),
        middles[chosen].cpu(), torch.cat(maps).float().cpu(),
    )  # fmt: skip


def side_for(layers: int, maps: int = 1 + CHANNELS) -> int:
    """Blocks of a map each way with which all maps of the page take MAP_BYTES, at most SIDE."""
    return min(SIDE, int((2 * MAP_BYTES / (layers * maps)) ** 0.5))


def page(summaries: Sequence[LayerSummary], tokens: Sequence[str], title: str, about: str) -> str:
    """The page as HTML. tokens: the text of each token, "" for a piece of a character.

    Raises AnymambaError if there are not as many tokens as were summarised.
    """
    t, size = len(summaries[0].dt), summaries[0].maps.shape[-1]
    if len(tokens) != t:
        raise AnymambaError(f"page: {len(tokens)} texts of tokens, but {t} tokens were read")
    data = {"title": title, "about": about, "tokens": list(tokens), "size": size, "block": -(-t // size),
            "layers": [_layer_data(summary) for summary in summaries]}  # fmt: skip
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no token can end the script
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    before, rest = template.split("@TITLE@")
    between, after = rest.split("@DATA@")
    return before + html.escape(title) + between + text + after


def _layer_data(summary: LayerSummary) -> dict:
    maps, scales = pack_maps(summary.maps)
    channels = zip(summary.channels, summary.channel_horizon.tolist(), strict=True)
    return {
        "dt": _base64(summary.dt.numpy()), "write": _base64(summary.write.numpy()),
        "horizon": [float(f"{v:.4g}") for v in summary.horizon.tolist()],
        "channels": [{"index": i, "horizon": float(f"{h:.4g}")} for i, h in channels],
        "maps": _base64(maps), "scales": [float(f"{v:.4g}") for v in scales],
    }  # fmt: skip


def pack_maps(maps: Tensor) -> tuple[np.ndarray, list[float]]:
    """Maps (k,p,p) as int8 (k,p(p+1)/2), each row up to the diagonal, and each one's largest value.

    The sign and the square root of a value's share of the largest, times 127: small shares show, too.
    """
    scales = maps.abs().amax((1, 2))
    shares = maps / scales.clamp(min=1e-30)[:, None, None]
    small = (shares.sign() * shares.abs().sqrt() * 127).round().to(torch.int8)
    i, j = torch.tril_indices(*maps.shape[1:])
    return small[:, i, j].numpy(), scales.tolist()


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()).decode()
