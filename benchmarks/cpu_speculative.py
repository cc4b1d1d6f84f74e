"""Speculative decoding of one text on the CPU against plain decoding, greedy, float32: the same tokens, faster or not.

    python benchmarks/cpu_speculative.py    about two minutes

Look-up with the shipped model of 8 M parameters goes on with three texts: source code of Python's library (a model of
novels soon repeats itself there), a passage that comes again, and prose. Then a model of the size of 130m with random
weights is its own draft: every guess is right, so the tokens a pass are the most there can be; and what its passes over
several tokens take bounds what any draft can bring, were its guesses free.
"""

import sysconfig
import time
from pathlib import Path

import torch

from anymamba import MambaConfig, MambaLM, SamplingConfig
from anymamba.cli.generate import DEFAULT_MODEL
from anymamba.generate import generate, read, speculate
from common import Report, measure, median, quiet, ratio, spread

GREEDY = SamplingConfig(temperature=0)
NEW = 128
PASSAGE = (
    "The old house stood at the end of the lane, behind a row of elms, and no one had lived in it for eleven years. "
    "Mr. Harding used to say that its windows followed him; but he was a nervous man, and fond of his own stories.\n"
)


def texts() -> dict[str, str]:
    code = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()
    methods = code[code.index("class _ActionsContainer") :][:3000]
    return {"source code": methods, "a passage again": PASSAGE + "\n" + PASSAGE[:60], "prose": PASSAGE}


def timed(write):
    """What `write(on_token)` gives, and the seconds from its first token to its last: without reading the prompt."""
    times = []
    out = write(lambda _: times.append(time.perf_counter()))
    return out, times[-1] - times[0]


def look_up(report, model, rounds=7):
    options = {"max_new_tokens": NEW, "sampling": GREEDY}
    for name, text in texts().items():
        ids = list(text.encode())
        ways = {"plain": lambda on_token: generate(model, [ids], on_token=on_token, **options)}  # noqa: B023
        for k in (3, 7):
            ways[f"look-up, k={k}"] = lambda on_token, k=k: speculate(model, ids, k=k, on_token=on_token, **options)  # noqa: B023
        outs, times = {}, {way: [] for way in ways}
        for _ in range(rounds):  # in turns: the machine's moods hit all of them alike
            for way, write in ways.items():
                outs[way], seconds = timed(write)
                times[way].append(seconds)
        [plain], plain_times = outs.pop("plain"), times.pop("plain")
        rate = (NEW - 1) / median(plain_times)
        report.add(
            f"{name}: plain", f"{spread(plain_times)} ms  {rate:6.0f} tokens/s", tokens_per_second=round(rate, 1)
        )
        for way, out in outs.items():
            add(report, f"{name}: {way}", times[way], plain_times, out, out.completion.ids == plain.ids)


def add(report, key, times, plain, out, same):
    r, rate = ratio(plain, times), (NEW - 1) / median(times)
    text = f"{spread(times)} ms  {rate:6.0f} tokens/s  {r:5.2f} ×  {out.acceptance:4.0%} of guesses right"
    report.add(key, f"{text}, {out.tokens_per_pass:.2f} tokens a pass{'' if same else '  OTHER TOKENS'}",
               tokens_per_second=round(rate, 1), ratio=round(r, 3), acceptance=round(out.acceptance, 3),
               tokens_per_pass=round(out.tokens_per_pass, 3), same_tokens=same)  # fmt: skip


def itself(report, k=4, new=33):
    """The ceiling of acceptance, and what the passes cost."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig.preset("130m"))
    options = {"max_new_tokens": new, "sampling": GREEDY}
    out = speculate(model, [1, 2, 3], draft=model, k=k, **options)
    same = out.completion.ids == generate(model, [[1, 2, 3]], **options)[0].ids
    report.add(f"130m, itself the draft, k={k}", f"{out.acceptance:4.0%} of guesses right, {out.tokens_per_pass:.2f} "
               f"tokens a pass{'' if same else '  OTHER TOKENS'}", acceptance=round(out.acceptance, 3),
               tokens_per_pass=round(out.tokens_per_pass, 3), same_tokens=same)  # fmt: skip
    state = read(model, [1, 2, 3]).state
    with torch.no_grad():
        times = measure({t: lambda t=t: model(torch.ones(1, t, dtype=torch.long), state, return_states=1)
                         for t in (1, 4, 5, 8)} |
                        {"plain": lambda: model(torch.ones(1, 1, dtype=torch.long), state)}, rounds=9)  # fmt: skip
    for t in (1, 4, 5, 8):
        r = ratio(times[t], times["plain"])
        report.add(f"130m, a pass over {t} tokens with states", f"{spread(times[t])} ms  {r:5.2f} × one of generate, "
                   f"at most {t / r:.2f} × as fast", ratio=round(r, 3))  # fmt: skip


def main():
    quiet()
    report = Report("cpu_speculative")
    look_up(report, MambaLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32))
    itself(report)
    report.close()


if __name__ == "__main__":
    main()
