"""Names on the Hugging Face hub: from a cache as huggingface_hub keeps it, offline, and from a hub on this machine."""

import hashlib
import http.server
import json
import threading

import pytest
import torch

from anymamba import AnymambaError, MambaConfig, MambaLM
from anymamba.checkpoint import hub
from anymamba.data import ByteTokenizer
from conftest import run_python

CONFIG = MambaConfig(d_model=16, n_layer=1, d_state=3)
OLD, NEW = "0" * 40, "1" * 40  # commits
CODE = """
import sys
from anymamba import AnymambaError, MambaLM
for name in {names!r}:
    try:
        print(name, "=", float(MambaLM.from_pretrained(name).backbone.norm_f.weight[0]), flush=True)
    except AnymambaError as error:
        print(name, "=", error, flush=True)
"""


def model(value, form, path):
    made = MambaLM(CONFIG)
    torch.nn.init.constant_(made.backbone.norm_f.weight, value)
    made.save_pretrained(path, form)
    ByteTokenizer().save(path)


def said(names, **environment):
    done = run_python(CODE.format(names=names), HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_XET="1", **environment)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" = ", 1) for line in done.stdout.splitlines())
    assert list(lines) == names
    return lines


def test_what_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert hub.hub_name("state-spaces/mamba-130m", None) == ("state-spaces/mamba-130m", None)
    assert hub.hub_name("a/b@v1.0", "main") == ("a/b", "v1.0")
    assert hub.hub_name("a/b", "refs/pr/1") == ("a/b", "refs/pr/1")
    assert hub.hub_name("runs/on@main", None) == ("runs/on", "main")
    for path in ("runs/one", "runs/on", "runs", "./b", "../b", "~/b", "/a/b", "a/b/c", "a\\b", "a/", "", "nowhere"):
        assert hub.hub_name(path, None) is None, path
    with pytest.raises(AnymambaError, match=r"no config\.json in runs/on"):
        MambaLM.from_pretrained("runs/on")


def test_offline(tmp_path):
    """By name, branch and commit from the cache; what is not all there is refused. Without any network."""
    repository = tmp_path / "hub" / "models--org--model"
    for value, commit, form in ((2, OLD, "state-spaces"), (3, NEW, "hf")):
        model(value, form, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for ref, commit in (("main", NEW), ("v1", OLD)):
        (repository / "refs" / ref).write_text(commit)
    partial = tmp_path / "hub" / "models--org--partial"
    model(4, "hf", partial / "snapshots" / NEW)
    (partial / "snapshots" / NEW / "model.safetensors").unlink()
    (partial / "refs").mkdir()
    (partial / "refs" / "main").write_text(NEW)
    names = ["org/model", "org/model@v1", f"org/model@{OLD}", "org/model@v2", "org/partial", "org/other"]
    lines = said(names, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert list(lines.values())[:3] == ["3.0", "2.0", "2.0"]
    for name in names[3:]:
        assert lines[name].startswith(f"no folder {name.partition('@')[0]} here, not all of that model in the cache")
        assert lines[name].endswith("and HF_HUB_OFFLINE is set: unset it to fetch the rest")
    code = "from anymamba.cli import main; exit(main(['generate', 'org/model@v1', '--prompt', 'a', {}]))"
    done = run_python(code.format("'--max-new-tokens', '3'"), HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout[:1]) == (0, "a"), done.stderr


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as downloading asks for."""

    root, asked = None, ()

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if self.command == "GET" and parts[0] != "api":
            self.asked.append("/".join(parts))
        refusals = {"org/gated": (403, "GatedRepo"), "org/private": (401, "RepoNotFound"), "org/broken": (400, "Odd")}
        if name in refusals:
            return self.say(refusals[name][0], **{"X-Error-Code": refusals[name][1]})
        folder = self.root / name
        if parts[-1] == "v9":
            return self.say(404, **{"X-Error-Code": "RevisionNotFound"})
        if parts[0] == "api" and "tree" in parts:
            files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": NEW} for f in folder.iterdir()]
            return self.say(200, json.dumps(files).encode())
        if parts[0] == "api":
            siblings = [{"rfilename": f.name} for f in folder.iterdir()] if folder.is_dir() else []
            return self.say(200, json.dumps({"id": name, "sha": NEW, "siblings": siblings}).encode())
        path = folder / parts[-1]
        if not path.is_file():
            return self.say(404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": NEW})
        etag = hashlib.sha256(path.read_bytes()).hexdigest()
        return self.say(200, path.read_bytes(), ETag=f'"{etag}"', **{"X-Repo-Commit": NEW})

    do_HEAD = do_GET  # noqa: N815

    def say(self, code, body=b"", **headers):
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """A hub with models in root/org, and the paths that were fetched from it."""
    handler = type("Served", (Hub,), {"root": tmp_path / "root", "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()


def test_from_a_hub(tmp_path, served):
    """Only what is needed is fetched, nothing twice, and no weights of what cannot run."""
    url, asked = served
    root = tmp_path / "root" / "org"
    model(5, "hf", root / "both")
    (root / "both" / "pytorch_model.bin").write_bytes(b"not to be fetched")
    (root / "both" / "training_args.bin").write_bytes(b"nor this")
    model(6, "state-spaces", root / "bin")
    model(7, "hf", root / "second")
    (root / "second" / "config.json").write_text('{"model_type": "mamba2"}')
    model(8, "hf", root / "empty")
    (root / "empty" / "model.safetensors").unlink()
    names = ["org/both", "org/bin@main", "org/both@main", "org/second", "org/empty", "org/gated", "org/private",
             "org/both@v9", "org/broken"]  # fmt: skip
    lines = said(names, HF_HOME=str(tmp_path / "home"), HF_ENDPOINT=url)
    assert [lines[name] for name in names[:3]] == ["5.0", "6.0", "5.0"]
    for name, words in [
        ("org/second", "not supported yet: Mamba-2 ('mamba2')"),
        ("org/empty", "org/empty has neither model.safetensors nor pytorch_model.bin, whole or in shards"),
        ("org/gated", f"org/gated is gated: ask for access at {url}/org/gated, then log in with  hf auth login"),
        ("org/private", f"there is no folder org/private here and no such model at {url}, or it is private"),
        ("org/both@v9", "org/both has no revision 'v9': give a branch, tag or commit of it"),
        ("org/broken", f"{url} cannot be reached"),
    ]:
        assert words in lines[name]
    fetched = sorted(path.replace(f"/resolve/{NEW}", "") for path in asked)
    assert fetched == sorted(f"org/{name}" for name in (
        "both/config.json", "both/model.safetensors", "both/tokenizer.json", "bin/config.json", "bin/pytorch_model.bin",
        "bin/tokenizer.json", "second/config.json", "second/tokenizer.json", "empty/config.json",
        "empty/tokenizer.json"))  # fmt: skip


def test_without_a_network(tmp_path):
    lines = said(["org/model"], HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9")
    assert "no folder org/model here" in lines["org/model"]
    assert "http://127.0.0.1:9 cannot be reached" in lines["org/model"]
