"""The examples and commands of the pages in docs/ run, and the figures of one are those of the results."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
import torch

from anymamba import MambaConfig, MambaLM
from anymamba.data import ByteTokenizer, load_tokenizer
from conftest import REPO

PAGE = REPO / "docs" / "inference.md"
BOOKS = REPO / "src" / "anymamba" / "models" / "books"
[COMMANDS] = re.findall(r"<!-- commands -->\n```sh\n(.*?)```", PAGE.read_text(), re.S)
CHECKPOINTS = REPO / "docs" / "checkpoints.md"
PAGES = {"inference": 6, "checkpoints": 3}  # and their examples


def examples(page):
    return re.findall(r"<!-- example -->\n```python\n(.*?)```", (REPO / "docs" / f"{page}.md").read_text(), re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a small model, some text, and tasks."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    MambaLM(MambaConfig(d_model=32, n_layer=2)).save_pretrained("runs/NAME")
    ByteTokenizer().save(tmp_path / "runs" / "NAME")
    text = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 60
    for name in ("book.txt", "notes/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "tasks").mkdir()
    for task in ("arc_easy", "piqa"):
        row = {"query": "It was the", "choices": ["best", "age"], "gold": 0}
        (tmp_path / "tasks" / f"{task}.jsonl").write_text(f"{json.dumps(row)}\n" * 5)
    return tmp_path


@pytest.mark.parametrize(("page", "count"), PAGES.items())
def test_every_python_block_is_an_example(page, count):
    assert len(examples(page)) == (REPO / "docs" / f"{page}.md").read_text().count("```python") == count


@pytest.mark.parametrize(("page", "i"), [(page, i) for page, count in PAGES.items() for i in range(count)])
def test_examples_run(page, i, folder):
    code = examples(page)[i]
    for name in re.findall(r"^from (transformers|peft)", code, re.M):
        pytest.importorskip(name)
    exec(compile(code, f"{page}.md", "exec"), {})


def test_the_page_on_evaluation(command, folder):
    """Its command and first example; lm-evaluation-harness fetches tasks, test_harness.py has local ones."""
    (folder / "tasks" / "lambada_test.jsonl").write_text(json.dumps({"text": "It was the best of times"}) + "\n")
    page = (REPO / "docs" / "evaluation.md").read_text()
    [line] = re.findall(r"<!-- commands -->\n```sh\n(.*?)\n```", page, re.S)
    code, out, err = command(*shlex.split(line.replace("MODEL", "runs/NAME").replace("DIR", "tasks"))[1:])
    assert code == 0, err
    assert all(task in out for task in ("lambada", "arc_easy", "piqa"))
    [example] = examples("evaluation")
    names = {}
    exec(compile(example.replace("MODEL", "runs/NAME").replace('"DIR"', '"tasks"'), "evaluation.md", "exec"), names)
    assert len(names["scores"]) == 2
    assert names["result"].n == 5


def test_the_walk_from_ssm_to_mamba_runs_top_to_bottom():
    text = (REPO / "docs" / "from-ssm-to-mamba.md").read_text()
    blocks = examples("from-ssm-to-mamba")
    assert len(blocks) == text.count("```python") == 7
    exec(compile("\n".join(blocks), "from-ssm-to-mamba.md", "exec"), {})


def test_the_pictures_of_the_walk(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import plot_ssm

    monkeypatch.setattr(plot_ssm, "DOCS", tmp_path)
    assert plot_ssm.main() == 0
    assert all((REPO / "docs" / path.name).exists() and path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("job", re.findall(r"^## (.*?)$(?=\n\n<!-- commands -->)", CHECKPOINTS.read_text(), re.M))
def test_commands_of_a_job_run(job, command, folder):
    for package in {"Fine-tune": ["peft"], "Convert": ["gguf"], "Export": ["onnx", "onnxscript"]}.get(job, []):
        pytest.importorskip(package)
    [lines] = re.findall(rf"## {job}\n\n<!-- commands -->\n```sh\n(.*?)```", CHECKPOINTS.read_text(), re.S)
    for line in lines.splitlines():
        program, *arguments = shlex.split(line)
        code, out, err = command(*arguments)
        assert (program, code) == ("anymamba", 0), (line, err)
        assert out or err, line
    if job == "Convert":
        assert load_tokenizer(folder / "mine").fingerprint == "bytes"
        program, *arguments = shlex.split("anymamba convert for-transformers again.gguf --to gguf")
        assert command(*arguments)[0] == 0
        assert load_tokenizer(folder / "again.gguf").fingerprint == "bytes"


def test_commands_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 2)
    for line in COMMANDS.splitlines():
        program, *arguments = shlex.split(line.replace("runs/NAME", str(BOOKS)))
        code, out, err = command(*arguments)
        assert (program, code) == ("anymamba", 0), err
        assert out
    assert (tmp_path / "later.state").stat().st_size < 2_000_000


@pytest.mark.parametrize("page", ["inference", "checkpoints", "from-ssm-to-mamba"])
def test_every_file_linked_exists(page):
    text = (REPO / "docs" / f"{page}.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    missing = [link for link in links if not (PAGE.parent / link).exists()]
    assert links
    assert missing == []


# ---- figures ----

GPU = {"gpu": {"name": "a GPU"}}


def decode_result():
    speeds = {}
    for model in ("2.8b", "130m"):
        for b, state in ((1, "fp32"), (64, "fp32"), (64, "bf16")):
            row = {"model": model, "batch": b, "state": state, "tokens_per_s": 100.0 * b}
            speeds[f"{model} b={b}, state {state}"] = row | {"ms": 10.0, "floor": 0.008, "earlier": 77}
    low = {"kl": 1.5e-6, "bits": 1.66391, "more": 0.0001}
    failed = {"1.4b b=1, state fp32": {"error": "out of memory"}, "machine": {"copy": 1.0}}
    return {"card": GPU, "rows": speeds | failed | {"weights fp32, state bf16": low}}


def transformer_result():
    contexts = {1: (512, 2048, 131072), 16: (512, 2048)}
    steps = {f"transformer b={b} t={t}": {"model": "transformer", "batch": b, "context": t, "tokens_per_s": 1e6 / t}
             for b, of in contexts.items() for t in of}  # fmt: skip
    mamba = {f"mamba b={b}": {"model": "mamba", "batch": b, "tokens_per_s": 4000.0 * b} for b in contexts}
    memory = {f"memory t={t}": {"context": t, "cache": t * 1000, "state": 20000} for t in contexts[1]}
    left_out = {"transformer b=16 t=131072": {"missing": 10**12}}
    return {"card": GPU, "rows": steps | mamba | memory | left_out}


def prefill_result():
    reads = {"read t=65536": {"t": 65536, "tokens_per_s": 1.3e6, "gib": 1.5}, "read: worst peak": {"gib": 1.5}}
    position = {"decode at 1024": {"t": 1024, "ms": 0.25}, "decode at 1048576 over 1024": {"ratio": 1.001}}
    return {"card": GPU, "rows": reads | position | {"first token: hit, in memory": {"ms": 12.5}}}


@pytest.fixture
def plot(monkeypatch, tmp_path):
    """The script with folders of its own, and a function that saves a result there."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import plot_inference

    monkeypatch.setattr(plot_inference, "RESULTS", tmp_path)
    monkeypatch.setattr(plot_inference, "DOCS", tmp_path)
    (tmp_path / "inference.md").write_text("# Before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n")

    def save(name, result):
        (tmp_path / f"{name}.jsonl").write_text("{}\n" + json.dumps(result) + "\n")

    return SimpleNamespace(script=plot_inference, save=save, folder=tmp_path)


def test_all_figures(plot):
    pytest.importorskip("matplotlib")
    plot.save("gpu_decode", decode_result())
    plot.save("gpu_transformer", transformer_result())
    plot.save("gpu_prefill", prefill_result())
    cpu = {"processor": "a processor"}
    row = {"t": 100_000, "tokens_per_s": 50_000.0, "bytes": 17 << 20}
    plot.save("cpu_read", {"card": cpu, "rows": {"read t=100000": row, "memory": {"ratio": 1}}})
    assert plot.script.main() == 0
    page = (plot.folder / "inference.md").read_text()
    assert page.startswith("# Before\n<!-- figures -->\nDecoding")
    assert page.endswith("\n<!-- end of figures -->\nafter\n")
    assert "old" not in page
    for line in ("| 2.8b | 64 | 6,400 | 1.25 | 6,400 | 77 |", "| 130m | 1 | 100 | 1.25 |  | 77 |",
                 "| weights fp32, state bf16 | 1.66391 | +0.00010 | 1.5e-06 |",
                 "| 16 | 2,048 | 64,000 | 488 | 131.1 × |",
                 "| reading 65,536 tokens | 1.30 M tokens/s, 1.50 GiB beyond the weights |",
                 "| a token, decoded after 1,024 | 0.250 ms |", "| first token: hit, in memory | 12.5 ms |",
                 "| 100,000 | 50,000 | 17.0 |"):  # fmt: skip
        assert line in page
    before = {}
    for name in ("batch", "context", "memory"):
        before[name] = (plot.folder / f"inference_{name}.svg").read_bytes()
        assert (plot.folder / f"inference_{name}.png").stat().st_size > 10_000
    plot.script.main()
    assert (plot.folder / "inference.md").read_text() == page
    assert all((plot.folder / f"inference_{name}.svg").read_bytes() == svg for name, svg in before.items())


def test_figures_without_results_are_left_out_with_a_message(plot, capsys):
    pytest.importorskip("matplotlib")
    plot.save("gpu_prefill", prefill_result())
    assert plot.script.main() == 0
    messages = capsys.readouterr().err.splitlines()
    assert [re.search(r"no (\w+)\.jsonl: left out", line).group(1) for line in messages] == [
        "gpu_decode", "gpu_transformer", "cpu_read"]  # fmt: skip
    assert list(plot.folder.glob("*.svg")) == []
    assert "Long prompts" in (plot.folder / "inference.md").read_text()


def test_a_page_without_its_marks_is_not_overwritten(plot):
    pytest.importorskip("matplotlib")
    (plot.folder / "inference.md").write_text("<!-- end of figures --> only")
    with pytest.raises(SystemExit, match="must have <!-- figures --> and"):
        plot.script.main()
    assert (plot.folder / "inference.md").read_text() == "<!-- end of figures --> only"
