"""PrefixCache: the same answers, fewer tokens read; budgets, files, and what can be wrong with them."""

import os
import threading

import pytest
import torch

from anymamba import AnymambaError, MambaConfig, MambaLM
from anymamba.data import documents
from anymamba.generate import PrefixCache, SamplingConfig, generate, read, stream
from conftest import run_python

CONFIG = MambaConfig(vocab_size=256, d_model=16, n_layer=2, d_state=4)
GREEDY = {"sampling": SamplingConfig(temperature=0), "max_new_tokens": 10}
EVERY = 16
SETUP = """
import torch
from anymamba import MambaConfig, MambaLM
torch.manual_seed(0)
model = MambaLM(MambaConfig(vocab_size=256, d_model=16, n_layer=2, d_state=4, tie_embeddings=False))
"""


def make_model(seed=0):
    torch.manual_seed(seed)
    return MambaLM(CONFIG.replace(tie_embeddings=False))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def text():
    first = next(text for document in documents(None) if len(text := document.text) > 2000)
    return list(first.encode()[:400])


@pytest.fixture
def tokens_read(model):
    """How many tokens the model reads, a number for each forward pass."""
    counts = []

    def count(_, args, kwargs):
        lengths = kwargs.get("lengths")
        counts.append(args[0].numel() if lengths is None else int(lengths.sum()))

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    hook.remove()


@pytest.fixture
def nbytes(model):
    return read(model, [1]).state.nbytes


def assert_same(out, want):
    torch.testing.assert_close(out.logits, want.logits, atol=1e-5, rtol=1e-4)
    assert out.state.seen.tolist() == want.state.seen.tolist()
    for layer, expected in zip(out.state.layers, want.state.layers, strict=True):
        torch.testing.assert_close(layer, expected, atol=1e-5, rtol=1e-4)


def test_only_the_rest_is_read(model, text, tokens_read):
    cache = PrefixCache(model, every=EVERY)
    first = cache.read(text[:100])
    assert sum(tokens_read) == 100
    assert len(cache) == 6
    assert cache.nbytes == 6 * first.state.nbytes
    tokens_read.clear()
    longer, fork = cache.read(text[:150]), cache.read([*text[:40], 1, 2, 3])
    assert sum(tokens_read) == (150 - 96) + (43 - 32)
    assert (cache.hits, cache.misses, cache.tokens_saved) == (2, 1, 96 + 32)
    assert_same(first, read(model, text[:100]))
    assert_same(longer, read(model, text[:150]))
    assert_same(fork, read(model, [*text[:40], 1, 2, 3]))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33])
def test_a_prompt_again(model, text, tokens_read, length):
    """At least one token is read, for the logits."""
    cache = PrefixCache(model, every=EVERY)
    want = cache.read(text[:length])
    tokens_read.clear()
    assert_same(cache.read(text[:length]), want)
    assert sum(tokens_read) == length - (length - 1) // EVERY * EVERY


def test_a_token_changed_is_another_beginning(model, text, tokens_read):
    cache = PrefixCache(model, every=EVERY)
    cache.read(text[:64])
    for place, kept in ((0, 0), (15, 0), (16, 16), (47, 32), (48, 48), (63, 48)):
        other = list(text[:64])
        other[place] ^= 1
        tokens_read.clear()
        assert_same(cache.read(other), read(model, other))
        assert tokens_read.pop() == 64  # of the plain read
        assert sum(tokens_read) == 64 - kept
    cache.read(text[16:64])  # the same blocks behind another beginning
    assert cache.misses == 4


def test_generation_with_a_cache_is_generation(model, text):
    cache = PrefixCache(model, every=EVERY)
    prompts = [text[:100], text[:7], [*text[:50], 9], text[200:233], text[:96]]
    for _ in range(2):
        for options in ({}, {"num_beams": 3}, {"n": 2, "max_new_tokens": 4}):
            options = GREEDY | options
            got = generate(model, prompts, cache=cache, **options)
            want = generate(model, prompts, **options)
            assert [c.ids for c in got] == [c.ids for c in want]
    assert cache.hits > 0
    assert [e.id for e in stream(model, text[:100], cache=cache, **GREEDY)] == got_ids(model, text[:100])
    sampled = generate(model, prompts, cache=cache, seed=3)
    assert [c.ids for c in sampled] == [c.ids for c in generate(model, prompts, seed=3)]


def got_ids(model, prompt):
    return generate(model, [prompt], **GREEDY)[0].ids


def test_states_that_were_given_out_do_not_change(model, text):
    cache = PrefixCache(model, every=EVERY)
    state = cache.read(text[: EVERY + 1]).state
    kept = next(iter(cache._states.values()))
    copies = state.copy(), kept.copy()
    generate(model, [text[:90]], cache=cache, **GREEDY)
    for value, copy in zip((state, kept), copies, strict=True):
        for layer, before in zip(value.layers, copy.layers, strict=True):
            assert torch.equal(layer.conv, before.conv)
            assert torch.equal(layer.ssm, before.ssm)


def test_the_least_recently_used_goes_first(model, text, nbytes):
    cache = PrefixCache(model, every=EVERY, max_bytes=3 * nbytes)
    a, b, c, d = ([first, *text[:EVERY]] for first in (1, 2, 3, 4))
    for prompt in (a, b, c, a, d):  # a is used again, so b is the oldest when d comes
        cache.read(prompt)
    assert (len(cache), cache.nbytes) == (3, 3 * nbytes)
    assert (cache.hits, cache.misses) == (1, 4)
    for prompt in (a, c, d):
        cache.read(prompt)
    assert (cache.hits, cache.misses) == (4, 4)
    cache.read(b)
    assert (cache.hits, cache.misses) == (4, 5)


def test_a_budget_below_one_state_keeps_none(model, text, nbytes):
    cache = PrefixCache(model, every=EVERY, max_bytes=nbytes - 1)
    for _ in range(2):
        assert_same(cache.read(text[:40]), read(model, text[:40]))
    assert (len(cache), cache.nbytes, cache.hits) == (0, 0, 0)


# ---- on disk ----


def test_files_are_found_by_a_later_cache(model, text, tmp_path, tokens_read):
    PrefixCache(model, every=EVERY, folder=tmp_path / "new" / "cache").read(text[:50])
    later = PrefixCache(make_model(), every=EVERY, folder=tmp_path / "new" / "cache")
    assert_same(later.read(text[:60]), read(model, text[:60]))
    assert (later.hits, later.tokens_saved, len(later)) == (1, 48, 1)


def test_files_are_found_by_another_process(model, text, tmp_path):
    code = f"""{SETUP}
from anymamba.generate import PrefixCache
PrefixCache(model, every={EVERY}, folder={str(tmp_path)!r}).read({text[:50]})
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    cache = PrefixCache(model, every=EVERY, folder=tmp_path)
    assert_same(cache.read(text[:60]), read(model, text[:60]))
    assert cache.tokens_saved == 48


def test_the_model_is_named_once_not_for_every_file(model, text, tmp_path, monkeypatch):
    named, real = [], model.fingerprint
    monkeypatch.setattr(model, "fingerprint", lambda: named.append(1) or real())
    cache = PrefixCache(model, every=EVERY, max_bytes=1, folder=tmp_path)
    cache.read(text[:100])
    cache.read(text[:100])
    assert (len(list(tmp_path.iterdir())), cache.hits, len(named)) == (6, 1, 1)


def test_what_memory_has_dropped_is_still_on_disk(model, text, nbytes, tmp_path):
    cache = PrefixCache(model, every=EVERY, max_bytes=nbytes, folder=tmp_path)
    cache.read([1, *text[:20]])
    cache.read([2, *text[:20]])
    cache.read([1, *text[:20]])
    assert (len(cache), cache.hits, cache.misses) == (1, 1, 2)


def test_the_disk_has_its_own_budget(model, text, tmp_path):
    PrefixCache(model, every=EVERY, folder=tmp_path).read([0, *text[:EVERY]])
    [path] = tmp_path.iterdir()
    size = path.stat().st_size
    path.unlink()
    (tmp_path / "notes.txt").write_text("not ours" * size)
    cache = PrefixCache(model, every=EVERY, max_bytes=1, max_disk_bytes=3 * size, folder=tmp_path)
    for step, first in enumerate((1, 2, 3, 1, 4)):  # as in memory: 2 is the oldest when 4 comes
        before = set(tmp_path.iterdir())
        cache.read([first, *text[:EVERY]])
        for file in set(tmp_path.iterdir()) - before:
            os.utime(file, (step, step))  # times that do not depend on the clock's grain
    assert len(list(tmp_path.glob("*.state"))) == 3
    again = PrefixCache(model, every=EVERY, folder=tmp_path)
    for first in (1, 3, 4):
        again.read([first, *text[:EVERY]])
    assert (again.hits, again.misses) == (3, 0)
    again.read([2, *text[:EVERY]])
    assert again.misses == 1
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "another model", "another prefix"])
def test_bad_files_are_misses_with_a_note(model, text, tmp_path, damage):
    PrefixCache(model, every=EVERY, folder=tmp_path).read(text[: EVERY + 1])
    [path] = tmp_path.iterdir()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage in ("empty", "text"):
        path.write_text("not a state" if damage == "text" else "")
    elif damage == "another model":
        read(make_model(1), text[:EVERY]).state.save(path, make_model(1))
    else:
        read(model, text[: EVERY + 5]).state.save(path, model)
    cache = PrefixCache(model, every=EVERY, folder=tmp_path)
    with pytest.warns(UserWarning, match="prefix cache: passed over a file, its text is read again"):
        out = cache.read(text[: EVERY + 1])
    assert_same(out, read(model, text[: EVERY + 1]))
    assert (cache.hits, cache.misses) == (0, 1)
    assert PrefixCache(model, every=EVERY, folder=tmp_path).start(torch.tensor(text[:17])).position == EVERY


def test_models_share_a_folder(model, text, tmp_path):
    for each in (model, make_model(1)):
        cache = PrefixCache(each, every=EVERY, folder=tmp_path)
        assert_same(cache.read(text[:40]), read(each, text[:40]))
        assert (cache.hits, cache.misses) == (0, 1)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_full_disk_costs_a_note(model, text, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    cache = PrefixCache(model, every=EVERY, folder=tmp_path)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.warns(UserWarning, match="not kept on disk: .*No space left on device"):
        cache.read(text[:20])
    cache.read(text[:20])
    assert cache.hits == 1


# ---- the rest ----


def test_threads_share_a_cache(model, text, nbytes, tmp_path):
    cache = PrefixCache(model, every=EVERY, max_bytes=5 * nbytes, folder=tmp_path)
    prompts = [[first, *text[: 40 + first]] for first in range(8)]
    want = [read(model, prompt) for prompt in prompts]
    outs, errors = {}, []

    def work(offset):
        try:
            for i in range(16):
                k = (i + offset) % 8
                outs[offset, i] = k, cache.read(prompts[k])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(outs) == 64
    for k, out in outs.values():
        assert_same(out, want[k])
    assert cache.hits + cache.misses == 64
    assert cache.nbytes == sum(state.nbytes for state in cache._states.values()) <= 5 * nbytes


def test_refuses(model, text, tmp_path):
    cache = PrefixCache(model, every=EVERY)
    for wrong in ({"every": 0}, {"max_bytes": -1}, {"max_disk_bytes": 0.5}):
        with pytest.raises(AnymambaError, match=f"PrefixCache: {next(iter(wrong))}="):
            PrefixCache(model, **wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(AnymambaError, match=r"cannot make .*; choose another folder"):
        PrefixCache(model, folder=tmp_path / "file" / "cache")
    with pytest.raises(AnymambaError, match="prompt 0 is empty"):
        cache.read([])
    with pytest.raises(AnymambaError, match="has id 256 at position 1"):
        cache.read([1, 256])
    with pytest.raises(AnymambaError, match="cache with state: a cache knows texts from their first token"):
        generate(model, [text], state=read(model, text).state, cache=cache)
    with pytest.raises(AnymambaError, match="the cache was made for another model"):
        generate(make_model(1), [text], cache=cache)


def test_those_who_read_by_themselves(model, text):
    """`keep` takes what stands at a checkpoint, and nothing else."""
    cache, ids = PrefixCache(model, every=EVERY), torch.tensor(text[:50])
    prefix = cache.start(ids)
    assert (prefix.position, prefix.state.seen.tolist()) == (0, [0])
    for position in (5, 16, 31, 32):
        states = read(model, text[:position]).state.fork(2)
        cache.keep(prefix, position, states, 1)
    assert len(cache) == 2
    again = cache.start(ids)
    assert (again.position, again.state.seen.tolist()) == (32, [32])
    cache.keep(prefix, 0, prefix.state)
    assert len(cache) == 2
    cache.trim()  # without a folder there is nothing to do
