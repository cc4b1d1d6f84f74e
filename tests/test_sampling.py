"""Every sampler against a case worked out by hand, then the laws that hold for any logits."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.errors import AnymambaError
from anymamba.generate import sampling
from anymamba.generate.sampling import SamplingConfig, greedy, process, sample

INF = math.inf
FILTERS = {
    "top_k": lambda x: sampling.top_k(x, 3),
    "top_p": lambda x: sampling.top_p(x, 0.7),
    "min_p": lambda x: sampling.min_p(x, 0.2),
    "typical": lambda x: sampling.typical(x, 0.6),
}


def of(*probabilities):
    return torch.tensor([probabilities]).log()


def kept(logits):
    """The ids that survive in each row."""
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_temperature_divides():
    torch.testing.assert_close(sampling.temperature(torch.tensor([[1.0, -2.0]]), 0.5), torch.tensor([[2.0, -4.0]]))


def test_the_smallest_temperature_is_greedy_without_overflow():
    logits = process(torch.tensor([[90.0, 91.0, -300.0]]), SamplingConfig(temperature=1e-6))
    assert sample(logits.repeat(50, 1)).tolist() == [1] * 50


def test_top_k():
    assert kept(sampling.top_k(of(0.1, 0.4, 0.2, 0.3), 2)) == [{1, 3}]


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert kept(sampling.top_k(of(0.5, 0.5), 7)) == [{0, 1}]


def test_top_k_does_not_choose_among_equals():
    assert kept(sampling.top_k(of(0.2, 0.4, 0.2, 0.2), 2)) == [{0, 1, 2, 3}]


def test_top_p_includes_the_token_that_crosses():
    assert kept(sampling.top_p(of(0.05, 0.5, 0.15, 0.3), 0.6)) == [{1, 3}]
    assert kept(sampling.top_p(of(0.05, 0.5, 0.15, 0.3), 0.45)) == [{1}]


def test_top_p_keeps_one_token_however_small_p():
    assert kept(sampling.top_p(of(0.1, 0.7, 0.2), 1e-9)) == [{1}]


def test_top_p_of_a_flat_large_vocabulary():
    """More tokens are needed than are ranked at first: 0.9 of 5000, and all equal to the last one."""
    logits = -torch.arange(5000.0)[None] * 1e-4
    probabilities = logits.softmax(-1)[0]
    count = len(kept(sampling.top_p(logits, 0.9))[0])
    assert probabilities[: count - 1].sum() < 0.9 <= probabilities[:count].sum() + 1e-6


def test_min_p_is_relative_to_the_highest_probability():
    """Not to token 0's, whatever its place: 0.5 · 0.2 = 0.1."""
    assert kept(sampling.min_p(of(0.01, 0.5, 0.29, 0.12, 0.08), 0.2)) == [{1, 2, 3}]


def test_typical_prefers_the_tokens_nearest_to_the_entropy():
    # information 0.51, 1.61, 1.61 and entropy 0.95, so the distances are 0.44, 0.66, 0.66
    assert kept(sampling.typical(of(0.6, 0.2, 0.2), 0.5)) == [{0}]
    # information 0.69, 1.39, 2.08, 2.08; entropy 1.21: the second token is the most typical one, the first comes next
    assert kept(sampling.typical(of(0.5, 0.25, 0.125, 0.125), 0.2)) == [{1}]
    assert kept(sampling.typical(of(0.5, 0.25, 0.125, 0.125), 0.3)) == [{0, 1}]


def test_typical_ignores_tokens_dropped_before():
    assert kept(sampling.typical(of(0.5, 0.0, 0.5), 0.9)) == [{0, 2}]


def test_repetition_penalty_divides_positive_and_multiplies_negative():
    logits, seen = torch.tensor([[4.0, -4.0, 4.0, -4.0]]), torch.tensor([[True, True, False, False]])
    assert sampling.repetition_penalty(logits, seen, 2.0).tolist() == [[2.0, -8.0, 4.0, -4.0]]


def test_presence_and_frequency_penalty():
    logits, counts = torch.zeros(1, 3), torch.tensor([[0, 1, 4]])
    assert sampling.presence_penalty(logits, counts, 0.5).tolist() == [[0.0, -0.5, -0.5]]
    assert sampling.frequency_penalty(logits, counts, 0.5).tolist() == [[0.0, -0.5, -2.0]]


def test_logit_bias():
    assert sampling.logit_bias(torch.zeros(2, 3), {2: 1.5, 0: -1}).tolist() == [[-1.0, 0.0, 1.5]] * 2


def test_padding_is_never_sampled():
    logits = sampling.mask_padding(torch.tensor([[0.0, 0.0, 0.0, 50.0]]), 3)
    assert kept(logits) == [{0, 1, 2}]
    assert greedy(logits).tolist() == [0]
    assert sample(logits.repeat(200, 1), torch.Generator().manual_seed(0)).max() < 3


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_sample_follows_the_distribution():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    ids = sample(p.log().repeat(20_000, 1), torch.Generator().manual_seed(0))
    frequency = ids.bincount(minlength=4) / 20_000
    assert frequency[1] == 0
    torch.testing.assert_close(frequency, p, atol=0.015, rtol=0)


def test_a_seed_gives_the_same_draws():
    logits = torch.randn(8, 50)
    first, again = (sample(logits, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.equal(again)


def test_a_row_with_its_own_generator_ignores_its_neighbours():
    logits = torch.randn(5, 50)
    together = sample(logits, [torch.Generator().manual_seed(i) for i in range(5)])
    alone = [sample(logits[i : i + 1], [torch.Generator().manual_seed(i)]) for i in range(5)]
    assert together.equal(torch.cat(alone))


def test_row_generators_depend_on_seed_prompt_and_sample_only():
    def draws(seed, prompts, n):
        return [[float(torch.rand((), generator=g)) for g in of] for of in sampling.row_generators(seed, prompts, n)]

    few, many = draws(7, 2, 2), draws(7, 3, 4)
    assert few == [of[:2] for of in many[:2]]
    assert len({x for seed in (7, 8) for of in draws(seed, 3, 4) for x in of}) == 24
    assert draws([7, 7], 2, 2) == [few[0], few[0]]  # a seed for each prompt: its place does not matter


def test_the_ends_of_the_unit_interval(monkeypatch):
    logits = of(0.0, 0.3, 0.7, 0.0)
    for u, token in ((0.0, 1), (1.0, 2)):  # 1.0 stands for u · total rounded up
        monkeypatch.setattr(torch, "rand", lambda *_, u=u, **__: torch.full((1,), u, dtype=torch.float64))
        assert sample(logits).tolist() == [token]


def test_greedy_takes_the_lowest_id_among_equals():
    assert greedy(torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 0.0]])).tolist() == [1, 0]


# --- process ---------------------------------------------------------------------------------------------------------


def test_defaults_change_nothing():
    logits = torch.randn(2, 9)
    assert process(logits, SamplingConfig()) is logits


def test_the_order_is_bias_penalties_temperature_filters():
    logits = torch.tensor([[2.0, 2.0, 0.5, -1.0]])
    config = SamplingConfig(
        logit_bias={2: 2.0},
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        temperature=0.5,
        top_k=3,
    )
    # token 1 occurred twice: (2 / 2 - 0.5 - 0.5) / 0.5 = 0; token 2: (0.5 + 2) / 0.5; token 3, now the lowest, goes
    expected = torch.tensor([[4.0, 0.0, 5.0, -INF]])
    torch.testing.assert_close(process(logits, config, counts=torch.tensor([[0, 2, 0, 0]])), expected)


def test_repetition_penalty_counts_the_prompt_and_the_other_penalties_do_not():
    logits, counts = torch.ones(1, 3), torch.tensor([[0, 1, 0]])
    seen = torch.tensor([[True, True, False]])
    config = SamplingConfig(repetition_penalty=2.0, presence_penalty=0.25)
    assert process(logits, config, counts, seen).tolist() == [[0.5, 0.25, 1.0]]
    assert process(logits, config, counts).tolist() == [[1.0, 0.25, 1.0]]


def test_greedy_keeps_the_best_token_whatever_the_filters():
    """The most probable token is not the most typical one, and temperature 0 must still take it."""
    logits = of(0.5, 0.25, 0.125, 0.125)
    assert greedy(process(logits, SamplingConfig(temperature=0, typical_p=0.2))).tolist() == [0]


def test_config_names_what_it_changes():
    assert SamplingConfig().changes() == {}
    assert SamplingConfig(top_k=5, temperature=0).changes() == {"temperature": 0, "top_k": 5}
    assert SamplingConfig(temperature=0).is_greedy
    assert not SamplingConfig(temperature=0.1).is_greedy
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingConfig().top_k = 5


# --- laws ------------------------------------------------------------------------------------------------------------

rows = st.lists(st.integers(-40, 40), min_size=1, max_size=12)  # whole tenths: ties happen, and only true ones
configs = st.builds(
    SamplingConfig,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 15),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    typical_p=st.floats(0.01, 1),
    repetition_penalty=st.floats(0.5, 2),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
)


@given(rows, configs, st.integers(0, 2**31))
@settings(deadline=None, max_examples=150)
def test_something_always_survives_and_can_be_drawn(row, config, seed):
    logits = torch.tensor([row]) / 10
    counts = torch.randint(0, 4, logits.shape, generator=torch.Generator().manual_seed(seed))
    result = process(logits, config, counts)
    token = sample(result, [torch.Generator().manual_seed(seed)])
    assert not result.isnan().any()
    assert result[0, token].isfinite().all()


@pytest.mark.parametrize("name", FILTERS)
@given(row=rows)
@settings(deadline=None, max_examples=60)
def test_a_filter_keeps_a_nonempty_subset_unchanged(name, row):
    logits = torch.tensor([row]) / 10
    result = FILTERS[name](logits)
    survives = result.isfinite()
    assert survives.any()
    assert result[survives].equal(logits[survives])


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
@given(row=rows)
@settings(deadline=None, max_examples=60)
def test_a_filter_keeps_the_best_from_some_threshold_on(name, row):
    logits = torch.tensor([row]) / 10
    survives = FILTERS[name](logits).isfinite()
    assert survives.equal(logits >= logits[survives].min())


@pytest.mark.parametrize("name", FILTERS)
@given(row=rows, seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_a_permuted_vocabulary_permutes_the_result(name, row, seed):
    logits = torch.tensor([row], dtype=torch.float64) / 10
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))
    assert FILTERS[name](logits[:, order]).equal(FILTERS[name](logits)[:, order])


@pytest.mark.parametrize("name", FILTERS)
def test_a_row_of_a_batch_is_that_row_alone(name):
    logits = torch.randn(4, 30)
    assert FILTERS[name](logits).equal(torch.cat([FILTERS[name](row[None]) for row in logits]))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("temperature", -1, r"temperature=-1, but it must be 0 \(greedy\) or a finite number"),
        ("temperature", math.nan, "temperature=nan"),
        ("temperature", "0.7", "temperature='0.7'"),
        ("top_k", -1, r"top_k=-1, but it must be a whole number ≥ 0 \(0 keeps every token\)"),
        ("top_k", 2.5, "top_k=2.5"),
        ("top_k", True, "top_k=True"),
        ("top_p", 0, r"top_p=0, but it must be in \(0, 1\]"),
        ("top_p", 1.1, "top_p=1.1"),
        ("typical_p", 0, r"typical_p=0, but it must be in \(0, 1\]"),
        ("min_p", 1.5, r"min_p=1.5, but it must be in \[0, 1\]"),
        ("repetition_penalty", 0, "repetition_penalty=0, but it must be a finite number > 0"),
        ("presence_penalty", INF, "presence_penalty=inf, but it must be a finite number"),
        ("frequency_penalty", None, "frequency_penalty=None"),
        ("logit_bias", {-1: 2.0}, "logit_bias has -1: 2.0, but it maps token ids to finite numbers"),
        ("logit_bias", {3: -INF}, "logit_bias has 3: -inf, but it maps token ids to finite numbers; -100 bans"),
    ],
)
def test_config_refuses(field, value, text):
    with pytest.raises(AnymambaError, match=text):
        SamplingConfig(**{field: value})


def test_bias_outside_the_vocabulary():
    with pytest.raises(AnymambaError, match="logit_bias names token id 5, but the vocabulary has 3 tokens"):
        sampling.logit_bias(torch.zeros(1, 3), {5: 1.0})


def test_penalties_need_counts():
    with pytest.raises(AnymambaError, match=r"'top_k': 2.*without counts; pass the token counts, shape \(b, vocab\)"):
        process(torch.zeros(1, 3), SamplingConfig(top_k=2, presence_penalty=1.0))


def test_one_generator_a_row():
    with pytest.raises(AnymambaError, match="2 generators for logits of 3 rows; pass one for each row"):
        sample(torch.zeros(3, 4), [torch.Generator()] * 2)


@pytest.mark.parametrize("choose", [greedy, sample])
@pytest.mark.parametrize("bad", [[math.nan, 0.0], [-INF, -INF]])
def test_a_row_without_a_choice_is_an_error(choose, bad):
    with pytest.raises(
        AnymambaError, match=r"row 1 has no token to choose: its \w+ are NaN or all -inf; check the model"
    ):
        choose(torch.tensor([[0.0, 1.0], bad]))
