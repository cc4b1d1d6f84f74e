"""mamba-ssm's language model, of Mamba-1 blocks. Axes: b batch, t time, m d_model, v padded vocabulary."""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anymamba.compat.mamba_ssm.models.config_mamba import MambaConfig
from anymamba.compat.mamba_ssm.modules.block import Block, add_norm
from anymamba.compat.mamba_ssm.modules.mamba_simple import Mamba
from anymamba.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm
from anymamba.compat.mamba_ssm.utils.generation import GenerationMixin
from anymamba.compat.mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from anymamba.config import check_keys
from anymamba.errors import AnymambaError
from anymamba.files import write_atomically
from anymamba.layers import Linear


class CausalLMOutput(NamedTuple):
    logits: Tensor  # (b,t,v)


def create_block(d_model: int, d_intermediate: int, ssm_cfg: dict[str, Any] | None = None,
                 attn_layer_idx: list[int] | None = None, attn_cfg: dict[str, Any] | None = None,
                 norm_epsilon: float = 1e-5, rms_norm: bool = False, residual_in_fp32: bool = False,
                 fused_add_norm: bool = False, layer_idx: int | None = None, device=None,
                 dtype=None) -> Block:  # fmt: skip
    """A block of a Mamba-1 mixer, made with `ssm_cfg`. Raises AnymambaError where the config asks for other layers."""
    ssm_cfg, kw = dict(ssm_cfg or {}), {"device": device, "dtype": dtype}
    layer = "attention" if layer_idx in (attn_layer_idx or ()) else ssm_cfg.pop("layer", "Mamba1")
    if layer != "Mamba1" or d_intermediate:
        other = f"an MLP (d_intermediate={d_intermediate})" if layer == "Mamba1" else f"a layer of {layer}"
        raise AnymambaError(f"layer {layer_idx} of the model has {other}: here are only models of Mamba-1 blocks alone")
    norm = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **kw)
    block = Block(d_model, partial(Mamba, layer_idx=layer_idx, **ssm_cfg, **kw), nn.Identity, norm_cls=norm,
                  fused_add_norm=fused_add_norm, residual_in_fp32=residual_in_fp32)  # fmt: skip
    block.layer_idx = layer_idx
    return block


class MixerModel(nn.Module):
    """Embedding, blocks and the final norm: ids (b,t) → (b,t,m). `initializer_cfg`: arguments of `init_weights`."""

    def __init__(self, d_model: int, n_layer: int, d_intermediate: int, vocab_size: int,
                 ssm_cfg: dict[str, Any] | None = None, attn_layer_idx: list[int] | None = None,
                 attn_cfg: dict[str, Any] | None = None, norm_epsilon: float = 1e-5, rms_norm: bool = False,
                 initializer_cfg: dict[str, Any] | None = None, fused_add_norm: bool = False,
                 residual_in_fp32: bool = False, device=None, dtype=None):  # fmt: skip
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **kw)
        self.layers = nn.ModuleList(
            create_block(d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm,
                         residual_in_fp32, fused_add_norm, layer_idx=i, **kw)
            for i in range(n_layer)
        )  # fmt: skip
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **kw)
        init_weights(self, n_layer, **(initializer_cfg or {}))

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs) -> dict[int, Any]:
        """The states of each layer, by its index, as `InferenceParams.key_value_memory_dict` takes them."""
        return {i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
                for i, layer in enumerate(self.layers)}  # fmt: skip

    def forward(self, input_ids: Tensor, inference_params=None, **mixer_kwargs) -> Tensor:
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, inference_params=inference_params, **mixer_kwargs)
        return add_norm(self.norm_f, hidden_states, residual, self.fused_add_norm, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """The model of a mamba-ssm `MambaConfig`, with its parameter names."""

    def __init__(self, config: MambaConfig, initializer_cfg: dict[str, Any] | None = None, device=None, dtype=None):
        super().__init__()
        self.config = config
        rows = -(-config.vocab_size // config.pad_vocab_size_multiple) * config.pad_vocab_size_multiple
        self.backbone = MixerModel(
            config.d_model, config.n_layer, config.d_intermediate, rows, config.ssm_cfg, config.attn_layer_idx,
            config.attn_cfg, rms_norm=config.rms_norm, initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm, residual_in_fp32=config.residual_in_fp32, device=device, dtype=dtype,
        )  # fmt: skip
        self.lm_head = Linear(config.d_model, rows, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs) -> dict[int, Any]:
        """See MixerModel."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, inference_params=None,
                num_last_tokens: int = 0, **mixer_kwargs) -> CausalLMOutput:  # fmt: skip
        """ids (b,t) → logits (b,t,v), of the last tokens only if `num_last_tokens` > 0. position_ids are not needed."""
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(self.lm_head(hidden_states))

    @classmethod
    def from_pretrained(cls, pretrained_model_name: str, device=None, dtype=None, **kwargs) -> "MambaLMHeadModel":
        """The model of a folder or of a repository of the hub. Raises AnymambaError for a config that is not
        mamba-ssm's, or layers that are not Mamba-1's."""
        values = load_config_hf(pretrained_model_name)
        check_keys(MambaConfig, values, f"{pretrained_model_name}: not a config of mamba-ssm, it has the key")
        model = cls(MambaConfig(**values), device=device, dtype=dtype, **kwargs)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype))
        return model

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write pytorch_model.bin and config.json to a folder, made if missing."""
        folder, text = Path(save_directory), json.dumps(dataclasses.asdict(self.config), indent=4)
        write_atomically(folder / "pytorch_model.bin", lambda path: torch.save(self.state_dict(), path))
        write_atomically(folder / "config.json", lambda path: path.write_text(text))


@torch.no_grad()
def init_weights(model: nn.Module, n_layer: int, initializer_range: float = 0.02,
                 rescale_prenorm_residual: bool = True, n_residuals_per_layer: int = 1) -> None:  # fmt: skip
    """Embedding N(0, initializer_range²), biases of Linears 0 but that of the step sizes, out_proj U(±1/√fan_in) over
    √(residuals in all), so that the residual stream does not grow with depth."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0, initializer_range)
        if isinstance(module, nn.Linear):
            if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
                module.bias.zero_()
            if rescale_prenorm_residual and name.endswith("out_proj"):
                bound = (module.in_features * n_residuals_per_layer * n_layer) ** -0.5
                module.weight.uniform_(-bound, bound)
