"""From named tensors to a model: every name and shape is checked, and each tensor goes straight to where it belongs."""

from collections.abc import Iterable, Mapping
from os import PathLike
from types import MappingProxyType

import torch
from torch import Tensor, nn

from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.model import MambaLM

EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"
REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KINDS = ("missing", "unexpected", "misshapen", "twice", "untied", "not real")


def assemble(config: MambaConfig, tensors: Iterable[tuple[str, Tensor]], where: str | PathLike, *,
             device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MambaLM:  # fmt: skip
    """The model of a config and its tensors, as `fill` takes them. Raises AnymambaError as `fill` does."""
    with torch.device("meta"):
        model = MambaLM(config)
    tied = {HEAD: EMBEDDING} if config.vocab_size is not None and config.tie_embeddings else {}
    fill(model, tensors, where, tied=tied, device=device, dtype=dtype)
    model.tie_weights()
    return model


def fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], where: str | PathLike, *,
         tied: Mapping[str, str] = MappingProxyType({}), device: torch.device | str | None = None,
         dtype: torch.dtype | None = None) -> None:  # fmt: skip
    """Give a model on "meta" its tensors, which are taken one at a time, in their own dtype or `dtype`.

    A_log, D and the step biases are float32 at least. `tied` names tensors that are others. Raises AnymambaError, which
    names every tensor that does not fit and `where` they came from.
    """
    if dtype is not None and dtype not in REAL:
        raise AnymambaError(f"dtype={dtype}, but it must be one of {', '.join(map(str, REAL))}; for integers, quantize")
    shapes = {name: tuple(v.shape) for name, v in model.state_dict().items()}
    exact = {name for name, v in model.to(torch.bfloat16).state_dict().items() if v.dtype != torch.bfloat16}
    state, found, wrong = {}, set(), []

    for name, v in tensors:
        own = tied.get(name, name)  # published files hold a tied head as well, or in place of the embedding
        want = dtype or v.dtype
        if problem := _problem(name, v, shapes, found):
            wrong.append(problem)
        elif not wrong:
            want = torch.promote_types(want, torch.float32) if name in exact else want
            v = torch.empty(v.shape, dtype=want, device=device).copy_(v)  # ours, contiguous: files are mapped
            if own in state and not torch.equal(state[own], v):
                wrong.append(("untied", f"{HEAD} is not {EMBEDDING}, but the config says that they are one"))
            state.setdefault(own, v)
        found.add(name)
    has = {tied.get(name, name) for name in found}
    wrong += [("missing", f"{k} {shape}") for k, shape in shapes.items() if tied.get(k, k) not in has]
    _refuse(wrong, where)
    model.load_state_dict(state | {name: state[own] for name, own in tied.items()}, assign=True)


def _problem(name, v, shapes, found):
    """(kind, text) of what is wrong with a tensor, or None."""
    shape = tuple(v.shape)
    if name not in shapes:
        return "unexpected", f"{name} {shape}"
    if shape != shapes[name]:
        return "misshapen", f"{name} {shape}, the config says {shapes[name]}"
    if name in found:
        return "twice", name
    if v.dtype not in REAL:
        return (
            "not real",
            f"{name} is {v.dtype}: load the model that this was quantised from, with quantize= if need be",
        )
    return None


def _refuse(wrong, where):
    if wrong:
        wrong = sorted(wrong, key=lambda problem: _KINDS.index(problem[0]))
        lines = [f"{kind:<10}  {text}" for kind, text in wrong]
        shown = "\n  ".join(lines[:20] + ([f"… and {len(lines) - 20} more"] if len(lines) > 20 else []))
        raise AnymambaError(f"the weights in {where} are not those of the model that its config describes:\n  {shown}")
