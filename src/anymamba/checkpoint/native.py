"""A model as a folder: `model.safetensors` and `config.json`. Nothing is pickled."""

import json
import os
from pathlib import Path

import torch

from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.files import write_atomically
from anymamba.layers import QuantizedLinear
from anymamba.model import MambaLM

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(model: MambaLM, folder: str | os.PathLike) -> None:
    """Write the model's weights and config to a folder, made if missing; each file atomically.

    Raises AnymambaError if the folder cannot be written, the disk is full, or the model is quantised; files that were
    there stay whole.
    """
    from safetensors.torch import save_file

    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise AnymambaError("a quantised model cannot be saved: save the model that it was made from, and quantise "
                            "after loading, anymamba.quantize(MambaLM.from_pretrained(folder))")  # fmt: skip

    folder = Path(folder)
    tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_embeddings:
        tensors.pop("lm_head.weight", None)  # it is the embedding
    text = json.dumps({"format": "anymamba-1", "model": model.config.to_dict()}, indent=2)
    write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path))
    write_atomically(folder / CONFIG, lambda path: path.write_text(text + "\n"))


def load_config(folder: str | os.PathLike) -> MambaConfig:
    """The config in a folder. Raises AnymambaError if it is missing, not JSON, or has unknown keys."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise AnymambaError(f"no {CONFIG} in {folder}: a model folder holds {CONFIG} and {WEIGHTS}")
    try:
        values = json.loads(path.read_text())["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise AnymambaError(f"{path} is not an anymamba config ({type(error).__name__}: {error})") from None
    return MambaConfig.from_dict(values)


def load(folder: str | os.PathLike, *, device=None, dtype: torch.dtype | None = None) -> MambaLM:
    """The model in a folder, in the stored dtype or `dtype` (A_log, D and step biases stay float32).

    Raises AnymambaError, naming every tensor, if one is missing, unexpected or misshapen, or if a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, path = load_config(folder), Path(folder) / WEIGHTS
    if not path.is_file():
        raise AnymambaError(f"no {WEIGHTS} in {folder}: a model folder holds {CONFIG} and {WEIGHTS}")
    try:
        tensors = load_file(path, device=str(device or "cpu"))
    except (SafetensorError, OSError) as error:
        raise AnymambaError(f"{path} is damaged or cut short ({error}); copy or save it again") from None
    with torch.device("meta"):
        model = MambaLM(config)
    if config.tie_embeddings and config.vocab_size is not None and "backbone.embedding.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["backbone.embedding.weight"])
    _check_names(path, model.state_dict(), tensors)
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model.to(dtype=dtype) if dtype is not None else model


def _check_names(path, expected, found):
    problems = [f"missing     {k} {tuple(expected[k].shape)}" for k in expected if k not in found]
    problems += [f"unexpected  {k} {tuple(found[k].shape)}" for k in found if k not in expected]
    problems += [
        f"misshapen   {k} {tuple(found[k].shape)}, the config says {tuple(expected[k].shape)}"
        for k in expected
        if k in found and found[k].shape != expected[k].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise AnymambaError(f"{path} does not hold the model that {CONFIG} beside it describes:\n  {shown}")
