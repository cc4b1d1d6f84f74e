"""Model files."""

from anymamba.checkpoint.native import load, save

__all__ = ["load", "save"]
