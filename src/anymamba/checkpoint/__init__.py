"""Model files: one module a format, told apart by what the files say.

A format has `matches(path)`, `read_config(path)`, `tensors(path)` under our names, one at a time, and
`save(model, path)`.
"""

import os
from pathlib import Path
from types import ModuleType

import torch

from anymamba.checkpoint import folder, gguf, hf, hub, native, state_spaces
from anymamba.checkpoint.assemble import assemble
from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.layers import QuantizedLinear
from anymamba.layers import quantize as quantized
from anymamba.layers.quantized import BITS
from anymamba.model import MambaLM

__all__ = ["FORMATS", "load", "load_config", "locate", "save"]

FORMATS: dict[str, ModuleType] = {"native": native, "state-spaces": state_spaces, "hf": hf,
                                  "gguf": gguf}  # fmt: skip
_OTHERS = {"mamba2": "Mamba-2", "jamba": "Jamba", "bamba": "Bamba", "zamba": "Zamba", "zamba2": "Zamba2",
           "falcon_h1": "Falcon-H1"}  # fmt: skip


def load(name_or_path: str | os.PathLike, *, device: torch.device | str | None = None,
         dtype: torch.dtype | None = None, quantize: str | None = None, revision: str | None = None,
         ) -> MambaLM:  # fmt: skip
    """The model of a folder, a file, or a name on the Hugging Face hub (`name@revision` or `revision`).

    It is in the stored dtype or `dtype` (A_log, D and step biases stay float32), and each tensor goes straight to
    `device`; `quantize` ("int8" or "int4") as `anymamba.quantize` does after loading.

    Raises AnymambaError if it cannot be found or had, is damaged, of no known format, or if its weights are not those
    that its config describes; every tensor is named that is missing, unexpected or misshapen.
    """
    if quantize is not None and quantize not in BITS:
        raise AnymambaError(f"quantize={quantize!r} does not exist: choose one of {', '.join(BITS)}")
    _check_device(device)
    path = locate(name_or_path, revision)
    form = format_of(path)
    model = assemble(form.read_config(path), form.tensors(path), path, device=device, dtype=dtype)
    if dtype is None and form is not native:  # others mix dtypes in a file, and mean that of the matrices
        model.to(model.backbone.layers[0].mixer.in_proj.weight.dtype)
    return model if quantize is None else quantized(model, quantize)


def _check_device(device):
    try:
        kind = torch.device("cpu" if device is None else device).type
    except (RuntimeError, TypeError) as error:
        why = str(error).partition(":")[0]
        raise AnymambaError(f"device={device!r} is none: {why}; give 'cpu' or 'cuda'") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise AnymambaError(f"device={str(device)!r}, but torch sees no GPU here: anymamba doctor says why")


def load_config(name_or_path: str | os.PathLike, revision: str | None = None) -> MambaConfig:
    """The config of what `load` loads, without its weights. Raises AnymambaError as `load` does."""
    path = locate(name_or_path, revision, weights=False)
    return format_of(path).read_config(path)


def save(model: MambaLM, path: str | os.PathLike, format: str = "native") -> None:
    """Write a model in one of FORMATS to a folder, made if missing; each file atomically. "gguf" is one file,
    path if its name ends in .gguf, else `model.gguf` in that folder; see `checkpoint.gguf.save` for its tokenizer.

    Raises AnymambaError if it cannot be written, the disk is full, the model is quantised or hears both directions, or
    the format cannot hold it.
    """
    if format not in FORMATS:
        raise AnymambaError(f"format={format!r} does not exist: choose one of {', '.join(FORMATS)}")
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise AnymambaError("a quantised model cannot be saved: save the model that it was made from, and quantise "
                            "after loading, MambaLM.from_pretrained(folder, quantize='int8')")  # fmt: skip
    if not model.keeps_state:
        raise AnymambaError("this model hears both directions, and no format says so: it would be loaded as another. "
                            "Save its weights by safetensors.torch.save_model, and load them by load_model into a "
                            "model made as this one was; a SequenceModel(bidirectional=True) saves itself")  # fmt: skip
    FORMATS[format].save(model, Path(path))


def locate(name_or_path: str | os.PathLike, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder or file of a model: a path as it is, and for a name on the hub where its files are now in the cache.

    A file within a model folder stands for the folder. Raises AnymambaError if the hub does not give them, or for a
    model that could not be loaded, before its weights are fetched.
    """
    name = hub.hub_name(os.fspath(name_or_path), revision)
    if name is None:
        path = Path(name_or_path).expanduser()
        if revision is not None:
            raise AnymambaError(f"revision={revision!r} goes with a name on the hub, and {path} is a path: drop it")
        inside = path.name.startswith(("config.json", folder.SAFETENSORS, folder.BIN)) and path.is_file()
        return path.parent if inside else _only_gguf(path)
    path = hub.fetch_small(*name)
    format_of(path).read_config(path)
    if weights:
        hub.fetch_weights(name[0], path)
    return path


def _only_gguf(path: Path) -> Path:
    """The GGUF file in a folder that holds one and no other model, else the path itself."""
    if not path.is_dir() or (path / folder.CONFIG).is_file():
        return path
    found = [file for file in path.glob("*.gguf") if gguf.matches(file)]
    return found[0] if len(found) == 1 else path


def format_of(path: Path) -> ModuleType:
    """The module of the format in which a folder or file is. Raises AnymambaError, with its name, for others."""
    for form in FORMATS.values():
        if form.matches(path):
            return form
    if path.is_file():
        raise AnymambaError(f"{path} is no model file that anymamba knows: give the folder of a model with its config")
    if (path / "params.json").is_file() and not (path / folder.CONFIG).is_file():
        raise AnymambaError(f"{path} has a params.json, as Codestral Mamba has: not supported yet: Mamba-2; anymamba "
                            "runs Mamba-1 language models")  # fmt: skip
    if (path / "adapter_config.json").is_file() and not (path / folder.CONFIG).is_file():
        raise AnymambaError(f"{path} holds an adapter, not a model: anymamba.lora.load puts it on its model, and the "
                            "command anymamba merge writes the two as one")  # fmt: skip
    settings = folder.read_settings(path)
    if kind := settings.get("model_type"):
        name = _OTHERS.get(str(kind), "model_type")
        raise AnymambaError(f"{path}: not supported yet: {name} ({kind!r}); anymamba runs Mamba-1 language models: "
                            f"{', '.join(hf.KINDS)} of Hugging Face")  # fmt: skip
    raise AnymambaError(f"{path / folder.CONFIG} is of no format that anymamba knows: it has no \"format\" (ours), no "
                        '"model_type" (Hugging Face), and not "d_model" and "n_layer" (state-spaces)')  # fmt: skip
