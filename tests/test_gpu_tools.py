"""Checkpoints and tools on a real GPU: loading, transformers patched, mamba-ssm's names, adapters, scores, export.

python -m pytest tests/test_gpu_tools.py
"""

import copy

import pytest
import torch

from anymamba import AnymambaError, MambaConfig, MambaLM, export
from anymamba.data import ByteTokenizer
from anymamba.eval.scoring import loglikelihoods
from anymamba.generate import SamplingConfig, generate
from anymamba.generate.decode import Decoder
from anymamba.reference import selective_scan
from anymamba.state import MambaState

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")


@pytest.fixture(autouse=True)
def exact():
    """Float32 products in float32."""
    torch.manual_seed(0)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def small(**changes):
    return MambaLM(MambaConfig(**{"d_model": 64, "n_layer": 2} | changes)).eval()


def ids(*shape, vocabulary=257):
    return torch.randint(1, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def close(a, b, tolerance=1e-4):
    return (a.cpu().float() - b.cpu().float()).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("form", ["native", "hf", "state-spaces", "gguf"])
@torch.no_grad()
def test_loading_straight_to_the_gpu(form, tmp_path):
    if form == "gguf":
        pytest.importorskip("gguf")
    model = small()
    model.save_pretrained(tmp_path / "model", form)
    for dtype in (torch.float32, torch.bfloat16):
        there = MambaLM.from_pretrained(tmp_path / "model", device="cuda", dtype=dtype)
        assert {p.device.type for p in there.parameters()} == {"cuda"}
        assert there.backbone.layers[0].mixer.in_proj.weight.dtype == dtype
        assert there.backbone.layers[0].mixer.A_log.dtype == torch.float32
        want = model(ids(2, 50)).logits
        assert close(there(ids(2, 50).cuda()).logits, want, 1e-4 if dtype == torch.float32 else 0.05)
    with pytest.raises(AnymambaError, match="its kernels run on a CPU"):
        MambaLM.from_pretrained(tmp_path / "model", device="cuda", quantize="int8")


@torch.no_grad()
def test_norms_inside_the_mixer():
    model = small(inner_norm_eps=1e-5)
    there = copy.deepcopy(model).cuda()
    text = ids(2, 30)
    assert close(there(text.cuda()).logits, model(text).logits)
    state, want = there(text.cuda()).state, model(text).state
    decoder = Decoder(there)
    for token in ids(5, 2):
        logits, state = decoder.step(token.cuda(), state)
        out = model(token[:, None], state=want)
        want = out.state
        assert close(logits[:, :257], out.logits[:, 0, :257])


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
def test_transformers_patched(kind):
    transformers = pytest.importorskip("transformers", minversion="5.21")
    from anymamba.hf import patch, unpatch

    config = getattr(transformers, f"{kind}Config")(vocab_size=300, hidden_size=64, num_hidden_layers=2)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).cuda().eval()
    text = ids(2, 40, vocabulary=300).cuda()
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        before, said = model(text).logits, model.generate(text, **options)
        patch(model)
        assert close(model(text).logits, before)
        assert torch.equal(model.generate(text, **options), said)
    model(text, labels=text).loss.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    unpatch(model)
    model.zero_grad()
    model(text, labels=text).loss.backward()
    for name, p in model.named_parameters():
        assert close(got[name], p.grad, 1e-3), name


def test_names_of_mamba_ssm():
    from anymamba.compat.mamba_ssm import Mamba, MambaLMHeadModel, selective_scan_fn
    from anymamba.compat.mamba_ssm.models.config_mamba import MambaConfig as TheirConfig

    b, d, t, n = 2, 24, 33, 5
    u, delta, z = (torch.randn(b, d, t, device="cuda", requires_grad=True) for _ in range(3))
    A, D, bias = -torch.rand(d, n, device="cuda"), torch.randn(d, device="cuda"), torch.randn(d, device="cuda")
    B, C = (torch.randn(b, n, t, device="cuda") for _ in range(2))
    y, last = selective_scan_fn(u, delta, A, B, C, D, z, bias, True, return_last_state=True)
    turned = (v.transpose(1, 2).double() for v in (u, delta, z, B, C))
    x, dt, gate, Bt, Ct = turned
    want, state = selective_scan(x, dt, A.double(), Bt, Ct, D.double(), gate, dt_bias=bias.double(), dt_softplus=True)
    assert close(y, want.transpose(1, 2))
    assert close(last, state)
    y.sum().backward()
    assert u.grad.isfinite().all()
    layer = Mamba(d_model=64, device="cuda")
    assert layer(torch.randn(2, 30, 64, device="cuda")).shape == (2, 30, 64)
    model = MambaLMHeadModel(TheirConfig(d_model=64, n_layer=2, vocab_size=257), device="cuda").eval()
    out = model.generate(ids(2, 10).cuda(), max_length=20, top_k=1)
    again = model(out[:, :-1]).logits[:, 9:].argmax(-1)
    assert torch.equal(out[:, 10:], again)


@pytest.mark.parametrize("options", [{}, {"lora": True}], ids=["all", "lora"])
def test_fine_tuning(options, tmp_path):
    """Recorded as a CUDA graph and not: the same losses; and they fall."""
    if options:
        pytest.importorskip("peft")
    from anymamba.train import TrainConfig, load_run, train

    small().save_pretrained(tmp_path / "base")
    ByteTokenizer().save(tmp_path / "base")
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 400)
    losses = []
    for graph in (True, False):
        result = train(TrainConfig(
            init=str(tmp_path / "base"), data=(str(tmp_path / "text.txt"),), steps=60, batch_size=4, seqlen=64,
            device="cuda", precision="fp32", lr=1e-2, graph=graph, out=str(tmp_path / f"run{graph}"), **options,
        ))  # fmt: skip
        model, tokenizer = load_run(result.run)
        text = torch.tensor([tokenizer.encode("It was the best of times, it was the worst").tolist()])
        losses.append(model(text[:, :-1], labels=text[:, 1:].long()).loss.item())
    start = small()(text[:, :-1], labels=text[:, 1:].long()).loss.item()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] < 0.8 * start


@torch.no_grad()
def test_scores():
    model, tokenizer = small(), ByteTokenizer()
    pairs = [("It was the best", choice) for choice in (" of times", " of", " and the worst")] + [("", "It was")]
    want = loglikelihoods(model, tokenizer, pairs)
    got = loglikelihoods(model.cuda(), tokenizer, pairs)
    for a, b in zip(got, want, strict=True):
        assert a.logprob == pytest.approx(b.logprob, rel=1e-4)
        assert (a.tokens, a.greedy) == (b.tokens, b.greedy)


@torch.no_grad()
def test_exported_step():
    model, text = small().cuda(), ids(1, 9).cuda()
    [said] = generate(model, text, max_new_tokens=12, sampling=SamplingConfig(temperature=0))
    for plain in (False, True):
        program, written = export.step(model, plain=plain).module(), []
        state = export.flatten(MambaState.zeros(model.config, 1, device="cuda"))
        for i in range(20):
            logits, *state = program(text[:, i : i + 1] if i < 9 else written[-1], *state)
            written.append(logits[:, -1:].argmax(-1))
        assert torch.cat(written[8:], 1)[0].tolist() == list(said.ids)
