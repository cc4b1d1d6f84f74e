"""Hugging Face's format of `mamba` and `falcon_mamba`: `config.json` with a model_type, and safetensors or .bin.

Tensors have our names, but for the embedding's. Falcon-Mamba is Mamba with norms on dt, B and C (arXiv 2410.05355).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from anymamba.checkpoint.assemble import EMBEDDING, HEAD
from anymamba.checkpoint.folder import (
    CONFIG,
    check_published,
    peek,
    read_settings,
    read_tensors,
    write_safetensors,
    write_settings,
)
from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.model import MambaLM

KINDS = {"mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM"}
THEIR_EMBEDDING = "backbone.embeddings.weight"
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")  # without a default: a config that lacks one is no whole one
# ours → theirs, and what they take where a config does not say
NAMES: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", None),
    "d_model": ("hidden_size", None),
    "n_layer": ("num_hidden_layers", None),
    "d_state": ("state_size", 16),
    "d_conv": ("conv_kernel", 4),
    "dt_rank": ("time_step_rank", "auto"),
    "conv_bias": ("use_conv_bias", True),
    "bias": ("use_bias", False),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tie_embeddings": ("tie_word_embeddings", True),
    "dt_min": ("time_step_min", 1e-3),
    "dt_max": ("time_step_max", 0.1),
    "dt_scale": ("time_step_scale", 1.0),
    "dt_init_floor": ("time_step_floor", 1e-4),
    "initializer_range": ("initializer_range", 0.1),
}
UNPADDED = "unpadded_vocab_size"  # ours alone: transformers knows the padded vocabulary only


def matches(path: Path) -> bool:
    """Whether `config.json` has the model_type of one of the two."""
    return peek(path).get("model_type") in list(KINDS)  # a list, as what is asked for may be anything


def read_config(path: Path) -> MambaConfig:
    """Raises AnymambaError for settings that make another model than ours."""
    settings = read_settings(path)
    if missing := [repr(name) for name in SIZES if name not in settings]:
        raise AnymambaError(f"{path / CONFIG} does not say {', '.join(missing)}, without which the model has no "
                            "size: copy or download it again")  # fmt: skip
    values = {ours: settings.get(theirs, default) for ours, (theirs, default) in NAMES.items()}
    if (act := settings.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise AnymambaError(f"{path / CONFIG}: not supported yet: hidden_act={act!r}, only 'silu'")
    if "quantization_config" in settings:
        raise AnymambaError(f"{path / CONFIG}: not supported yet: weights quantised by others (quantization_config); "
                            "load the original model, with quantize='int8' if need be")  # fmt: skip
    if values["dt_rank"] in ("auto", math.ceil(_whole(path, "hidden_size", values["d_model"]) / 16)):
        values["dt_rank"] = None
    values["expand"] = _expand(path, settings, values["d_model"])
    if settings["model_type"] == "falcon_mamba":
        values["inner_norm_eps"] = settings.get("mixer_rms_eps", 1e-6)
    return MambaConfig(**values | _vocabulary(path, settings, values["vocab_size"]))


def _whole(path, name, value):
    if not isinstance(value, int) or value < 1:
        raise AnymambaError(f"{path / CONFIG}: {name}={value!r}, but it must be a whole number of at least 1")
    return value


def _expand(path, settings, d_model):
    """d_inner / d_model. Falcon-Mamba 7B says expand=16, which its intermediate_size overrides."""
    d_inner = settings.get("intermediate_size") or int(settings.get("expand", 2) * d_model)
    if _whole(path, "intermediate_size", d_inner) % d_model:
        raise AnymambaError(f"{path / CONFIG}: not supported yet: intermediate_size={d_inner}, which is no multiple of "
                            f"hidden_size={d_model}")  # fmt: skip
    return d_inner // d_model


def _vocabulary(path, settings, rows):
    """The rows of the embedding are all that transformers knows; how they were padded some configs say as well."""
    multiple = settings.get("pad_vocab_size_multiple") or 1
    if _whole(path, "vocab_size", rows) % _whole(path, "pad_vocab_size_multiple", multiple):
        multiple = 1
    unpadded = settings.get(UNPADDED, rows)
    fits = isinstance(unpadded, int) and rows - multiple < unpadded <= rows
    return {"vocab_size": unpadded if fits else rows, "pad_vocab_size_multiple": multiple}


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """See `folder.read_tensors`."""
    for name, v in read_tensors(path):
        yield EMBEDDING if name == THEIR_EMBEDDING else name, v


def save(model: MambaLM, path: Path) -> None:
    """Write a folder that transformers' AutoModelForCausalLM loads; each file atomically.

    Raises AnymambaError for a model without vocabulary, or with other blocks than the published.
    """
    c = model.config
    check_published(model, "hf")
    if c.vocab_size is None:
        raise AnymambaError("the format hf is for language models, and this one has vocab_size=None: save as native")
    kind = "mamba" if c.inner_norm_eps is None else "falcon_mamba"
    ours = c.to_dict() | {"vocab_size": c.padded_vocab_size, "dt_rank": c.rank}
    settings = {"architectures": [KINDS[kind]], "model_type": kind}
    settings |= {theirs: ours[name] for name, (theirs, _) in NAMES.items()}
    settings |= {"expand": c.expand, "intermediate_size": c.d_inner, "hidden_act": "silu", "residual_in_fp32": True,
                 "pad_vocab_size_multiple": c.pad_vocab_size_multiple,
                 "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
                 "dtype": str(model.backbone.embedding.weight.dtype).removeprefix("torch.")}  # fmt: skip
    if c.inner_norm_eps is not None:
        settings["mixer_rms_eps"] = c.inner_norm_eps
    if c.vocab_size != c.padded_vocab_size:
        settings[UNPADDED] = c.vocab_size
    state = model.state_dict()
    if c.tie_embeddings:
        del state[HEAD]
    write_safetensors(path, {THEIR_EMBEDDING if name == EMBEDDING else name: v for name, v in state.items()})
    write_settings(path, settings)
