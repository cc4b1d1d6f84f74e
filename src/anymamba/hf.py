"""transformers' Mamba and Falcon-Mamba models on our ops: `patch(model)`, undone by `unpatch(model)`.

Only classes are exchanged. Modules, parameters and their names stay the same objects, so that optimizers, the Trainer,
`generate` with its caches, gradient checkpointing, PEFT and `save_pretrained` go on as before.

Axes: b batch, t time, m hidden_size, d intermediate_size, n state_size, r time_step_rank, w conv_kernel.
"""

import types

import torch
from torch import Tensor, nn

from anymamba import layers
from anymamba.errors import AnymambaError
from anymamba.ops import causal_conv1d, linear, selective_scan

try:
    from transformers import PreTrainedModel, __version__
    from transformers.cache_utils import Cache
    from transformers.models.falcon_mamba import modeling_falcon_mamba
    from transformers.models.mamba import modeling_mamba

    if not hasattr(Cache, "get_conv_state"):
        raise AnymambaError(f"anymamba.hf needs transformers 5.21 or newer, and this is {__version__}, with other "
                            "caches: pip install -U transformers")  # fmt: skip
    from transformers.integrations.accelerate import force_accelerate_hooks
except ImportError as error:
    raise AnymambaError(f"anymamba.hf needs transformers: pip install 'transformers>=5.21' ({error})") from None


class Linear(layers.Linear):
    """A Linear of a patched model: this class marks it for `unpatch`."""


class _Mixer:
    """The forward pass of both kinds of mixers."""

    # where a model is offloaded, these two are brought in by hooks, and we read their weights without calling them
    @force_accelerate_hooks(["conv1d", "dt_proj"])
    def forward(self, hidden_states: Tensor, cache_params: Cache | None = None, attention_mask: Tensor | None = None):
        """(b,t,m) → (b,t,m). Any number of tokens continues what `cache_params` has read. The mask (b,t) is 0 where
        there is padding; of a longer one, of the tokens before too, the end counts."""
        conv_state, ssm_state = self._states(cache_params)
        x, z = self.in_proj(_masked(hidden_states, attention_mask)).chunk(2, dim=-1)
        inputs = x
        x, _ = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu",
                             initial_state=conv_state)  # fmt: skip
        x = _masked(x, attention_mask)
        dt, B, C = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
        dt, B, C = self._normed(dt, B, C)
        dt, dt_bias = self._step_sizes(dt)
        y, ssm_state = selective_scan(x, dt, -torch.exp(self.A_log.float()), B, C, self.D.float(), z, dt_bias=dt_bias,
                                      dt_softplus=True, initial_state=ssm_state)  # fmt: skip
        if cache_params is not None:
            self._remember(cache_params, inputs, ssm_state)
        return self.out_proj(y)

    def _states(self, cache):
        """The last w-1 inputs (b,d,w-1) of conv1d and the SSM state (b,d,n), None before the first token."""
        conv_state = None if cache is None else cache.get_conv_state(self.layer_idx)
        if conv_state is None:
            return None, None
        return conv_state[:, :, conv_state.shape[2] - (self.conv_kernel_size - 1) :], cache.get_recurrent_state(
            self.layer_idx
        )

    def _remember(self, cache, x, ssm_state):
        # a cache that may be rolled back wants all inputs, else the last w are enough
        last = x if cache.is_recording_past(self.layer_idx) else x[:, -self.conv_kernel_size :]
        cache.update_conv_state(last.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        cache.update_recurrent_state(ssm_state, self.layer_idx)

    def _normed(self, dt, B, C):
        return dt, B, C

    def _step_sizes(self, dt):
        """dt_proj's output and the bias that the scan adds to it in float32; None where the layer has added it."""
        if type(self.dt_proj) is nn.Linear:
            return linear(dt, self.dt_proj.weight), self.dt_proj.bias
        return self.dt_proj(dt), None  # an adapter, or weights as integers


class MambaMixer(_Mixer, modeling_mamba.MambaMixer):
    """transformers' MambaMixer with our forward pass."""


class FalconMambaMixer(_Mixer, modeling_falcon_mamba.FalconMambaMixer):
    """transformers' FalconMambaMixer with our forward pass."""

    def _normed(self, dt, B, C):
        return self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)


MIXERS = {modeling_mamba.MambaMixer: MambaMixer, modeling_falcon_mamba.FalconMambaMixer: FalconMambaMixer}


def patch(model: nn.Module) -> nn.Module:
    """Run the Mamba-1 mixers of a model on our ops, in place; returns the same model.

    Takes transformers' MambaModel, MambaForCausalLM, FalconMambaModel, FalconMambaForCausalLM, and what holds one, a
    PEFT model for example. What is patched already stays. Logits are the same up to rounding, but where transformers'
    own are wrong: several tokens that continue a cache see the state there, and adapters on dt_proj have an effect.

    Raises AnymambaError for a model without such mixers, or with an activation other than silu.
    """
    if not isinstance(model, nn.Module):
        raise AnymambaError(f"patch: this is a {type(model).__name__}, and it takes a model of transformers")
    found = [module for module in model.modules() if type(module) in MIXERS]
    if not found and not any(isinstance(module, _Mixer) for module in model.modules()):
        raise AnymambaError(_nothing_to_patch(model))
    for mixer in found:
        if mixer.activation not in ("silu", "swish"):
            raise AnymambaError(
                f"patch: the mixers have hidden_act={mixer.activation!r}, and our convolution knows silu only"
            )
    for mixer in found:
        _exchange(mixer, MIXERS[type(mixer)])
        for layer in (mixer.in_proj, mixer.x_proj, mixer.out_proj):
            _exchange_linear(layer)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and (head := module.get_output_embeddings()) is not None:
            _exchange_linear(head)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`, in place; returns the same model."""
    originals = {ours: theirs for theirs, ours in MIXERS.items()} | {Linear: nn.Linear}
    for module in model.modules():
        if type(module) in originals:
            _exchange(module, originals[type(module)])
    return model


def _exchange(module, kind):
    module.__class__ = kind
    if "_old_forward" in vars(module):  # what accelerate's hooks call
        module._old_forward = types.MethodType(kind.forward, module)


def _exchange_linear(layer):
    if type(layer) is nn.Linear:
        _exchange(layer, Linear)


def _nothing_to_patch(model):
    kinds = {type(module).__name__ for module in model.modules()}
    others = sorted(name for name in kinds if "Mixer" in name and "amba" in name)
    what = f"its mixers are {', '.join(others)}" if others else "it holds no Mamba mixers"
    return (f"patch: nothing to do for this {type(model).__name__}, {what}: transformers' Mamba and FalconMamba models "
            "can be patched, which are Mamba-1")  # fmt: skip


def _masked(v, mask):
    return v if mask is None else (v * mask[:, -v.shape[1] :, None]).to(v.dtype)
