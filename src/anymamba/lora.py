"""Low-rank adapters (LoRA, arXiv 2106.09685) by the `peft` library: a frozen W becomes W + (alpha / rank) · B A.

The layers of a model are modules that are called, in training and in decoding, so `peft.get_peft_model(model,
LoraConfig(target_modules=[...]))` works on a `MambaLM` as it is: without `task_type`, which is for models with the
interface of transformers, and DoRA not on dt_proj, whose bias the scan adds. This module adds what a run needs: checks,
files that are written whole, and a base that is known to be the right one. Files have peft's own format.

Axes: r rank.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from anymamba import checkpoint
from anymamba.errors import AnymambaError
from anymamba.files import write_atomically
from anymamba.layers import QuantizedLinear
from anymamba.model import MambaLM

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ("in_proj", "x_proj", "dt_proj", "out_proj")  # every matrix of a block
VOCABULARY = ("embedding", "lm_head")


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in its place: `model`, which `attach` has changed, computes with it."""

    model: MambaLM
    peft: nn.Module  # the PeftModel around it
    base: str  # fingerprint of the model without it

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json` as peft does; each file atomically.

        Raises AnymambaError if the folder cannot be written; files that were there stay whole.
        """
        from safetensors.torch import save_file

        tensors = {k: v.detach().contiguous() for k, v in _tensors(self.peft).items()}
        meta = {"format": "pt", "base": self.base}
        write_atomically(Path(folder) / WEIGHTS, lambda part: save_file(tensors, part, metadata=meta))
        values = self.peft.peft_config["default"].to_dict() | {"inference_mode": True}
        text = json.dumps(values, indent=2, sort_keys=True, default=sorted)  # sets, in one order
        write_atomically(Path(folder) / CONFIG, lambda part: part.write_text(text + "\n", encoding="utf-8"))

    def restore(self, folder: str | os.PathLike) -> None:
        """Take the weights that `save_pretrained` wrote.

        Raises AnymambaError if they are missing or damaged, or are those of an adapter for another model.
        """
        import peft
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / WEIGHTS
        try:
            with safe_open(path, framework="pt", device=str(self.model.device)) as file:
                base, found = (file.metadata() or {}).get("base"), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise AnymambaError(f"{path} is missing or damaged ({error}); copy or save it again") from None
        _check_tensors(path, _tensors(self.peft), found)
        if base not in (None, self.base):
            raise AnymambaError(f"{path} belongs to another model:\n  made for  {base}\n  this is   {self.base}\n"
                                "Put back the model that it was trained on, or name it (merge --base)")  # fmt: skip
        peft.set_peft_model_state_dict(self.peft, found)

    def merge(self) -> MambaLM:
        """The model with the adapter added to its weights: as fast as without, and all of it can be trained."""
        return self.peft.merge_and_unload().requires_grad_(True)

    def check_gradients(self) -> None:
        """To be asked after a backward pass. Raises AnymambaError, naming them, for adapters that had no part in it."""
        reached: dict[str, bool] = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                layer = name.partition(".lora_")[0]
                reached[layer] = reached.get(layer, False) or (p.grad is not None and bool(p.grad.any()))
        dead = [name for name, is_reached in reached.items() if not is_reached]
        if dead:
            others = f" and {len(dead) - 1} more" if len(dead) > 1 else ""
            raise AnymambaError(
                f"the adapter on {dead[0]}{others} gets no gradient: the model reads the weights of that layer without "
                f"calling it, so that no adapter can learn there. Leave it out of the targets; {_choices(self.model)}"
            )


def attach(model: MambaLM, *, rank: int = 8, alpha: float = 16, targets: Sequence[str] = TARGETS,
           base: str | None = None) -> Adapter:  # fmt: skip
    """Put a new adapter on a model, which is changed in place: its own parameters are frozen, the adapter's are not.

    At first it changes nothing: its B (outputs,r) is 0, and only A (r,inputs) is random.

    Args:
        rank: r. alpha: what B A is scaled by is alpha / rank.
        targets: names of layers, the last part or more ("in_proj", "0.mixer.in_proj", "embedding", "lm_head"). Tied
            embedding and head are untied where one of them is a target: a change of one must not be one of the other.
        base: name or folder of the model, which the adapter's file then names.

    Raises AnymambaError for targets that the model does not have, impossible numbers, and a quantised model.
    """
    peft = _peft()
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AnymambaError(f"lora: rank={rank!r}, but it must be a whole number of at least 1")
    if not alpha > 0:
        raise AnymambaError(f"lora: alpha={alpha!r}, but it must be above 0")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), base_model_name_or_path=base)
    return _attach(model, config)


def matches(folder: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / CONFIG).is_file()


def load(folder: str | os.PathLike, *, base: str | os.PathLike | None = None, device=None,
         dtype: torch.dtype | None = None) -> MambaLM:  # fmt: skip
    """The model of an adapter with the adapter merged into it, in float32, or then `dtype`.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`, of ours or of peft's.
        base: name or folder of the model, in place of the one that the adapter names.

    Raises AnymambaError if the adapter or its model is missing or damaged, or if they do not belong together.
    """
    peft, path = _peft(), Path(folder) / CONFIG
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise AnymambaError(f"{path} is missing or is no adapter config ({type(error).__name__}: {error})") from None
    if config.peft_type != "LORA":
        raise AnymambaError(f"{path} is a {config.peft_type} adapter: only LoRA can be added to the weights of a model")
    if base is None and config.base_model_name_or_path is None:
        raise AnymambaError(f"{path} does not say which model it is for: name it by  anymamba merge {folder} --base "
                            "MODEL -o OUT")  # fmt: skip
    model = _load_base(folder, base or config.base_model_name_or_path, device).float()  # small changes would be lost
    adapter = _attach(model, config)
    adapter.restore(folder)
    merged = adapter.merge()
    return merged if dtype is None else merged.to(dtype=dtype)


def _load_base(folder, base, device):
    try:
        return load(base, device=device) if matches(base) else checkpoint.load(base, device=device)
    except AnymambaError as error:
        raise AnymambaError(
            f"the adapter {folder} is for the model {base}, which cannot be loaded: {error}\n"
            f"Put it back, or say where it is:  anymamba merge {folder} --base MODEL -o OUT"
        ) from None


def _attach(model, config) -> Adapter:
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise AnymambaError("a quantised model cannot be trained, nor an adapter of it: attach to the model that it "
                            "was made from, merge, and quantise that")  # fmt: skip
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise AnymambaError("the model has an adapter already: merge it, or load the model again")
    targets = config.target_modules
    if not isinstance(targets, str) and set(targets) == set(TARGETS):  # the default: those of them that there are
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        targets = config.target_modules = {name for name in targets if name in names}
    if not isinstance(targets, str):  # one that is may be a pattern, and is left to peft
        _check_targets(model, targets)
    fingerprint = model.fingerprint()
    if model.config.vocab_size is not None and model.config.tie_embeddings and any(v in targets for v in VOCABULARY):
        model.config = model.config.replace(tie_embeddings=False)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    try:
        peft_model = _peft().PeftModel(model, config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise AnymambaError(f"lora: peft cannot attach this adapter ({error}); {_choices(model)}") from None
    step_layers = (getattr(block.mixer, "dt_proj", None) for block in model.backbone.layers)
    if any(getattr(layer, "use_dora", {}).get("default") for layer in step_layers):
        raise AnymambaError("lora: DoRA on dt_proj does not compute what is merged, for the scan adds the bias of that "
                            "layer, and DoRA takes it off its output: leave dt_proj out of the targets")  # fmt: skip
    return Adapter(model, peft_model, fingerprint)


def _check_targets(model, targets):
    names = [name for name, _ in model.named_modules()]
    wrong = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if wrong or not targets:
        what = f"no layer is called {', '.join(map(repr, wrong))}" if wrong else "no targets"
        raise AnymambaError(f"lora: {what}; {_choices(model)}")


def _choices(model):
    there = {name.split(".")[-1] for name, _ in model.named_modules()}
    return f"targets are names of layers: {', '.join(name for name in (*TARGETS, *VOCABULARY) if name in there)}"


def _check_tensors(path, expected: dict[str, Tensor], found: dict[str, Tensor]):
    problems = [f"missing     {k}" for k in expected if k not in found]
    problems += [f"unexpected  {k}" for k in found if k not in expected]
    problems += [
        f"misshapen   {k} {tuple(found[k].shape)}, this model needs {tuple(expected[k].shape)}"
        for k in expected
        if k in found and found[k].shape != expected[k].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:8] + ([f"… and {len(problems) - 8} more"] if len(problems) > 8 else []))
        raise AnymambaError(f"{path} is not an adapter of this model:\n  {shown}")


def _tensors(peft_model) -> dict[str, Tensor]:
    return _peft().get_peft_model_state_dict(peft_model, save_embedding_layers=False)


def _peft():
    try:
        import peft
    except ImportError as error:
        raise AnymambaError(f"LoRA needs peft ({error}): pip install 'anymamba[lora]'") from None
    return peft
