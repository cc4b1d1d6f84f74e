from torch import Tensor, nn

from anymamba.config import MambaConfig
from anymamba.layers.mamba import MambaMixer
from anymamba.layers.norm import RMSNorm
from anymamba.state import LayerState


class Block(nn.Module):
    """norm → mixer → add to the residual stream."""

    def __init__(self, config: MambaConfig, device=None, dtype=None):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps, device=device, dtype=dtype)
        self.mixer = MambaMixer(config, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: LayerState | None = None, cu_seqlens: Tensor | None = None):
        y, state = self.mixer(self.norm(x), state, cu_seqlens)
        return x + y, state
