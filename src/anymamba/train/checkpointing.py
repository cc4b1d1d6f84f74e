"""Checkpoints of a run: folders that appear whole or not at all, checked by digest when they are read.

checkpoints/step-00000120/
    config.json, model.safetensors    the model, as everywhere; of an adapter the two files of peft instead
    training.safetensors              moments of the optimizer, and the carried state
    trainer.json                      step, time, choices made; digests of the files above
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.lora import Adapter
from anymamba.model import MambaLM
from anymamba.state import LayerState, MambaState

FOLDER, META, TRAINING = "checkpoints", "trainer.json", "training.safetensors"
_UNFINISHED = ".unfinished-"


def save(run: Path, model: MambaLM | Adapter, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of step `meta["step"]` of a run and drop all but the newest `keep`.

    Raises AnymambaError when it cannot be written; what was saved before is then untouched.
    """
    folder = run / FOLDER
    target = folder / f"step-{meta['step']:08d}"
    unfinished = folder / f"{_UNFINISHED}{target.name}"
    try:
        for left_over in folder.glob(f"{_UNFINISHED}*"):  # of a process that was killed
            shutil.rmtree(left_over)
        unfinished.mkdir(parents=True)
        _write(unfinished, model, tensors, meta)
        if target.exists():  # a damaged one that was skipped, or the one that this process began with
            shutil.rmtree(target)
        os.replace(unfinished, target)
        _sync(folder)
        for old in _found(run)[keep:]:
            shutil.rmtree(old)
    except (OSError, SafetensorError, AnymambaError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise AnymambaError(
            f"cannot save a checkpoint to {target}: {error}\nThe checkpoints before it are whole: free some space, "
            f"then  anymamba train --resume {run}"
        ) from error
    return target


def load(run: Path, device: torch.device) -> tuple[Path, dict[str, Tensor], dict[str, Any], list[str]] | None:
    """Folder, tensors and meta of the newest whole checkpoint, and the names of damaged ones that are newer.

    None if there is no checkpoint yet. Raises AnymambaError if all that are there are damaged.
    """
    from safetensors.torch import load_file

    damaged = []
    for folder in _found(run):
        meta = _whole(folder)
        if meta is None:
            damaged.append(folder.name)
            continue
        tensors = load_file(folder / TRAINING, device=str(device))
        return folder, tensors, meta, damaged
    if damaged:
        raise AnymambaError(
            f"all checkpoints of {run} are damaged ({', '.join(damaged)}): copy them again, or start a new run with  "
            f"anymamba train --config {run / 'train.json'}"
        )
    return None


def newest_meta(run: Path) -> dict[str, Any] | None:
    """What the newest whole checkpoint says about itself, or None."""
    return next((meta for folder in _found(run) if (meta := _whole(folder))), None)


# ---- what training holds beside the model, as named tensors ----


def optimizer_tensors(model: MambaLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by name of parameter: `optimizer.{parameter}.{exp_avg, exp_avg_sq, step}`."""
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    return {f"optimizer.{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def restore_optimizer(model: MambaLM, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    for name, p in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            optimizer.state[p] = state


def state_tensors(state: MambaState | None) -> dict[str, Tensor]:
    """A carried state as `carried.*`; nothing for None."""
    if state is None:
        return {}
    layers = {f"carried.{i}.{k}": v for i, layer in enumerate(state.layers) for k, v in layer._asdict().items()}
    return {"carried.seen": state.seen} | layers


def restored_state(tensors: dict[str, Tensor], n_layer: int) -> MambaState | None:
    """The inverse of `state_tensors`."""
    if "carried.seen" not in tensors:
        return None
    layers = (LayerState(tensors[f"carried.{i}.conv"], tensors[f"carried.{i}.ssm"]) for i in range(n_layer))
    return MambaState(tuple(layers), tensors["carried.seen"])


# ---- files ----


def _found(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((run / FOLDER).glob("step-*"), reverse=True)


def _write(folder: Path, model: MambaLM | Adapter, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    # clones, for safetensors takes neither views nor tensors that share memory
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, folder / TRAINING)
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    (folder / META).write_text(json.dumps(meta | {"files": digests}, indent=1) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _whole(folder: Path) -> dict[str, Any] | None:
    """The meta of a checkpoint, if every file is as it was written."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        whole = all(_digest(folder / name) == digest for name, digest in meta["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return meta if whole else None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _sync(path: Path) -> None:
    """Onto the disk: a rename is only as good as what it renames."""
    if os.name == "nt" and path.is_dir():  # Windows cannot, and needs not, sync a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
