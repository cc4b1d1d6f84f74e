"""Eight requests at once on the CPU, random weights: through the engine, and one after the other through `generate`.

    python benchmarks/cpu_engine.py    about two minutes

Prompts of 16 to 128 tokens, 32 new tokens each, greedy. The last lines of each model: the longest time between two
tokens of seven running streams while a prompt of 4096 tokens is read beside them.
"""

import time

import torch

from anymamba import MambaConfig, MambaLM, SamplingConfig
from anymamba.generate import Engine, Request, generate
from common import Report, measure, median, quiet, ratio, spread

GREEDY = SamplingConfig(temperature=0)
STREAMS, NEW = 8, 32
MODELS = {
    "tiny (2 layers of 64)": MambaConfig(d_model=64, n_layer=2, vocab_size=257),
    "4 layers of 130m": MambaConfig(d_model=768, n_layer=4, vocab_size=50277),
}


def through_engine(model, prompts, max_batch=STREAMS):
    engine = Engine(model, max_batch=max_batch)
    handles = [engine.submit(Request(prompt=p, max_new_tokens=NEW, sampling=GREEDY)) for p in prompts]
    engine.run()
    return [handle.result()[0].ids for handle in handles]


def one_by_one(model, prompts):
    return [generate(model, [p], max_new_tokens=NEW, sampling=GREEDY)[0].ids for p in prompts]


def longest_gap(model, prompts, chunk):
    """Seconds of the longest step while a long prompt is read."""
    engine = Engine(model, prefill_chunk=chunk, max_prefill_tokens=chunk)
    for p in prompts[1:]:
        engine.submit(Request(prompt=p, max_new_tokens=10_000, sampling=GREEDY))
    while engine.counters().running < len(prompts) - 1:
        engine.step()
    long = engine.submit(Request(prompt=torch.zeros(4096, dtype=torch.long), max_new_tokens=1))
    times = []
    while not long.done:
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    engine.close()
    return max(times)


def main():
    quiet()
    report = Report("cpu_engine")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = MambaLM(config)
        lengths = torch.linspace(16, 128, STREAMS).long().tolist()
        prompts = [torch.randint(0, config.vocab_size, (length,)) for length in lengths]
        same = sum(a == b for a, b in zip(through_engine(model, prompts), one_by_one(model, prompts), strict=True))
        times = measure({
            "engine": lambda: through_engine(model, prompts),  # noqa: B023  called before the next model is made
            "engine, 4 slots": lambda: through_engine(model, prompts, max_batch=4),  # noqa: B023
            "one by one": lambda: one_by_one(model, prompts),  # noqa: B023
        }, rounds=3, settle=0)  # fmt: skip
        for key, values in times.items():
            rate = STREAMS * NEW / median(values)
            report.add(f"{name}: {key}", f"{spread(values)} ms  {rate:8.0f} tokens/s", tokens_per_second=round(rate))
        r = ratio(times["one by one"], times["engine"])
        report.add(f"{name}: engine against one by one", f"{r:8.2f} ×", ratio=round(r, 3), same_tokens=same)
        for chunk in (128, 512, 2048):
            gap = longest_gap(model, prompts, chunk)
            report.add(f"{name}: longest gap, chunk {chunk}", f"{gap * 1e3:9.1f} ms", seconds=round(gap, 4))
    report.close()


if __name__ == "__main__":
    main()
