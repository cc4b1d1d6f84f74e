"""Models other than the published Mamba, and looking inside, on a real GPU: what a CPU gives, a GPU gives.

python -m pytest tests/test_gpu_models.py
"""

import copy

import pytest
import torch

from anymamba import MambaConfig, MambaLM, SamplingConfig, SequenceModel, inspect
from anymamba.generate import generate
from test_mixers import CASES, SIZES, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")
cases = pytest.mark.parametrize("name", CASES)
CLOSE = {"rtol": 2e-3, "atol": 2e-4}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """cuDNN's recurrent networks round to TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def both(name):
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(**SIZES | CASES[name], initializer_range=1.0))
    return model, copy.deepcopy(model).to("cuda")


def assert_close(got, want, name=None):
    torch.testing.assert_close(
        got.detach().cpu(), want.detach(), **CLOSE, msg=name and (lambda text: f"{name}: {text}")
    )


@cases
def test_reading_and_training(name):
    model, on_gpu = both(name)
    ids = tokens(2, 150)
    want, got = model(ids, labels=ids), on_gpu(ids.cuda(), labels=ids.cuda())
    assert_close(got.loss, want.loss)
    want.loss.backward()
    got.loss.backward()
    for (key, p), q in zip(model.named_parameters(), on_gpu.parameters(), strict=True):
        scale = float(p.grad.abs().max()) or 1.0
        assert_close(q.grad / scale, p.grad / scale, key)


@cases
@torch.no_grad()
def test_states_packed_rows_and_steps(name):
    model, on_gpu = both(name)
    ids, ends = tokens(1, 70), torch.tensor([0, 20, 20, 50, 70])
    want, got = model(ids, cu_seqlens=ends), on_gpu(ids.cuda(), cu_seqlens=ends.cuda())
    assert_close(got.logits, want.logits)
    more = tokens(4, 1)
    assert_close(on_gpu(more.cuda(), got.state).logits, model(more, want.state).logits)
    lengths = torch.tensor([3, 9])
    rows = tokens(2, 9)
    assert_close(on_gpu(rows.cuda(), lengths=lengths.cuda()).logits, model(rows, lengths=lengths).logits)


@cases
def test_a_compiled_model_is_the_model(name):
    if CASES[name].get("mixer") in ("rnn", "gru", "lstm"):
        pytest.skip("torch does not compile its own recurrent networks whole")
    torch._dynamo.reset()  # its count of models seen
    _, model = both(name)
    ids = tokens(2, 40).cuda()
    compiled = torch.compile(model, fullgraph=True)
    got, want = compiled(ids, labels=ids).loss, model(ids, labels=ids).loss
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    packed, ends = ids.view(1, -1), torch.tensor([0, 30, 80], device="cuda")
    if CASES[name].get("mixer") is None:  # others look at the lengths
        torch.testing.assert_close(compiled(packed, cu_seqlens=ends).logits, model(packed, cu_seqlens=ends).logits,
                                   rtol=1e-3, atol=1e-3)  # fmt: skip


def test_generate_is_recorded_and_patched():
    """Decoding by kernels and CUDA graphs gives way to calls that a hook hears."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=64, n_layer=2, vocab_size=31)).to("cuda", torch.bfloat16)
    prompt, options = tokens(1, 12)[0].tolist(), {"max_new_tokens": 20, "sampling": SamplingConfig(temperature=0)}
    generate(model, [prompt], **options)  # by kernels
    with inspect.recording(model) as seen:
        ids = prompt + generate(model, [prompt], **options)[0].ids
    whole = inspect.capture(model, torch.tensor([ids]).cuda())
    for i, want in whole.layers.items():
        for part in ("x", "dt", "B", "C", "z"):
            torch.testing.assert_close(getattr(seen.layer(i), part), getattr(want, part), rtol=0.1, atol=0.05)
    heard = []
    with inspect.patch(model, 1, "dt", lambda dt: heard.append(dt.shape[1]) or dt):
        generate(model, [prompt], **options)
    assert sum(heard) == len(ids)


@pytest.mark.parametrize("changes", [{}, {"discretization": "zoh"}, {"selective": "dt", "gate": False}], ids=str)
def test_hidden_attention_is_the_scan(changes):
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=64, n_layer=2, vocab_size=31, **changes)).to("cuda")
    layer = inspect.capture(model, tokens(1, 300).cuda()).layers[1]
    M = inspect.hidden_attention(layer, list(range(128)), skip=True, gate=model.config.gate)
    y = torch.einsum("dij,jd->id", M.double(), layer.x[0].double())
    error = (y - layer.y[0]).abs().max() / layer.y.abs().max()
    assert float(error) < 1e-5
    assert inspect.horizon(layer).shape == (128, 16)


@torch.no_grad()
def test_both_directions():
    torch.manual_seed(0)
    model = SequenceModel(MambaConfig(vocab_size=None, d_model=32, n_layer=2), inputs=3, outputs=5, bidirectional=True)
    x, lengths = torch.randn(3, 90, 3), torch.tensor([90, 7, 40])
    want, on_gpu = model(x, lengths).y, copy.deepcopy(model).to("cuda")
    assert_close(on_gpu(x.cuda(), lengths.cuda()).y, want)
    compiled = torch.compile(on_gpu, fullgraph=True)
    assert_close(compiled(x.cuda()).y, model(x).y)
