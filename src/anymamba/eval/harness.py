"""A Mamba model for lm-evaluation-harness: `--model anymamba --model_args pretrained=PATH`. Importing registers it.

The harness knows only the models that it has imported, so its own command would not find this one:
`python -m anymamba.eval` is that command with this module imported. In Python:

    import anymamba.eval.harness
    lm_eval.simple_evaluate(model="anymamba", model_args="pretrained=PATH,dtype=bfloat16", tasks=["arc_easy"])
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    if error.name != "lm_eval":  # it is there, and lacks something itself
        raise
    raise ModuleNotFoundError("lm-evaluation-harness is not installed: pip install 'anymamba[eval]'") from error
from tqdm import tqdm

from anymamba.data import Tokenizer
from anymamba.errors import AnymambaError
from anymamba.eval.scoring import loglikelihoods, score_ids
from anymamba.generate import SamplingConfig, generate
from anymamba.layers import quantize as quantize_
from anymamba.model import MambaLM
from anymamba.train.runs import load_run

ROWS = 16  # written side by side where the harness leaves that to the model
NEW_TOKENS = 256  # of an answer whose task does not say


def main() -> None:
    """The harness's own command."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


@register_model("anymamba")
class Harness(LM):
    """A model and its tokenizer, as lm-evaluation-harness calls them.

    pretrained: folder of a run or model, or a MambaLM, which then needs `tokenizer` as well.
    tokenizer: "bytes", a tokenizer.json, a folder that holds one, or a Tokenizer; the model's own if None.
    dtype, device: of the weights, such as "bfloat16" and "cuda"; as stored, and "cuda" where there is one, if None.
    quantize: "int8" or "int4".
    batch_size: completions that are written side by side. Texts to score are packed by their tokens, with what they
        share read once, so that it does not concern them.

    Contexts of any length are read whole. Raises AnymambaError for what cannot be loaded.
    """

    def __init__(self, pretrained: str | MambaLM, tokenizer: str | Tokenizer | None = None, *,
                 dtype: str | torch.dtype | None = None, device: str | None = None, quantize: str | None = None,
                 batch_size: int | str = "auto", max_batch_size: int | None = None):  # fmt: skip
        super().__init__()
        if isinstance(pretrained, MambaLM):
            if tokenizer is None or isinstance(tokenizer, str):
                raise AnymambaError("harness: a model in memory needs its tokenizer: pass one that is loaded, too")
            self.model, self.tokenizer = pretrained, tokenizer
        else:
            self.model, self.tokenizer = load_run(pretrained, tokenizer)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = self.model.to(device=device, dtype=_dtype(dtype)).eval()
        if quantize is not None:
            quantize_(self.model, quantize)
        rows = _rows(batch_size)
        self.rows = rows if max_batch_size is None else min(rows, max_batch_size)
        self._device = self.model.device

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each (context, continuation)."""
        pairs = [request.args for request in requests]
        with tqdm(total=len(pairs), desc="anymamba: loglikelihood", disable=disable_tqdm) as bar:
            scores = loglikelihoods(self.model, self.tokenizer, pairs, on_progress=lambda n: bar.update(n - bar.n))
        answers = [(score.logprob, score.greedy) for score in scores]
        return self._remember("loglikelihood", pairs, answers)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text after an end-of-text id."""
        eos = self.tokenizer.eos_id
        if eos is None:
            raise AnymambaError("harness: the tokenizer has no end-of-text id for a whole text to start from")
        texts = [request.args[0] for request in requests]
        # an empty text is certain
        answers, known = [0.0] * len(texts), [i for i, text in enumerate(texts) if text]
        pairs = [(np.array([eos]), ids) for ids in self.tokenizer.encode_batch([texts[i] for i in known])]
        with tqdm(total=len(pairs), desc="anymamba: loglikelihood_rolling", disable=disable_tqdm) as bar:
            scores = score_ids(self.model, pairs, on_progress=lambda n: bar.update(n - bar.n))
        for i, score in zip(known, scores, strict=True):
            answers[i] = score.logprob
        return self._remember("loglikelihood_rolling", [(text,) for text in texts], answers)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop sequence, an end of text or the greatest length."""
        contexts = [request.args[0] for request in requests]
        rules = [_Rules(request.args[1]) for request in requests]
        ids = self.tokenizer.encode_batch(contexts)
        answers: list[str] = [""] * len(requests)
        # rows of one length are read without waiting for the longest
        order = sorted(range(len(requests)), key=lambda i: (rules[i].key, len(ids[i])))
        with tqdm(total=len(requests), desc="anymamba: generate_until", disable=disable_tqdm) as bar:
            for batch in _batches(order, [rule.key for rule in rules], self.rows):
                for i, text in zip(batch, self._write([ids[i] for i in batch], rules[batch[0]]), strict=True):
                    answers[i] = text
                bar.update(len(batch))
        return self._remember("generate_until", [request.args for request in requests], answers)

    def _write(self, prompts: Sequence[np.ndarray], rules: "_Rules") -> list[str]:
        eos = self.tokenizer.eos_id
        if eos is None and not all(map(len, prompts)):
            raise AnymambaError("harness: an empty context, and the tokenizer has no end-of-text id to stand for it")
        out = generate(
            self.model, [prompt.tolist() or [eos] for prompt in prompts], max_new_tokens=rules.max_new_tokens,
            sampling=rules.sampling, stop_strings=rules.until, stop_ids=[] if eos is None else [eos],
            tokenizer=self.tokenizer,
        )  # fmt: skip
        return [completion.text for completion in out]

    def _remember(self, kind, arguments, answers):
        """Into the harness's own cache, where one is used."""
        for argument, answer in zip(arguments, answers, strict=True):
            self.cache_hook.add_partial(kind, argument, answer)
        return answers


class _Rules:
    """How the harness wants an answer written."""

    KNOWN = ("until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks", "max_new_tokens", "max_tokens",
             "max_completion_tokens")  # fmt: skip

    def __init__(self, options: dict):
        if unknown := set(options) - set(self.KNOWN):
            raise AnymambaError(f"harness: generation with {sorted(unknown)}; anymamba knows {', '.join(self.KNOWN)}")
        until = options.get("until") or []
        self.until = [text for text in ([until] if isinstance(until, str) else until) if text]
        lengths = [options[name] for name in self.KNOWN[5:] if options.get(name) is not None]
        self.max_new_tokens = int(lengths[0]) if lengths else NEW_TOKENS
        named = {name: options[name] for name in ("temperature", "top_p", "top_k") if options.get(name) is not None}
        draws = options.get("do_sample", named.get("temperature", 0) != 0)
        self.sampling = SamplingConfig(**named) if draws else SamplingConfig(temperature=0)
        self.key = repr((self.until, self.max_new_tokens, self.sampling))  # rows with one key are written together


def _batches(order: Sequence[int], keys: Sequence[str], rows: int) -> Iterable[list[int]]:
    """Runs of at most `rows` indices with one key."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == rows or keys[i] != keys[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _rows(batch_size: int | str) -> int:
    if str(batch_size).startswith("auto"):
        return ROWS
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise AnymambaError(f'harness: batch_size={batch_size!r}, but it must be "auto" or a number of at least 1')
    return int(batch_size)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype in (None, "auto"):
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise AnymambaError(f"harness: dtype={dtype!r}, but it must be a torch dtype such as bfloat16")
    return found
