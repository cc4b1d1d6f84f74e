"""Speculative decoding of one text on the CPU against plain decoding, greedy, float32: the same tokens, faster or not.

    python benchmarks/cpu_speculative.py    about five minutes

Look-up with the shipped model of 8 M parameters goes on with three texts: source code of Python's library, which repeats
itself, a passage that comes again, and prose, which does not. A model of the size of 130m with random weights guesses
for itself: every guess is right, so the tokens a pass are the most there can be, and the time is what a draft as dear as
the model costs. What a free draft would bring is in the last lines: k + 1 tokens for one pass over k + 1 tokens.
"""  # noqa: E501

import sysconfig
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


def look_up(report, model):
    for name, text in texts().items():
        ids = list(text.encode())
        start = read(model, ids[:-1])  # the prompt is read before the clock starts, but for its last token
        options = {"max_new_tokens": NEW, "sampling": GREEDY}
        plain = lambda: generate(model, [ids[-1:]], state=start.state, **options)[0]  # noqa: B023, E731
        report_text(report, model, name, ids, plain, options)


def report_text(report, model, name, ids, plain, options):
    """The prompt counts for look-up, so both sides read it; what reading takes is measured and taken off."""
    outs, functions = {}, {"plain": plain, "reading": lambda: read(model, ids)}
    for k in (3, 7):
        outs[k] = speculate(model, ids, k=k, **options)
        functions[f"k={k}"] = lambda k=k: speculate(model, ids, k=k, **options)
    times = measure(functions, rounds=5, settle=0)
    report.add(f"{name}: plain", f"{spread(times['plain'])} ms  {NEW / median(times['plain']):6.0f} tokens/s",
               tokens_per_second=round(NEW / median(times["plain"]), 1))  # fmt: skip
    same = plain().ids
    for k, out in outs.items():
        own = [whole - reading for whole, reading in zip(times[f"k={k}"], times["reading"], strict=True)]
        add(report, f"{name}: look-up, k={k}", own, times["plain"], out, out.completion.ids == same)


def add(report, key, times, plain, out, same):
    r, rate = ratio(plain, times), NEW / median(times)
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
