"""lm-evaluation-harness: our model in it gives what its own models give, and our tasks give what its tasks do."""

import json
import lzma
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from anymamba import AnymambaError, MambaConfig, MambaLM
from anymamba.data import JsonTokenizer, load_tokenizer, train_bpe
from anymamba.eval import run
from conftest import REPO
from shared_data import shared

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'anymamba[eval]'")

from lm_eval.tasks import TaskManager  # noqa: E402

from anymamba.eval.harness import Harness  # noqa: E402

BYTES = load_tokenizer("bytes")
BOOKS = REPO / "src" / "anymamba" / "models" / "books"
TASKS = Path(lm_eval.__file__).parent / "tasks"
OF_A_DATASET = ("task:", "dataset_path:", "dataset_name:", "training_split", "validation_split", "test_split")


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> JsonTokenizer:
    texts = [f"Question: what is {i}? Answer: it is {i * 7} or a cat and not a car" for i in range(300)]
    return train_bpe(texts, 320, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return MambaLM(MambaConfig(vocab_size=257, d_model=24, n_layer=2, d_state=5)).double()


@pytest.fixture(scope="module")
def pair(bpe):
    """Transformers' Mamba with random weights, as the harness runs it, and the same weights here."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the harness's own models need accelerate")
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=bpe.vocab_size, hidden_size=32, num_hidden_layers=2, state_size=4)
    theirs = transformers.MambaForCausalLM(config).eval().double()
    with torch.no_grad():
        for p in theirs.parameters():  # else a random model hardly cares for what it reads
            p.mul_(1.5)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    ours = MambaLM(MambaConfig(vocab_size=bpe.vocab_size, d_model=32, n_layer=2, d_state=4)).double()
    tensors = {k.replace("embeddings.", "embedding."): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(tensors)
    return HFLM(theirs, tokenizer=tokenizer, batch_size=3, device="cpu"), Harness(ours, bpe)


# ---- beside the harness's own model ----

PAIRS = [("Question: what is 3?\nAnswer:", " it is 21"), ("Question: what is 3?\nAnswer:", " a cat"), ("", "it is"),
         ("Question: what is 3? ", "a car"), ("a", "nswer"), ("not a cat " * 30, "or a car")]  # fmt: skip


def test_loglikelihood_as_their_model(pair):
    theirs, ours = (lm.loglikelihood(requests(*PAIRS), disable_tqdm=True) for lm in pair)
    assert [p for p, _ in ours] == pytest.approx([p for p, _ in theirs], rel=1e-6)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_as_their_model(pair):
    texts = [("not a cat or a car",), ("Question: what is 3? " * 9,), ("x",)]
    theirs, ours = (lm.loglikelihood_rolling(requests(*texts), disable_tqdm=True) for lm in pair)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert pair[1].loglikelihood_rolling(requests(("",)), disable_tqdm=True) == [0.0]


def test_generation_as_their_model(pair):
    stop = pair[1].generate_until(requests(("what is", {"max_gen_toks": 9})), disable_tqdm=True)[0][4:6]
    asked = [("what is", {"until": [stop], "max_gen_toks": 9}), ("a cat and", {"until": ["\n\n"], "max_gen_toks": 7}),
             ("Question: what", {"until": stop, "max_gen_toks": 9, "do_sample": False})]  # fmt: skip
    theirs, ours = (lm.generate_until(requests(*asked), disable_tqdm=True) for lm in pair)
    assert ours == theirs
    assert stop not in ours[0]
    assert all(ours)


def test_task_as_their_model(pair, tmp_path):
    rows = [{"q": f"what is {i}?", "options": [f"it is {i * 7}", "a cat", f"not {i}"], "label": i % 3}
            for i in range(20)]  # fmt: skip
    task = {"task": "mine", "output_type": "multiple_choice", "doc_to_text": "Question: {{q}}\nAnswer:",
            "doc_to_choice": "options", "doc_to_target": "label", "num_fewshot": 1, "fewshot_split": "test",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task | dataset(tmp_path, "mine", rows)))
    theirs, ours = (measured(lm, ["mine"], tmp_path)["mine"] for lm in pair)
    assert ours == theirs
    assert 0 < ours["acc"] < 1


# ---- our tasks beside the harness's definitions ----


def dataset(folder, name, rows):
    path = folder / f"{name}.rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}


def measured(lm, names, folder, **options):
    """What the harness finds for tasks that are defined in a folder."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options |= {"task_manager": manager, "bootstrap_iters": 100, "verbosity": "ERROR"}
    found = lm_eval.simple_evaluate(lm, tasks=names, **options)
    values = {name: found["results"][name] for name in names}
    return {name: {k.split(",")[0]: v for k, v in of.items() if k.endswith(",none")} for name, of in values.items()}


def arc(row):
    letters = "ABCDE"[: len(row["choices"])]
    question = row["query"].removeprefix("Question: ")
    return {"question": question, "choices": {"text": row["choices"], "label": list(letters)},
            "answerKey": letters[row["gold"]]}  # fmt: skip


def piqa(row):
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}


def openbook(row):
    return {"question_stem": row["query"]} | {k: v for k, v in arc(row).items() if k != "question"}


def winogrande(row):
    first, second = (context.split(" ") for context in row["context_options"])
    same = next(i for i, words in enumerate(zip(first, second, strict=False)) if words[0] != words[1])
    begin, options = "".join(word + " " for word in first[:same]), [" ".join(w[same:]) for w in (first, second)]
    return {"sentence": f"{begin}_ {row['continuation']}", "option1": options[0], "option2": options[1],
            "answer": str(row["gold"] + 1)}  # fmt: skip


DEFINED = {  # the harness's file, its row for one of ours, our shared data, rows that every machine has
    "arc_easy": ("arc/arc_easy.yaml", arc, "zeroshot/arc_easy.jsonl.xz", [
        {"query": f"Question: what is é{i}?", "choices": ["a cat", f"the é{i}", "no", "x"], "gold": i % 4}
        for i in range(9)]),
    "piqa": ("piqa/piqa.yaml", piqa, "zeroshot/piqa.jsonl.xz", [
        {"query": f"Question: how to {i}\n", "choices": [f"do {i} times", "do not"], "gold": i % 2} for i in range(9)]),
    "openbook_qa": ("openbookqa/openbookqa.yaml", openbook, "zeroshot/openbook_qa.jsonl.xz", [
        {"query": f"The {i} of", "choices": ["a cat", "them", f"{i}", "x y"], "gold": i % 4} for i in range(9)]),
    "winogrande": ("winogrande/default.yaml", winogrande, "zeroshot/winogrande.jsonl.xz", [
        {"context_options": ["Ann saw Bob so Ann", "Ann saw Bob so Bob"], "continuation": f"had {i}.", "gold": i % 2}
        for i in range(9)]),
    "lambada": ("lambada/lambada_openai.yaml", dict, "lambada/lambada_test.jsonl.xz", [
        {"text": f"It was {i}\nand then it was the é{i}"} for i in range(9)]),
}  # fmt: skip


def compare(lm, rows_of, folder, rel):
    """The harness with its definition, on rows turned into its fields, and `run` on ours."""
    for name, rows in rows_of.items():
        source = TASKS / DEFINED[name][0]
        for code in source.parent.glob("*.py"):
            (folder / code.name).write_text(code.read_text())
        lines = [line for line in source.read_text().splitlines() if not line.startswith(OF_A_DATASET)]
        theirs = dataset(folder, name, [DEFINED[name][1](row) for row in rows])
        (folder / f"{name}.yaml").write_text("\n".join([f"task: my_{name}", *lines, yaml.safe_dump(theirs)]))
    found = measured(lm, [f"my_{name}" for name in rows_of], folder)
    for name, rows in rows_of.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        *_, ours = run(lm.model, lm.tokenizer, name, path)
        theirs = found[f"my_{name}"]
        for metric, (value, error) in ours.metrics.items():
            assert value == pytest.approx(theirs["perplexity" if metric == "ppl" else metric], rel=rel)
            if metric != "ppl":  # whose error the harness draws
                assert error == pytest.approx(theirs[f"{metric}_stderr"])
        assert {"ppl" if m == "perplexity" else m for m in theirs if "stderr" not in m} == set(ours.metrics)


def test_tasks_are_the_harness_tasks(small, tmp_path):
    compare(Harness(small, BYTES), {name: rows for name, (*_, rows) in DEFINED.items()}, tmp_path, 1e-9)


def test_real_rows_are_the_harness_tasks(tmp_path):
    rows = {}
    for name, (_, _, path, _) in DEFINED.items():
        with lzma.open(shared(path), "rt") as file:
            rows[name] = [json.loads(next(file)) for _ in range(4)]
    compare(Harness(str(BOOKS), dtype="float32"), rows, tmp_path, 1e-4)


# ---- what it is given ----


def test_the_command_knows_the_model(tmp_path, monkeypatch):
    rows = [DEFINED["lambada"][3][0]]
    task = {"task": "mine", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}]}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task | dataset(tmp_path, "mine", rows)))

    def call(pretrained):
        """`python -m anymamba.eval`, without the half minute in which the harness looks through all its tasks."""
        arguments = f"pretrained={pretrained},dtype=float32"
        command = lambda: found.update(measured("anymamba", ["mine"], tmp_path, model_args=arguments))  # noqa: E731
        monkeypatch.setattr("lm_eval.__main__.cli_evaluate", command)
        runpy.run_module("anymamba.eval", run_name="__main__")

    found = {}
    call(BOOKS)
    model = MambaLM.from_pretrained(BOOKS, dtype=torch.float32)
    ids = torch.tensor([[256, *rows[0]["text"].encode()]])
    bits = model(ids[:, :-1], labels=ids[:, 1:]).loss.item() / math.log(2)
    assert found["mine"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    with pytest.raises(SystemExit, match=r"anymamba\.eval: no config\.json in nowhere"):
        call("nowhere")


def test_what_is_refused(small, tmp_path):
    with pytest.raises(AnymambaError, match="dtype='bf17', but it must be a torch dtype such as bfloat16"):
        Harness(str(BOOKS), dtype="bf17")
    with pytest.raises(AnymambaError, match=r'batch_size=0, but it must be "auto" or a number'):
        Harness(str(BOOKS), batch_size=0)
    with pytest.raises(AnymambaError, match="a model in memory needs its tokenizer"):
        Harness(small)
    with pytest.raises(AnymambaError, match=r"generation with \['num_beams'\]; anymamba knows until, "):
        Harness(small, BYTES).generate_until(requests(("a", {"num_beams": 3})), disable_tqdm=True)
    lm = Harness(small, BYTES, batch_size="auto:4", max_batch_size=2)
    assert lm.rows == 2
    assert lm.device == torch.device("cpu")


def test_sampling_and_empty_contexts(small):
    lm = Harness(small, BYTES, batch_size=2)
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 5}
    asked = [("", {"max_gen_toks": 5}), ("ab", drawn), ("ab", {"max_new_tokens": 5}), ("b" * 40, {"max_gen_toks": 5})]
    answers = lm.generate_until(requests(*asked), disable_tqdm=True)
    again = [lm.generate_until(requests(one), disable_tqdm=True)[0] for one in asked]
    assert answers == again, "what stands beside a row does not change it"
    assert answers[1] != answers[2]


def test_the_harness_keeps_answers(small):
    kept = {}
    lm = Harness(small, BYTES)
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda kind, args, answer: kept.update({(kind, args): answer})))
    [answer] = lm.loglikelihood(requests(("a", "b")), disable_tqdm=True)
    assert kept == {("loglikelihood", ("a", "b")): answer}
