"""Text from a model: samplers, `generate` for whole completions, `stream` for one token at a time."""

from anymamba.generate.generate import Completion, TokenEvent, generate, stream
from anymamba.generate.sampling import SamplingConfig

__all__ = ["Completion", "SamplingConfig", "TokenEvent", "generate", "stream"]
