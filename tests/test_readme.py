"""The README's commands and examples are the ones that run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def command(name):
    return re.search(rf"<!-- command: {name} -->\n```sh\n(.*?)\n```", README, re.S).group(1)


def examples():
    return re.findall(r"<!-- example -->\n```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", examples())
def test_python_examples_run(code, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_two_examples():
    assert len(examples()) == 2


def test_ci_runs_the_readmes_test_command():
    """`.ci/run` takes the command out of the README; here the same extraction gives what the README shows."""
    script = (ROOT / ".ci" / "run").read_text()
    extract = re.search(r"command=\$\((awk .*?README\.md)\)", script).group(1)
    shown = subprocess.run(["bash", "-c", extract], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert shown == command("test")
    assert 'bash -euo pipefail -c "$command"' in script


@pytest.mark.parametrize("name", ["train", "test"])
def test_commands_use_the_constraints_and_real_extras(name):
    text = command(name)
    assert "-c constraints.txt" in text
    extras = re.search(r"\.\[([\w,]+)\]", text).group(1).split(",")
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras)


def test_every_subcommand_shown_exists():
    from anymamba.cli import COMMANDS

    shown = set(re.findall(r"^(?:\.venv/bin/)?anymamba (\w+)", README, re.M))
    assert shown <= set(COMMANDS)
    assert len(shown) >= 4


def test_every_file_linked_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert all((ROOT / link).exists() for link in links)
