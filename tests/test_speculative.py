"""Speculative decoding: the tokens of `generate`, or of the same distribution, in fewer passes; states on the way."""

import itertools

import numpy as np
import pytest
import torch

from anymamba import AnymambaError, MambaConfig, MambaLM, MambaState
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.generate import SamplingConfig, generate, read, speculate
from anymamba.generate.sampling import process
from anymamba.generate.speculative import look_up
from test_generate import GREEDY, PROMPTS, Letters, assert_has_read, logprobs_of, tiny

REPEATS = SamplingConfig(temperature=0.6, repetition_penalty=1.2, frequency_penalty=-0.7)  # counts matter at once
LOOP = [5, 9, 33, 7, 5, 9, 33, 7, 5, 9]  # a text that repeats itself
WARM = SamplingConfig(temperature=0.7, top_k=20, top_p=0.95)
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4, "logit_bias": {3: 2.0}}


def small(vocab_size=61, seed=7, **changes):
    """Another model of the vocabulary, padded to another size."""
    torch.manual_seed(seed)
    config = MambaConfig(d_model=16, n_layer=1, d_state=4, vocab_size=vocab_size, pad_vocab_size_multiple=50)
    model = MambaLM(config.replace(tie_embeddings=False, **changes))
    with torch.no_grad():
        model.backbone.embedding.weight.normal_(0, 1.0)
        model.lm_head.weight.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def draft():
    return small()


def passes(monkeypatch, model):
    """The number of tokens of every pass of the model."""
    lengths, forward = [], model.forward

    def watched(ids, *args, **options):
        lengths.append(ids.shape[1])
        return forward(ids, *args, **options)

    monkeypatch.setattr(model, "forward", watched)
    return lengths


# ---- the tokens of generate ----


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("guesser", ["look-up", "draft", "itself"])
def test_greedy_is_generate(model, draft, guesser, k):
    draft = {"look-up": None, "draft": draft, "itself": model}[guesser]
    for prompt, penalties in itertools.product([*PROMPTS, LOOP], ({}, PENALTIES)):
        options = {"sampling": SamplingConfig(temperature=0, **penalties), "max_new_tokens": 17, "logprobs": True}
        [want] = generate(model, [prompt], **options)
        out = speculate(model, prompt, draft=draft, k=k, **options)
        assert out.completion.ids == want.ids
        assert out.completion.logprobs == pytest.approx(want.logprobs, abs=1e-4)
        assert_has_read(model, out.completion.state, [*prompt, *want.ids])
        assert 0 <= out.accepted <= out.proposed
        if guesser == "itself":
            assert (out.accepted, out.acceptance) == (out.proposed, 1)
            assert out.passes == 16 // (k + 1) + 1  # the first token comes with the prompt, the last one is read, too


@pytest.mark.parametrize("sampling", [SamplingConfig(), WARM, REPEATS])
def test_look_up_draws_what_generate_draws(model, sampling):
    accepted = 0
    for seed, prompt in enumerate([*PROMPTS, LOOP]):
        options = {"sampling": sampling, "max_new_tokens": 30, "seed": seed}
        out = speculate(model, prompt, k=3, **options)
        assert out.completion.ids == generate(model, [prompt], **options)[0].ids
        accepted += out.accepted
    assert accepted > 0


def test_a_pass_reads_the_guesses_and_no_token_more(model, monkeypatch):
    lengths = passes(monkeypatch, model)
    out = speculate(model, LOOP, draft=model, k=4, max_new_tokens=12, sampling=GREEDY)
    own = [t for t in lengths if t > 2][1:]  # without the prompt for model and draft; the draft reads 1 or 2 at a time
    assert own == [10, 5, 5]  # for 1 + 5 + 5 tokens; the last pass reads 2, as does the draft in between
    assert (out.proposed, out.accepted, out.passes) == (9, 9, 3)
    assert out.tokens_per_pass == 4


def test_a_text_that_repeats_itself_takes_few_passes(monkeypatch, model):
    forward = model.forward

    def speak(ids, *args, **options):  # 1 … 7 in turns, whatever was read
        out = forward(ids, *args, **options)
        following = torch.as_tensor(ids) % 7 + 1
        following = following[:, -out.logits.shape[1] :]
        return out._replace(logits=torch.nn.functional.one_hot(following, 64) * 50.0)

    monkeypatch.setattr(model, "forward", speak)
    out = speculate(model, [1, 2, 3, 4, 5, 6, 7, 1, 2], k=7, max_new_tokens=33, sampling=GREEDY)
    assert out.completion.ids == [i % 7 + 1 for i in range(2, 35)]
    assert (out.acceptance, out.passes) == (1, 32 // 8 + 1)
    new = speculate(model, [5], k=7, max_new_tokens=6, sampling=GREEDY)  # nothing to find: one token a pass
    assert (new.proposed, new.acceptance, new.passes, new.tokens_per_pass) == (0, 0, 6, 1)


def test_guesses_grow_fewer_where_they_are_wrong(monkeypatch, model):
    """At most one more than twice as many as were right the last time."""
    forward, truth = model.forward, [*[1, 2, 3, 4] * 4, *[1, 2, 5, 4, 3, 2, 1] * 3, *[1, 2, 3, 4] * 4]

    def speak(ids, state=None, **options):  # `truth`, whatever was read
        out = forward(ids, state=state, **options)
        end = int(out.state.seen)
        following = torch.tensor(truth[end - out.logits.shape[1] + 1 : end + 1])[None]
        return out._replace(logits=torch.nn.functional.one_hot(following, 64) * 50.0)

    monkeypatch.setattr(model, "forward", speak)
    lengths = passes(monkeypatch, model)
    out = speculate(model, truth[:6], k=6, max_new_tokens=40, sampling=GREEDY)
    assert out.completion.ids == truth[6:46]
    guesses = [t - 1 for t in lengths[1:]]
    assert guesses[0] == 6
    assert 1 in guesses
    assert sum(guesses) == out.proposed
    assert all(later <= 2 * earlier + 1 for earlier, later in zip(guesses[:-1], guesses[1:], strict=True) if earlier)


# ---- the distribution ----


def p_value(counts, expected):
    """Of the chi-square test; cells that are expected fewer than 5 times are put together."""
    few = expected < 5
    cells = [(counts[~few], expected[~few]), (counts[few].sum()[None], expected[few].sum()[None])]
    counts, expected = (torch.cat(part).double() for part in zip(*cells, strict=True))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize("drafted", [True, False])
def test_three_tokens_have_their_joint_distribution(drafted):
    """Every text of three tokens of four as often as the model says, and not as the draft would have it."""
    model, draft = small(4, seed=1), small(4, seed=2)
    prompt, draws = [0, 2, 1, 0, 2], 600
    texts = list(itertools.product(range(4), repeat=3))

    def expected(model):
        rows = [logprobs_of(model, [*prompt, *text])[len(prompt) - 1 : -1] for text in texts]
        logs = [row.gather(1, torch.tensor(text)[:, None]).sum() for row, text in zip(rows, texts, strict=True)]
        return torch.stack(logs).exp() * draws

    counts = torch.zeros(len(texts))
    reading = read(model, prompt)
    known = read(draft, prompt).state if drafted else None
    total = 0
    for seed in range(draws):
        start = {"state": reading.state, "logits": reading.logits, "draft_state": known}
        if not drafted:
            start = {}
        out = speculate(model, [] if drafted else prompt, draft=draft if drafted else None, k=2, max_new_tokens=3,
                        seed=seed, **start)  # fmt: skip
        counts[texts.index(tuple(out.completion.ids))] += 1
        total += out.accepted
    assert p_value(counts, expected(model)) > 0.01
    assert p_value(counts, expected(draft)) < 1e-6  # the test can fail
    assert 0.1 * draws < total < 2 * draws


@pytest.mark.parametrize(
    ("sampling", "drafted"),
    [
        (WARM, True),
        (SamplingConfig(temperature=1.3, min_p=0.02, **PENALTIES), True),
        (SamplingConfig(typical_p=0.9), True),
        (WARM, False),
    ],
    ids=["filters", "penalties", "typical", "look-up"],
)
def test_every_token_has_the_processed_distribution(model, draft, sampling, drafted):
    """Where a token falls in the model's distribution, ordered by what the draft prefers, is uniform: a bias towards
    the draft would put tokens early."""
    prompt, n = PROMPTS[3], 400
    out = speculate(model, prompt, draft=draft if drafted else None, k=3, max_new_tokens=n, sampling=sampling, seed=5)
    assert out.accepted > 20
    ids = out.completion.ids
    places, preferred = [], []
    u = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        text = torch.tensor([prompt + ids])
        logits, theirs = (m(text).logits[0, len(prompt) - 1 :, :61] for m in (model, draft))
    for t, token in enumerate(ids):
        counts = torch.tensor(ids[:t], dtype=torch.long).bincount(minlength=61)[None]
        seen = counts + torch.tensor(prompt).bincount(minlength=61) > 0
        p, q = (process(of[None, t], sampling, counts, seen)[0].double().softmax(-1) for of in (logits, theirs))
        order = (q / p).nan_to_num(0).argsort(descending=True, stable=True)
        at = int((order == token).nonzero())
        assert p[token] > 0
        places.append(p[order[:at]].sum() + u[t] * p[token])
        preferred.append((q / p)[token] > 1)
    counts = torch.histc(torch.stack(places).float(), 12, 0, 1)
    assert p_value(counts, torch.full((12,), n / 12)) > 0.01
    assert 0 < sum(preferred) < n


# ---- ends, events, states ----


@pytest.mark.parametrize("guesser", ["look-up", "draft", "itself"])
def test_it_ends_where_generate_ends(model, draft, guesser):
    draft = {"look-up": None, "draft": draft, "itself": model}[guesser]
    free = generate(model, [LOOP], max_new_tokens=14, sampling=GREEDY)[0].ids
    for stop in dict.fromkeys(free):
        options = {"max_new_tokens": 14, "sampling": GREEDY, "stop_ids": [stop]}
        [want] = generate(model, [LOOP], **options)
        out = speculate(model, LOOP, draft=draft, k=5, **options).completion
        assert (out.ids, out.finish_reason) == (want.ids, want.finish_reason)
        assert_has_read(model, out.state, [*LOOP, *out.ids])
    for count in (1, 2, 3):
        out = speculate(model, LOOP, draft=draft, k=5, max_new_tokens=count, sampling=GREEDY)
        assert (out.completion.ids, out.completion.finish_reason) == (free[:count], "length")
        assert_has_read(model, out.completion.state, [*LOOP, *free[:count]])


def test_stop_strings_inside_the_guesses(monkeypatch, model):
    forward = model.forward

    def speak(ids, *args, **options):
        out = forward(ids, *args, **options)
        following = (torch.as_tensor(ids)[:, -out.logits.shape[1] :] + 1) % 26
        return out._replace(logits=torch.nn.functional.one_hot(following, 64) * 50.0)

    monkeypatch.setattr(model, "forward", speak)
    events = []
    out = speculate(model, [*range(26), 0], k=6, sampling=GREEDY, stop_strings=["ghi"], tokenizer=Letters(),
                    on_token=events.append)  # fmt: skip
    c = out.completion
    assert (c.text, c.ids, c.finish_reason) == ("bcdef", list(range(1, 9)), "stop")
    assert [e.text for e in events] == ["b", "c", "d", "e", "f", "", "", ""]
    assert [e.id for e in events] == c.ids
    assert [e.completion for e in events] == [None] * 7 + [c]
    assert c.state.seen.tolist() == [27 + 8]


def test_it_goes_on_from_a_state_and_leaves_it_alone(model, draft, monkeypatch):
    def draft_knows(state):
        """How many tokens the draft has read before each of its first two passes."""
        seen, forward = [], draft.forward

        def watched(ids, state=None, **options):
            seen.append(None if state is None else int(state.seen))
            return forward(ids, state=state, **options)

        with monkeypatch.context() as patch:
            patch.setattr(draft, "forward", watched)
            speculate(model, [5, 6], state=ours.state, draft=draft, draft_state=state, max_new_tokens=2)
        return seen[:2]

    text = [3, 8, 8, 1]
    ours, theirs = read(model, text), read(draft, text)
    before = ours.state.copy()
    options = {"max_new_tokens": 15, "sampling": GREEDY}
    [want] = generate(model, [[*text, 5, 6]], **options)
    for more in ({}, {"draft": draft}, {"draft": draft, "draft_state": theirs.state}):
        out = speculate(model, [5, 6], state=ours.state, **more, **options)
        assert out.completion.ids == want.ids
        assert_has_read(model, out.completion.state, [*text, 5, 6, *want.ids])
        on = speculate(model, [], state=ours.state, logits=ours.logits, **more, **options)
        assert on.completion.ids == generate(model, [text], **options)[0].ids
    for layer, kept in zip(ours.state.layers, before.layers, strict=True):
        assert all(a.equal(b) for a, b in zip(layer, kept, strict=True))
    assert draft_knows(theirs.state) == [4, 6]
    assert draft_knows(None) == [None, 2]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 0}, "speculate: k=0, but it must be"),
        ({"ngram": 1.5}, "speculate: ngram=1.5, but it must be"),
        ({"prompt": []}, "prompt 0 is empty"),
        ({"prompt": "text"}, "token ids, not text"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"draft": small(60)}, "the draft knows 60 tokens, the model 61; take two of one tokenizer"),
        (
            {"draft": MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=None))},
            "speculate: the draft: this model has no vocabulary",
        ),
        ({"draft": small().to("meta")}, "the draft is on meta, the model on cpu; move one of them"),
        ({"draft_state": MambaState.zeros(small().config, 1)}, "draft_state without a draft"),
        ({"draft": small(), "draft_state": MambaState.zeros(small().config, 2)}, "draft_state has 2 rows"),
    ],
)
def test_refuses(model, options, text):
    with pytest.raises(AnymambaError, match=text):
        speculate(model, **{"prompt": [1], **options})


def test_a_broken_model_is_not_sampled_from(draft):
    broken = small(seed=3)
    broken.backbone.norm_f.weight.data.fill_(float("nan"))
    with pytest.raises(AnymambaError, match="has no token to choose"):
        speculate(broken, [1], draft=draft)
    with pytest.raises(AnymambaError, match="has no token to choose"):
        speculate(draft, [1], draft=broken)


# ---- look-up ----


@pytest.mark.parametrize(
    ("text", "ngram", "k", "found"),
    [
        ([1, 2, 3], 3, 4, []),
        ([1], 3, 4, []),
        ([1, 2, 3, 1], 3, 2, [2, 3]),
        ([1, 2, 3, 1], 3, 5, [2, 3, 1, 2, 3]),  # taken for a loop
        ([4, 4], 3, 3, [4, 4, 4]),
        ([1, 2, 7, 0, 2, 8, 1, 2], 3, 1, [7]),  # two tokens fit there, one fits later
        ([1, 2, 7, 0, 2, 8, 1, 2], 1, 1, [8]),
        ([1, 2, 7, 1, 2, 8, 1, 2], 3, 2, [8, 1]),  # the latest of two
        ([2, 5, 1, 2], 4, 0, []),
    ],
)
def test_look_up(text, ngram, k, found):
    assert look_up(np.array(text), ngram, k) == found


# ---- states at every place ----


@pytest.mark.parametrize("w", [1, 2, 4])
@pytest.mark.parametrize(("t", "k"), [(1, 1), (7, 1), (7, 3), (6, 3), (5, 9)])
def test_states_are_those_of_reading_so_far(t, k, w):
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=23, d_model=16, n_layer=2, d_state=4, d_conv=w))
    ids = torch.randint(23, (3, t + 2), generator=torch.Generator().manual_seed(1))
    start = model(ids[:, :2]).state
    for before, text in ((start, ids[:, 2:]), (None, ids[:, :t])):
        out, plain = model(text, before, return_states=k), model(text, before)
        torch.testing.assert_close(out.logits, plain.logits, atol=1e-5, rtol=1e-4)
        assert out.states.counts == tuple(sorted({*range(k, t + 1, k), t}))
        for count in out.states.counts:
            want = model(text[:, :count], before).state
            got = out.states.after(count)
            assert got.seen.tolist() == want.seen.tolist()
            for layer, expected in zip(got.layers, want.layers, strict=True):
                torch.testing.assert_close(layer, expected, atol=1e-5, rtol=1e-4)
        last = out.states.after(t)
        assert all(a.equal(b) for x, y in zip(last.layers, out.state.layers, strict=True)
                   for a, b in zip(x, y, strict=True))  # fmt: skip
        assert plain.states is None


def test_each_row_has_its_own_place_and_gradients_go_through():
    model = MambaLM(MambaConfig(vocab_size=23, d_model=16, n_layer=2, d_state=4))
    ids = torch.randint(23, (3, 6), generator=torch.Generator().manual_seed(1))
    state = model(ids, return_states=1).states.after([5, 2, 6])
    assert state.seen.tolist() == [5, 2, 6]
    model(ids[:, :2], state=state).logits.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    cut = MambaState.cat([model(ids[[r], :t]).state for r, t in enumerate([5, 2, 6])])
    model(ids[:, :2], state=cut).logits.square().sum().backward()
    for got, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad, atol=1e-4, rtol=1e-3)
    recomputing = MambaLM(model.config)
    recomputing.load_state_dict(model.state_dict())
    recomputing.recompute = True
    assert torch.allclose(recomputing(ids, return_states=4).logits, model(ids).logits, atol=1e-5)


def test_states_that_are_not_there(model):
    states = model([[1, 2, 3, 4, 5]], return_states=2).states
    for wrong in (0, 1, 6, [2, 4], -1):
        with pytest.raises(AnymambaError, match="there are 1 rows with states after 2, 4, 5 tokens"):
            states.after(wrong)
    for options in ({"lengths": torch.tensor([2])}, {"cu_seqlens": torch.tensor([0, 1, 3])}):
        with pytest.raises(AnymambaError, match="return_states needs rows of one length"):
            model([[1, 2, 3]], return_states=1, **options)
    with pytest.raises(AnymambaError, match="return_states=0, but it must be a whole number"):
        model([[1, 2, 3]], return_states=0)


# ---- the command ----


def test_generate_with_guesses_writes_the_same(command, tmp_path):
    for name, made in (("big", tiny(257)), ("small", small(257, pad_vocab_size_multiple=8))):
        made.save_pretrained(tmp_path / name)
        ByteTokenizer().save(tmp_path / name)
    base = ("generate", tmp_path / "big", "--greedy", "--max-new-tokens", 12, "--prompt", "abcabcab")
    plain = command(*base)
    for options in (["--lookup"], ["--draft", tmp_path / "small"], ["--draft", tmp_path / "big", "--guesses", 2]):
        code, said, errors = command(*base, *options)
        assert (code, said) == plain[:2]
        assert "guesses right (" in errors
        assert errors.endswith(" tokens a pass\n")
    assert "8 of 8 guesses right (100%), 3.00 tokens a pass" in errors
    both = (*base, "--lookup", "--draft", tmp_path / "small")
    for arguments, words in ((both, "--draft with --lookup"), ((*base, "--lookup", "--n", 2), "drop --n"),
                             (("generate", tmp_path / "big", "--lookup", "--interactive"), "and --interactive"),
                             ((*base, "--draft", tmp_path / "none"), "no config.json"),
                             ((*base, "--lookup", "--guesses", 0), "k=0, but it must be")):  # fmt: skip
        code, said, errors = command(*arguments)
        assert (code, said) == (2, "")
        assert words in errors


def test_a_draft_with_another_tokenizer_is_refused(command, tmp_path):
    bpe = pytest.importorskip("tokenizers")
    other = bpe.Tokenizer(bpe.models.BPE(vocab={chr(i + 33): i for i in range(257)}, merges=[]))
    for name in ("big", "small"):
        small(257, pad_vocab_size_multiple=8).save_pretrained(tmp_path / name)
    ByteTokenizer().save(tmp_path / "big")
    other.save(str(tmp_path / "small" / "tokenizer.json"))
    code, said, errors = command("generate", tmp_path / "big", "--prompt", "a", "--draft", tmp_path / "small")
    assert (code, said) == (2, "")
    assert "has another tokenizer than the model" in errors
