"""transformers' own Mamba model, 130m with random weights, before and after `anymamba.hf.patch`, on the CPU.

    python benchmarks/cpu_hf.py            reading 512 tokens and decoding, float32 and bfloat16; some minutes

Both run in turns in one process, through transformers' own code: `model(ids)`, and `model(token, cache_params=…)`.
"""

import copy

import torch

from common import Report, arguments, measure, median, quiet, spread

PROMPT, STEPS = 512, 20


def models(dtype):
    """The same weights twice: as transformers runs them, and patched."""
    from transformers import MambaConfig, MambaForCausalLM

    from anymamba.hf import patch

    torch.manual_seed(0)
    config = MambaConfig(num_hidden_layers=24, initializer_range=0.02)  # of the published models
    theirs = MambaForCausalLM(config).to(dtype).eval()
    return theirs, patch(copy.deepcopy(theirs))


def step_of(model, ids):
    """A function that decodes one token, each call the next one."""
    cache, token = model(ids, use_cache=True).cache_params, ids[:, :1]
    return lambda: model(token, cache_params=cache, use_cache=True)


@torch.no_grad()
def compare(report, dtype, name):
    theirs, ours = models(dtype)
    ids = torch.randint(1, 50280, (1, PROMPT))
    if dtype == torch.float32:
        error = (theirs(ids[:, :64]).logits - ours(ids[:, :64]).logits).abs().max()
        assert error < 1e-4, f"logits differ by {error}"
    reading = {"transformers": lambda: theirs(ids), "patched": lambda: ours(ids)}
    decoding = {"transformers": step_of(theirs, ids[:, :32]), "patched": step_of(ours, ids[:, :32])}
    for what, tokens, functions, rounds in ((f"prefill {PROMPT}", PROMPT, reading, 2), ("decode", 1, decoding, STEPS)):
        times = measure(functions, rounds=rounds, settle=what == "decode")
        for key, v in times.items():
            report.add(f"{what} {name}: {key}, ms", f"{spread(v)}, {tokens / median(v):.1f} tokens/s", median=median(v),
                       tokens_per_s=tokens / median(v))  # fmt: skip
        report.compare(f"{what} {name}: patched vs unpatched", times, "patched", "transformers", "> 1")


def main():
    quiet()
    assert not arguments(), "cpu_hf takes no arguments but --save"
    report = Report("cpu_hf")
    compare(report, torch.float32, "fp32")
    compare(report, torch.bfloat16, "bf16")
    report.close()


if __name__ == "__main__":
    main()
