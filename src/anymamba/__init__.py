"""anymamba: Mamba on any machine. Public names, loaded when they are first used; importing needs torch only."""

import importlib

__version__ = "0.1.0"

_HOME = {
    "AnymambaError": "errors",
    "Bidirectional": "layers",
    "MambaConfig": "config",
    "MambaLM": "model",
    "MambaState": "state",
    "MambaMixer": "layers",
    "SamplingConfig": "generate",
    "SequenceModel": "sequence",
    "causal_conv1d": "ops",
    "causal_conv1d_step_": "ops",
    "explain": "ops",
    "quantize": "layers",
    "selective_scan": "ops",
    "selective_step_": "ops",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'anymamba' has no attribute {name!r}")
    return getattr(importlib.import_module(f"anymamba.{_HOME[name]}"), name)


def __dir__():
    return __all__
