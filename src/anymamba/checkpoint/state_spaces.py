"""The format of the `mamba-ssm` package and of the published state-spaces/mamba-*: `config.json`, `pytorch_model.bin`.

Names and shapes of the tensors are ours; the config has those of its own `MambaConfig` and `Mamba` classes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anymamba.checkpoint.assemble import EMBEDDING, HEAD
from anymamba.checkpoint.folder import (
    BIN,
    check_published,
    peek,
    read_settings,
    read_tensors,
    remove_others,
    write_settings,
)
from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.files import write_atomically
from anymamba.model import MambaLM

EPS = 1e-5  # of its norms: not in the config
DEFAULTS = {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "pad_vocab_size_multiple": 8, "tie_embeddings": True}
SSM_DEFAULTS = {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "dt_min": 1e-3, "dt_max": 0.1,
                "dt_scale": 1.0, "dt_init_floor": 1e-4, "conv_bias": True, "bias": False}  # fmt: skip
# what changes nothing here: the residual stream is float32 anyway, and how a model was initialised is past
WITHOUT_EFFECT = ("residual_in_fp32", "fused_add_norm", "attn_cfg")
SSM_WITHOUT_EFFECT = ("dt_init", "use_fast_path")
# what would make another model than ours, its value when it does not, and its name
OTHERS = {"rms_norm": (True, "LayerNorm in place of RMSNorm"), "attn_layer_idx": ([], "a hybrid with attention layers"),
          "d_intermediate": (0, "a hybrid with MLP layers")}  # fmt: skip


def matches(path: Path) -> bool:
    """Whether `config.json` has the keys of mamba-ssm, and no model_type, which Hugging Face's copies add to them."""
    settings = peek(path)
    return {"d_model", "n_layer"} <= settings.keys() and not {"model_type", "format"} & settings.keys()


def read_config(path: Path) -> MambaConfig:
    """Raises AnymambaError for layers that are not Mamba-1, and for keys that are unknown."""
    settings = read_settings(path)
    ssm = settings.pop("ssm_cfg", None) or {}
    if not isinstance(ssm, dict):
        raise AnymambaError(f"{path}: ssm_cfg is {ssm!r}, but it must be an object of settings")
    ssm = dict(ssm)
    layer = ssm.pop("layer", "Mamba1")
    others = [] if layer == "Mamba1" else [f"layers of kind {layer}"]
    others += [name for key, (ours, name) in OTHERS.items() if settings.pop(key, ours) not in (ours, None)]
    if others:
        raise AnymambaError(f"{path}: not supported yet: {', '.join(others)}; anymamba runs Mamba-1 language models, "
                            "such as state-spaces/mamba-130m")  # fmt: skip
    values = _known(path, settings, DEFAULTS, WITHOUT_EFFECT) | _known(path, ssm, SSM_DEFAULTS, SSM_WITHOUT_EFFECT)
    if values["dt_rank"] == "auto":
        values["dt_rank"] = None
    return MambaConfig(**values, norm_eps=EPS)


def _known(path, given: dict[str, Any], defaults: dict[str, Any], without_effect) -> dict[str, Any]:
    if unknown := [key for key in given if key not in defaults and key not in without_effect]:
        raise AnymambaError(f"{path}: the config has {', '.join(unknown)}, which mamba-ssm does not know for Mamba-1")
    return {key: given.get(key, default) for key, default in defaults.items()}


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """See `folder.read_tensors`."""
    return read_tensors(path)


def save(model: MambaLM, path: Path) -> None:
    """Write a folder that mamba-ssm's `MambaLMHeadModel.from_pretrained` loads; each file atomically.

    Raises AnymambaError for what its config cannot say: other blocks than the published, another epsilon of the norms,
    inner norms, no vocabulary.
    """
    c = model.config
    check_published(model, "state-spaces")
    if c.vocab_size is None or c.norm_eps != EPS or c.inner_norm_eps is not None:
        raise AnymambaError(f"the format state-spaces has no key for norm_eps={c.norm_eps} (always {EPS}), "
                            f"inner_norm_eps={c.inner_norm_eps} or vocab_size={c.vocab_size}: save as native "
                            "or hf")  # fmt: skip
    state = {name: v.detach().cpu() for name, v in model.state_dict().items()}
    if c.tie_embeddings:
        state[HEAD] = state[EMBEDDING]  # mamba-ssm wants to find it; stored once
    ours = c.to_dict() | {"dt_rank": c.dt_rank or "auto"}
    top = {key: ours[key] for key in DEFAULTS if key != "tie_embeddings" or not c.tie_embeddings}
    ssm = {key: ours[key] for key, default in SSM_DEFAULTS.items() if ours[key] != default}
    write_atomically(path / BIN, lambda file: torch.save(state, file))
    remove_others(path, [BIN])
    write_settings(path, top | {"ssm_cfg": ssm, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True})
