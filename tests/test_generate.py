"""Generation against plain recomputation: no state, no batch, no shortcut."""

import itertools

import numpy as np
import pytest
import torch

from anymamba.config import MambaConfig
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.errors import AnymambaError
from anymamba.generate import SamplingConfig, generate, stream
from anymamba.model import MambaLM
from anymamba.state import MambaState

GREEDY = SamplingConfig(temperature=0)
PROMPTS = [[5, 9, 33], [7], list(range(40, 57)), [1, 1, 2, 60, 12, 13]]


def tiny(vocab_size=61):
    """A model with weights large enough to have opinions that depend on what it has read; 61 ids are padded to 64."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=32, n_layer=2, vocab_size=vocab_size, tie_embeddings=False))
    with torch.no_grad():
        model.backbone.embedding.weight.normal_(0, 1.0)
        model.lm_head.weight.normal_(0, 0.3)
        for layer in model.backbone.layers:
            layer.mixer.out_proj.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def byte_model():
    return tiny(vocab_size=257)


@torch.no_grad()
def logprobs_of(model, ids):
    """log p (t, v) of every next token, all from the start."""
    return model(torch.tensor([ids])).logits[0, :, : model.config.vocab_size].log_softmax(-1)


def recomputed(model, prompt, steps):
    """Greedy decoding that reads everything anew for each token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(logprobs_of(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def ids_of(completions):
    return [c.ids for c in completions]


def assert_has_read(model, state, ids):
    with torch.no_grad():
        expected = model(torch.tensor([ids])).state
    assert state.seen.tolist() == [len(ids)]
    for layer, expected_layer in zip(state.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer, expected_layer, atol=1e-4, rtol=1e-3)


# --- greedy ----------------------------------------------------------------------------------------------------------


def test_greedy_is_the_argmax_recomputed_from_the_start(model):
    completions = generate(model, PROMPTS, max_new_tokens=12, sampling=GREEDY)
    assert ids_of(completions) == [recomputed(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(c.ids) for c in completions}) > 1  # else the test shows little
    assert [(c.prompt_index, c.sample_index, c.finish_reason) for c in completions] == [
        (p, 0, "length") for p in range(4)
    ]


def test_a_prompt_of_a_batch_is_that_prompt_alone(model):
    for sampling in (GREEDY, SamplingConfig(temperature=1.5, top_p=0.9)):
        together = generate(model, PROMPTS, max_new_tokens=10, sampling=sampling, seed=[3, 1, 4, 1])
        alone = [
            generate(model, [prompt], max_new_tokens=10, sampling=sampling, seed=seed)[0]
            for prompt, seed in zip(PROMPTS, [3, 1, 4, 1], strict=True)
        ]
        assert ids_of(together) == ids_of(alone)


@pytest.mark.parametrize("chunk", [1, 3, 17, 18])
def test_prompts_read_in_pieces(model, chunk):
    whole = generate(model, PROMPTS, max_new_tokens=8, sampling=GREEDY)
    pieces = generate(model, PROMPTS, max_new_tokens=8, sampling=GREEDY, prefill_chunk=chunk)
    assert ids_of(whole) == ids_of(pieces)


def test_prompts_may_be_lists_tensors_and_what_tokenizers_give(model):
    kinds = [PROMPTS[0], torch.tensor(PROMPTS[0]), np.array(PROMPTS[0], dtype=np.uint16)]
    first, *others = ids_of(generate(model, kinds, max_new_tokens=4, sampling=GREEDY))
    assert others == [first, first]
    for whole in (torch.tensor([PROMPTS[0]]), np.array([PROMPTS[0]]), (tuple(PROMPTS[0]),), iter([PROMPTS[0]])):
        assert ids_of(generate(model, whole, max_new_tokens=4, sampling=GREEDY)) == [first]


def test_under_inference_mode_and_with_gradients_on(model):
    with torch.inference_mode():
        inside = generate(model, PROMPTS, max_new_tokens=4, sampling=GREEDY)
    outside = generate(model, PROMPTS, max_new_tokens=4, sampling=GREEDY)
    assert ids_of(inside) == ids_of(outside)
    assert not outside[0].state.layers[0].ssm.requires_grad
    model(torch.tensor([[1, 2]]), state=outside[0].state).logits.sum().backward()  # and one can train from there
    model.zero_grad()


def test_the_padding_of_the_vocabulary_is_never_written(model):
    """Without the mask 3 of 64 tokens would be ids that do not exist."""
    completions = generate(model, [[1]], n=30, max_new_tokens=20, sampling=SamplingConfig(temperature=50.0))
    ids = {id for c in completions for id in c.ids}
    assert max(ids) < 61
    assert len(ids) > 50


# --- log-probabilities and states ------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model_before_sampling_transforms(model):
    sampling = SamplingConfig(temperature=2.0, top_k=5, repetition_penalty=1.3)
    for c in generate(model, PROMPTS, max_new_tokens=6, sampling=sampling, logprobs=True):
        prompt = PROMPTS[c.prompt_index]
        rows = logprobs_of(model, prompt + c.ids)[len(prompt) - 1 : -1]
        expected = rows.gather(1, torch.tensor(c.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=1e-4, rtol=1e-4)
    assert generate(model, [[1]], max_new_tokens=2)[0].logprobs is None


def test_the_final_state_has_read_prompt_and_completion(model):
    stop = recomputed(model, PROMPTS[1], 3)[-1]
    for c in generate(model, PROMPTS, max_new_tokens=7, sampling=GREEDY, stop_ids=[stop], n=2):
        assert_has_read(model, c.state, PROMPTS[c.prompt_index] + c.ids)


def test_going_on_from_a_state_is_one_longer_prompt(model):
    firsts = generate(model, PROMPTS, max_new_tokens=5, sampling=GREEDY)
    more = [[3, 4], [8], [2] * 9, [11]]
    state = MambaState.cat([c.state for c in firsts])
    continued = generate(model, more, state=state, max_new_tokens=6, sampling=GREEDY, prefill_chunk=4)
    whole = [prompt + c.ids + new for prompt, c, new in zip(PROMPTS, firsts, more, strict=True)]
    assert ids_of(continued) == ids_of(generate(model, whole, max_new_tokens=6, sampling=GREEDY))


def test_a_given_state_is_not_changed(model):
    state = generate(model, [PROMPTS[0]], max_new_tokens=3)[0].state
    before = state.copy()
    generate(model, [[1, 2]], state=state, n=3, max_new_tokens=5)
    assert all(a.equal(b) for x, y in zip(state.layers, before.layers, strict=True) for a, b in zip(x, y, strict=True))


# --- sampling --------------------------------------------------------------------------------------------------------


def test_samples_come_from_one_reading_of_the_prompt(model):
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(tuple(args[0].shape)), with_kwargs=True
    )
    completions = generate(model, [PROMPTS[2], PROMPTS[0]], n=3, max_new_tokens=4)
    hook.remove()
    assert lengths == [(2, 17), *[(6, 1)] * 4]
    assert [(c.prompt_index, c.sample_index) for c in completions] == list(itertools.product(range(2), range(3)))
    assert len({tuple(c.ids) for c in completions}) == 6


def test_a_seed_gives_the_same_samples_and_another_seed_others(model):
    first, again, other = (ids_of(generate(model, PROMPTS, n=2, max_new_tokens=8, seed=s)) for s in (5, 5, 6))
    assert first == again != other


def test_a_sample_does_not_depend_on_how_many_there_are(model):
    many = generate(model, PROMPTS[:2], n=4, max_new_tokens=8, seed=1)
    assert [c.ids for c in many if c.sample_index < 2 and c.prompt_index == 0] == ids_of(
        generate(model, PROMPTS[:1], n=2, max_new_tokens=8, seed=1)
    )


def test_samples_follow_the_model(model):
    completions = generate(model, [[5]], n=4000, max_new_tokens=1)
    frequency = torch.tensor([c.ids[0] for c in completions]).bincount(minlength=61) / 4000
    torch.testing.assert_close(frequency, logprobs_of(model, [5])[0].exp(), atol=0.03, rtol=0)


def test_penalties_see_prompt_and_completion(model):
    once = SamplingConfig(temperature=0, presence_penalty=1e4)
    for c in generate(model, PROMPTS, max_new_tokens=61, sampling=once):
        assert sorted(c.ids) == list(range(61))
    # A huge divisor takes a token's positive logit to 0, below some other one: neither prompt nor completion recurs.
    new = SamplingConfig(temperature=0, repetition_penalty=1e9)
    for c in generate(model, PROMPTS, max_new_tokens=10, sampling=new):
        assert len({*PROMPTS[c.prompt_index], *c.ids}) == len(set(PROMPTS[c.prompt_index])) + 10


# --- stopping --------------------------------------------------------------------------------------------------------


def test_rows_stop_at_their_own_stop_id_and_leave_the_batch(model):
    free = ids_of(generate(model, PROMPTS, max_new_tokens=12, sampling=GREEDY))
    stops = [free[0][2], free[2][5]]
    batches = []
    hook = model.register_forward_pre_hook(lambda _, args: batches.append(args[0].shape[0]))
    completions = generate(model, PROMPTS, max_new_tokens=12, sampling=GREEDY, stop_ids=stops)
    hook.remove()
    for c, ids in zip(completions, free, strict=True):
        at = next((i for i, id in enumerate(ids) if id in stops), None)
        assert c.ids == (ids if at is None else ids[: at + 1])
        assert c.finish_reason == ("length" if at is None else "stop")
    assert len({len(c.ids) for c in completions}) > 1
    assert batches == [
        4,
        *(sum(len(c.ids) > step for c in completions) for step in range(max(len(c.ids) for c in completions))),
    ]


class Letters:
    """Ids are pairs and single letters, so that strings span tokens: 0 … 25 a … z, 26 + i "x" + letter i."""

    vocab_size = 61
    eos_id = 60

    def decode(self, ids):
        return "".join("" if i >= 52 else chr(97 + i) if i < 26 else "x" + chr(97 + i - 26) for i in map(int, ids))


def scripted(monkeypatch, model, *steps):
    """The model's own state, but the logits say what comes next in every row: an id, or logits of the first ids."""
    position = iter(range(10_000))
    forward = model.forward

    def speak(*args, **kwargs):
        out = forward(*args, **kwargs)
        step = steps[next(position) % len(steps)]
        logits = torch.full_like(out.logits, -99.0)
        if isinstance(step, int):
            logits[..., step] = 99.0
        else:
            logits[..., : len(step)] = torch.tensor(step)
        return out._replace(logits=logits)

    monkeypatch.setattr(model, "forward", speak)


@pytest.mark.parametrize(
    ("stop_strings", "text", "count", "reason"),
    [
        (["dx"], "abc", 5, "stop"),  # half a token: the text is cut inside token 4, "xe"
        (["cdxe"], "ab", 5, "stop"),  # spans four tokens
        (["xef", "de"], "abcd", 6, "stop"),  # the text in question is "abcdxefg…"
        (["f", "bc"], "a", 3, "stop"),  # the first to be complete
        (["zz", "abd"], "abcdxefghi", 9, "length"),
    ],
)
def test_stop_strings(monkeypatch, model, stop_strings, text, count, reason):
    scripted(monkeypatch, model, 0, 1, 2, 3, 26 + 4, 5, 6, 7, 8)
    options = {"sampling": GREEDY, "stop_strings": stop_strings, "tokenizer": Letters(), "max_new_tokens": 9}
    c = generate(model, [[1]], **options)[0]
    assert (c.text, len(c.ids), c.finish_reason) == (text, count, reason)


def test_streamed_text_never_has_to_be_taken_back(monkeypatch, model):
    """What may become the stop string is held back, and given out when it did not."""
    scripted(monkeypatch, model, 0, 1, 2, 0, 1, 3)
    options = {"sampling": GREEDY, "stop_strings": ["abd"], "tokenizer": Letters()}
    events = list(stream(model, [1], **options))
    assert [e.text for e in events] == ["", "", "abc", "", "", ""]
    scripted(monkeypatch, model, 0, 1, 2, 0, 1)
    events = list(stream(model, [1], max_new_tokens=5, **options))
    assert [e.text for e in events] == ["", "", "abc", "", "ab"]


def test_stop_id_is_in_the_ids_and_not_in_the_text(monkeypatch, model):
    scripted(monkeypatch, model, 7, 8, 60)
    c = generate(model, [[1]], sampling=GREEDY, stop_ids=[60], tokenizer=Letters())[0]
    assert (c.ids, c.text, c.finish_reason) == ([7, 8, 60], "hi", "stop")


# --- streaming -------------------------------------------------------------------------------------------------------


def test_stream_is_generate_token_by_token(byte_model):
    prompt = ByteTokenizer().encode("héllo")
    options = {"max_new_tokens": 40, "seed": 3, "tokenizer": ByteTokenizer(), "stop_strings": ["q"]}
    [c] = generate(byte_model, [prompt], logprobs=True, **options)
    events = list(stream(byte_model, prompt, **options))
    assert [e.id for e in events] == c.ids
    assert [e.logprob for e in events] == c.logprobs
    assert "".join(e.text for e in events) == c.text == events[-1].completion.text
    assert [e.completion is None for e in events] == [True] * (len(events) - 1) + [False]
    assert_has_read(byte_model, events[-1].completion.state, prompt.tolist() + c.ids)


def test_characters_are_streamed_whole(monkeypatch, byte_model):
    scripted(monkeypatch, byte_model, *"aé€".encode())
    texts = [e.text for e in stream(byte_model, [0], sampling=GREEDY, tokenizer=ByteTokenizer(), max_new_tokens=5)]
    assert texts == ["a", "", "é", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_token_is_given_out_before_the_model_reads_it(model):
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    events = stream(model, [1, 2], max_new_tokens=5)
    assert calls == []
    next(events)
    hook.remove()
    assert calls == [1]
    assert torch.is_grad_enabled()


def test_on_token_sees_every_token(model):
    events = []
    completions = generate(model, PROMPTS, n=2, max_new_tokens=6, on_token=events.append, stop_ids=[3, 4, 5])
    for c in completions:
        mine = [e for e in events if (e.prompt_index, e.sample_index) == (c.prompt_index, c.sample_index)]
        assert [e.id for e in mine] == c.ids
        assert mine[-1].completion is c


# --- beams -----------------------------------------------------------------------------------------------------------


def exhaustive(model, prompt, depth, length_penalty, stop_ids=()):
    """Every sequence of `depth` tokens, or fewer if it ends in a stop id, by score."""
    v = model.config.vocab_size
    ends = {()}
    scores = {}
    for length in range(1, depth + 1):
        longer = [(*ids, token) for ids in ends for token in range(v)]
        for ids in longer:
            if ids[-1] in stop_ids or length == depth:
                rows = logprobs_of(model, [*prompt, *ids])[len(prompt) - 1 : -1]
                scores[ids] = float(rows.double().gather(1, torch.tensor(ids)[:, None]).sum()) / length**length_penalty
        ends = {ids for ids in longer if ids[-1] not in stop_ids}
    return sorted(scores.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("stop_ids", [(), (2,), (0, 3)])
def test_enough_beams_search_exhaustively(length_penalty, stop_ids):
    model = tiny(vocab_size=5)
    options = {"stop_ids": stop_ids, "length_penalty": length_penalty, "max_new_tokens": 3}
    best = generate(model, [[1, 4]], num_beams=5**3, n=5, **options)
    expected = exhaustive(model, [1, 4], 3, length_penalty, stop_ids)
    assert ids_of(best) == [list(ids) for ids, _ in expected[:5]]
    assert [c.score for c in best] == pytest.approx([score for _, score in expected[:5]], abs=1e-4)


def test_a_beam_that_is_behind_may_win_by_its_length(monkeypatch):
    """Two stop ids come first and fill the results; yet the third token, then certain, has the best score at last."""
    model = tiny(vocab_size=5)
    scripted(monkeypatch, model, [3.0, 2.0, 1.9, 1.0], *[2] * 9)
    first, second = generate(model, [[1]], num_beams=2, n=2, stop_ids=[0, 1], max_new_tokens=10)
    assert (first.ids, first.finish_reason) == ([2] * 10, "length")
    assert (second.ids, second.finish_reason) == ([3] + [2] * 9, "length")


def test_beams_carry_their_own_states(model):
    """The beams change places at every step, and their states must change with them."""
    completions = generate(model, PROMPTS, num_beams=4, n=4, max_new_tokens=8, logprobs=True)
    assert [(c.prompt_index, c.sample_index) for c in completions] == list(itertools.product(range(4), range(4)))
    for c in completions:
        prompt = PROMPTS[c.prompt_index]
        rows = logprobs_of(model, prompt + c.ids)[len(prompt) - 1 : -1]
        torch.testing.assert_close(
            torch.tensor(c.logprobs), rows.gather(1, torch.tensor(c.ids)[:, None])[:, 0], atol=1e-4, rtol=1e-4
        )
        assert c.score == pytest.approx(sum(c.logprobs) / 8)
        assert_has_read(model, c.state, prompt + c.ids)


def test_beams_are_at_least_as_good_as_greedy_and_sorted(model):
    for prompt in PROMPTS:
        [greedy] = generate(model, [prompt], max_new_tokens=6, sampling=GREEDY, logprobs=True)
        scores = [c.score for c in generate(model, [prompt], max_new_tokens=6, num_beams=8, n=8)]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] >= sum(greedy.logprobs) / 6 - 1e-5


def test_beams_stop_at_stop_strings(byte_model):
    options = {"tokenizer": ByteTokenizer(), "max_new_tokens": 6, "num_beams": 6, "n": 6, "length_penalty": 0.0}
    free = generate(byte_model, [[65]], **options)
    stop = free[0].text[1]
    stopped = generate(byte_model, [[65]], stop_strings=[stop], **options)
    assert "stop" in {c.finish_reason for c in stopped}
    assert all(stop not in c.text for c in stopped)
    assert all(stop in ByteTokenizer().decode(c.ids) for c in stopped if c.finish_reason == "stop")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "text"),
    [
        ([], {}, "no prompts; pass a list of at least one"),
        ("hello", {}, "prompts are token ids, not text; encode each one with the tokenizer"),
        (["hello"], {}, "prompts are token ids, not text"),
        ([1, 2], {}, r"prompt 0 is \(\), but must be \(t,\); for one pass \[prompt\]"),
        ([[1], []], {}, "prompt 1 is empty; give it a token to start from"),
        ([[1.5]], {}, "prompt 0 is torch.float64, but token ids are whole numbers"),
        ([[True]], {}, "prompt 0 is torch.bool, but token ids are whole numbers"),
        (None, {}, "prompts=None, but it must be a list of prompts, of ids each"),
        (b"ab", {}, "prompts are token ids, not text"),
        ([[1], [None]], {}, "prompt 1: a list that makes no tensor .*; give whole numbers, in rows of one length"),
        ([np.array(["a"])], {}, "prompt 0: a ndarray that makes no tensor"),
        ([[[1], [2, 3]]], {}, "prompt 0: a list that makes no tensor"),
        (
            [[1], [2, 61, 99]],
            {},
            "prompt 1 has id 61 at position 1, but the vocabulary has ids 0 … 60; was it encoded with",
        ),
        ([[-1]], {}, "prompt 0 has id -1 at position 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0, but it must be a whole number of at least 1"),
        ([[1]], {"n": 0}, "n=0, but it must be"),
        ([[1]], {"num_beams": 1.5}, "num_beams=1.5, but it must be"),
        ([[1]], {"prefill_chunk": True}, "prefill_chunk=True, but it must be"),
        ([[1]], {"stop_ids": 3}, "stop_ids=3, but it must be a list of token ids"),
        ([[1]], {"stop_ids": [None]}, r"stop_ids=\[None\], but it must be a list of token ids"),
        ([[1]], {"stop_ids": [61]}, "stop_ids has id 61, but the vocabulary is 0 … 60"),
        (
            [[1]],
            {"sampling": SamplingConfig(logit_bias={62: 1.0})},
            "logit_bias has id 62, but the vocabulary is 0 … 60",
        ),
        ([[1]], {"stop_strings": "stop"}, "stop_strings='stop', but it must be a list, none empty"),
        ([[1]], {"stop_strings": [""]}, r"stop_strings=\[''\], but it must be a list, none empty"),
        ([[1]], {"stop_strings": ["a"]}, r"stop_strings=\['a'\] without a tokenizer; pass the model's"),
        ([[1]], {"seed": -1}, "seed=-1, but a seed is a whole number ≥ 0"),
        ([[1]], {"seed": None}, "seed=None, but a seed is a whole number ≥ 0"),
        ([[1]], {"seed": [1, 2]}, "2 seeds for 1 prompts; pass one number, or one for each prompt"),
        ([[1]], {"num_beams": 2, "n": 3}, "n=3 of num_beams=2; ask for as many beams as results"),
        ([[1]], {"num_beams": 2, "on_token": print}, "on_token with num_beams=2: a beam is known only at the end"),
        ([[1]], {"num_beams": 2, "length_penalty": float("nan")}, "length_penalty=nan, but it must be a finite number"),
        (
            [[1]],
            {"num_beams": 2, "sampling": SamplingConfig(temperature=0, top_k=5)},
            r"num_beams=2 with {'top_k': 5}: beam search does not sample, drop one",
        ),
    ],
)
def test_arguments_that_cannot_be_meant(model, prompts, options, text):
    with pytest.raises(AnymambaError, match=text):
        generate(model, prompts, **options)


def test_a_state_has_one_row_for_each_prompt(model):
    state = MambaState.zeros(model.config, 2)
    with pytest.raises(AnymambaError, match="a state of 2 rows for 3 prompts; pass one row for each prompt"):
        generate(model, [[1], [2], [3]], state=state)


def test_a_model_of_features_does_not_write():
    model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=None))
    with pytest.raises(AnymambaError, match="this model has no vocabulary"):
        generate(model, [[1]])


def test_stream_refuses_at_once(model):
    with pytest.raises(AnymambaError, match="prompt 0 is empty"):
        stream(model, [])


def test_a_broken_model_is_not_sampled_from():
    model = tiny()
    model.backbone.norm_f.weight.data.fill_(float("nan"))
    with pytest.raises(AnymambaError, match="row 0 has no token to choose"):
        generate(model, [[1]])
