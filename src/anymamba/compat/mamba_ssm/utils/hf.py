"""mamba-ssm's checkpoints: a config.json and pytorch_model.bin (or model.safetensors), in a folder or on the hub."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anymamba.errors import AnymambaError


def load_config_hf(model_name: str) -> dict[str, Any]:
    """The config of a folder or of a repository of the hub. Raises AnymambaError if there is none."""
    return json.loads(_find(model_name, "config.json").read_text())


def load_state_dict_hf(model_name: str, device=None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights of a folder or of a repository of the hub. Nothing but tensors is unpickled. Raises AnymambaError if
    there are none, or they cannot be read."""
    from safetensors.torch import load_file

    path = _find(model_name, "model.safetensors", "pytorch_model.bin")
    try:
        safe = path.suffix == ".safetensors"
        tensors = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what the readers raise for bytes that make no sense is of many kinds
        raise AnymambaError(f"{path} is damaged, cut short, or holds more than tensors ({error})") from None
    return {name: v.to(device=device, dtype=dtype) for name, v in tensors.items()}


def _find(model_name, *names) -> Path:
    """The first of the files that is there."""
    folder = Path(model_name)
    if folder.is_dir():
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            raise AnymambaError(f"{folder} holds no {' or '.join(names)}: is it a mamba-ssm checkpoint?")
        return found
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(str(model_name), name))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):  # the hub says that it has no such file
                continue
            problem = error
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            problem = error
        raise AnymambaError(f"{model_name!r} is no folder here, and cannot be had from the hub: {problem}")
    raise AnymambaError(f"{model_name!r} on the hub holds no {' or '.join(names)}: is it a mamba-ssm checkpoint?")
