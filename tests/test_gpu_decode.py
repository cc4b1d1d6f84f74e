"""The decoder on a real GPU: kernels against the model, graphs, batches that change, generation that never waits.

python -m pytest tests/test_gpu_decode.py
"""

import copy

import pytest
import torch

from anymamba import AnymambaError, MambaConfig, MambaLM, SamplingConfig
from anymamba.generate import Engine, Request, generate
from anymamba.generate.decode import Decoder, _weights, bucket
from anymamba.kernels import cuda_decode
from anymamba.kernels.cuda_launch import Kernel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
GREEDY = SamplingConfig(temperature=0)
STATES = {torch.float32: 1, torch.bfloat16: 4, torch.float16: 2}  # times the error of the model's own forward


def config(**changes):
    return MambaConfig(**{"d_model": 128, "n_layer": 2, "vocab_size": 1000} | changes)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def models(config):
    """A model in bfloat16 and the same numbers in float32, with norms and biases that matter."""
    rough = MambaLM(config, device="cuda")
    with torch.no_grad():
        for name, p in rough.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
            elif name.endswith("bias") and "dt_proj" not in name:
                p.normal_()
    rough = rough.bfloat16().eval()
    return rough, copy.deepcopy(rough).float()


def ids(config, *shape):
    return torch.randint(0, config.vocab_size, shape, device="cuda")


def error(a, b):
    if a.numel() == 0:  # the state of a convolution of width 1
        return 0.0
    return ((a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-6)).item()


@torch.no_grad()
def follow(config, b, state_dtype=torch.float32, steps=5):
    """Errors against float32 of the decoder and of the model's own forward: of logits, scan state and conv state."""
    rough, exact = models(config)
    text, v = ids(config, b, 20), config.vocab_size
    expected, plain = exact(text).state, rough(text).state
    state, decoder, errors = plain, Decoder(rough, state_dtype=state_dtype), torch.zeros(2, 3)
    for _ in range(steps):
        token = ids(config, b)
        want, own = exact(token[:, None], state=expected), rough(token[:, None], state=plain)
        expected, plain = want.state, own.state
        logits, state = decoder.step(token, state)
        assert (logits[:, v:] == -torch.inf).all()
        assert torch.equal(state.seen, expected.seen)
        for i, (got, after) in enumerate(((logits, state), (own.logits[:, 0], plain))):
            states = [max(error(x, y) for x, y in zip(*pair, strict=True)) for pair in (
                ([layer.ssm for layer in after.layers], [layer.ssm for layer in expected.layers]),
                ([layer.conv for layer in after.layers], [layer.conv for layer in expected.layers]))]  # fmt: skip
            now = torch.tensor([error(got[:, :v], want.logits[:, 0, :v]), *states])
            errors[i] = torch.maximum(errors[i], now)
    return decoder, *errors


def kernels_of(decoder):
    return decoder._batch._kernel is not None


@pytest.mark.parametrize("b", [1, 3, 8, 9, 16, 17, 40, 64, 96, 100])
@pytest.mark.parametrize("changes", [{}, {"bias": True, "conv_bias": False, "tie_embeddings": False}])
def test_rows(b, changes):
    decoder, ours, plain = follow(config(**changes), b)
    assert kernels_of(decoder)
    assert (ours <= 2 * plain + 1e-6).all(), (ours, plain)


@pytest.mark.parametrize("changes", [
    {"d_state": 8}, {"d_state": 32}, {"d_state": 64, "d_conv": 2}, {"d_state": 128, "d_conv": 1}, {"dt_rank": 40},
    {"d_model": 768, "vocab_size": 50277}, {"expand": 1, "d_model": 192, "dt_rank": 16},
    {"d_model": 2560, "n_layer": 1},
])  # fmt: skip
@pytest.mark.parametrize("b", [2, 33])
def test_sizes(changes, b):
    decoder, ours, plain = follow(config(**changes), b)
    assert kernels_of(decoder)
    assert (ours <= 2 * plain + 1e-6).all(), (ours, plain)


@pytest.mark.parametrize("changes", [{"d_model": 96}, {"d_state": 5}, {"dt_rank": 3}])
def test_what_no_kernel_takes_is_recorded_as_it_is(changes):
    decoder, ours, plain = follow(config(**changes), 3)
    assert not kernels_of(decoder)
    assert (ours <= plain + 1e-6).all()


@pytest.mark.parametrize("dtype", STATES)
@pytest.mark.parametrize("b", [4, 20])
def test_states_of_fewer_bits(dtype, b):
    decoder, ours, plain = follow(config(), b, dtype)
    assert decoder._batch.state.layers[0].ssm.dtype == dtype
    assert (ours <= 2 * STATES[dtype] * plain + 1e-6).all(), (ours, plain)


@torch.no_grad()
def test_a_graph_gives_the_bits_of_its_kernels(monkeypatch):
    """200 steps of launches that overlap, against the same ones that do not."""
    rough, _ = models(config(n_layer=4))
    decoder, token = Decoder(rough), ids(rough.config, 6)
    state = rough(ids(rough.config, 6, 9)).state
    alone, launch = state.copy(), Kernel.launch
    step = cuda_decode.Step(*_weights(rough), rough.config, alone.layers)
    for _ in range(200):
        logits, state = decoder.step(token, state)
        with monkeypatch.context() as patch:
            patch.setattr(Kernel, "launch", lambda self, *arguments, overlap: launch(self, *arguments))
            assert torch.equal(logits, step(token))
        token = logits.argmax(-1)
    for layer, expected in zip(state.layers, alone.layers, strict=True):
        assert torch.equal(layer.ssm, expected.ssm)
        assert torch.equal(layer.conv, expected.conv)


@torch.no_grad()
def test_a_batch_that_grows_and_shrinks():
    rough, _ = models(config())
    decoder = Decoder(rough)
    state = rough(ids(rough.config, 24, 5)).state
    for b in (24, 20, 3, 1, 2, 9):
        token, some = ids(rough.config, b), state.select(list(range(b)))
        logits, after = decoder.step(token, some)
        expected = rough(token[:, None], state=some, last_only=True)
        assert after.batch_size == b
        assert error(logits[:, :1000], expected.logits[:, 0, :1000].float()) < 0.03
        again, _ = decoder.step(token, after.select(list(range(b))))  # a copy of its own memory
        more = rough(token[:, None], state=expected.state, last_only=True)
        assert error(again[:, :1000], more.logits[:, 0, :1000].float()) < 0.03


def test_buckets():
    assert [bucket(b) for b in (1, 2, 3, 5, 16, 17, 25, 33, 64, 65, 100)] == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(top_p=0.9, top_k=50, repetition_penalty=1.2)])
def test_generation_is_that_of_the_cpu(dtype, sampling):
    """In float32 the same tokens; an engine and `generate` agree on both."""
    torch.manual_seed(3)
    model = MambaLM(config()).eval()
    prompts = [torch.randint(0, 1000, (n,)) for n in (4, 90, 17)]
    expected = generate(model, prompts, max_new_tokens=24, sampling=sampling, seed=5)
    model = model.to("cuda", dtype)
    got = generate(model, prompts, max_new_tokens=24, sampling=sampling, seed=5)
    if dtype == torch.float32:
        assert [c.ids for c in got] == [c.ids for c in expected]
    engine = Engine(model, max_batch=2)
    handles = [engine.submit(Request(prompt=p, max_new_tokens=24, sampling=sampling, seed=5)) for p in prompts[:1]]
    assert handles[0].result()[0].ids == got[0].ids
    for c, p in zip(got, prompts, strict=True):
        with torch.no_grad():  # the state has read all of it
            read = model(torch.cat([p, torch.tensor(c.ids)])[None].cuda()).state
        assert all(error(a.ssm, b.ssm) < (1e-4 if dtype == torch.float32 else 0.05)
                   for a, b in zip(c.state.layers, read.layers, strict=True))  # fmt: skip


def test_nothing_waits_for_a_token(monkeypatch):
    """Between two tokens the host waits for what was drawn, and only once the GPU has the next step."""
    model = MambaLM(config(), device="cuda").bfloat16().eval()
    order = []
    step, wait = Decoder.step, torch.cuda.Event.synchronize
    monkeypatch.setattr(Decoder, "step", lambda *a: (order.append("step"), step(*a))[1])
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (order.append("wait"), wait(event))[1])
    sampling = SamplingConfig(top_p=0.9, temperature=0.8)
    generate(model, [[1, 2, 3]], max_new_tokens=3, sampling=sampling)  # compiled by now
    del order[:]

    try:
        watch = lambda _: torch.cuda.set_sync_debug_mode("error")  # noqa: E731  once the prompt is read
        generate(model, [[1, 2, 3]], max_new_tokens=6, sampling=sampling, on_token=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert order == ["step", "wait"] * 6


def test_a_row_without_a_choice():
    model = MambaLM(config(), device="cuda").bfloat16().eval()
    with torch.no_grad():
        model.backbone.norm_f.weight.fill_(torch.nan)
    with pytest.raises(AnymambaError, match="row 0 has no token to choose"):
        generate(model, [[1, 2]], max_new_tokens=3)
    engine = Engine(model)
    handle = engine.submit(Request(prompt=[1, 2], max_new_tokens=3))
    engine.run()
    assert handle.done
    assert "NaN" in str(handle.error)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@torch.no_grad()
def test_on_a_second_device():
    model = MambaLM(config(), device="cuda:1").bfloat16().eval()
    text = torch.randint(0, 1000, (2, 9), device="cuda:1")
    state = model(text).state
    token = text[:, 0].contiguous()
    expected = model(token[:, None], state=state, last_only=True)
    logits, _ = Decoder(model).step(token, state)
    assert logits.device == text.device
    assert error(logits[:, :1000], expected.logits[:, 0, :1000].float()) < 0.03
