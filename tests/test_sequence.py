"""Models of features: patches, pools, padding, states, files, and that they learn what a formula makes."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anymamba import AnymambaError, MambaConfig, MambaLM, SequenceModel
from anymamba.layers.heads import Patches, Pool

CONFIG = MambaConfig(vocab_size=None, d_model=16, n_layer=2, d_state=4)
VARIANTS = [
    {"pool": None},
    {"pool": "last"},
    {"pool": "mean", "patch": 3},
    {"pool": "attention", "patch": 5, "stride": 2},
    {"pool": None, "patch": 4, "stride": 3, "bidirectional": True},
    {"pool": "attention", "bidirectional": True},
]
variants = pytest.mark.parametrize("options", VARIANTS, ids=str)


def make(**options):
    torch.manual_seed(0)
    model = SequenceModel(CONFIG, **({"inputs": 3, "outputs": 4} | options))
    if model.pool is not None and model.pool.kind == "attention":
        torch.nn.init.normal_(model.pool.query)  # equal weights at first would hide them
    return model


def features(b=3, t=11, f=3, seed=1):
    return torch.randn(b, t, f, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---- parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (4, 4), (5, 2), (7, 3)])
@pytest.mark.parametrize("t", [1, 2, 6, 13])
def test_patches_are_windows(size, stride, t):
    """Each window by hand, from the samples that it may hear."""
    patches, x = Patches(2, 5, size, stride), features(2, t, 2)
    got = patches(x)
    assert got.shape == (2, patches.count(t), 5) == (2, math.ceil(t / stride), 5)
    for i in range(got.shape[1]):
        last = (i + 1) * stride
        window = [x[:, j] if 0 <= j < t else torch.zeros(2, 2) for j in range(last - size, last)]
        close(got[:, i], patches.projection(torch.stack(window, -1).flatten(1)))


def test_patches_do_not_hear_padding():
    patches, x = Patches(2, 5, 4, 2), features(2, 9, 2)
    lengths = torch.tensor([9, 4])
    x[1, 4:] = torch.nan
    close(patches(x, lengths)[1:, :2], patches(x[1:, :4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pools(dtype):
    x, lengths = features(3, 7, 5).to(dtype), [7, 1, 4]
    x[1, 1:] = torch.nan  # padding may be anything
    got = {kind: Pool(kind, 5, dtype=dtype) for kind in ("last", "mean", "attention")}
    torch.nn.init.normal_(got["attention"].query)
    got = {kind: (pool, pool(x, torch.tensor(lengths))) for kind, pool in got.items()}
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for i, n in enumerate(lengths):
        row = x[i, :n]
        weights = (row @ got["attention"][0].query).softmax(0)
        want = {"last": row[-1], "mean": row.mean(0), "attention": weights @ row}
        for kind, (_, y) in got.items():
            assert y.dtype == dtype
            close(y[i], want[kind], tolerance)


@pytest.mark.parametrize("part", [Patches(3, 5, 4, 2), Pool("last", 3), Pool("mean", 3)], ids=str)
def test_parts_refuse_what_does_not_fit(part):
    x = features()
    for bad in (x[0], x[:, :0], x[..., :2], x.long()):
        with pytest.raises(AnymambaError, match=r"x is \(.*, but must be real numbers \(batch, seqlen ≥ 1, 3\)"):
            part(bad)
    for lengths in ([11, 12, 1], [11, 1], [1.0, 1.0, 1.0]):
        with pytest.raises(AnymambaError, match="but must be 3 integers from 0 to 11, one a row"):
            part(x, lengths)
    assert len(part(x[:0])) == 0


def test_attention_begins_as_the_mean():
    x = features()
    close(Pool("attention", 3)(x), Pool("mean", 3)(x))


@pytest.mark.parametrize("kind", ["last", "mean", "attention"])
def test_a_row_of_nothing_is_nan(kind):
    y = Pool(kind, 3)(features(), torch.tensor([2, 0, 11]))
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_a_mean_over_long_times_in_sixteen_bits():
    y = Pool("mean", 1)(torch.ones(1, 5000, 1, dtype=torch.bfloat16) * 1.0078125)
    assert y.item() == 1.0078125


# ---- laws ------------------------------------------------------------------------------------------------------


@variants
def test_padding_changes_nothing(options):
    model, x, lengths = make(**options), features(), [11, 1, 6]
    holes = x.clone()
    for i, n in enumerate(lengths):
        holes[i, n:] = torch.nan
    y, _ = model(holes, lengths=torch.tensor(lengths))
    for i, n in enumerate(lengths):
        alone, k = model(x[i : i + 1, :n]).y, model.patches.count(n)
        close(y[i : i + 1] if options["pool"] else y[i : i + 1, :k], alone)
        if options["pool"] is None:
            assert torch.equal(y[i, k:], torch.zeros_like(y[i, k:]))


@variants
def test_every_parameter_learns(options):
    model = make(**options)
    model(features(), lengths=torch.tensor([11, 3, 6])).y.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert float(p.grad.abs().max()) > 0, name


@pytest.mark.parametrize("patch", [1, 3])
def test_states_go_on(patch):
    model, x = make(pool=None, patch=patch), features()
    whole, first = model(x), model(x[:, :6])
    rest = model(x[:, 6:], state=first.state)
    close(torch.cat([first.y, rest.y], 1), whole.y)
    close(rest.state.layers[1].ssm, whole.state.layers[1].ssm)


def test_a_state_counts_samples_and_knows_of_patches_that_were_not_whole():
    model, x = make(pool=None, patch=3), features()
    first = model(x[:, :6], lengths=torch.tensor([6, 3, 0])).state
    assert first.seen.tolist() == [6, 3, 0]
    assert model(x, state=first).state.seen.tolist() == [17, 14, 11]
    after = model(x[:, :6], lengths=torch.tensor([6, 4, 0])).state
    for state in (after, model(x[:, :5]).state, model(x, state=first).state):
        with pytest.raises(AnymambaError, match=f"has read {re.escape(str(state.seen.tolist()))} samples, .* of 3"):
            model(x, state=state)
    close(model(x[[0, 2]], state=after.select([0, 2])).y, model(x[[0, 2]], state=first.select([0, 2])).y)


@variants
def test_lengths_of_all_samples_are_no_lengths(options):
    model, x = make(**options), features(t=10)
    some, none = model(x, lengths=[10] * 3), model(x)
    close(some.y, none.y)
    if none.state is not None:
        assert torch.equal(some.state.seen, none.state.seen)
        close(some.state.layers[1].ssm, none.state.layers[1].ssm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_features_may_be_arrays_lists_and_of_any_real_dtype(dtype):
    model, x = make(patch=2).to(dtype), features().bfloat16()  # whose numbers every dtype holds
    want = model(x.to(dtype)).y
    assert want.dtype == dtype
    for given in (x, x.float(), x.double(), x.double().numpy(), x.float().numpy(), x.tolist()):
        assert torch.equal(model(given).y, want)
    assert torch.equal(model(x.float().numpy(), lengths=np.array([11, 11, 11])).y, model(x, lengths=[11] * 3).y)


def test_gaps_reach_the_blocks():
    model, x, delta = make(pool="mean"), features(), 3 * torch.rand(3, 11)
    want = model.mamba(embeddings=model.patches(x), delta=delta).hidden.mean(1)
    close(model(x, delta=delta).y, model.head(want))
    assert float((model(x, delta=delta).y - model(x).y).detach().abs().max()) > 1e-4


@torch.no_grad()
def test_long_rows_without_gradients(monkeypatch):
    """A model that reads in pieces must not do so when it hears both directions."""
    from anymamba import model

    for both in (False, True):
        sequence, x = make(pool="mean", bidirectional=both), features()
        whole = sequence(x).y
        monkeypatch.setattr(model, "PIECE", 8)
        close(sequence(x).y, whole)
        monkeypatch.undo()


# ---- files -----------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same(options, dtype, tmp_path):
    model, x = make(**options).to(dtype), features().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = SequenceModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(x).y, model(x).y)
    assert loaded.settings == model.settings
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}


def test_files_of_other_kinds_are_refused(tmp_path):
    make().save_pretrained(tmp_path / "sequence")
    MambaLM(CONFIG).save_pretrained(tmp_path / "plain")
    with pytest.raises(AnymambaError, match="'anymamba-1', but a SequenceModel is 'anymamba-sequence-1'"):
        SequenceModel.from_pretrained(tmp_path / "plain")
    with pytest.raises(AnymambaError, match=r"holds a SequenceModel.*SequenceModel\.from_pretrained"):
        MambaLM.from_pretrained(tmp_path / "sequence")
    config = tmp_path / "sequence" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"sequence": settings["sequence"] | {"outputs": 5}}))
    with pytest.raises(AnymambaError, match=r"misshapen *head.bias \(4,\), the config says \(5,\)"):
        SequenceModel.from_pretrained(tmp_path / "sequence")
    config.write_text(json.dumps(settings | {"sequence": {"inputs": 3, "future": 1}}))
    with pytest.raises(AnymambaError, match=r"does not describe a SequenceModel .*future"):
        SequenceModel.from_pretrained(tmp_path / "sequence")


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max"}, "pool='max' does not exist: choose one of last, mean, attention, or None"),
        ({"patch": 2, "stride": 3}, "patches of 2 samples every 3, but it must be 1 ≤ stride ≤ size"),
        ({"patch": 0}, "patch=0, but it must be a whole number of at least 1"),
        ({"outputs": 2.0}, "outputs=2.0, but it must be a whole number"),
        ({"bidirectional": "no"}, "bidirectional='no', but it must be True or False"),
        ({"config": {"d_model": 16}}, "a config is a dict, but must be a MambaConfig"),
        ({"config": CONFIG.replace(vocab_size=9)}, "vocab_size=9: make it with vocab_size=None"),
    ],
)
def test_impossible_models_are_refused(options, message):
    with pytest.raises(AnymambaError, match=message):
        SequenceModel(**{"config": CONFIG, "inputs": 3, "outputs": 4} | options)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"x": features(f=2)}, r"x is \(3, 11, 2\) torch.float32, but must be real numbers .*, 3\)"),
        ({}, {"x": features()[0]}, r"x is \(11, 3\)"),
        ({}, {"x": features(t=0)}, "seqlen ≥ 1"),
        ({}, {"x": features()[:0]}, "batch ≥ 1"),
        ({}, {"x": features().long()}, r"torch.int64, but must be real numbers .* give x.float\(\)"),
        ({}, {"x": np.zeros((2, 9, 3), np.int16)}, r"torch.int16, .*: give .* of 16 bits x.float\(\) / 32768"),
        ({}, {"x": features() > 0}, "torch.bool, but must be real numbers"),
        ({}, {"x": features().to(torch.complex64)}, "torch.complex64, but must be real numbers"),
        ({}, {"x": "sound.wav"}, "x: a str that makes no tensor"),
        ({}, {"x": [[[1.0] * 3], []]}, "x: a list that makes no tensor"),
        ({}, {"x": features().to("meta")}, r"x is on meta, the model on cpu: give x.to\('cpu'\)"),
        ({"inputs": 1}, {"x": features()[..., 0]}, r"for one feature a sample, give x.unsqueeze\(-1\)"),
        ({}, {"x": features(), "state": "one"}, "state is a str, but must be a MambaState"),
        ({}, {"x": features(), "delta": "one"}, "delta: a str that makes no tensor"),
        ({}, {"x": features(), "lengths": [11.0, 11.0, 1.0]}, "but must be 3 integers from 0 to 11"),
        ({}, {"x": features(), "lengths": [11, 12, 1]}, r"lengths are \[11, 12, 1\], but must be 3 integers"),
        ({"patch": 2}, {"x": features(), "delta": torch.ones(3, 11)}, "delta needs a model of single samples"),
        ({"patch": 2, "stride": 1}, {"x": features(), "state": "one"}, "has patches of 2 every 1, and cannot go on"),
        ({"bidirectional": True}, {"x": features(), "state": "one"}, "is bidirectional, and cannot go on from a state"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(options, call, message):
    with pytest.raises(AnymambaError, match=message):
        make(**options)(**call)


# ---- learning --------------------------------------------------------------------------------------------------


def tones(count, generator, t=120):
    """Waveforms of two classes: a tone that rises and one that falls, of any pitch, phase, loudness and length.

    No single moment tells them apart, nor does the spectrum of the whole.
    """
    classes = torch.randint(2, (count,), generator=generator)
    low, loud, phase = (torch.rand(count, 1, generator=generator) for _ in range(3))
    lengths = torch.randint(t // 2, t + 1, (count,), generator=generator)
    place = torch.arange(t) / lengths[:, None]
    place = torch.where(classes[:, None] == 1, place, 1 - place)
    pitch = 0.1 + 0.3 * low + 0.8 * place
    x = (0.5 + loud) * torch.sin(pitch.cumsum(1) + 2 * math.pi * phase)
    return (x + 0.02 * torch.randn(x.shape, generator=generator))[..., None], lengths, classes


def train(model, batch, loss_of, steps, lr):
    """Losses of each step."""
    optimizer, losses = torch.optim.AdamW(model.param_groups(0.01), lr=lr), []
    for _ in range(steps):
        loss = loss_of(*batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_it_learns_which_way_a_tone_goes():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = SequenceModel(CONFIG.replace(n_layer=1), inputs=1, outputs=2, pool="mean", patch=8, stride=4)
    x, lengths, classes = tones(256, torch.Generator().manual_seed(1))

    def accuracy():
        with torch.no_grad():
            return float((model(x, lengths).y.argmax(1) == classes).float().mean())

    before = accuracy()
    train(model, lambda: tones(32, generator), lambda x, n, c: F.cross_entropy(model(x, n).y, c), 60, 1e-2)
    assert before < 0.7
    assert accuracy() > 0.95


def clocks(generator, t=10):
    """A constant signal, seen at times of another pace in each row, and whether a moment of time has passed since."""
    pace = 0.02 + torch.rand(64, 1, generator=generator) ** 2
    gaps = pace * (0.5 + torch.rand(64, t, generator=generator))
    return torch.ones(64, t, 1), gaps, (gaps.cumsum(1) > 1).float()[..., None]


@pytest.mark.parametrize("known", [True, False])
def test_it_learns_time_from_the_gaps_alone(known):
    """An answer at every step; without the gaps the rows are all the same."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = SequenceModel(CONFIG.replace(n_layer=1, dt_min=0.1, dt_max=2.0), inputs=1, outputs=1, pool=None)

    def loss(x, gaps, late):
        return F.binary_cross_entropy_with_logits(model(x, delta=gaps if known else None).y, late)

    train(model, lambda: clocks(generator), loss, 50, 2e-2)
    x, gaps, late = clocks(torch.Generator().manual_seed(1))
    with torch.no_grad():
        accuracy = float(((model(x, delta=gaps if known else None).y > 0) == (late > 0)).float().mean())
    assert accuracy > 0.9 if known else accuracy < 0.8
