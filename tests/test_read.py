"""Reading in chunks is reading at once, in memory that does not grow, and what was read outlives an interruption."""

import os
import re
import sys

import numpy as np
import pytest
import torch

from anymamba import AnymambaError, MambaConfig, MambaLM, MambaState
from anymamba.data import documents
from anymamba.generate import Reading, SamplingConfig, generate, read, reading
from conftest import assert_law, run_python

CONFIG = MambaConfig(vocab_size=253, d_model=16, n_layer=2, d_state=4)  # padded to 256


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MambaLM(CONFIG)


@pytest.fixture(scope="module")
def text():
    """The beginning of Python's own library, as ids."""
    first = next(text for document in documents(None) if len(text := document.text) > 2000)
    return torch.tensor(list(first.encode()[:1000])) % 253


def parts(logits, state):
    return {"logits": logits, **{f"{i}.{k}": v for i, s in enumerate(state.layers) for k, v in s._asdict().items()}}


@torch.no_grad()
def assert_read(model, out, ids, before=None):
    """`out` against one pass, both measured against one pass in float64."""
    exact_model = MambaLM(CONFIG).double()
    exact_model.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    one_pass = model(ids[None], state=before, last_only=True)
    exact_before = None if before is None else before.to(dtype=torch.float64, ssm_dtype=torch.float64)
    exact = exact_model(ids[None], state=exact_before, last_only=True)
    exact = parts(exact.logits[:, -1], exact.state)
    plain = parts(one_pass.logits[:, -1], one_pass.state)
    for name, got in parts(out.logits, out.state).items():
        assert_law(got, plain[name], exact[name].double(), name, slack=32)
    assert out.state.seen.equal(one_pass.state.seen)


@pytest.mark.parametrize("chunk", [1, 7, 333, 999, 1000, 1001, None])
def test_chunks_are_one_pass(model, text, chunk):
    ids = text[:50] if chunk == 1 else text
    out = read(model, ids, chunk=chunk)
    assert out.logits.shape == (1, 256)
    assert_read(model, out, ids)


@pytest.mark.parametrize("chunk", [13, None])
def test_reading_goes_on_from_a_state(model, text, chunk):
    before = read(model, text[:123]).state
    assert_read(model, read(model, text[123:], before, chunk=chunk), text[123:], before)
    assert before.seen.tolist() == [123]


def test_lists_tensors_arrays_and_files_are_the_same(model, text, tmp_path):
    text.numpy().astype(np.uint16).tofile(tmp_path / "ids")
    mapped = np.memmap(tmp_path / "ids", dtype=np.uint16, mode="r")
    want = read(model, text, chunk=300).logits
    for ids in (text.tolist(), text.int(), text.numpy(), mapped, text.numpy().astype(np.uint8)):
        assert torch.equal(read(model, ids, chunk=300).logits, want)


def test_progress_counts_what_this_call_has_read(model, text):
    counts = []
    out = read(model, text[:100], chunk=30, on_progress=counts.append)
    assert counts == [30, 60, 90, 100]
    read(model, text[:5], out.state, chunk=3, on_progress=counts.append)
    assert counts[4:] == [3, 5]


def test_what_was_read_outlives_an_interruption(model, text):
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    last = None
    with pytest.raises(KeyboardInterrupt):
        for last in reading(model, text, chunk=100):  # noqa: B007
            pass
    hook.remove()
    assert last.state.seen.tolist() == [300]
    rest = read(model, text[300:], last.state)
    assert_read(model, rest, text)


def test_gradients_stay_on_around_it_and_no_graph_is_kept(model, text):
    steps = reading(model, text[:20], chunk=10)
    assert not next(steps).logits.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ("text", "a text (str), but it must be token ids; encode it first"),
        ([], "ids are (0,), but must be (t,) of at least one token"),
        ([[1, 2]], "ids are (1, 2), but must be (t,)"),
        ([1.0, 2.0], "float64, but token ids are whole numbers"),
        (torch.zeros(3), "float32, but token ids are whole numbers"),
        ([None, "a"], "object, but token ids are whole numbers"),
        ([1, 2, 253], "the text has id 253 at position 2, but the vocabulary has ids 0 … 252"),
        (np.array([0] * 9 + [-1]), "the text has id -1 at position 9"),
    ],
)
def test_refuses_what_are_no_ids(model, ids, words):
    with pytest.raises(AnymambaError, match=re.escape(words)):
        read(model, ids, chunk=4)


def test_refuses_other_nonsense(model, text):
    for chunk in (0, -1, 2.0, True):
        with pytest.raises(AnymambaError, match="read: chunk="):
            reading(model, text, chunk=chunk)  # at once, before the first step
    with pytest.raises(AnymambaError, match=r"a state of 2 rows for one text; choose a row: state.select\(\[0\]\)"):
        read(model, text, MambaState.zeros(CONFIG, 2))
    with pytest.raises(AnymambaError, match="this model has no vocabulary"):
        read(MambaLM(CONFIG.replace(vocab_size=None)), text)


# ---- going on without a prompt ----


def test_a_text_goes_on_from_its_reading_without_a_prompt(model, text, tmp_path):
    greedy = {"sampling": SamplingConfig(temperature=0), "max_new_tokens": 12}
    want = generate(model, [text], **greedy)[0]
    read(model, text).save(tmp_path / "s", model)
    logits, state = Reading.load(tmp_path / "s", model)
    assert generate(model, [[]], state=state, logits=logits, **greedy)[0].ids == want.ids
    two = generate(model, [[], [5]], state=state.fork(2), logits=logits.repeat(2, 1), **greedy)
    five = generate(model, [[*text.tolist(), 5]], **greedy)[0]
    assert [c.ids for c in two] == [want.ids, five.ids]
    assert MambaState.load(tmp_path / "s", model).seen.tolist() == [len(text)]


def test_a_state_alone_does_not_say_what_comes_next(model, text, tmp_path):
    logits, state = read(model, text)
    state.save(tmp_path / "s", model)
    with pytest.raises(AnymambaError, match="does not say what comes next"):
        Reading.load(tmp_path / "s", model)
    with pytest.raises(AnymambaError, match="prompt 0 is empty"):
        generate(model, [[]], state=state)
    for wrong in ({"logits": logits}, {"logits": logits[:, :9], "state": state}):
        with pytest.raises(AnymambaError, match=r"must be \(1, 256\) and go with one"):
            generate(model, [[]], **wrong)


# ---- memory ----

CLEAR_REFS = "/proc/self/clear_refs"
MEASURE = """
import sys, numpy as np, torch
from itertools import islice
from anymamba import MambaConfig, MambaLM
from anymamba.data import documents
from anymamba.generate import read
chunk_sizes = sys.modules[read.__module__]

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

def extra_peak(*args, **options):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    read(model, *args, **options)
    return status("VmHWM") - before

model = MambaLM(MambaConfig(vocab_size=256, d_model=64, n_layer=1, d_state=4))
book = "".join(document.text for document in islice(documents(None), 100)).encode()[:400_000]
assert len(book) == 400_000
ids = np.frombuffer(book, np.uint8)
read(model, ids[:5000], chunk=2048)  # compiles
print(extra_peak(ids[:20_000], chunk=2048), extra_peak(ids, chunk=2048), extra_peak(ids[:16384], chunk=8192),
      chunk_sizes.bytes_per_token(model))
"""


@pytest.mark.skipif(not os.access(CLEAR_REFS, os.W_OK), reason="the system does not record a peak")
def test_memory_does_not_grow_with_the_text_and_is_what_chunks_are_chosen_by():
    done = run_python(MEASURE, MALLOC_MMAP_THRESHOLD_="65536", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    short, long, chunk, per_token = map(int, done.stdout.split())
    assert long <= 1.1 * short + (1 << 20)  # 20 times the text, whose own 400 kB are there before
    assert short > 1 << 20  # else nothing was measured
    assert 0.8 * per_token <= chunk / 8192 <= 1.3 * per_token


@torch.no_grad()
def test_rows_of_one_length_are_read_as_rows(model, text):
    """Without lengths; the logits and states are those of each row alone, and of rows of several lengths."""
    sizes = sys.modules[read.__module__]
    before = model(text[:60].view(3, 20)).state
    told = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs["lengths"]), with_kwargs=True)
    try:
        same = [text[100:150], text[200:250], text[300:350]]
        got = sizes.read_batch(model, same, before, chunk=20)
        assert told == [None] * 3
        mixed = sizes.read_batch(model, [*same[:2], text[300:330]], before, torch.zeros(3, 256), chunk=20)
        assert told[3] is None
        assert [v.tolist() for v in told[4:]] == [[20, 20, 10], [10, 10, 0]]
    finally:
        hook.remove()
    for i, ids in enumerate(same):
        row = Reading(got.logits[[i]], got.state.select([i]))
        assert_read(model, row, ids, before.select([i]))
        ids = ids if i < 2 else text[300:330]
        assert_read(model, Reading(mixed.logits[[i]], mixed.state.select([i])), ids, before.select([i]))


def test_chunks_follow_the_free_memory(model, monkeypatch):
    sizes = sys.modules[read.__module__]  # the function hides the module of its name
    per_token = sizes.bytes_per_token(model)
    for free, chunk in [(None, 2048), (1 << 50, 2048), (4 * 1000 * per_token, 1000), (0, 256)]:
        monkeypatch.setattr(sizes, "free_memory", lambda device, free=free: free)
        assert sizes.chunk_for(model) == chunk
    monkeypatch.setitem(sizes.LONGEST, "cpu", 1 << 40)
    for free in (None, 1 << 50):
        monkeypatch.setattr(sizes, "free_memory", lambda device, free=free: free)
        assert 1 << 30 < sizes.chunk_for(model) * per_token < 2 << 30
    monkeypatch.undo()
    free = sizes.free_memory(torch.device("cpu"))
    if os.path.exists("/proc/meminfo"):
        assert 1 << 20 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
