from torch import Tensor, nn

from anymamba.config import MambaConfig
from anymamba.layers.mixers import make_mixer
from anymamba.layers.norm import RMSNorm
from anymamba.state import LayerState


class Block(nn.Module):
    """Add to the residual stream → norm → mixer. The mixer's output is added by the next norm, in the same pass."""

    def __init__(self, config: MambaConfig, device=None, dtype=None):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps, device=device, dtype=dtype)
        self.mixer = make_mixer(config, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None, state: LayerState | None, cu_seqlens: Tensor | None,
                return_states: int | None = None, delta: Tensor | None = None):  # fmt: skip
        """x (b,t,m), what is still to be added to `residual` (b,t,m) → the same two after this block, and its state, or
        with `return_states` its states, as the mixer gives them. Gaps `delta` are for mixers that know of time."""
        x, residual = self.norm(x, residual)
        gaps = {} if delta is None else {"delta": delta}
        x, state = self.mixer(x, state, cu_seqlens, return_states, **gaps)
        return x, residual, state
