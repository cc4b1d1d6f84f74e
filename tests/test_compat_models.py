"""mamba-ssm's modules and models on ours: held to transformers' slow path, and to what their documentation says."""

import itertools
import json

import pytest
import torch
import transformers
from torch import nn

from anymamba import AnymambaError, MambaConfig, MambaLM
from anymamba.compat.mamba_ssm import Mamba, MambaLMHeadModel
from anymamba.compat.mamba_ssm.models.config_mamba import MambaConfig as SsmConfig
from anymamba.compat.mamba_ssm.modules.block import Block
from anymamba.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm
from anymamba.compat.mamba_ssm.utils.generation import InferenceParams, sample
from conftest import run_python

SIZES = {"d_model": 24, "d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 4}


def ids_of(*shape, seed=0, v=61):
    return torch.randint(0, v, shape, generator=torch.Generator().manual_seed(seed))


def mixer(**changes):
    torch.manual_seed(0)
    return Mamba(**SIZES | {"layer_idx": 0} | changes)


def model(n_layer=2, **changes):
    torch.manual_seed(0)
    return MambaLMHeadModel(SsmConfig(d_model=24, n_layer=n_layer, vocab_size=61, **changes)).eval()


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=1e-4)


# ---- Mamba -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"bias": True, "conv_bias": False}, {"d_state": 1, "d_conv": 2, "dt_rank": "auto"}]
)
@pytest.mark.parametrize("t", [1, 2, 33])
def test_mixer_is_that_of_transformers(changes, t):
    ours, sizes = mixer(**changes), SIZES | changes
    config = transformers.MambaConfig(
        hidden_size=24, state_size=sizes["d_state"], conv_kernel=sizes["d_conv"], expand=3, num_hidden_layers=1,
        time_step_rank=sizes["dt_rank"], use_bias=sizes.get("bias", False), use_conv_bias=sizes.get("conv_bias", True),
    )  # fmt: skip
    theirs = transformers.MambaModel(config).layers[0].mixer
    theirs.load_state_dict(ours.state_dict())
    u = torch.randn(2, t, 24, requires_grad=True)
    want, got = theirs(u), ours(u)
    close(got, want)
    parameters = [[u, *dict(sorted(m.named_parameters())).values()] for m in (ours, theirs)]
    gradients = [torch.autograd.grad(y.square().sum(), v) for y, v in zip((got, want), parameters, strict=True)]
    for a, b in zip(*gradients, strict=True):
        close(a, b, 1e-4 * float(b.abs().max()))


def test_attributes():
    m = mixer()
    assert (m.d_model, m.d_state, m.d_conv, m.expand, m.d_inner, m.dt_rank, m.layer_idx) == (24, 5, 3, 3, 72, 4, 0)
    assert (m.activation, m.use_fast_path, Mamba(33).dt_rank) == ("silu", True, 3)
    assert m.A_log._no_weight_decay
    assert m.D._no_weight_decay
    assert m.dt_proj.bias._no_reinit
    low = Mamba(24, dtype=torch.bfloat16)
    assert {name: p.dtype for name, p in low.named_parameters() if p.dtype == torch.float32}.keys() == {"A_log", "D"}


def test_initialisation():
    m = mixer(dt_min=0.01, dt_max=0.2, dt_scale=0.5, d_model=96)
    steps = nn.functional.softplus(m.dt_proj.bias)
    assert 0.01 * 0.99 <= steps.min() < 0.02
    assert 0.1 < steps.max() <= 0.2 * 1.01
    assert 0.2 < m.dt_proj.weight.abs().max() <= 0.5 * 4**-0.5
    close(m.A_log.exp(), torch.arange(1.0, 6).expand(288, 5))
    assert m.D.eq(1).all()
    assert mixer(dt_init="constant").dt_proj.weight.eq(4**-0.5).all()
    floor = nn.functional.softplus(mixer(dt_min=1e-6, dt_max=1e-5, dt_init_floor=0.03).dt_proj.bias)
    close(floor, torch.full_like(floor, 0.03))
    assert (nn.functional.softplus(mixer().dt_proj.bias) <= 0.101).all()


@pytest.mark.parametrize("use_fast_path", [False, True])
@pytest.mark.parametrize("parts", [(9,), (8, 1), (1, 1, 7), (4, 1, 1, 3)])
def test_inference_params(parts, use_fast_path):
    """Prefill and steps, of any sizes, are the whole; states are the last inputs of conv1d, and the scan's."""
    m, u, params = mixer(use_fast_path=use_fast_path), torch.randn(2, 9, 24), InferenceParams(9, 2)
    with torch.no_grad():
        want, outs = m(u), []
        for piece in u.split(parts, dim=1):
            outs.append(m(piece, inference_params=params))
            params.seqlen_offset += piece.shape[1]
        close(torch.cat(outs, 1), want)
        conv_state, ssm_state = params.key_value_memory_dict[0]
        assert (conv_state.shape, ssm_state.shape) == ((2, 72, 3), (2, 72, 5))
        close(conv_state, m.in_proj(u)[:, -3:, :72].transpose(1, 2))
        params.reset(9, 2)  # the same memory, from the beginning
        close(m(u, inference_params=params), want)


@pytest.mark.parametrize("t", [1, 2, 3, 5])
def test_states_of_short_texts(t):
    m, u, params = mixer(), torch.randn(2, t, 24), InferenceParams(9, 2)
    with torch.no_grad():
        m(u, inference_params=params)
        inputs = m.in_proj(u)[..., :72].transpose(1, 2)
    close(params.key_value_memory_dict[0][0], nn.functional.pad(inputs, (3 - t, 0)))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_step(dtype):
    m, u = mixer(), torch.randn(2, 4, 24)
    conv_state, ssm_state = m.allocate_inference_cache(2, max_seqlen=99, dtype=dtype)
    assert (conv_state.dtype, ssm_state.dtype) == (dtype or torch.float32,) * 2
    with torch.no_grad():
        for i, want in enumerate(m(u).split(1, dim=1)):
            out, conv, ssm = m.step(u[:, i : i + 1], conv_state, ssm_state)
            close(out, want, 2e-2 if dtype == torch.bfloat16 else 2e-5)
            assert conv is conv_state
            assert ssm is ssm_state
    assert m.bfloat16().allocate_inference_cache(1, 1)[1].dtype == torch.float32


@pytest.mark.parametrize(("call", "message"), [
    (lambda: mixer(dt_init="zeros"), 'dt_init=\'zeros\', but it must be "random" or "constant"'),
    (lambda: mixer(d_state=0), "d_state=0, but it must be a whole number of at least 1"),
    (lambda: mixer(layer_idx=None)(torch.zeros(1, 1, 24), inference_params=InferenceParams(1, 1)), "with layer_idx=0"),
    (lambda: mixer().step(torch.zeros(1, 1, 24), torch.zeros(1, 72, 1), torch.zeros(1, 72, 5)), "its last axis must"),
])  # fmt: skip
def test_mixer_errors(call, message):
    with pytest.raises(AnymambaError, match=message):
        call()


def test_cache_of_another_batch():
    m, params = mixer(), InferenceParams(9, 2)
    m(torch.zeros(2, 3, 24), inference_params=params)
    with pytest.raises(AnymambaError, match="the cache holds 2 rows, and the input has 3: use new InferenceParams"):
        m(torch.zeros(3, 1, 24), inference_params=params)


# ---- Block and the models --------------------------------------------------------------------------------------


class Passing(nn.Module):
    """A mixer that shows what it was called with."""

    def __init__(self, dim):
        super().__init__()
        self.seen = None

    def forward(self, x, inference_params=None, **more):
        self.seen = inference_params, more
        return 2 * x

    def allocate_inference_cache(self, *arguments, **options):
        return arguments, options


@pytest.mark.parametrize("mlp", [nn.Identity, lambda dim: nn.Linear(dim, dim)])
@pytest.mark.parametrize("norm", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("in_fp32", [False, True])
def test_block(norm, mlp, in_fp32):
    """Fused or not, it is add → norm → mixer (→ add → norm → MLP)."""
    torch.manual_seed(0)
    fused, plain = (Block(8, Passing, mlp, norm, fused_add_norm=f, residual_in_fp32=in_fp32) for f in (True, False))
    plain.load_state_dict(fused.state_dict())
    x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    first, second = (block(x, residual, inference_params="p", extra=1) for block in (fused, plain))
    for a, b in zip(first, second, strict=True):
        close(a, b)
    total = x + residual
    y = 2 * fused.norm(total)
    if fused.mlp is not None:
        total = total + y
        y = fused.mlp(fused.norm2(total))
    close(first[0], y)
    close(first[1], total)
    assert fused.mixer.seen == ("p", {"extra": 1})
    assert fused.allocate_inference_cache(2, 9, dtype=None, a=1) == ((2, 9), {"dtype": None, "a": 1})
    low = plain.bfloat16()(x.bfloat16())[1].dtype
    assert low == (torch.float32 if in_fp32 else torch.bfloat16)


def test_block_refuses_other_norms():
    with pytest.raises(AnymambaError, match="fused_add_norm with a Identity: it must be a LayerNorm or RMSNorm"):
        Block(8, Passing, norm_cls=lambda dim: nn.Identity(), fused_add_norm=True)


def test_model_is_that_of_transformers():
    ours, ids = model(), ids_of(2, 13)
    config = transformers.MambaConfig(vocab_size=64, hidden_size=24, num_hidden_layers=2, time_step_rank=2)
    theirs = transformers.MambaForCausalLM(config).eval()
    weights = {k.replace("embedding.", "embeddings."): v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(weights)
    with torch.no_grad():
        out = ours(ids)
        close(out.logits, theirs(ids).logits)
        close(ours(ids, num_last_tokens=4).logits, out.logits[:, -4:])
        other = MambaLM(MambaConfig(vocab_size=61, d_model=24, n_layer=2)).eval()
        other.load_state_dict(ours.state_dict())
        close(out.logits, other(ids).logits)


@pytest.mark.parametrize(("rms_norm", "fused", "in_fp32"), list(itertools.product([False, True], repeat=3)))
def test_norms_of_a_model(rms_norm, fused, in_fp32):
    """Each is what plain torch makes of the same parameters."""
    m = model(rms_norm=rms_norm, fused_add_norm=fused, residual_in_fp32=in_fp32)
    ids = ids_of(2, 9)
    with torch.no_grad():
        x = m.backbone.embedding(ids)
        for layer in m.backbone.layers:
            normed = (nn.functional.rms_norm if rms_norm else nn.functional.layer_norm)(
                x, (24,), layer.norm.weight, eps=1e-5
            )
            x = x + layer.mixer(normed)
        x = (nn.functional.rms_norm if rms_norm else nn.functional.layer_norm)(
            x, (24,), m.backbone.norm_f.weight, eps=1e-5
        )
        close(m(ids).logits, x @ m.lm_head.weight.T)
    assert [name for name, _ in m.named_parameters() if name.endswith("norm.bias")] == (
        [] if rms_norm else [f"backbone.layers.{i}.norm.bias" for i in range(2)]
    )


def test_model_initialisation():
    torch.manual_seed(0)
    m = MambaLMHeadModel(SsmConfig(d_model=64, n_layer=4, vocab_size=300, ssm_cfg={"bias": True, "d_state": 3}))
    assert 0.019 < m.backbone.embedding.weight.std() < 0.021
    assert m.lm_head.weight is m.backbone.embedding.weight
    assert m.lm_head.weight.shape == (304, 64)
    for layer in m.backbone.layers:
        bound = 128**-0.5 / 2
        assert 0.95 * bound < layer.mixer.out_proj.weight.abs().max() <= bound
        assert layer.mixer.in_proj.bias.eq(0).all()
        assert layer.mixer.dt_proj.bias.ne(0).all()
        assert layer.mixer.d_state == 3
    m = MambaLMHeadModel(SsmConfig(d_model=64, n_layer=4, vocab_size=300, tie_embeddings=False),
                         initializer_cfg={"initializer_range": 0.5, "rescale_prenorm_residual": False})  # fmt: skip
    assert 0.48 < m.backbone.embedding.weight.std() < 0.52
    assert m.lm_head.weight is not m.backbone.embedding.weight
    assert m.backbone.layers[0].mixer.out_proj.weight.abs().max() > 0.07


def test_prefill_and_steps():
    m, ids, params = model(), ids_of(2, 9), InferenceParams(max_seqlen=9, max_batch_size=2)
    params.key_value_memory_dict = m.allocate_inference_cache(2, 9)
    with torch.no_grad():
        want, logits = m(ids).logits, []
        for i, j in ((0, 5), (5, 6), (6, 9)):
            position = torch.full((2, j - i), i)
            logits.append(m(ids[:, i:j], position_ids=position, inference_params=params).logits)
            params.seqlen_offset = j
    close(torch.cat(logits, 1), want)


@pytest.mark.parametrize(("changes", "message"), [
    ({"attn_layer_idx": [1]}, "layer 1 of the model has a layer of attention: here are only models of Mamba-1"),
    ({"ssm_cfg": {"layer": "Mamba2"}}, "layer 0 of the model has a layer of Mamba2"),
    ({"d_intermediate": 8}, r"an MLP \(d_intermediate=8\)"),
])  # fmt: skip
def test_other_layers_are_refused(changes, message):
    with pytest.raises(AnymambaError, match=message):
        model(**changes)
    assert model(ssm_cfg={"layer": "Mamba1"}).config.ssm_cfg == {"layer": "Mamba1"}


# ---- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_save_and_load(tmp_path, kind):
    m, ids = model(), ids_of(1, 7)
    m.save_pretrained(tmp_path / "new")
    if kind == "safetensors":
        from safetensors.torch import save_file

        tensors = {k: v.clone() for k, v in torch.load(tmp_path / "new" / "pytorch_model.bin").items()}
        save_file(tensors, tmp_path / "new" / "model.safetensors")
        (tmp_path / "new" / "pytorch_model.bin").unlink()
    loaded = MambaLMHeadModel.from_pretrained(str(tmp_path / "new"))
    assert loaded.config == m.config
    assert torch.equal(loaded(ids).logits, m(ids).logits)
    assert loaded.lm_head.weight is loaded.backbone.embedding.weight
    low = MambaLMHeadModel.from_pretrained(tmp_path / "new", dtype=torch.bfloat16, device="cpu")
    assert low.lm_head.weight.dtype == torch.bfloat16
    assert low(ids).logits.dtype == torch.bfloat16


def write(folder, config=None, weights=b""):
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin").write_bytes(weights)
    return folder


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_files_that_cannot_be_loaded(tmp_path, capsys, monkeypatch):
    load = MambaLMHeadModel.from_pretrained
    config = {"d_model": 24, "n_layer": 1, "vocab_size": 61}
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnymambaError, match=r"holds no config\.json: is it a mamba-ssm checkpoint"):
        load(tmp_path / "empty")
    with pytest.raises(AnymambaError, match="not a config of mamba-ssm, it has the key 'hidden_size'"):
        load(write(tmp_path / "hf", {"hidden_size": 24}))
    with pytest.raises(AnymambaError, match=r"pytorch_model\.bin is damaged, cut short, or holds more than tensors"):
        load(write(tmp_path / "cut", config, b"abc"))
    torch.save(Evil(), tmp_path / "evil.bin")
    with pytest.raises(AnymambaError, match="holds more than tensors"):
        load(write(tmp_path / "evil", config, (tmp_path / "evil.bin").read_bytes()))
    assert capsys.readouterr().out == ""
    folder = write(tmp_path / "none", config)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(AnymambaError, match=r"holds no model\.safetensors or pytorch_model\.bin"):
        load(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AnymambaError, match="'no-such/model' is no folder here, and cannot be had from the hub"):
        load("no-such/model")
    with pytest.raises(AnymambaError, match="'no such model!' is no folder here"):
        load("no such model!")


# ---- generation ------------------------------------------------------------------------------------------------


def test_greedy_is_argmax_after_argmax():
    m, ids = model(), ids_of(2, 5)
    want, scores = ids, []
    with torch.no_grad():
        for _ in range(6):
            logits = m(want).logits[:, -1]
            scores.append(logits)
            want = torch.cat([want, logits.argmax(-1, keepdim=True)], 1)
    assert m.generate(ids, max_length=11, top_p=0.3, min_p=0.5, temperature=3.0).tolist() == want.tolist()
    out = m.generate(ids, max_length=11, cg=True, output_scores=True, return_dict_in_generate=True)
    assert out.sequences.tolist() == want.tolist()
    close(torch.stack(out.scores), torch.stack(scores))
    assert m.generate(ids, max_length=11, return_dict_in_generate=True).scores is None
    assert m.generate(ids, max_length=5).tolist() == ids.tolist()


def test_each_row_ends_by_itself():
    m, ids = model(), ids_of(3, 4)
    free = m.generate(ids, max_length=24)
    end = int(free[0, 7])
    got = m.generate(ids, max_length=24, eos_token_id=end)
    for row, line in zip(got.tolist(), free.tolist(), strict=True):
        stop = line.index(end, 4) + 1 if end in line[4:] else 24
        assert row[:stop] == line[:stop][: len(row)]
        assert set(row[stop:]) <= {end}
    alone = m.generate(ids[:1], max_length=24, eos_token_id=end)
    assert alone[0, -1] == end
    assert alone.shape[1] <= 8


def test_teacher_penalty_vocabulary_and_streamer(capsys):
    m, ids = model(), ids_of(2, 4)
    teacher = ids_of(2, 7, seed=5)
    got = m.generate(ids, max_length=10, teacher_outputs=teacher)
    assert got[:, 4:7].tolist() == teacher[:, 4:].tolist()
    with torch.no_grad():
        assert got[:, 7].tolist() == m(got[:, :7]).logits[:, -1].argmax(-1).tolist()

    got = m.generate(ids, max_length=24, repetition_penalty=50.0)
    assert all(len(set(row[4:])) == 20 and not set(row[:4]) & set(row[4:]) for row in got.tolist())

    with torch.no_grad():
        m.lm_head.weight[61:] = 3 * m.lm_head.weight[:1].sign()
    assert m.generate(ids, max_length=30, vocab_size=7)[:, 4:].max() < 7

    class Streamer:
        def __init__(self):
            self.seen, self.ended = [], 0

        def put(self, v):
            self.seen.append(v)

        def end(self):
            self.ended += 1

    streamer = Streamer()
    got = m.generate(ids, max_length=7, streamer=streamer, enable_timing=True)
    assert torch.equal(torch.cat(streamer.seen, 1), got)
    assert streamer.ended == 1
    assert "prompt processing + decoding time: " in capsys.readouterr().out


def frequencies(logits, **options):
    torch.manual_seed(0)
    ids = sample(torch.tensor(logits).log().expand(20000, -1), **options)
    return [round(float((ids == i).float().mean()), 2) for i in range(len(logits))]


@pytest.mark.parametrize(("options", "want"), [
    ({"top_k": 0}, [0.1, 0.2, 0.3, 0.4]),
    ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
    ({"top_k": 0, "top_p": 0.65}, [0, 0, 3 / 7, 4 / 7]),
    ({"top_k": 3, "top_p": 0.7}, [0, 0, 3 / 7, 4 / 7]),
    ({"top_k": 0, "min_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),  # relative to the most probable, wherever that is
    ({"top_k": 0, "min_p": 0.0, "top_p": 1.0}, [0.1, 0.2, 0.3, 0.4]),
    ({"top_k": 0, "temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
    ({}, [0, 0, 0, 1]),
    ({"top_k": 1, "temperature": 9.0}, [0, 0, 0, 1]),
])  # fmt: skip
def test_sample(options, want):
    for got, expected in zip(frequencies([0.1, 0.2, 0.3, 0.4], **options), want, strict=True):
        assert got == pytest.approx(expected, abs=0.02)


def test_sampling_options_reach_generate():
    m, ids = model(), ids_of(1, 4)
    torch.manual_seed(0)
    many = m.generate(ids.repeat(300, 1), max_length=5, top_k=3)[:, 4]
    with torch.no_grad():
        best = m(ids).logits[0, -1].topk(3).indices
    assert set(many.tolist()) == set(best.tolist())


@pytest.mark.parametrize(("call", "message"), [
    (lambda m: m.generate(ids_of(4), max_length=9), r"input_ids are \(4,\), but must be \(batch, seqlen ≥ 1\)"),
    (lambda m: m.generate(ids_of(1, 4), max_length=9, top_k=0, top_p=1.5), "top_p=1.5, but it must be"),
    (lambda m: m.generate(ids_of(1, 4), max_length=9, top_k=-1), "top_k=-1, but it must be"),
])  # fmt: skip
def test_generate_errors(call, message):
    with pytest.raises(AnymambaError, match=message):
        call(model())


# ---- install ---------------------------------------------------------------------------------------------------

INSTALLED = """
import anymamba.compat, sys
assert sorted(anymamba.compat.install()) == ["causal_conv1d", "mamba_ssm"] and anymamba.compat.install() == []
from mamba_ssm import Mamba, MambaLMHeadModel, mamba_inner_fn, selective_scan_fn
from mamba_ssm.ops.selective_scan_interface import mamba_inner_ref, selective_scan_ref
from mamba_ssm.ops.triton.selective_state_update import selective_state_update, selective_state_update_ref
from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_ssm.ops.triton.layernorm import RMSNorm as old_name
from mamba_ssm.modules.mamba_simple import Mamba as again, Block as old_place
from mamba_ssm.modules.block import Block
from mamba_ssm.models.mixer_seq_simple import MixerModel, create_block
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.generation import GenerationMixin, InferenceParams, decode, sample
from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref
import anymamba.compat.mamba_ssm.modules.mamba_simple as ours, mamba_ssm
assert Mamba is again is ours.Mamba and old_name is RMSNorm and old_place is Block and mamba_ssm.ops.triton.layer_norm
try:
    import mamba_ssm.modules.mamba2
except ModuleNotFoundError as error:
    print(error)
"""


def test_install():
    done = run_python(INSTALLED)
    assert done.returncode == 0, done.stderr
    assert "No module named 'mamba_ssm.modules.mamba2'" in done.stdout


def test_install_leaves_what_is_there(tmp_path):
    (tmp_path / "mamba_ssm.py").write_text("real = True")
    done = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport anymamba.compat\n"
                      "print(anymamba.compat.install())\nimport mamba_ssm; print(mamba_ssm.real)")  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["['causal_conv1d']", "True"], done.stderr


TRANSFORMERS = """
import torch, transformers
torch.manual_seed(0)
jamba = dict(intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, attn_layer_period=2,
             attn_layer_offset=1, num_experts=1, num_experts_per_tok=1, mamba_d_state=4, use_mamba_kernels=False)
ids, found = torch.randint(1, 31, (2, 9)), []
for name, more in (("Mamba", {}), ("FalconMamba", {}), ("Jamba", jamba)):
    config = getattr(transformers, name + "Config")(vocab_size=31, hidden_size=16, num_hidden_layers=2, **more)
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    with torch.no_grad():
        found.append(model(ids).logits)
        found.append(model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0))
    if name == "Mamba":
        model.train()(ids, labels=ids).loss.backward()
        found.append(model.backbone.layers[0].mixer.A_log.grad)
"""


def test_transformers_uses_what_is_installed(tmp_path):
    """Its models of Mamba-1 find our functions by the names of the originals, and give the same."""
    path = str(tmp_path / "found")
    done = run_python(f"import anymamba.compat; anymamba.compat.install()\n{TRANSFORMERS}\ntorch.save(found, {path!r})")
    assert done.returncode == 0, done.stderr
    assert "falling back" not in done.stderr
    without = {}
    exec(TRANSFORMERS, without)
    for got, want in zip(torch.load(path), without["found"], strict=True):
        if got.is_floating_point():
            close(got, want, 1e-4 * max(1.0, float(want.abs().max())))
        else:
            assert got.tolist() == want.tolist()
