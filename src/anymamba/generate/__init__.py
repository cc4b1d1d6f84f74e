"""Text from a model: samplers, `generate` for whole completions, `stream` for one token at a time, `Engine` for many
requests at once."""

from anymamba.generate.engine import Engine
from anymamba.generate.generate import generate, stream
from anymamba.generate.requests import Counters, Handle, QueueFull, Request
from anymamba.generate.rows import Completion, TokenEvent
from anymamba.generate.sampling import SamplingConfig

__all__ = ["Completion", "Counters", "Engine", "Handle", "QueueFull", "Request", "SamplingConfig", "TokenEvent",
           "generate", "stream"]  # fmt: skip
