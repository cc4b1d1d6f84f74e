"""mamba-ssm's generation, on the samplers of `generate.sampling`. Axes: b batch, t time, v vocabulary."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anymamba.errors import AnymambaError
from anymamba.generate.sampling import SamplingConfig, choose


@dataclass
class InferenceParams:
    """What a model has read: the states of each layer in `key_value_memory_dict`, and how many tokens that were."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin anew in the same memory."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class GenerateOutput:
    """`sequences` (b,t), the prompt and what was generated; `scores`: the logits (b,v) of each token, or None."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Ids (b,) from logits (b,v). top_k=1 is greedy, top_k=0 keeps all; top_p or min_p of 0 or 1 are off."""
    return choose(logits, _sampling(top_k, top_p, min_p, temperature), None, (), ())


@torch.no_grad()  # not inference_mode: one may go on computing with what comes back
def decode(input_ids: Tensor, model: torch.nn.Module, max_length: int, top_k: int = 1, top_p: float = 0.0,
           min_p: float = 0.0, temperature: float = 1.0, repetition_penalty: float = 1.0,
           eos_token_id: int | None = None, teacher_outputs: Tensor | None = None, vocab_size: int | None = None,
           cg: bool = False, enable_timing: bool = False, output_scores: bool = False,
           streamer=None) -> GenerateOutput:  # fmt: skip
    """Continue input_ids (b,t) to max_length tokens. Random numbers are torch's own: torch.manual_seed.

    Args:
        top_k, top_p, min_p, temperature: as `sample`; filters come after the temperature, min_p too.
        repetition_penalty: above 1 disfavours all tokens so far.
        eos_token_id: ends a row, which repeats it while others go on; all stop when every row has ended.
        teacher_outputs: (b,t') tokens to take in place of generated ones, as far as they reach.
        vocab_size: ids from here on are never chosen.
        cg: CUDA graphs there; here it changes nothing.
        enable_timing: prints the time it took.
        output_scores: keep the logits. streamer: gets each token by `put`, and `end`.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise AnymambaError(f"generate: input_ids are {tuple(input_ids.shape)}, but must be (batch, seqlen ≥ 1)")
    sampling, start = _sampling(top_k, top_p, min_p, temperature, repetition_penalty), time.perf_counter()
    params = InferenceParams(max_seqlen=max_length, max_batch_size=len(input_ids))
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    sequences, new, scores = input_ids, input_ids, []
    while sequences.shape[1] < max_length and not ended.all():
        logits = model(new, inference_params=params, num_last_tokens=1).logits[:, -1, :vocab_size]
        if output_scores:
            scores.append(logits.clone())
        params.seqlen_offset += new.shape[1]
        ids = choose(logits.float(), sampling, None, [()] * len(logits), sequences)
        if teacher_outputs is not None and params.seqlen_offset < teacher_outputs.shape[1]:
            ids = teacher_outputs[:, params.seqlen_offset]
        if eos_token_id is not None:
            ids = ids.masked_fill(ended, eos_token_id)
            ended = ended | (ids == eos_token_id)
        new = ids[:, None]
        sequences = torch.cat([sequences, new], 1)
        if streamer is not None:
            streamer.put(new.cpu())
    if streamer is not None:
        streamer.end()
    if enable_timing:
        print(f"prompt processing + decoding time: {1e3 * (time.perf_counter() - start):.0f} ms")
    return GenerateOutput(sequences, tuple(scores) if output_scores else None)


class GenerationMixin:
    """`generate` for a model that is called with input_ids, inference_params and num_last_tokens."""

    def generate(self, input_ids: Tensor, max_length: int, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0,
                 temperature: float = 1.0, return_dict_in_generate: bool = False, output_scores: bool = False,
                 **kwargs) -> Tensor | GenerateOutput:  # fmt: skip
        """The sequences of `decode` (b,t), or with return_dict_in_generate all that it gives."""
        out = decode(input_ids, self, max_length, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature,
                     output_scores=output_scores, **kwargs)  # fmt: skip
        return out if return_dict_in_generate else out.sequences


def _sampling(top_k, top_p, min_p, temperature, repetition_penalty=1.0):
    if top_k == 1:  # greedy, whatever the others say
        return SamplingConfig(temperature=0, repetition_penalty=repetition_penalty)
    return SamplingConfig(top_k=top_k, top_p=top_p or 1.0, min_p=min_p if min_p < 1 else 0.0, temperature=temperature,
                          repetition_penalty=repetition_penalty)  # fmt: skip
