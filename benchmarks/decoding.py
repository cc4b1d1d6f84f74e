"""What the benchmarks of decoding on a GPU share: a model of random weights, where it starts, the greedy loop.

Axis letters: b rows, t time, v vocabulary.
"""

import math

import torch

from anymamba import MambaConfig, MambaLM, MambaState
from common import median
from gpu_common import event_times, rounds_for

DEVICE = "cuda"
TOKENS = 128  # of a round


def build(preset: str) -> MambaLM:
    """A model in bfloat16, made on the GPU; the same weights in every process."""
    torch.manual_seed(0)
    return MambaLM(MambaConfig.preset(preset), device=DEVICE).bfloat16().eval()


def random_ids(model, *shape) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, shape, device=DEVICE)


@torch.no_grad()
def state_of(model, b: int, t: int = 64) -> MambaState:
    """The state after t random tokens in each of b rows: what a state holds does not change how long a step takes."""
    return model(random_ids(model, b, t), last_only=True).state


class Loop:
    """A decoder and where it stands."""

    def __init__(self, model, state: MambaState, state_dtype: torch.dtype = torch.float32):
        from anymamba.generate.decode import Decoder

        self.decoder, self.state = Decoder(model, state_dtype=state_dtype), state

    @property
    def kept(self) -> torch.dtype:
        """In what the states lie after a step: a decoder without kernels of its own may keep float32."""
        return self.state.layers[0].ssm.dtype

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """The next logits (b,v), until the next step."""
        logits, self.state = self.decoder.step(ids, self.state)
        return logits


def step_bytes(model, b: int, state_dtype: torch.dtype = torch.float32) -> int:
    """Bytes that a step must move: every weight once, the states read and written; the latter in `state_dtype`."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    dtype = model.backbone.norm_f.weight.dtype
    state = MambaState.zeros(model.config, b, device="meta", dtype=dtype).to(ssm_dtype=state_dtype)
    return weights + 2 * state.nbytes


def greedy_times(loop: Loop, ids, tokens: int = TOKENS, budget: float = 1.0) -> list[float]:
    """Seconds a token of each round of so many, as a caller writes it: where Python is slower, the GPU waits."""

    def write(count=tokens):
        nonlocal ids
        for _ in range(count):
            ids = loop.step(ids).argmax(-1)

    write(8)  # compiles, records the graph
    first = event_times(write, 1)[0]
    return [seconds / tokens for seconds in event_times(write, rounds_for(first, budget, least=3, most=15))]


@torch.no_grad()
def logits_error(model, loop: Loop, steps: int = 4) -> float:
    """Root mean square of what the loop's logits differ by from those of the model's own pass, over that of the logits;
    of several steps the worst."""
    worst, state, real = 0.0, loop.state.copy(), model.config.vocab_size
    for _ in range(steps):
        ids = random_ids(model, state.batch_size)
        out = model(ids[:, None], state=state)
        want, state = out.logits[:, -1, :real].float(), out.state
        error = float((loop.step(ids)[:, :real] - want).square().mean().sqrt() / want.square().mean().sqrt())
        worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst


def rate(times: list[float], b: int) -> float:
    """Tokens a second of b rows."""
    return b / median(times)
