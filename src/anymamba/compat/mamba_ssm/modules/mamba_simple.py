"""mamba-ssm's `Mamba`: our mixer, its signature.

Axes: b batch, t time, m d_model, d d_inner, n d_state, w d_conv.
"""

import math

import torch
from torch import Tensor, nn

from anymamba.compat.mamba_ssm.modules.block import Block
from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.layers import MambaMixer
from anymamba.state import LayerState

__all__ = ["Block", "Mamba"]  # Block was here in mamba-ssm 1


class Mamba(MambaMixer):
    """(b,t,m) → (b,t,m), arXiv 2312.00752 section 3.4. `use_fast_path` changes nothing: there is one path."""

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, dt_rank: int | str = "auto",
                 dt_min: float = 0.001, dt_max: float = 0.1, dt_init: str = "random", dt_scale: float = 1.0,
                 dt_init_floor: float = 1e-4, conv_bias: bool = True, bias: bool = False, use_fast_path: bool = True,
                 layer_idx: int | None = None, device=None, dtype=None):  # fmt: skip
        if dt_init not in ("random", "constant"):
            raise AnymambaError(f'Mamba: dt_init={dt_init!r}, but it must be "random" or "constant"')
        config = MambaConfig(vocab_size=None, d_model=d_model, n_layer=1, d_state=d_state, d_conv=d_conv, expand=expand,
                             dt_rank=None if dt_rank == "auto" else dt_rank, dt_min=dt_min, dt_max=dt_max,
                             dt_scale=dt_scale, dt_init_floor=dt_init_floor, conv_bias=conv_bias,
                             bias=bias)  # fmt: skip
        super().__init__(config, device=device, dtype=dtype)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank, self.layer_idx = config.d_inner, config.rank, layer_idx
        self.use_fast_path = use_fast_path
        self.activation, self.act = "silu", nn.SiLU()
        self._init_steps(dt_init)

    @torch.no_grad()
    def _init_steps(self, dt_init):
        """A_log, D and the step sizes; the other layers have torch's own initialisation."""
        c, weight, bias = self.config, self.dt_proj.weight, self.dt_proj.bias
        std = c.rank**-0.5 * c.dt_scale
        weight.fill_(std) if dt_init == "constant" else weight.uniform_(-std, std)
        dt = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(c.dt_min), math.log(c.dt_max)).exp()
        dt.clamp_(min=c.dt_init_floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus⁻¹
        self.A_log.copy_(torch.arange(1, c.d_state + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.D.fill_(1)
        # marks that training code looks for
        bias._no_reinit = True
        self.A_log._no_weight_decay = self.D._no_weight_decay = True

    def forward(self, hidden_states: Tensor, inference_params=None) -> Tensor:
        """(b,t,m) → (b,t,m). With `InferenceParams` the states there are read from its second call on, and advanced in
        place; any number of tokens at a time."""
        if inference_params is None:
            return super().forward(hidden_states)[0]
        states = self._get_states_from_cache(inference_params, len(hidden_states))
        return self._advance(hidden_states, *states, fresh=inference_params.seqlen_offset == 0)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next token or tokens (b,t,m); conv_state (b,d,w) and ssm_state (b,d,n) are advanced in place.

        Returns (out (b,t,m), conv_state, ssm_state).
        """
        return self._advance(hidden_states, conv_state, ssm_state, fresh=False), conv_state, ssm_state

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs) -> tuple[Tensor, Tensor]:
        """Zeros: conv_state (b,d,w), in `dtype` or the weights', and ssm_state (b,d,n), in `dtype` or float32.
        The size does not depend on max_seqlen."""
        conv, device = self.conv1d.weight, self.out_proj.weight.device
        conv_state = torch.zeros(batch_size, self.d_inner, self.d_conv, device=device, dtype=dtype or conv.dtype)
        ssm_state = torch.zeros(batch_size, self.d_inner, self.d_state, device=device, dtype=dtype or torch.float32)
        return conv_state, ssm_state

    def _get_states_from_cache(self, inference_params, batch_size: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise AnymambaError("Mamba: inference_params need to know the layer: make it with layer_idx=0, 1, …")
        found = inference_params.key_value_memory_dict
        if self.layer_idx not in found:
            found[self.layer_idx] = self.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        states = found[self.layer_idx]
        if len(states[0]) != batch_size:
            raise AnymambaError(f"Mamba: the cache holds {len(states[0])} rows, and the input has {batch_size}: use "
                                "new InferenceParams for another batch")  # fmt: skip
        return states

    def _advance(self, hidden_states, conv_state, ssm_state, fresh):
        w = conv_state.shape[2]
        if w < self.d_conv - 1:
            raise AnymambaError(f"Mamba: conv_state is {tuple(conv_state.shape)}, but its last axis must be d_conv = "
                                f"{self.d_conv}: see allocate_inference_cache")  # fmt: skip
        before = None if fresh else LayerState(conv_state[:, :, w - (self.d_conv - 1) :], ssm_state)
        out, after = super().forward(hidden_states, before)
        with torch.no_grad():
            x = self.in_proj(hidden_states[:, -w:])[..., : self.d_inner].transpose(1, 2)  # the last inputs of conv1d
            past = torch.zeros_like(conv_state) if fresh else conv_state
            conv_state.copy_(torch.cat([past, x.to(past.dtype)], 2)[:, :, -w:])
            ssm_state.copy_(after.ssm)
        return out
