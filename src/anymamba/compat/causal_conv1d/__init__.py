"""causal-conv1d's functions, see `anymamba.compat`."""

from anymamba.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__version__ = "1.7.0"  # whose functions these are
__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
