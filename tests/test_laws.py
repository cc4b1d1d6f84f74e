"""Laws that hold for any input: of the ops, then of a whole model. Hypothesis chooses sizes, splits and arguments."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anymamba import MambaConfig, MambaLM, MambaState, ops
from anymamba import backends as choice
from conftest import OPTIONAL, conv_arguments, outputs_and_gradients, scan_arguments

pytestmark = pytest.mark.usefixtures("poison")
EXACT = {"rtol": 1e-11, "atol": 1e-12}
ROUNDING = {"rtol": 2e-5, "atol": 2e-5}  # float32, and numbers of about 1 that may cancel
BACKENDS = [("reference", torch.float64), ("reference", torch.float32), ("numba", torch.float32)]
backends = pytest.mark.parametrize(("backend", "dtype"), BACKENDS)


def assert_same(got, want, dtype=torch.float32):
    torch.testing.assert_close(got, want, **EXACT if dtype == torch.float64 else ROUNDING)


# ---- ops -------------------------------------------------------------------------------------------------------


@st.composite
def scans(draw, batch=True):
    groups = draw(st.sampled_from([None, 0, 1, 2]))
    d = draw(st.integers(1, 20)) * (2 if groups == 2 else 1)
    return {"b": draw(st.integers(1, 3)) if batch else 1, "t": draw(st.integers(1, 40)), "d": d,
            "n": draw(st.integers(1, 5)), "groups": groups, "seed": draw(st.integers(0, 9)),
            "without": tuple(draw(st.sets(st.sampled_from(OPTIONAL))))}  # fmt: skip


@st.composite
def convs(draw, batch=True):
    return {"b": draw(st.integers(1, 3)) if batch else 1, "t": draw(st.integers(1, 70)), "d": draw(st.integers(1, 20)),
            "w": draw(st.integers(1, 7)), "activation": draw(st.sampled_from([None, "silu"])),
            "seed": draw(st.integers(0, 9)),
            "without": tuple(draw(st.sets(st.sampled_from(["bias", "initial_state"]))))}  # fmt: skip


def make(kind, sizes, dtype, **more):
    """The op, its arguments, and the names of those that have a time axis."""
    if kind == "conv":
        return ops.causal_conv1d, conv_arguments(**sizes, dtype=dtype, **more), ("x",)
    timed = ("x", "dt", "z") if sizes["groups"] == 0 else ("x", "dt", "z", "B", "C")
    return ops.selective_scan, scan_arguments(**sizes, dtype=dtype, **more), timed


def cut(arguments, timed, i, j):
    return arguments | {k: arguments[k][:, i:j] for k in timed if k in arguments}


both_ops = st.one_of(st.tuples(st.just("scan"), scans()), st.tuples(st.just("conv"), convs()))
both_ops_one_row = st.one_of(st.tuples(st.just("scan"), scans(False)), st.tuples(st.just("conv"), convs(False)))


@backends
@given(case=both_ops)
def test_step_by_step(backend, dtype, case):
    op, arguments, timed = make(*case, dtype)
    want, want_state = op(**arguments, backend=backend)
    step, state = {"selective_scan": ops.selective_step_, "causal_conv1d": ops.causal_conv1d_step_}[op.__name__], None
    state = torch.zeros_like(want_state) if "initial_state" not in arguments else arguments["initial_state"].clone()
    arguments.pop("initial_state", None)
    y = []
    for i in range(arguments["x"].shape[1]):
        token = cut(arguments, timed, i, i + 1)
        token |= {k: token[k].squeeze(1) for k in timed if k in token}
        if case[0] == "scan" and case[1]["groups"] == 0:  # a step takes what the time axis is gone from, no constants
            rows = arguments["x"].shape[0]
            token |= {k: token[k][None, :, :].expand(rows, -1, -1) for k in ("B", "C")}
        y.append(step(state, **token, backend=backend))
    assert_same(torch.stack(y, 1), want, dtype)
    assert_same(state, want_state, dtype)


@backends
@given(case=both_ops, data=st.data())
def test_split_anywhere(backend, dtype, case, data):
    """Outputs, and gradients that flow back through the state."""
    op, arguments, timed = make(*case, dtype)
    t = arguments["x"].shape[1]
    ends = sorted(data.draw(st.lists(st.integers(0, t), max_size=3)))

    def in_pieces(**leaves):
        y, state = [], leaves.get("initial_state")
        for i, j in zip([0, *ends], [*ends, t], strict=True):
            out, state = op(**cut(leaves, timed, i, j) | {"initial_state": state}, backend=backend)
            y.append(out)
        return torch.cat(y, 1), state

    want = outputs_and_gradients(op, arguments, backend=backend)
    got = outputs_and_gradients(in_pieces, arguments)
    for name in want:
        assert_same(got[name], want[name], dtype)


@backends
@given(case=both_ops_one_row, data=st.data())
def test_packed_is_one_by_one(backend, dtype, case, data):
    t = case[1]["t"]
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, t), max_size=5))), t]
    op, arguments, timed = make(*case, dtype, rows=len(bounds) - 1)
    packed = torch.tensor(bounds)

    def one_by_one(**leaves):
        initial, parts = leaves.get("initial_state"), []
        for s, (i, j) in enumerate(zip(bounds, bounds[1:], strict=False)):
            state = None if initial is None else initial[s : s + 1]
            parts.append(op(**cut(leaves, timed, i, j) | {"initial_state": state}, backend=backend))
        return torch.cat([y for y, _ in parts], 1), torch.cat([h for _, h in parts])

    want = outputs_and_gradients(one_by_one, arguments)
    got = outputs_and_gradients(op, arguments, backend=backend, cu_seqlens=packed)
    for name in want:
        assert_same(got[name], want[name], dtype)


@backends
@given(case=both_ops)
def test_row_alone(backend, dtype, case):
    """Bit for bit: what else is in the batch changes nothing."""
    op, arguments, timed = make(*case, dtype)
    y, final_state = op(**arguments, backend=backend)
    for row in range(y.shape[0]):
        mine = {k: arguments[k][row : row + 1] for k in (*timed, "initial_state") if k in arguments}
        y_row, state_row = op(**arguments | mine, backend=backend)
        if backend == "numba":
            assert torch.equal(y_row, y[row : row + 1])
            assert torch.equal(state_row, final_state[row : row + 1])
        assert_same(y_row, y[row : row + 1], dtype)
        assert_same(state_row, final_state[row : row + 1], dtype)


@given(case=both_ops)
def test_every_backend_is_the_reference(case):
    op, arguments, _ = make(*case, torch.float32)
    want = outputs_and_gradients(op, arguments, backend="reference")
    for backend in ("reference", "numba"):  # the GPU's have tests of their own
        got = outputs_and_gradients(op, arguments, backend=backend)
        for name in want:
            assert_same(got[name], want[name])


# ---- a model ---------------------------------------------------------------------------------------------------

VOCABULARY = 23


@functools.cache
def model(dtype=torch.float32):
    """Two small layers whose step sizes and states matter; bigger weights than at the start of training."""
    torch.manual_seed(0)
    made = MambaLM(
        MambaConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, d_state=4, d_conv=3, dt_min=0.05, dt_max=1.0)
    )
    with torch.no_grad():
        made.backbone.embedding.weight.normal_()
        for block in made.backbone.layers:
            block.mixer.in_proj.weight.mul_(2)
            block.mixer.x_proj.weight.mul_(2)
    return made.to(dtype)


def tokens(b, t, seed=0):
    return torch.randint(VOCABULARY, (b, t), generator=torch.Generator().manual_seed(seed))


def state_tensors(state):
    return [v for layer in state.layers for v in layer]


def assert_same_state(got, want, dtype=torch.float32):
    assert torch.equal(got.seen, want.seen)
    for i, j in zip(state_tensors(got), state_tensors(want), strict=True):
        assert_same(i, j, dtype)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
lengths_of_time = st.integers(1, 12)


@dtypes
@given(t=st.integers(2, 12), b=st.integers(1, 3), data=st.data())
def test_model_split_anywhere(dtype, t, b, data):
    m, ids = model(dtype), tokens(b, t)
    want = m(ids)
    ends = sorted(data.draw(st.sets(st.integers(1, t - 1), max_size=4)))
    state, logits = None, []
    for i, j in zip([0, *ends], [*ends, t], strict=True):
        out = m(ids[:, i:j], state)
        state = out.state
        logits.append(out.logits)
    assert_same(torch.cat(logits, 1), want.logits, dtype)
    assert_same_state(state, want.state, dtype)


@dtypes
def test_model_token_by_token(dtype):
    m, ids = model(dtype), tokens(2, 9)
    want, state, logits = m(ids), None, []
    for i in range(9):
        out = m(ids[:, i : i + 1], state)
        state = out.state
        logits.append(out.logits)
    assert_same(torch.cat(logits, 1), want.logits, dtype)
    assert_same_state(state, want.state, dtype)


@dtypes
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), side=st.sampled_from(["left", "right"]),
       wide=st.integers(0, 3), carried=st.booleans())  # fmt: skip
def test_model_padding_is_invisible(dtype, lengths, side, wide, carried):
    """Padded on either side = each row alone; padding tokens may be anything; a row of length 0 keeps its state."""
    m, b, t = model(dtype), len(lengths), max([1, *lengths]) + wide
    ids = tokens(b, t)
    before = m(tokens(b, 3, seed=1)).state if carried else None
    out = m(ids, before, torch.tensor(lengths), padding_side=side)
    last = m(ids, before, torch.tensor(lengths), padding_side=side, last_only=True).logits
    assert last.shape[:2] == (b, 1)
    for row, length in enumerate(lengths):
        real = slice(0, length) if side == "right" else slice(t - length, t)
        state = None if before is None else before.select([row])
        if length == 0:
            assert last[row].isnan().all()
            want = MambaState.zeros(m.config, 1).to(dtype=dtype, ssm_dtype=dtype) if state is None else state
            assert_same_state(out.state.select([row]), want, dtype)
        else:
            alone = m(ids[row : row + 1, real], state)
            assert_same(out.logits[row : row + 1, real], alone.logits, dtype)
            assert_same(last[row], alone.logits[0, -1:], dtype)
            assert_same_state(out.state.select([row]), alone.state, dtype)
        padding = torch.ones(t, dtype=torch.bool)
        padding[real] = False
        assert (out.logits[row, padding] == 0).all()
        assert (out.hidden[row, padding] == 0).all()


@dtypes
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any))
def test_model_packed_is_one_by_one(dtype, lengths):
    m, bounds = model(dtype), torch.tensor([0, *lengths]).cumsum(0)
    ids = tokens(1, sum(lengths))
    before = m(tokens(len(lengths), 3, seed=1)).state
    out = m(ids, before, cu_seqlens=bounds)
    last = m(ids, before, cu_seqlens=bounds, last_only=True).logits
    for row, (i, j) in enumerate(zip(bounds.tolist(), bounds.tolist()[1:], strict=False)):
        if i == j:
            assert last[0, row].isnan().all()
            assert_same_state(out.state.select([row]), before.select([row]), dtype)
            continue
        alone = m(ids[:, i:j], before.select([row]))
        assert_same(out.logits[:, i:j], alone.logits, dtype)
        assert_same(last[0, row], alone.logits[0, -1], dtype)
        assert_same_state(out.state.select([row]), alone.state, dtype)


@given(t=lengths_of_time, b=st.integers(1, 4))
def test_model_row_alone(t, b):
    m, ids = model(), tokens(b, t)
    out = m(ids)
    for row in range(b):
        alone = m(ids[row : row + 1])
        assert_same(alone.logits, out.logits[row : row + 1])
        assert_same_state(alone.state, out.state.select([row]))


def gradients_of(m, loss):
    return torch.autograd.grad(loss, list(m.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(t=st.integers(2, 12), data=st.data())
def test_model_gradients_through_the_state(dtype, t, data):
    """Cut in two, with the state's history kept: the gradients of the whole."""
    m, ids = model(dtype), tokens(2, t + 1)
    cut_at = data.draw(st.integers(1, t - 1))
    inputs, labels = ids[:, :-1], ids[:, 1:]
    want = gradients_of(m, m(inputs, labels=labels).loss)
    first = m(inputs[:, :cut_at], labels=labels[:, :cut_at])
    second = m(inputs[:, cut_at:], first.state, labels=labels[:, cut_at:])
    got = gradients_of(m, (first.loss * cut_at + second.loss * (t - cut_at)) / t)
    for i, j in zip(got, want, strict=True):
        assert_same(i, j, dtype)
    # detached, nothing of the second half reaches the first
    second = m(inputs[:, cut_at:], first.state.detach(), labels=labels[:, cut_at:])
    assert not any(v.requires_grad for v in state_tensors(first.state.detach()))
    assert second.loss.requires_grad


@dtypes
def test_model_recompute(dtype):
    m, ids = model(dtype), tokens(2, 12)
    want = gradients_of(m, m(ids, labels=ids).loss)
    m.recompute = True
    try:
        got = gradients_of(m, m(ids, labels=ids).loss)
    finally:
        m.recompute = False
    assert all(torch.equal(i, j) for i, j in zip(got, want, strict=True))


@dtypes
def test_model_last_only(dtype):
    m, ids = model(dtype), tokens(3, 7)
    full, last = m(ids, labels=ids), m(ids, labels=ids, last_only=True)
    assert full.logits is None  # with labels they are not made
    assert last.logits.shape[:2] == (3, 1)
    assert_same(last.logits, m(ids).logits[:, -1:], dtype)
    assert_same(last.loss, full.loss, dtype)
    assert torch.equal(last.hidden, full.hidden)


@dtypes
def test_model_embeddings(dtype):
    m, ids = model(dtype), tokens(3, 7)
    want, got = m(ids), m(embeddings=m.backbone.embedding(ids))
    assert torch.equal(got.logits, want.logits)
    lengths = torch.tensor([2, 0, 7])
    want, got = m(ids, lengths=lengths), m(embeddings=m.backbone.embedding(ids), lengths=lengths)
    assert torch.equal(got.logits, want.logits)


def test_model_backends_agree(monkeypatch):
    m, ids = model(), tokens(2, 12)
    got = m(ids, labels=ids)
    got_gradients = gradients_of(m, got.loss)
    monkeypatch.setattr(choice, "_default", lambda *_: ("reference", "a test asks for it"))
    monkeypatch.setattr(choice, "_warn_once", lambda *_: None)
    want = m(ids, labels=ids)
    assert_same(got.logits, want.logits)
    for i, j in zip(got_gradients, gradients_of(m, want.loss), strict=True):
        assert_same(i, j)


@dtypes
@given(data=st.data())
def test_state_operations_change_nothing(dtype, data, tmp_path_factory):
    """Copy, fork, select, cat, save and load, in any order: each row goes on as it would have gone on alone."""
    m, rows = model(dtype), data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    state, origin = m(tokens(3, 5)).state, [0, 1, 2]
    reference_state, after = m(tokens(3, 5)).state, tokens(1, 4, seed=2)
    for action in data.draw(
        st.lists(st.sampled_from(["copy", "fork", "select", "cat", "file", "detach", "to"]), max_size=4)
    ):
        if action == "copy":
            state = state.copy()
        elif action == "fork":
            state, origin = state.fork(2), [row for row in origin for _ in range(2)]
        elif action == "select":
            chosen = [row % len(origin) for row in rows]
            state, origin = state.select(chosen), [origin[row] for row in chosen]
        elif action == "cat":
            state, origin = MambaState.cat([state, state.select([0])]), [*origin, origin[0]]
        elif action == "file":
            path = tmp_path_factory.mktemp("state") / "state.safetensors"
            state.save(path, m)
            state = MambaState.load(path, m)
        elif action == "detach":
            state = state.detach()
        else:
            state = state.to("cpu")
    assert state.batch_size == len(origin)
    got = m(after.expand(len(origin), -1), state)
    for row, source in enumerate(origin):
        want = m(after, reference_state.select([source]))
        assert_same(got.logits[row : row + 1], want.logits, dtype)
        assert_same_state(got.state.select([row]), want.state, dtype)


def test_reading_does_not_change_the_state():
    m = model()
    state = m(tokens(2, 5)).state
    before = [v.clone() for v in state_tensors(state)]
    m(tokens(2, 3, seed=1), state)
    assert all(torch.equal(i, j) for i, j in zip(before, state_tensors(state), strict=True))
