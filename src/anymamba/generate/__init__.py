"""Text from a model: `generate` and `stream`, samplers, `read` for long texts, `PrefixCache` for common beginnings."""

from anymamba.generate.generate import Completion, TokenEvent, generate, stream
from anymamba.generate.prefix import PrefixCache
from anymamba.generate.read import Reading, read, reading
from anymamba.generate.sampling import SamplingConfig

__all__ = [
    "Completion",
    "PrefixCache",
    "Reading",
    "SamplingConfig",
    "TokenEvent",
    "generate",
    "read",
    "reading",
    "stream",
]
