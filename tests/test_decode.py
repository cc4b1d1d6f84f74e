"""The decoder against the model called token by token, and against the model in float64."""

import copy
import multiprocessing

import pytest
import torch

from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.generate import Engine, Request, SamplingConfig, decode, generate
from anymamba.generate.decode import Decoder
from anymamba.kernels import numba_decode, numba_launch
from anymamba.layers import quantize
from anymamba.model import MambaLM
from conftest import assert_law
from test_generate import recomputed, tiny

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONFIGS = {
    "plain": MambaConfig(vocab_size=61, d_model=32, n_layer=2),
    "odd": MambaConfig(vocab_size=51, d_model=37, n_layer=3, d_state=5, d_conv=3, expand=3, dt_rank=7, bias=True,
                       tie_embeddings=False),
    "no past": MambaConfig(vocab_size=8, d_model=40, n_layer=1, d_state=19, d_conv=1, conv_bias=False),
    "one of all": MambaConfig(vocab_size=3, d_model=1, n_layer=2, d_state=1, d_conv=2, expand=1),
    "inner norms": MambaConfig(vocab_size=45, d_model=9, n_layer=2, d_state=17, dt_rank=19, inner_norm_eps=1e-3),
    "wide": MambaConfig(vocab_size=130, d_model=50, n_layer=1, d_state=33, d_conv=20),
}  # fmt: skip
GREEDY = SamplingConfig(temperature=0)
kinds = pytest.mark.parametrize("kind", ["int8", "int4"])
pytestmark = pytest.mark.usefixtures("shared_work")


@pytest.fixture
def shared_work(monkeypatch, two_threads):
    """Small models too are computed by several threads."""
    monkeypatch.setattr(numba_launch, "SMALL", 0)


def built(config, dtype=torch.float32):
    torch.manual_seed(1)
    model = MambaLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", ".D", "norm.weight")) and "dt_proj" not in name:
                p.normal_()
        model.backbone.embedding.weight.normal_()
    return model.to(dtype)


def random_ids(config, *shape, seed=0):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, ids, state=None):
    """Logits of the vocabulary in float32, and the state."""
    out = model(ids, state=state, last_only=True)
    return out.logits[:, -1, : model.config.vocab_size].float(), out.state


def decoded(decoder, model, ids, state):
    """Logits (steps,b,v) and the last state of one step for every column of ids."""
    every = []
    for token in ids.T:
        logits, state = decoder.step(token, state)
        v = model.config.vocab_size
        assert logits.shape == (len(token), model.config.padded_vocab_size)
        assert logits.dtype == torch.float32
        assert (logits[:, v:] == -torch.inf).all()
        every.append(logits[:, :v].clone())
    return torch.stack(every), state


def called(model, ids, state):
    every = []
    for token in ids.T:
        logits, state = read(model, token[:, None], state)
        every.append(logits)
    return torch.stack(every), state


def tensors(state):
    return [v for layer in state.layers for v in layer]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_the_model(name, dtype, launches):
    check(built(CONFIGS[name], dtype), 3, launches)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_integers_is_the_model(name, rows, dtype, kind, launches):
    check(quantize(built(CONFIGS[name], dtype), kind), rows, launches)


def check(model, rows, launches):
    """Five steps of the decoder by its kernel, held to the model called and to the model in float64."""
    config = model.config
    text, ids = random_ids(config, rows, 6), random_ids(config, rows, 5, seed=1)
    _, start = read(model, text)
    launches.clear()
    got, state = decoded(Decoder(model), model, ids, start)
    assert launches == ["decode_step"] * 5
    plain, plain_state = called(model, ids, start)
    double = copy.deepcopy(model).double()
    exact, exact_state = called(double, ids, start.to(dtype=torch.float64, ssm_dtype=torch.float64))
    assert_law(got, plain, exact.double(), "logits", slack=16)
    for i, values in enumerate(zip(tensors(state), tensors(plain_state), tensors(exact_state), strict=True)):
        assert_law(*values, f"state {i}", slack=16)
    assert state.seen.tolist() == plain_state.seen.tolist() == [11] * rows


@pytest.mark.parametrize(("dtype", "kind"), [*((dtype, None) for dtype in DTYPES), (torch.float32, "int8"),
                                             (torch.float32, "int4")])  # fmt: skip
def test_a_row_is_that_row_alone(dtype, kind):
    config, rows = CONFIGS["odd"], 9
    model = built(config, dtype)
    if kind is not None:
        quantize(model, kind)
    _, start = read(model, random_ids(config, rows, 4))
    ids = random_ids(config, rows, 3, seed=1)
    alone = [decoded(Decoder(model), model, ids[[r]], start.select([r])) for r in range(rows)]
    for b in range(1, rows + 1):
        logits, state = decoded(Decoder(model), model, ids[:b], start.select(range(b)))
        for r, (one, after) in enumerate(alone[:b]):
            assert torch.equal(logits[:, [r]], one), f"row {r} of {b}"
            assert all(torch.equal(v[[r]], w) for v, w in zip(tensors(state), tensors(after), strict=True))


@kinds
def test_a_row_that_overflows_leaves_the_others_alone(kind):
    """Rows of integers are filled up beyond those of x, where the next row's numbers lie."""
    config = CONFIGS["odd"]
    model = quantize(built(config), kind)
    _, start = read(model, random_ids(config, 6, 4))
    ids = random_ids(config, 6, 2, seed=1)
    want, _ = decoded(Decoder(model), model, ids, start)
    for layer in start.layers:
        layer.ssm[[1, 5]] = torch.inf
    got, _ = decoded(Decoder(model), model, ids, start)
    assert not got[:, [1, 5]].isfinite().any()
    assert torch.equal(got[:, [0, 2, 3, 4]], want[:, [0, 2, 3, 4]])


def test_matrices_of_several_kinds(launches):
    model = built(CONFIGS["odd"])
    quantize(model.backbone, "int4")  # and the head stays dense
    check(model, 3, launches)
    launches.clear()
    model = built(CONFIGS["odd"])
    quantize(model.backbone.layers[1], "int8")
    _, state = read(model, torch.tensor([[3, 4]]))
    logits, _ = Decoder(model).step(torch.tensor([5]), state)
    torch.testing.assert_close(logits[:, :51], read(model, torch.tensor([[5]]), state)[0])
    assert "decode_step" not in launches, "layers that differ are called"


def test_integers_stay_away_from_the_kernels_of_a_gpu(monkeypatch):
    model = built(CONFIGS["plain"]).bfloat16()
    monkeypatch.setattr(decode, "explain", lambda *_: ("cuda", ""))
    monkeypatch.setattr("anymamba.kernels.cuda_decode.supports", lambda *_: True)
    assert decode._kernels_for(model).__name__ == "anymamba.kernels.cuda_decode"
    assert decode._kernels_for(quantize(model)) is None


@pytest.mark.parametrize(("dtype", "state_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_states_of_16_bits(dtype, state_dtype):
    config = CONFIGS["odd"]
    model = built(config, dtype)
    _, start = read(model, random_ids(config, 2, 6))
    ids = random_ids(config, 2, 4, seed=1)
    got, state = decoded(Decoder(model, state_dtype=state_dtype), model, ids, start)
    assert all(layer.ssm.dtype == state_dtype and layer.conv.dtype == dtype for layer in state.layers)
    plain, rounded = [], start
    for token in ids.T:  # rounded after every token, as the decoder keeps it
        logits, rounded = read(model, token[:, None], rounded.to(ssm_dtype=state_dtype).to(ssm_dtype=torch.float32))
        plain.append(logits)
    eps = max(torch.finfo(dtype).eps, torch.finfo(state_dtype).eps)
    torch.testing.assert_close(got, torch.stack(plain), rtol=0, atol=4 * eps * float(got.abs().max()))
    for layer, want in zip(state.layers, rounded.layers, strict=True):
        scale = float(want.ssm.abs().max())
        torch.testing.assert_close(layer.ssm.float(), want.ssm, rtol=0, atol=4 * eps * scale)


@pytest.mark.parametrize("way", ["one thread", "pool", "more threads than cores"])
def test_threads_change_nothing(monkeypatch, way):
    config = CONFIGS["odd"]
    model = built(config)
    _, start = read(model, random_ids(config, 2, 4))
    ids = random_ids(config, 2, 20, seed=1)
    want, state = decoded(Decoder(model), model, ids, start)
    if way == "one thread":
        torch.set_num_threads(1)
    elif way == "pool":
        monkeypatch.setattr(numba_launch, "_openmp", lambda: None)
    else:
        torch.set_num_threads(7)
    got, after = decoded(Decoder(model), model, ids, start)
    assert torch.equal(got, want)
    assert all(torch.equal(v, w) for v, w in zip(tensors(after), tensors(state), strict=True))


def _in_child(pipe, decoder, ids, state):
    pipe.send(decoder.step(ids, state)[0][0].tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_step_after_fork():
    config = CONFIGS["plain"]
    model = built(config)
    _, start = read(model, random_ids(config, 1, 4))
    decoder, ids = Decoder(model), torch.tensor([5])
    want = decoder.step(ids, start)[0][0].tolist()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_child, args=(there, decoder, ids, start))
    child.start()
    answered = here.poll(60)
    child.kill() if not answered else child.join(60)
    assert answered, "the forked process hangs"
    assert here.recv() == want


def test_rows_come_and_go(launches):
    config = CONFIGS["plain"]
    model = built(config)
    most = numba_decode.MAX_ROWS + 1
    _, state = read(model, random_ids(config, most, 3))
    want, decoder = state, Decoder(model)
    for rows in (range(most), range(5), [4, 0, 2], [1, 1, 0, 2], [3], [0] * 6, [2, 3], range(2)):
        state, want = state.select(rows), want.select(rows)
        ids = random_ids(config, len(rows), seed=len(rows))
        logits, state = decoder.step(ids, state)
        plain, want = read(model, ids[:, None], want)
        torch.testing.assert_close(logits[:, : config.vocab_size], plain, rtol=1e-4, atol=1e-4)
        assert torch.equal(state.seen, want.seen)
        for v, w in zip(tensors(state), tensors(want), strict=True):
            torch.testing.assert_close(v, w, rtol=1e-4, atol=1e-4)
    assert launches.count("decode_step") == 7  # all but the first, for which torch's own products are faster


def test_states_from_elsewhere_and_back():
    config = CONFIGS["odd"]
    model = built(config)
    _, first = read(model, random_ids(config, 2, 5))
    _, second = read(model, random_ids(config, 2, 7, seed=3))
    before, decoder, ids = first.copy(), Decoder(model), random_ids(config, 2, seed=1)
    want, after = (v.clone() if isinstance(v, torch.Tensor) else v.copy() for v in decoder.step(ids, first))
    other, changed = decoder.step(ids, second)
    assert not torch.equal(other, want)
    assert all(torch.equal(v, w) for v, w in zip(tensors(first), tensors(before), strict=True)), "an input was changed"
    decoder.step(ids, changed)
    again, state = decoder.step(ids, first)
    assert torch.equal(again, want)
    assert all(torch.equal(v, w) for v, w in zip(tensors(state), tensors(after), strict=True))
    on = decoder.step(ids, state)[0].clone()
    assert torch.equal(Decoder(model).step(ids, after)[0], on), "a state passed back is that state"


@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_hook_is_called(launches, kind):
    config = CONFIGS["plain"]
    model = built(config)
    if kind is not None:
        quantize(model, kind)
    _, state = read(model, random_ids(config, 2, 4))
    ids, heard = torch.tensor([1, 2]), []
    want = Decoder(model).step(ids, state)[0].clone()
    assert "decode_step" in launches
    launches.clear()
    backbone = model.backbone
    places = [model, backbone.embedding, backbone.layers[1], backbone.layers[0].mixer.x_proj, backbone.norm_f,
              model.lm_head]  # fmt: skip
    for module in places:
        handle = module.register_forward_hook(lambda *_: heard.append(1))
        torch.testing.assert_close(Decoder(model).step(ids, state)[0], want)
        handle.remove()
    assert len(heard) == len(places)
    assert "decode_step" not in launches


def test_a_graph_that_would_call_no_hook_is_not_recorded(monkeypatch):
    """A CUDA graph plays kernels back, and Python that listens would hear the first step only."""
    model = built(CONFIGS["plain"])
    model.backbone.layers[1].mixer.out_proj.register_forward_pre_hook(lambda *_: None)
    monkeypatch.setattr(MambaLM, "device", property(lambda self: torch.device("cuda")))
    assert type(decode._batch_for(model, 1, torch.float32)) is decode._Called


def test_what_has_no_kernels_is_called(launches):
    model = built(CONFIGS["plain"]).double()
    logits, state = Decoder(model).step(torch.tensor([1]), read(model, torch.tensor([[3, 4]]))[1])
    assert state.layers[0].ssm.dtype == torch.float64
    assert logits.isfinite()[0, :61].all()
    model = built(CONFIGS["plain"])
    with torch.autocast("cpu", torch.bfloat16):
        Decoder(model).step(torch.tensor([1]), read(model, torch.tensor([[3, 4]]))[1])
    model.dropout = 0.5
    Decoder(model.train()).step(torch.tensor([1]), read(model, torch.tensor([[3, 4]]))[1])
    model = built(CONFIGS["plain"])
    state, forward = read(model, torch.tensor([[3, 4]]))[1], model.forward
    model.forward = lambda *args, **options: forward(*args, **options)._replace(logits=torch.full((1, 1, 64), 3.0))
    assert (Decoder(model).step(torch.tensor([1]), state)[0][:, :61] == 3).all()
    assert "decode_step" not in launches


def test_generate_and_the_engine_write_what_the_model_says(launches):
    model, prompts = tiny(), [[5, 9, 33], [7], [1, 1, 2, 60]]
    want = [recomputed(model, prompt, 12) for prompt in prompts]
    launches.clear()
    assert [c.ids for c in generate(model, prompts, max_new_tokens=12, sampling=GREEDY)] == want
    assert launches.count("decode_step") == 12
    launches.clear()
    engine = Engine(model, max_batch=2)
    handles = [engine.submit(Request(prompt=p, max_new_tokens=12, sampling=GREEDY)) for p in prompts]
    engine.run()
    assert [handle.result()[0].ids for handle in handles] == want
    assert "decode_step" in launches


def test_bad_input():
    config = CONFIGS["plain"]
    model = built(config)
    _, state = read(model, random_ids(config, 2, 4))
    decoder = Decoder(model)
    decoder.step(torch.tensor([1, 2]), state)
    for id in (-1, 64):
        with pytest.raises(AnymambaError, match=f"token id {id} is outside the vocabulary of 61"):
            decoder.step(torch.tensor([1, id]), state)
    with pytest.raises(
        AnymambaError, match=r"the state has 2 layers .* = \(2, 64, 16\), but .* need 2 of \(1, 64, 16\)"
    ):
        decoder.step(torch.tensor([1]), state)
