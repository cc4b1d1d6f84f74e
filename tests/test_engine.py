"""Continuous batching: with a real model against `generate` alone, its policy with a model of a few integers."""

import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.generate import Engine, PrefixCache, QueueFull, Request, SamplingConfig, generate
from anymamba.state import LayerState, MambaState
from test_generate import assert_has_read, tiny

GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def model():
    return tiny()


class Adder:
    """A model of 97 ids whose state is the sum of what it has read: the next id is that sum. Cheap, and exact."""

    config = SimpleNamespace(vocab_size=97)
    device = torch.device("cpu")

    def __init__(self):
        self.calls = []  # (tokens read, rows, was it a prompt?)
        self.broken = None  # what to raise

    def __call__(self, ids, state=None, lengths=None, last_only=False):
        assert last_only
        if self.broken:
            raise self.broken
        b, t = ids.shape
        counts = torch.full((b,), t) if lengths is None else lengths
        self.calls.append((int(counts.sum()), b, t > 1))
        before = torch.zeros(b, 1, 1) if state is None else state.layers[0].ssm
        total = before[:, 0, 0] + (ids * (torch.arange(t) < counts[:, None])).sum(1)
        logits = torch.nn.functional.one_hot(total.long() % 97, 97)[:, None] * 50.0
        seen = counts if state is None else state.seen + counts
        state = MambaState((LayerState(torch.zeros(b, 1, 1), total[:, None, None]),), seen)
        return SimpleNamespace(logits=logits, state=state)


def added(prompt, count):
    """What Adder writes after a prompt."""
    ids, total = [], sum(prompt)
    for _ in range(count):
        ids.append(total % 97)
        total += ids[-1]
    return ids


def greedy(prompt, count, **options):
    return Request(prompt=prompt, max_new_tokens=count, sampling=GREEDY, **options)


def assert_counters_add_up(engine):
    c = engine.counters()
    assert c.submitted == c.waiting + c.reading + c.running + c.finished + c.cancelled + c.failed
    return c


# --- the same tokens as alone ----------------------------------------------------------------------------------------

CONFIGS = [
    GREEDY,
    SamplingConfig(),
    SamplingConfig(temperature=1.5, top_p=0.9),
    SamplingConfig(temperature=0.8, top_k=20, repetition_penalty=1.2, frequency_penalty=0.3),
    SamplingConfig(logit_bias={3: 2.0, 7: -100.0}),
]


def random_request(rng, state=None):
    return Request(
        prompt=[rng.randrange(61) for _ in range(rng.choice([1, 2, 5, 17, 40]))],
        max_new_tokens=rng.randint(1, 14),
        sampling=rng.choice(CONFIGS),
        stop_ids=rng.sample(range(61), rng.choice([0, 0, 3])),
        seed=rng.randrange(1000),
        n=rng.choice([1, 1, 1, 3]),
        state=state,
    )


def alone(model, request):
    return generate(
        model, [request.prompt], max_new_tokens=request.max_new_tokens, sampling=request.sampling, state=request.state,
        stop_ids=request.stop_ids, seed=request.seed, n=request.n, logprobs=True,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_requests_that_join_at_any_time_get_what_they_get_alone(model, seed):
    rng = random.Random(seed)
    memory = generate(model, [[9, 9, 4]], max_new_tokens=3)[0].state
    requests = [random_request(rng, state=rng.choice([None, None, memory])) for _ in range(24)]
    engine, handles, left = Engine(model, max_batch=6, prefill_chunk=7, max_prefill_tokens=16), [], requests.copy()
    sizes = set()
    while engine.step() or left:
        sizes.add(engine.counters().slots)
        for _ in range(min(len(left), rng.choice([0, 0, 1, 3]))):
            handles.append(engine.submit(left.pop(0)))
    assert len(sizes) > 3  # else little was shared
    for request, handle in zip(requests, handles, strict=True):
        completions, expected = handle.result(), alone(model, request)
        assert [(c.ids, c.finish_reason, c.sample_index) for c in completions] == [
            (c.ids, c.finish_reason, c.sample_index) for c in expected
        ]
        for got, want in zip(completions, expected, strict=True):
            assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
            assert got.state.seen.tolist() == want.state.seen.tolist()
            for layer, other in zip(got.state.layers, want.state.layers, strict=True):
                torch.testing.assert_close(layer, other, atol=1e-4, rtol=1e-3)
    reasons = {c.finish_reason for handle in handles for c in handle.result()}
    assert reasons == {"stop", "length"}
    assert assert_counters_add_up(engine).finished == 24


def test_the_state_goes_on_where_the_completion_ended(model):
    engine = Engine(model)
    first = engine.submit(greedy([5, 9, 33], 5)).result()[0]
    assert_has_read(model, first.state, [5, 9, 33, *first.ids])
    more = engine.submit(greedy([3, 4], 6, state=first.state)).result()[0]
    assert more.ids == generate(model, [[5, 9, 33, *first.ids, 3, 4]], max_new_tokens=6, sampling=GREEDY)[0].ids


def test_samples_are_forked_from_one_reading(model):
    engine = Engine(model, prefill_chunk=100)
    shapes = []
    hook = model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    handle = engine.submit(Request(prompt=range(40, 57), n=4, max_new_tokens=3, seed=8))
    completions = handle.result()
    hook.remove()
    assert shapes == [(1, 17), (4, 1), (4, 1), (4, 1)]
    assert len({tuple(c.ids) for c in completions}) == 4
    events = handle.poll()
    assert len(events) == 12
    for i, completion in enumerate(completions):
        of_sample = [e for e in events if e.sample_index == i]
        assert [e.id for e in of_sample] == completion.ids
        assert [e.completion for e in of_sample] == [None, None, completion]


def test_a_prompt_that_changes_after_submit_is_read_as_it_was(model):
    prompt = torch.tensor([4, 5, 6])
    engine = Engine(model)
    handle = engine.submit(greedy(prompt, 4))
    prompt.fill_(0)
    assert handle.result()[0].ids == generate(model, [[4, 5, 6]], max_new_tokens=4, sampling=GREEDY)[0].ids


# --- stopping, streaming ---------------------------------------------------------------------------------------------


def test_stop_ids_and_max_new_tokens():
    engine = Engine(Adder())
    [stopped] = engine.submit(greedy([3], 9, stop_ids=[60, 48, 24])).result()
    assert (stopped.ids, stopped.finish_reason, stopped.text) == ([3, 6, 12, 24], "stop", None)
    [full] = engine.submit(greedy([3], 4, stop_ids=[60])).result()
    assert (full.ids, full.finish_reason) == ([3, 6, 12, 24], "length")
    assert full.state.seen.tolist() == [5]


def test_iterating_a_handle_gives_each_token_once():
    engine = Engine(Adder())
    other = engine.submit(greedy([1], 7))
    handle = engine.submit(greedy([2, 3], 5))
    engine.step()
    assert [e.id for e in handle.poll()] == added([2, 3], 5)[:1]
    assert handle.poll() == []
    assert not handle.done
    assert [e.id for e in handle] == added([2, 3], 5)[1:]
    assert handle.done
    assert list(handle) == []
    assert [e.id for e in other] == added([1], 7)


# --- bounded work between two tokens ---------------------------------------------------------------------------------


def test_a_long_prompt_does_not_hold_up_the_others():
    model = Adder()
    engine = Engine(model, prefill_chunk=10, max_prefill_tokens=14)
    running = [engine.submit(greedy([i], 60)) for i in range(5)]
    engine.step()
    for handle in running:
        handle.poll()
    long = engine.submit(greedy([7] * 200, 3))  # 20 chunks
    short = engine.submit(greedy([1] * 4, 3))
    for step in range(20):
        model.calls.clear()
        assert long.poll() == []
        engine.step()
        assert [len(handle.poll()) for handle in running] == [1] * 5
        assert sum(tokens for tokens, _, is_prompt in model.calls if is_prompt) == (14 if step == 0 else 10)
        assert len(model.calls) == 2
    assert [e.id for e in short.poll()] == added([1] * 4, 3)  # read beside the long one, not after it
    assert [e.id for e in long] == added([7] * 200, 3)


def test_prompts_are_packed_within_the_limits():
    model = Adder()
    engine = Engine(model, prefill_chunk=8, max_prefill_tokens=20)
    handles = [engine.submit(greedy([i] * length, 2)) for i, length in enumerate([30, 3, 8, 5, 1])]
    engine.run()
    prompts = [(tokens, rows) for tokens, rows, is_prompt in model.calls if is_prompt]
    assert prompts == [(20, 4), (13, 3), (8, 1), (6, 1)]
    assert engine.counters().prefill_tokens == 47
    assert engine.counters().generated_tokens == 10
    assert [h.result()[0].ids for h in handles] == [added([i] * n, 2) for i, n in enumerate([30, 3, 8, 5, 1])]


# --- cancellation ----------------------------------------------------------------------------------------------------


def test_cancelled_while_waiting_reading_running_and_after_the_end():
    engine = Engine(Adder(), max_batch=2, prefill_chunk=4)
    over = engine.submit(greedy([1], 1))
    running = engine.submit(greedy([5], 50))
    engine.step()
    engine.step()
    reading = engine.submit(greedy([2] * 40, 5))
    waiting = engine.submit(greedy([3], 5))
    engine.step()
    c = engine.counters()
    assert (c.running, c.reading, c.waiting, c.slots) == (1, 1, 1, 2)
    assert [h.cancel() for h in (over, running, reading, waiting)] == [False, True, True, True]
    last = engine.submit(greedy([4], 2))
    engine.step()
    assert [h.done for h in (running, reading, waiting)] == [True] * 3
    assert len(last.poll()) == 1  # the slots were free at once
    [c] = running.result()
    assert (c.ids, c.finish_reason) == (added([5], 3), "cancelled")
    assert c.state.seen.tolist() == [4]
    for handle in (reading, waiting):
        [c] = handle.result()
        assert (c.ids, c.finish_reason, c.state) == ([], "cancelled", None)
        assert list(handle) == []
    assert over.result()[0].finish_reason == "length"
    assert last.result()[0].ids == added([4], 2)
    c = assert_counters_add_up(engine)
    assert (c.finished, c.cancelled, c.failed, c.slots) == (2, 3, 0, 0)
    assert [h.cancel() for h in (over, running)] == [False, False]


def test_close_cancels_everything_and_refuses_more():
    engine = Engine(Adder(), max_batch=1)
    handles = [engine.submit(greedy([1], 9)) for _ in range(3)]
    engine.step()
    engine.close()
    assert all(h.done for h in handles)
    assert [h.result()[0].finish_reason for h in handles] == ["cancelled"] * 3
    with pytest.raises(AnymambaError, match="it is closed and takes no requests"):
        engine.submit(greedy([1], 9))
    assert not engine.step()


# --- limits and errors -----------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_or_waits():
    engine = Engine(Adder(), max_batch=1, max_queue=2)
    for _ in range(2):
        engine.submit(greedy([1], 1))
    with pytest.raises(QueueFull, match="2 requests wait, and max_queue=2; try again later"):
        engine.submit(greedy([1], 1))
    start = time.perf_counter()
    with pytest.raises(QueueFull):
        engine.submit(greedy([1], 1), timeout=0.1)
    assert time.perf_counter() - start >= 0.1
    late = threading.Timer(0.05, engine.run)
    late.start()
    handle = engine.submit(greedy([1], 1), timeout=30)  # the other thread makes room
    late.join()
    assert handle.result()[0].ids == [1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prompt": [1, 97]}, "prompt 0 has id 97 at position 1, but the vocabulary has ids 0 … 96"),
        ({"prompt": []}, "prompt 0 is empty"),
        ({"prompt": "text"}, "prompts are token ids, not text"),
        ({"max_new_tokens": 0}, "max_new_tokens=0, but it must be"),
        ({"n": 0}, "n=0, but it must be"),
        ({"n": 9}, "n=9 completions, but max_batch=8; ask for fewer"),
        ({"stop_ids": [97]}, "stop_ids has id 97"),
        ({"seed": -1}, "seed=-1, but a seed is a whole number"),
        ({"sampling": SamplingConfig(logit_bias={98: 1.0})}, "logit_bias has id 98"),
    ],
)
def test_what_cannot_be_meant_does_not_enter(options, text):
    engine = Engine(Adder(), max_batch=8)
    other = engine.submit(greedy([5], 4))
    engine.step()
    with pytest.raises(AnymambaError, match=text):
        engine.submit(Request(**{"prompt": [1], **options}))
    assert [e.id for e in other] == added([5], 4)
    assert engine.counters().submitted == 1


def test_states_that_do_not_fit_do_not_enter(model):
    engine = Engine(model)
    with pytest.raises(AnymambaError, match="a state of 2 rows for 1 prompts"):
        engine.submit(Request(prompt=[1], state=MambaState.zeros(model.config, 2)))
    other = MambaConfig(d_model=32, n_layer=2, vocab_size=61, d_state=8)
    with pytest.raises(AnymambaError, match="pass a state that this model has given"):
        engine.submit(Request(prompt=[1], state=MambaState.zeros(other, 1)))


def test_limits_are_positive():
    with pytest.raises(AnymambaError, match="max_batch=0, but it must be"):
        Engine(Adder(), max_batch=0)


def test_an_error_of_the_model_ends_those_it_was_called_for():
    model = Adder()
    engine = Engine(model, max_batch=3)
    running = engine.submit(greedy([5], 50, n=2))
    engine.step()
    waiting = [engine.submit(greedy([i], 3)) for i in range(2)]
    model.broken = RuntimeError("the machine is on fire")
    engine.step()  # one of the two has a slot
    model.broken = None
    for handle in (running, waiting[0]):
        assert {c.finish_reason for c in handle.result()} == {"error"}
        assert str(handle.error) == "the machine is on fire"
    assert not waiting[1].done
    assert waiting[1].result()[0].ids == added([1], 3)
    assert waiting[1].error is None
    c = assert_counters_add_up(engine)
    assert (c.finished, c.failed, c.slots) == (1, 2, 0)


def test_an_interrupt_leaves_the_engine_usable():
    model = Adder()
    engine = Engine(model, prefill_chunk=2)
    running = engine.submit(greedy([5], 9))
    engine.step()
    model.broken = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    model.broken = None
    assert running.result()[0].finish_reason == "error"
    assert engine.submit(greedy([5], 9)).result()[0].ids == added([5], 9)


def test_a_row_of_nan_fails_alone(model):
    bad = MambaState.zeros(model.config, 1)
    bad.layers[0].ssm.fill_(float("nan"))
    engine = Engine(model)
    good, broken = engine.submit(greedy([7], 6)), engine.submit(greedy([7], 6, state=bad))
    assert broken.result()[0].finish_reason == "error"
    assert "NaN" in str(broken.error)
    assert good.result()[0].ids == generate(model, [[7]], max_new_tokens=6, sampling=GREEDY)[0].ids


# --- any order of events ---------------------------------------------------------------------------------------------


class Watched(Engine):
    """Notes the requests in the order of their admission."""

    def _prefill(self):
        self.admitted = getattr(self, "admitted", {}) | {id(job.handle): job.handle for job in self._reading}
        super()._prefill()


@pytest.mark.parametrize("seed", range(4))
def test_nothing_leaks_whatever_comes_and_goes(seed):
    """Random joins, cancellations, failures: every handle ends, right tokens, first come first served, no slot lost."""
    rng, model = random.Random(seed), Adder()
    engine = Watched(model, max_batch=5, max_queue=12, prefill_chunk=6, max_prefill_tokens=9)
    handles, refused, cancels = [], 0, 0
    for _ in range(1200):
        for _ in range(rng.choice([0, 0, 1, 1, 3])):
            prompt = [rng.randrange(97) for _ in range(rng.choice([1, 3, 6, 20]))]
            try:
                request = greedy(prompt, rng.randint(1, 6), n=rng.choice([1, 1, 2, 5]), stop_ids=[rng.randrange(97)])
                handles.append(engine.submit(request))
            except QueueFull:
                refused += 1
        for handle in handles[-20:]:
            if rng.random() < 0.02:
                cancels += handle.cancel()
        model.broken = RuntimeError("out of memory") if rng.random() < 0.01 else None
        engine.step()
        c = assert_counters_add_up(engine)
        assert c.slots <= 5
        assert c.waiting <= 12
    model.broken = None
    engine.run()
    c = assert_counters_add_up(engine)
    assert (c.waiting, c.reading, c.running, c.slots) == (0, 0, 0, 0)
    assert engine._batch.state is None
    assert c.submitted == len(handles) > 400
    assert min(refused, c.cancelled, c.failed, c.finished) > 5
    assert c.cancelled <= cancels
    order = [handles.index(handle) for handle in engine.admitted.values()]
    assert order == sorted(order)
    assert len(order) > 300
    generated = 0
    for handle in handles:
        assert handle.done
        for completion in handle.result():
            request, generated = handle.request, generated + len(completion.ids)
            expected = added(request.prompt, request.max_new_tokens)
            assert completion.ids == expected[: len(completion.ids)]
            if completion.finish_reason == "stop":
                assert completion.ids[-1] in request.stop_ids
            elif completion.finish_reason == "length":
                assert completion.ids == expected
            assert not set(request.stop_ids) & set(completion.ids[:-1])
    assert generated == c.generated_tokens


def test_threads_submit_cancel_and_wait_while_one_steps():
    engine, wrong = Engine(Adder(), max_batch=4, max_queue=3), []

    def ask(seed):
        rng = random.Random(seed)
        for _ in range(25):
            prompt = [rng.randrange(97) for _ in range(rng.randint(1, 5))]
            handle = engine.submit(greedy(prompt, 4), timeout=60)
            if rng.random() < 0.2:
                handle.cancel()
                if handle.result()[0].finish_reason not in ("cancelled", "length"):
                    wrong.append(handle)
            elif [e.id for e in handle] != added(prompt, 4):
                wrong.append(handle)
            assert_counters_add_up(engine)

    server = threading.Thread(target=engine.run, kwargs={"forever": True})
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in (server, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    engine.close()
    server.join(60)
    assert not server.is_alive()
    assert wrong == []
    assert assert_counters_add_up(engine).submitted == 200


def test_threads_that_wait_step_where_none_runs():
    engine, texts = Engine(Adder()), {}
    handles = [engine.submit(greedy([i], 30)) for i in range(6)]
    threads = [
        threading.Thread(target=lambda i=i, h=h: texts.update({i: [e.id for e in h]})) for i, h in enumerate(handles)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert texts == {i: added([i], 30) for i in range(6)}


# --- with a cache of prefixes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "together"), [(512, 1024), (5, 9), (8, 11)])
def test_what_a_cache_knows_is_not_read_again(model, chunk, together):
    rng = random.Random(1)
    begin = [rng.randrange(61) for _ in range(37)]
    requests = [
        Request(prompt=begin[:length] + [rng.randrange(61) for _ in range(rest)], max_new_tokens=6, seed=i, n=1 + i % 2)
        for i, (length, rest) in enumerate([(37, 0), (37, 3), (20, 5), (8, 0), (9, 0), (3, 30), (37, 40)])
    ]
    cache = PrefixCache(model, every=8)
    read = []
    for options in ({}, {"cache": cache}, {"cache": cache}):
        engine = Engine(model, prefill_chunk=chunk, max_prefill_tokens=together, max_batch=8, **options)
        handles = []
        for request in requests:  # one after the other: each can find what those before it have left
            handles.append(engine.submit(request))
            engine.run()
        for request, handle in zip(requests, handles, strict=True):
            for got, want in zip(handle.result(), alone(model, request), strict=True):
                assert got.ids == want.ids
                assert got.state.seen.tolist() == want.state.seen.tolist()
        read.append(engine.counters().prefill_tokens)
    lengths = [len(request.prompt) for request in requests]
    first = [0, 32, 16, 0, 8, 0, 32]  # at least one token is read, for the logits
    assert read == [sum(lengths), sum(lengths) - sum(first), sum((n - 1) % 8 + 1 for n in lengths)]
    assert (cache.hits, cache.misses) == (4 + 6, 3 + 1)
    assert cache.tokens_saved == 2 * sum(lengths) - read[1] - read[2]


def test_requests_at_once_with_a_cache_and_with_states(model):
    cache = PrefixCache(model, every=8)
    memory = generate(model, [[9, 9, 4]], max_new_tokens=3)[0].state
    prompt = [*range(40, 60)]
    generate(model, [prompt], max_new_tokens=1, cache=cache)  # `generate` and the engine share it
    engine = Engine(model, prefill_chunk=7, max_prefill_tokens=10, cache=cache)
    requests = [greedy([*prompt, i], 5, state=state) for i, state in enumerate([None, memory, None, memory])]
    handles = [engine.submit(request) for request in requests]
    engine.run()
    for request, handle in zip(requests, handles, strict=True):
        assert handle.result()[0].ids == alone(model, request)[0].ids
    assert (cache.hits, cache.misses, len(cache)) == (2, 1, 2)
    assert engine.counters().prefill_tokens == 2 * 5 + 2 * 21


def test_a_waiting_request_finds_what_was_read_meanwhile(model):
    cache = PrefixCache(model, every=8)
    engine = Engine(model, max_batch=1, cache=cache)
    handles = [engine.submit(greedy([*range(20), i], 2)) for i in range(3)]
    engine.run()
    assert [handle.result()[0].ids for handle in handles] == [alone(model, h.request)[0].ids for h in handles]
    assert (cache.hits, cache.misses) == (2, 1)
    assert engine.counters().prefill_tokens == 21 + 2 * 5


def test_a_cache_in_a_folder_keeps_its_size_and_serves_the_next_process(model, tmp_path):
    cache = PrefixCache(model, every=8, folder=tmp_path, max_disk_bytes=1)
    Engine(model, cache=cache).submit(greedy([*range(20)], 2)).result()
    assert list(tmp_path.iterdir()) == []
    Engine(model, cache=PrefixCache(model, every=8, folder=tmp_path)).submit(greedy([*range(20)], 2)).result()
    later = PrefixCache(model, every=8, folder=tmp_path)
    [completion] = Engine(model, cache=later).submit(greedy([*range(20)], 2)).result()
    assert completion.ids == alone(model, greedy([*range(20)], 2))[0].ids
    assert (later.hits, later.tokens_saved) == (1, 16)


def test_a_cache_of_another_model_is_refused(model):
    with pytest.raises(AnymambaError, match="the cache was made for another model"):
        Engine(model, cache=PrefixCache(tiny()))
