"""Log-likelihoods and zero-shot tasks: equal to reading each text alone, and what they say to bad input."""

import gzip
import json
import lzma
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anymamba import AnymambaError, MambaConfig, MambaLM
from anymamba.data import load_tokenizer, train_bpe
from anymamba.eval import TASKS, find, loglikelihoods, run
from anymamba.eval.prefixes import DEEPEST, tree
from anymamba.eval.scoring import encode_pairs, score_ids
from anymamba.eval.tasks import _questions
from conftest import REPO
from shared_data import shared

BYTES = load_tokenizer("bytes")
BOOKS = REPO / "src" / "anymamba" / "models" / "books"
QUESTION = "Question: what sleeps on the mat and purrs?\nAnswer:"
PAIRS = [
    *((QUESTION, choice) for choice in (" a cat", " a car", " a dog", " a cat and a dog")),
    (QUESTION, " a cat"),  # again
    (QUESTION + " ", "a car"),  # a space that moves
    ("", "no context"),
    ("x", "y"),
    ("A text that is far longer than what is read at once. " * 3, "and its end"),
    (QUESTION + " a cat. Question: what is a cat?", " a sleeper"),
]


def small(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    model = MambaLM(MambaConfig(**{"vocab_size": 257, "d_model": 24, "n_layer": 2, "d_state": 5} | changes))
    return model.to(dtype)


@pytest.fixture(scope="module")
def model():
    return small()


@torch.no_grad()
def alone(model, context, continuation):
    """(log-probability, greedy) of ids, by one pass over all of them and log_softmax."""
    ids = torch.tensor([*context, *continuation], dtype=torch.int64)
    vocabulary = model.config.vocab_size
    logprobs = model(ids[None, :-1]).logits[0, len(context) - 1 :, :vocabulary].log_softmax(-1)
    targets = ids[len(context) :, None]
    return logprobs.gather(1, targets).sum().item(), torch.equal(logprobs.argmax(-1), targets[:, 0])


# ---- log-likelihoods ----


@pytest.mark.parametrize("batch_tokens", [1, 7, 64, None])
@pytest.mark.parametrize("share", [True, False])
def test_equal_to_each_pair_alone(model, batch_tokens, share):
    got = loglikelihoods(model, BYTES, PAIRS, batch_tokens=batch_tokens, share=share)
    want = [alone(model, *pair) for pair in encode_pairs(BYTES, PAIRS)]
    assert [s.logprob for s in got] == pytest.approx([logprob for logprob, _ in want], rel=1e-12)
    assert [s.greedy for s in got] == [greedy for _, greedy in want]
    assert [s.tokens for s in got] == [len(ids) for _, ids in encode_pairs(BYTES, PAIRS)]


def test_greedy_is_what_generation_writes(model):
    from anymamba.generate import SamplingConfig, generate

    prompt = BYTES.encode("The cat")
    [written] = generate(model, [prompt], max_new_tokens=9, sampling=SamplingConfig(temperature=0))
    other = [*written.ids[:-1], (written.ids[-1] + 1) % 257]
    scores = score_ids(model, [(prompt, np.array(written.ids)), (prompt, np.array(other))])
    assert [s.greedy for s in scores] == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    """The sum over a continuation is off by no more than rounding the logits allows."""
    exact, low = (loglikelihoods(small(dtype=d), BYTES, PAIRS) for d in (torch.float64, dtype))
    each = 40 * torch.finfo(dtype).eps  # a token, for logits of this size
    assert all(abs(a.logprob - b.logprob) <= each * a.tokens for a, b in zip(exact, low, strict=True))


def test_blocks_of_the_head(model, monkeypatch):
    whole = loglikelihoods(model, BYTES, PAIRS)
    monkeypatch.setattr("anymamba.eval.scoring.LOGITS", 3 * 264)
    monkeypatch.setattr("anymamba.eval.scoring.STATES", 1)
    pieces = loglikelihoods(model, BYTES, PAIRS)
    assert [s.logprob for s in pieces] == pytest.approx([s.logprob for s in whole], rel=1e-12)


def test_padded_vocabulary_has_no_probability():
    model = small(vocab_size=257, pad_vocab_size_multiple=64)
    with torch.no_grad():
        model.backbone.embedding.weight[257:] = 50.0
    [score] = loglikelihoods(model, BYTES, PAIRS[:1])
    assert score.logprob == pytest.approx(alone(model, *encode_pairs(BYTES, PAIRS[:1])[0])[0], rel=1e-12)


def test_what_is_shared_is_read_once(model, monkeypatch):
    seen, forward = [], MambaLM.forward

    def spy(self, ids, **options):
        seen.append(ids.numel())
        return forward(self, ids, **options)

    monkeypatch.setattr(MambaLM, "forward", spy)
    done = []
    shared_scores = loglikelihoods(model, BYTES, PAIRS, on_progress=done.append)
    assert sum(seen) == sum(s.read for s in shared_scores)
    assert done == sorted(done)
    assert done[-1] == len(PAIRS)
    seen.clear()
    scores = loglikelihoods(model, BYTES, PAIRS, share=False)
    assert sum(seen) == sum(s.read for s in scores) == sum(s.alone for s in shared_scores)
    # the question once, not seven times
    assert sum(s.alone - s.read for s in shared_scores) >= 6 * len(QUESTION)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=60), min_size=1, max_size=12))
def test_every_sequence_is_a_path(sequences):
    arrays = [np.array(ids) for ids in sequences + [ids + [0, 1] * 6 for ids in sequences]]
    paths = {i: [] for i in range(len(arrays))}

    def walk(nodes, start, depth):
        assert depth <= DEEPEST
        for node in nodes:
            assert node.start == start < node.stop
            assert {i for child in node.children for i in child.members} == {
                i for i in node.members if len(arrays[i]) > node.stop
            }
            for i in node.members:
                paths[i] += arrays[node.members[0]][node.start : node.stop].tolist()
            walk(node.children, node.stop, depth + 1)

    walk(tree(arrays), 0, 0)
    assert paths == {i: ids.tolist() for i, ids in enumerate(arrays)}


def test_nested_beginnings_go_only_so_deep(model):
    """Each text begins with the one before it: without a bound, a thousand states would be held at once."""
    texts = [np.arange(9 * n) % 251 for n in range(1, 24)]
    scores = score_ids(model, [(ids, ids[:2]) for ids in texts])
    for ids, score in list(zip(texts, scores, strict=True))[::5]:
        assert score.logprob == pytest.approx(alone(model, ids, ids[:2])[0], rel=1e-12)
    assert sum(s.read for s in scores) < sum(s.alone for s in scores)


def test_tokens_where_the_two_meet(tmp_path):
    """As lm-evaluation-harness cuts them: both together, less as many as the context alone has."""
    tokenizer = train_bpe(["the theme " * 20], 262, tmp_path)
    pairs = [("the theme", " the"), ("the theme ", "the"), ("the the", "me the"), ("\n", "the")]
    encoded = encode_pairs(tokenizer, pairs)
    for (context, continuation), (head, tail) in zip(pairs, encoded, strict=True):
        alone = tokenizer.encode(context.rstrip()).tolist()
        assert head.tolist() == (alone or [tokenizer.eos_id])
        assert tail.tolist() == tokenizer.encode(context + continuation).tolist()[len(alone) :]
    assert [ids.tolist() for ids in encoded[0]] == [ids.tolist() for ids in encoded[1]], "the space has moved"
    # " theme" is one token, which stands in the place of the context's " the"
    assert len(encoded[2][1]) < len(tokenizer.encode("me the"))


def test_eos_stands_for_an_empty_context(model):
    [(head, tail)] = encode_pairs(BYTES, [("", "abc")])
    assert (head.tolist(), tail.tolist()) == ([256], [97, 98, 99])


def test_pairs_that_are_refused(model, tmp_path):
    with pytest.raises(AnymambaError, match=r"the continuation '' of a context that ends in 'ab' has no tokens"):
        loglikelihoods(model, BYTES, [("ab", "c"), ("ab", "")])
    with pytest.raises(AnymambaError, match=r"pair 1 has id 257, but the vocabulary has ids 0 … 256; was it encoded"):
        score_ids(model, [(np.array([1]), np.array([2])), (np.array([257]), np.array([2]))])
    with pytest.raises(AnymambaError, match="pair 0 has 0 ids of context and 1 of continuation"):
        score_ids(model, [(np.array([]), np.array([2]))])
    with pytest.raises(AnymambaError, match="batch_tokens=0, but it must be a whole number of at least 1"):
        loglikelihoods(model, BYTES, PAIRS, batch_tokens=0)
    with pytest.raises(AnymambaError, match="this model has no vocabulary"):
        loglikelihoods(small(vocab_size=None), BYTES, PAIRS)
    no_end = load_tokenizer("bytes")
    no_end.eos_id = None
    with pytest.raises(AnymambaError, match=r"the context of 'abc' is empty and the tokenizer 'bytes' has no end"):
        loglikelihoods(model, no_end, [("", "abc")])
    assert loglikelihoods(model, BYTES, []) == []


# ---- tasks ----

CHOICES = [{"query": f"Question: what is {i}?", "choices": [f"{i}", f"not {i + 1} é", "x"], "gold": i % 3}
           for i in range(10)]  # fmt: skip
CONTEXTS = [{"context_options": ["Ann saw Bob because Ann", "Ann saw Bob because Bob"], "continuation": f"had {i}.",
             "gold": i % 2} for i in range(5)]  # fmt: skip
TEXTS = [{"text": f"One two\nthree {i}, he said and went home"} for i in range(5)]
DYCK = [{"context": "Input: [ ( " + "< " * i + "\nOutput:", "continuation": "> " * i + ") ]"} for i in range(1, 4)]
ROWS = {"arc_easy": CHOICES, "winogrande": CONTEXTS, "lambada": TEXTS, "bigbench_dyck_languages": DYCK}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path):
    for name, rows in ROWS.items():
        write(tmp_path / f"{TASKS[name].file or name}.jsonl", rows)
    return tmp_path


def last(*arguments, **options):
    *_, result = run(*arguments, **options)
    return result


def plain(model, context, continuation):
    return alone(model, BYTES.encode(context), BYTES.encode(continuation))


def test_choices(model, folder, monkeypatch):
    monkeypatch.setattr("anymamba.eval.tasks.BLOCK", 8)
    path = folder / "arc_easy.jsonl"
    right, normed = [], []
    for row in CHOICES:
        found = [plain(model, row["query"] + "\nAnswer:", " " + choice)[0] for choice in row["choices"]]
        right.append(np.argmax(found) == row["gold"])
        lengths = [len(choice) for choice in row["choices"]]
        normed.append(np.argmax(np.array(found) / lengths) == row["gold"])
    results = list(run(model, BYTES, "arc_easy", path))
    assert [r.n for r in results] == [8, 10]
    for name, values in (("acc", right), ("acc_norm", normed)):
        share = statistics.mean(map(float, values))
        assert results[-1].metrics[name] == pytest.approx((share, math.sqrt(share * (1 - share) / 9)))
        assert results[0].metrics[name][0] == pytest.approx(statistics.mean(map(float, values[:8])))
    assert results[-1].read < results[-1].alone
    unshared = last(model, BYTES, "arc_easy", path, share=False)
    assert (unshared.metrics, unshared.read) == (results[-1].metrics, results[-1].alone)


def test_contexts(model, folder):
    right = []
    for row in CONTEXTS:
        found = [plain(model, context, " " + row["continuation"])[0] for context in row["context_options"]]
        right.append(float(np.argmax(found) == row["gold"]))
    result = last(model, BYTES, "winogrande", folder / "winogrande.jsonl")
    assert result.metrics == {"acc": pytest.approx((statistics.mean(right), statistics.stdev(right) / math.sqrt(5)))}


@pytest.mark.parametrize("name", ["lambada", "bigbench_dyck_languages"])
def test_continuations(model, folder, name):
    if name == "lambada":
        pairs = [(row["text"].removesuffix(" home"), " home") for row in TEXTS]
    else:
        pairs = [(row["context"], " " + row["continuation"]) for row in DYCK]
    found = [plain(model, *pair)[0] for pair in pairs]
    result = last(model, BYTES, name, find([name], folder)[name])
    ppl = math.exp(-statistics.mean(found))
    assert result.metrics["ppl"] == pytest.approx((ppl, ppl * statistics.stdev(found) / math.sqrt(len(found))))
    assert result.metrics["acc"] == (0.0, 0.0)


class Spaces(torch.nn.Module):
    """A head to which the next byte is a space, most probably."""

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], 264).index_fill(-1, torch.tensor([32]), 5.0)


def test_greedy_continuations_are_right(tmp_path):
    model = small()
    model.lm_head = Spaces()
    rows = [{"context": "a", "continuation": "  "}, {"context": "a", "continuation": " b"}]
    result = last(model, BYTES, "bigbench_dyck_languages", write(tmp_path / "rows.jsonl", rows))
    space, other = 5 - math.log(256 + math.exp(5)), -math.log(256 + math.exp(5))
    ppl = math.exp(-(3 * space + 2 * space + other) / 2)
    assert result.metrics["acc"] == pytest.approx((0.5, 0.5))
    assert result.metrics["ppl"] == pytest.approx((ppl, ppl * (space - other) / 2))


def test_files_are_found(folder):
    text = (folder / "winogrande.jsonl").read_bytes()
    (folder / "zeroshot").mkdir()
    (folder / "zeroshot" / "copa.jsonl.xz").write_bytes(lzma.compress(text))
    (folder / "winograd_wsc.jsonl.gz").write_bytes(gzip.compress(text))
    found = find(["copa", "winograd_wsc", "lambada"], folder)
    assert [p.relative_to(folder).as_posix() for p in found.values()] == [
        "zeroshot/copa.jsonl.xz", "winograd_wsc.jsonl.gz", "lambada_test.jsonl"]  # fmt: skip
    assert last(small(), BYTES, "winograd_wsc", found["winograd_wsc"]).n == 5
    with pytest.raises(AnymambaError, match=r"unknown task 'arc_esy': did you mean 'arc_easy'\? known tasks"):
        find(["arc_esy"], folder)
    with pytest.raises(AnymambaError, match=r"task piqa: no piqa\.jsonl, \.jsonl\.xz or \.jsonl\.gz in .* or its"):
        find(["piqa"], folder)
    with pytest.raises(AnymambaError, match=r"no folder .*; did you mean .*zeroshot\?"):
        find(["piqa"], folder / "zeroshoot")


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("arc_easy", "{", "not JSON"),
        ("arc_easy", '["a"]', "a list, but each line must be an object"),
        ("arc_easy", {"query": "a", "gold": 0}, "no field 'choices'; the fields are 'query', 'gold'"),
        ("arc_easy", {"query": "a", "choices": [], "gold": 0}, r"field 'choices' is \[\], but must be a list of two"),
        ("arc_easy", {"query": "a", "choices": ["a", ""], "gold": 0}, "or more, none empty"),
        ("arc_easy", {"query": "a", "choices": ["a", 3], "gold": 0}, "must be a list of two texts"),
        ("arc_easy", {"query": "a", "choices": ["a", "b"], "gold": 2}, "field 'gold' is 2, but .* of the 2 .* 0 … 1"),
        ("arc_easy", {"query": "a", "choices": ["a", "b"], "gold": "A"}, "field 'gold' is 'A'"),
        ("arc_easy", {"query": "", "choices": ["a", "b"], "gold": 0}, "field 'query' is '', but must be a text"),
        ("winogrande", {"context_options": ["a", "b"], "gold": 0}, "no field 'continuation'"),
        ("winogrande", {"context_options": "ab", "continuation": "c", "gold": 0}, "'context_options' is 'ab'"),
        ("lambada", {"text": "word"}, "text 'word' has no last word after a space"),
        ("lambada", {"text": "word "}, "text 'word ' has no last word after a space"),
        ("bigbench_dyck_languages", {"context": "a", "continuation": None}, "field 'continuation' is None"),
    ],
)
def test_rows_that_are_refused(model, tmp_path, task, row, message):
    good = json.dumps(ROWS[task][0])
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{good}\n\n{row if isinstance(row, str) else json.dumps(row)}\n{good}\n")
    with pytest.raises(AnymambaError, match=rf"rows\.jsonl:3: .*{message}"):
        run(model, BYTES, task, path)
    assert last(model, BYTES, task, path, limit=1).total == 1  # what is not asked for is not looked at


def test_runs_that_are_refused(model, tmp_path, folder):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(AnymambaError, match=r"empty\.jsonl: no questions in it"):
        run(model, BYTES, "arc_easy", tmp_path / "empty.jsonl")
    with pytest.raises(AnymambaError, match="limit=0, but it must be at least 1 question"):
        run(model, BYTES, "arc_easy", folder / "arc_easy.jsonl", limit=0)
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(b"{}" * 999)[:-20])
    with pytest.raises(AnymambaError, match="damaged or cut-off"):
        run(model, BYTES, "arc_easy", tmp_path / "cut.jsonl.xz")


def test_real_files():
    """Every row of each task's own file fits it; the first ones of one are asked of a trained model."""
    files = find(list(TASKS), shared("zeroshot").parent)
    counts = {name: sum(1 for _ in _questions(TASKS[name], path)) for name, path in files.items()}
    assert counts == {"lambada": 5153, "arc_easy": 2376, "arc_challenge": 1172, "piqa": 1838, "winogrande": 1267,
                      "openbook_qa": 500, "copa": 100, "siqa": 1954, "commonsense_qa": 1221, "winograd_wsc": 273,
                      "bigbench_dyck_languages": 1000}  # fmt: skip
    easy = last(MambaLM.from_pretrained(BOOKS, dtype=torch.float32), BYTES, "arc_easy", files["arc_easy"], limit=4)
    assert easy.alone / easy.read > 2.5


# ---- the command ----


def test_command(folder, command):
    names = "arc_easy,winogrande,lambada,arc_easy"  # twice is once
    code, out, _ = command("eval", BOOKS, "--tasks", names, "--data-dir", folder, "--limit", 2)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["task", "n", "acc", "acc_norm", "ppl"]
    assert [line.split()[:2] for line in lines[1:4]] == [["arc_easy", "2"], ["winogrande", "2"], ["lambada", "2"]]
    assert all("±" in line for line in lines[1:4])
    read, alone = (int(word) for word in lines[4].split() if word.isdigit())
    assert read < alone
    code, out, _ = command("eval", BOOKS, "--tasks", names, "--data-dir", folder, "--limit", 1, "--json")
    found = json.loads(out)
    assert set(found) == {"arc_easy", "winogrande", "lambada"}
    easy = found["arc_easy"]
    assert (easy["n"], easy["of"], easy["acc_stderr"]) == (1, 1, None)
    books = MambaLM.from_pretrained(BOOKS)
    want = last(books, BYTES, "lambada", folder / "lambada_test.jsonl", limit=1)
    assert found["lambada"]["ppl"] == pytest.approx(want.metrics["ppl"][0], rel=1e-3)


def test_interrupted_command_prints_what_it_has(folder, command, monkeypatch):
    def interrupted(model, tokenizer, name, path, limit):
        steps = run(model, tokenizer, name, path, limit=limit)
        yield next(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr("anymamba.cli.eval.run", interrupted)
    monkeypatch.setattr("anymamba.eval.tasks.BLOCK", 2)
    code, out, errors = command("eval", BOOKS, "--tasks", "arc_easy,winogrande", "--data-dir", folder)
    assert code == 130
    assert "interrupted" in errors
    assert out.splitlines()[1].startswith("arc_easy  2 of 10")
    assert "winogrande" not in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "arc_esy", "--data-dir", "{folder}"], "unknown task 'arc_esy': did you mean 'arc_easy'?"),
        (["--tasks", "arc_easy", "{folder}"], "give texts or tasks, one of the two"),
        (["--tasks", "arc_easy"], "where are the tasks' files? give --data-dir DIR, or set ANYMAMBA_DATA"),
        (["--tasks", "arc_easy", "--data-dir", "{folder}", "--no-carry"], "--no-carry says nothing about --tasks"),
        (["--tasks", "arc_easy", "--data-dir", "{folder}", "--max-tokens", "9"], "--max-tokens says nothing about"),
        (["{folder}/text.txt", "--limit", "9"], "--limit says nothing about a text"),
        (["--tasks", "piqa", "--data-dir", "{folder}"], "task piqa: no piqa.jsonl"),
        (["--tasks", "arc_easy", "--data-dir", "{folder}", "--tokenizer", "{folder}/bpe"], "give the model's own with"),
    ],
)
def test_command_refuses(folder, command, monkeypatch, options, words):
    monkeypatch.delenv("ANYMAMBA_DATA", raising=False)
    if "{folder}/bpe" in options:
        train_bpe([f"{i} words of text {i * i}" for i in range(99)], 290, folder / "bpe")
    code, out, errors = command("eval", BOOKS, *(option.replace("{folder}", str(folder)) for option in options))
    assert (code, out) == (2, "")
    assert words in errors
