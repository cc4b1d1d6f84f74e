"""The rules of the code itself: imports go one way, files and functions stay small, importing is light."""

import ast
import statistics
from pathlib import Path

import pytest

import anymamba
from conftest import REPO, run_python

PACKAGE = REPO / "src" / "anymamba"
# each room may import those below it, and itself
ROOMS = ["cli", "serve", "eval", "train", "lora", "export", "tasks", "inspect", "hf", "compat", "generate", "data",
         "sequence", "checkpoint", "model", "layers", "state", "ops", "discretized", "backends", "registration",
         "padding", "ids", "kernels", "reference", "config", "files", "errors"]  # fmt: skip
# a model saves and loads itself: the two methods reach up, when they are called
REACH_UP = {("model", "checkpoint")}
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in SOURCES if path.parent != PACKAGE or not path.name.startswith("__")]
files = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree):
    """(room, at module level?) of each import of the package."""
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that they can be read"
            names = [node.module]
            if node.module == "anymamba":
                names = [f"anymamba.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "anymamba":
                rest = rest.split(".")[0]
                yield anymamba._HOME.get(rest, rest), id(node) in top


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = room_of(path)
    assert room in ROOMS, f"{path} is in no room of the list"
    for other, at_top in imports(ast.parse(path.read_text())):
        if other == "__version__":
            continue
        assert other in ROOMS, f"{path} imports anymamba.{other}, which is in no room of the list"
        if (room, other) in REACH_UP:
            assert not at_top, f"{path} imports anymamba.{other}, above it, when it is itself imported"
        elif room in ("kernels", "reference"):
            assert other == room, f"{path} imports anymamba.{other}; {room} import nothing else of the package"
        else:
            assert ROOMS.index(room) <= ROOMS.index(other), f"{path} imports anymamba.{other}, which is above it"


def test_rooms_that_exist_are_in_order():
    found = {room_of(path) for path in MODULES}
    assert found <= set(ROOMS)
    assert {"kernels", "reference", "ops", "model"} <= found


@files
def test_files_are_short(path):
    limit = 500 if path.name.startswith("triton_") else 350
    assert len(path.read_text().splitlines()) <= limit


@files
def test_functions_are_short(path):
    """Lines of code, the docstring apart."""
    limit = 120 if room_of(path) == "kernels" else 50
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, lines = node.body[0], node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= first.end_lineno - first.lineno + 1
            assert lines <= limit, f"{node.name} has {lines} lines"


def test_public_names_exist():
    for name in anymamba.__all__:
        assert getattr(anymamba, name) is not None
    assert set(anymamba.__all__) <= set(dir(anymamba))
    with pytest.raises(AttributeError, match="module 'anymamba' has no attribute 'nothing'"):
        _ = anymamba.nothing


HEAVY = ("numba", "llvmlite", "triton", "transformers", "matplotlib", "pyarrow", "tokenizers", "rich", "peft", "onnx")


@pytest.mark.parametrize("statement", ["import anymamba", "import anymamba.ops, anymamba.model, anymamba.state"])
def test_import_needs_torch_only(statement):
    done = run_python(f"import sys, torch; before = set(sys.modules)\n{statement}\nprint(*set(sys.modules) - before)")
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & set(HEAVY)


def test_import_is_quick():
    """At most 0.3 s over `import torch`. Processor time, which does not count what else the machine does."""
    code = "import time, torch; start = time.process_time(); import anymamba; print(time.process_time() - start)"
    assert statistics.median(float(run_python(code).stdout) for _ in range(3)) <= 0.3
