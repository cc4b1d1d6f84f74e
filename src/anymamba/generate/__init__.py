"""Text from a model: samplers, `generate` for whole completions, `stream` for one token at a time, `Engine` for many
requests at once, `speculate` for several tokens a pass, `read` for long texts, `PrefixCache` for what many prompts
begin with."""

from anymamba.generate.engine import Engine
from anymamba.generate.generate import generate, stream
from anymamba.generate.prefix import PrefixCache
from anymamba.generate.read import Reading, read, reading
from anymamba.generate.requests import Counters, Handle, QueueFull, Request
from anymamba.generate.rows import Completion, TokenEvent
from anymamba.generate.sampling import SamplingConfig
from anymamba.generate.speculative import Speculation, speculate

__all__ = ["Completion", "Counters", "Engine", "Handle", "PrefixCache", "QueueFull", "Reading", "Request",
           "SamplingConfig", "Speculation", "TokenEvent", "generate", "read", "reading", "speculate",
           "stream"]  # fmt: skip
