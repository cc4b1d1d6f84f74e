"""A model as a folder: `model.safetensors` and `config.json`. Nothing is pickled."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from anymamba.checkpoint.assemble import HEAD
from anymamba.checkpoint.folder import CONFIG, peek, read_settings, read_tensors, write_safetensors, write_settings
from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.model import MambaLM

FORMAT = "anymamba-1"


def matches(path: Path) -> bool:
    """Whether `config.json` says that it is ours."""
    return str(peek(path).get("format", "")).startswith("anymamba-")


def read_config(path: Path) -> MambaConfig:
    """Raises AnymambaError for a config of a newer version, without sizes, or with unknown keys."""
    settings = read_settings(path)
    if "sequence" in settings:
        raise AnymambaError(f"{path} holds a SequenceModel, no language model: load it by "
                            "SequenceModel.from_pretrained")  # fmt: skip
    if settings["format"] != FORMAT:
        raise AnymambaError(f"{path / CONFIG} is of format {settings['format']!r}, and this version of anymamba reads "
                            f"{FORMAT!r}: update anymamba")  # fmt: skip
    if not isinstance(settings.get("model"), dict):
        raise AnymambaError(f'{path / CONFIG} has no "model", the sizes; copy or save it again')
    return MambaConfig.from_dict(settings["model"])


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """See `folder.read_tensors`."""
    return read_tensors(path)


def save(model: MambaLM, path: Path) -> None:
    """Write a folder, made if missing; each file atomically."""
    state = model.state_dict()
    if model.config.tie_embeddings:
        state.pop(HEAD, None)  # it is the embedding
    write_safetensors(path, state)
    write_settings(path, {"format": FORMAT, "model": model.config.to_dict()})
