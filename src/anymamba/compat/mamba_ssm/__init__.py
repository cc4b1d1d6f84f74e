"""mamba-ssm's names for Mamba-1, see `anymamba.compat`."""

from anymamba.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from anymamba.compat.mamba_ssm.modules.mamba_simple import Mamba
from anymamba.compat.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

__version__ = "1.2.2"  # the last with Mamba-1 alone: code that asks for 2 wants Mamba-2
__all__ = ["Mamba", "MambaLMHeadModel", "mamba_inner_fn", "selective_scan_fn"]
