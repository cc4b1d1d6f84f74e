"""What model folders have in common: `config.json`, and weights in safetensors or a torch .bin, perhaps in shards."""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.files import write_atomically

CONFIG, SAFETENSORS, BIN = "config.json", "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"  # behind the name of the weights: which shard holds which tensor
SHARD = 5 * 10**9  # bytes of a file; larger models are written in several
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def read_settings(folder: Path) -> dict[str, Any]:
    """What `config.json` says. Raises AnymambaError if it is missing or no JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        raise AnymambaError(f"no {CONFIG} in {folder}: a model folder holds {CONFIG} and {SAFETENSORS}")
    return _json_object(path)


def peek(path: Path) -> dict[str, Any]:
    """What `config.json` says, or nothing: to tell formats apart."""
    try:
        return read_settings(path)
    except AnymambaError:
        return {}


def check_published(model, format: str) -> None:
    """Raises AnymambaError for a model whose blocks a format of others has no words for."""
    if not model.config.published:
        c = model.config
        raise AnymambaError(f"the format {format} is for the published Mamba, and this model has mixer={c.mixer!r}, "
                            f"discretization={c.discretization!r}, selective={c.selective!r}, gate={c.gate}, "
                            f"use_conv={c.use_conv}: save it as native")  # fmt: skip


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    write_atomically(folder / CONFIG, lambda path: path.write_text(json.dumps(settings, indent=2) + "\n"))


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AnymambaError(f"{path} is not JSON ({type(error).__name__}: {error}); copy or save it again") from None
    if not isinstance(values, dict):
        raise AnymambaError(f"{path} holds a {type(values).__name__}, but it must be an object of settings")
    return values


# ---- reading ----


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything stored, as it is stored, each a view of a mapped file: to be copied.

    What was read of a mapped file counts as memory until nothing refers to it, so it is mapped again and again. The
    largest come first: while one is converted it is there twice, and that costs nothing as long as the others are
    still to come. Raises AnymambaError for a file that is missing, damaged, or more than tensors.
    """
    files = {path: _open(path)[1] for path in weight_files(folder)}
    for path in sorted(files, key=lambda path: max(files[path].values(), default=0), reverse=True):
        (get, sizes), most, touched = _open(path), max(1 << 20, path.stat().st_size // 32), 0
        for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
            if touched > most:
                (get, _), touched = _open(path), 0
            v = get(name)
            if v.layout != torch.strided:
                raise AnymambaError(f"{path}: {name} is {v.layout}, and only dense tensors are read")
            touched += v.nbytes
            yield name, v
            v = None


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a folder; safetensors if there are both kinds."""
    for name in (SAFETENSORS, BIN):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / (name + INDEX)).is_file():
            return _shards(folder / (name + INDEX))
    raise AnymambaError(f"no {SAFETENSORS} in {folder}: a model folder holds {CONFIG} and {SAFETENSORS} (or its shards "
                        f"and {SAFETENSORS}{INDEX}), or {BIN}")  # fmt: skip


def shard_names(index: Path) -> list[str]:
    """The files that an index names."""
    names = _json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise AnymambaError(f"{index} has no weight_map, which says in which file each tensor is; copy it again")
    names = sorted(set(map(str, names.values())))
    if odd := next((name for name in names if not _WEIGHTS.fullmatch(name)), None):
        raise AnymambaError(f"{index} names {odd!r}, which is no shard such as model-00001-of-00002.safetensors")
    return names


def _shards(index: Path) -> list[Path]:
    files = [index.parent / name for name in shard_names(index)]
    if missing := [path.name for path in files if not path.is_file()]:
        raise AnymambaError(f"{index.parent} lacks {', '.join(missing)}, of {len(files)} files that {index.name} "
                            "names: copy or download the rest")  # fmt: skip
    return files


def _open(path: Path) -> tuple[Callable[[str], Tensor], dict[str, int]]:
    """What gives a tensor by its name, and how many elements each has."""
    return _open_bin(path) if path.suffix == ".bin" else _open_safetensors(path)


def _open_safetensors(path: Path) -> tuple[Callable[[str], Tensor], dict[str, int]]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None
    return file.get_tensor, sizes


def _open_bin(path: Path) -> tuple[Callable[[str], Tensor], dict[str, int]]:
    """A file of `torch.save`. Nothing in it is executed."""
    if not zipfile.is_zipfile(path):
        raise AnymambaError(f"{path} is cut short, or is not what torch.save writes since torch 1.6: copy it again, or "
                            "load and save it with torch")  # fmt: skip
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        what = str(error).partition("\n")[0]
        raise AnymambaError(f"{path} holds more than tensors, and Python code in a file is not executed here: get the "
                            f"model as safetensors, from its authors for example ({what})") from None  # fmt: skip
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise _damaged(path, error) from None
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise AnymambaError(f"{path} is not a dictionary of tensors: save model.state_dict() alone, with torch.save")
    return tensors.__getitem__, {name: v.numel() for name, v in tensors.items()}


def _damaged(path, error):
    return AnymambaError(f"{path} is damaged or cut short ({error}); copy or save it again")


# ---- writing ----


def write_safetensors(folder: Path, tensors: Mapping[str, Tensor], shard: int = SHARD) -> None:
    """Write `model.safetensors`, or shards of at most so many bytes and their index, each file atomically."""
    from safetensors.torch import save_file

    def write(name, part):  # the metadata is what transformers asks for
        write_atomically(folder / name, lambda path: save_file(part, path, metadata={"format": "pt"}))

    tensors = {name: v.detach().contiguous() for name, v in tensors.items()}
    if sum(v.nbytes for v in tensors.values()) <= shard:
        write(SAFETENSORS, tensors)
        return remove_others(folder, [SAFETENSORS])
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard)
    for name, names in split.filename_to_tensors.items():
        write(name, {k: tensors[k] for k in names})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    write_atomically(folder / (SAFETENSORS + INDEX), lambda path: path.write_text(json.dumps(index, indent=2) + "\n"))
    return remove_others(folder, [*split.filename_to_tensors, SAFETENSORS + INDEX])


def remove_others(folder: Path, written: list[str]) -> None:
    """Remove the weights of the model that was in the folder before: two models in one folder would be a riddle."""
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in written:
            path.unlink()
