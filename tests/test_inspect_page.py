"""The page of `anymamba inspect`: its structure everywhere, what it draws where there is a browser."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from anymamba import AnymambaError, MambaConfig, MambaLM
from anymamba.cli.inspect import token_texts
from anymamba.data import ByteTokenizer, load_tokenizer
from anymamba.inspect import attention_blocks, capture, horizon, report, write_strength
from anymamba.inspect.plots import save_plots
from conftest import REPO

BOOKS = REPO / "src" / "anymamba" / "models" / "books"
NASTY = "</script><b>é</b>\n@DATA@ €&amp;"
BROWSER = os.environ.get("ANYMAMBA_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MambaLM(MambaConfig(d_model=24, n_layer=3, d_state=5))


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """The model's folder and the page that the command writes of a text."""
    folder = tmp_path_factory.mktemp("inspect")
    model.save_pretrained(folder / "model")
    ByteTokenizer().save(folder / "model")
    (folder / "text.txt").write_text(NASTY * 20, encoding="utf-8")
    return folder


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_command_writes_one_page_that_loads_nothing(written, command, model):
    out = written / "page.html"
    arguments = ("inspect", written / "model", "--file", written / "text.txt", "--tokens", 300, "-o", out, "--force")
    code, said, errors = command(*arguments, "--png", written / "png")
    assert code == 0, errors
    text = NASTY * 20
    assert f"300 tokens, the first of {len(text.encode())}" in said
    page = out.read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)\s*=|url\(|@import|fetch\(|XMLHttp", page)
    assert page.count("</script>") == 2  # its own: the text's cannot end them
    data = data_of(page)
    assert "".join(data["tokens"]) == text.encode()[:300].decode(errors="replace")
    assert (data["size"], data["block"], len(data["layers"])) == (100, 3, 3)
    for name in ("step_sizes", "attention", "horizons"):
        picture = written / "png" / f"{name}.png"
        assert str(picture) in said
        from matplotlib.image import imread

        assert imread(picture)[..., :3].std() > 0.05, f"{name} is blank"


def test_the_numbers_of_the_page_are_those_of_the_model(model):
    ids = torch.randint(0, 257, (50,), generator=torch.Generator().manual_seed(0))
    summaries = report.summarise(model, ids, side=20)
    data = data_of(report.page(summaries, ["a"] * 50, "<title>", "about"))
    p = data["size"]
    assert (p, data["block"]) == (17, 3)
    floats = lambda text: torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy())  # noqa: E731
    for i, layer in capture(model, ids[None]).layers.items():
        shown = data["layers"][i]
        torch.testing.assert_close(floats(shown["dt"]), layer.dt[0].mean(-1))
        torch.testing.assert_close(floats(shown["write"]), write_strength(layer)[0].mean(-1))
        chosen = [c["index"] for c in shown["channels"]]
        want = torch.cat([attention_blocks(layer, 20)[None], attention_blocks(layer, 20, chosen)])
        q = np.frombuffer(base64.b64decode(shown["maps"]), np.int8).reshape(len(want), -1) / 127
        rows, columns = np.tril_indices(p)
        got = np.sign(q) * q**2 * np.array(shown["scales"])[:, None]
        error = np.abs(got - want.numpy()[:, rows, columns]).max(1) / np.array(shown["scales"])
        assert error.max() < 2 / 127
        middles = horizon(layer).median(-1).values
        assert [c["horizon"] for c in shown["channels"]] == pytest.approx(middles[chosen].tolist(), rel=1e-3)
        assert middles[chosen[0]] == middles.min()
        assert middles[chosen[-1]] == middles.max()


def test_layers_recorded_a_few_at_a_time_are_the_same(model, monkeypatch):
    ids = torch.arange(30)
    whole = report.summarise(model, ids)
    monkeypatch.setattr(report, "TRACE_BYTES", 1)
    for a, b in zip(whole, report.summarise(model, ids), strict=True):
        assert torch.equal(a.maps, b.maps)
        assert torch.equal(a.dt, b.dt)


@pytest.mark.parametrize("layers", [1, 24, 64])
def test_maps_of_any_depth_stay_within_the_size(layers):
    side, maps = report.side_for(layers), 1 + report.CHANNELS
    assert 60 < side <= 128
    assert layers * maps * side * (side + 1) / 2 * 4 / 3 < 3.5e6


def test_token_texts_are_the_text():
    text = "Ein Mäuschen €\n"
    pieces = token_texts(ByteTokenizer().encode(text), ByteTokenizer())
    assert "".join(pieces) == text
    assert pieces[5:7] == ["", "ä"]
    tokenizer = load_tokenizer(BOOKS)
    assert "".join(token_texts(tokenizer.encode("It was a dark night"), tokenizer)) == "It was a dark night"


def test_refusals(written, command, model):
    run = ("inspect", written / "model", "-o", written / "other.html")
    for arguments, message in {
        (*run,): "give --prompt TEXT or --file FILE",
        (*run, "--prompt", "a", "--file", "b"): "one of the two",
        (*run, "--prompt", ""): "the text is empty",
        (*run, "--prompt", "a", "--tokens", "0"): "--tokens 0, but it must be at least 1",
        (*run, "--file", written / "model" / "model.safetensors"): "is not UTF-8 text",
        ("inspect", written / "model", "-o", written, "--prompt", "a"): "is a folder",
        (*run, "--prompt", "a", "--png", written / "text.txt"): "text.txt cannot be one",
    }.items():
        code, _, errors = command(*arguments)
        assert code == 2
        assert message in errors
    assert not (written / "other.html").exists()
    with pytest.raises(AnymambaError, match="3 texts of tokens, but 4 tokens were read"):
        report.page(report.summarise(model, [1, 2, 3, 4]), ["a"] * 3, "", "")
    with pytest.raises(AnymambaError, match=r"\(2, 2\) torch.int64, but must be \(t,\)"):
        report.summarise(model, [[1, 2], [3, 4]])


def test_other_models_are_refused_with_one_message_and_ablations_are_not(command, tmp_path):
    for name, changes in {
        "gru": {"mixer": "gru"},
        "bare": {"gate": False, "use_conv": False, "selective": "dt"},
    }.items():
        MambaLM(MambaConfig(d_model=16, n_layer=2, **changes)).save_pretrained(tmp_path / name)
        ByteTokenizer().save(tmp_path / name)
    code, _, errors = command("inspect", tmp_path / "gru", "--prompt", "a", "-o", tmp_path / "page.html")
    assert code == 2
    assert errors.startswith(
        "anymamba inspect: layer 0 is of mixer='gru', which has no steps that the state fades by: "
    )
    assert errors.count("inspect: ") == 1
    code, said, errors = command("inspect", tmp_path / "bare", "--prompt", "a", "-o", tmp_path / "new" / "page.html")
    assert (code, errors) == (0, "")
    assert "1 token, " in said
    assert len(data_of((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))["layers"]) == 2


def test_progress_is_told_and_an_interruption_leaves_no_page(written, command, model, monkeypatch):
    calls = []
    report.summarise(model, [1, 2, 3], on_layer=lambda: calls.append(1))
    assert len(calls) == 3

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("anymamba.cli.inspect.page", interrupt)
    code, _, errors = command("inspect", written / "model", "--prompt", "a", "-o", written / "half.html")
    assert code == 130
    assert "interrupted" in errors
    assert not list(written.glob("*half*"))


def test_standard_input(written, command):
    run = ("inspect", written / "model", "--prompt", "-", "-o", written / "piped.html", "--tokens", 10**6)
    code, _, errors = command(*run)
    assert code == 2
    assert "the text is empty" in errors
    code, said, errors = command(*run, stdin="Mäuschen")
    assert (code, errors) == (0, "")
    assert "9 tokens, " in said  # bytes, however many were allowed


def test_standard_input_that_is_no_text(written):
    done = subprocess.run(
        [sys.executable, "-m", "anymamba", "inspect", written / "model", "--prompt", "-", "-o", written / "bad.html"],
        input=b"\xff\xfe\x00a", capture_output=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(REPO / "src"), "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode == 2
    assert b"standard input is not UTF-8 text" in done.stderr
    assert not (written / "bad.html").exists()


def test_one_token_and_no_channels(model, tmp_path):
    (first, *_) = summaries = report.summarise(model, [7], channels=0)
    assert first.maps.shape == (1, 1, 1)
    assert data_of(report.page(summaries, ["a"], "", ""))["block"] == 1
    assert len(save_plots(summaries, tmp_path)) == 3


# added to a copy of the page: what --dump-dom cannot say
MEASURE = """<script>
const root = document.documentElement, map = document.getElementById("map"), box = map.getBoundingClientRect();
map.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + 1, clientY: box.bottom - 1 }));
const wide = [...document.body.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > innerWidth + 1);
const pixels = map.getContext("2d").getImageData(0, 0, map.width, map.height).data;
root.dataset.measured = JSON.stringify({ scroll: root.scrollWidth, inner: innerWidth, wide: wide.map(e => e.tagName),
  painted: pixels.filter((v, i) => i % 4 === 3 && v > 0).length,
  dark: matchMedia("(prefers-color-scheme: dark)").matches, paper: getComputedStyle(document.body).backgroundColor });
</script>"""


@pytest.mark.skipif(
    BROWSER is None, reason="no browser found: put chromium on the path, or its name in ANYMAMBA_BROWSER"
)
@pytest.mark.parametrize("flags", ["--window-size=1200,900", "--window-size=390,844", "--force-dark-mode"])
def test_a_browser_draws_it(model, tmp_path, flags):
    tokens = [NASTY, "", "a\nb", "wide" * 200, *"cdef"]
    page = report.page(report.summarise(model, list(range(8))), tokens, NASTY * 5, "about")
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", flags,
         "--dump-dom", f"{(tmp_path / 'page.html').as_uri()}#layer=2&map=3"],
        capture_output=True, text=True, timeout=60, encoding="utf-8",
    )  # fmt: skip
    assert 'data-drawn="layer 2 map 3"' in done.stdout
    assert done.stdout.count("<option") == 2 + 1 + report.CHANNELS
    assert len(re.findall(r'class="row( chosen)?" data-layer', done.stdout)) == 3
    assert "<b>é</b>" not in done.stdout
    assert re.search(r'id="map-told">token 7 .*\nreads \S+ of token 0 ', done.stdout)
    measured = json.loads(html.unescape(re.search(r'data-measured="(.*?)"', done.stdout)[1]))
    assert measured["scroll"] <= measured["inner"], "the page scrolls sideways"
    assert measured["wide"] == []
    assert measured["painted"] == 8 * 9 / 2  # the triangle, nothing above it
    assert measured["paper"] == ("rgb(22, 22, 24)" if measured["dark"] else "rgb(252, 252, 250)")
