"""Every kind of mixer, by its name in the config."""

from torch import nn

from anymamba.config import MambaConfig
from anymamba.layers.mamba import MambaMixer
from anymamba.layers.recurrent import RecurrentMixer
from anymamba.layers.s4 import S4Mixer
from anymamba.layers.s4d import S4DMixer

KINDS = {"mamba": MambaMixer, "s4": S4Mixer, "s4d": S4DMixer, "rnn": RecurrentMixer, "lstm": RecurrentMixer,
         "gru": RecurrentMixer}  # fmt: skip
MIXERS = tuple(set(KINDS.values()))
CONSTANTS = {"A_log", "A_imag", "P", "B", "C"}  # parameters of two axes or more that weight decay must not pull to 0


def make_mixer(config: MambaConfig, device=None, dtype=None) -> nn.Module:
    """The mixer that the config names, uninitialised: `MambaLM.reset_parameters` fills it."""
    return KINDS[config.mixer](config, device=device, dtype=dtype, fill=False)
