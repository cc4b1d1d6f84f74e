"""MambaLM: equal to transformers' model, the published sizes, initialisation, files, and what torch does with it."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from anymamba import AnymambaError, MambaConfig, MambaLM

SMALL = MambaConfig(vocab_size=23, d_model=32, n_layer=2, d_state=4)


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return MambaLM(SMALL.replace(**changes))


def tokens(b=2, t=9, vocabulary=23):
    return torch.randint(vocabulary, (b, t), generator=torch.Generator().manual_seed(0))


# ---- equal to transformers -------------------------------------------------------------------------------------

CONFIGS = [
    {},
    {"expand": 3, "d_state": 7},
    {"d_conv": 2, "conv_bias": False},
    {"bias": True, "dt_rank": 5},
    {"tie_embeddings": False, "norm_eps": 1e-3},
    {"d_model": 24, "n_layer": 3, "vocab_size": 50, "d_state": 16},
    {"inner_norm_eps": 1e-6},
    {"inner_norm_eps": 1e-2, "tie_embeddings": False, "dt_rank": 3, "d_state": 5, "d_conv": 3},
]


def their_model(c):
    transformers = pytest.importorskip("transformers")
    options, kind = {}, "Mamba"
    if c.inner_norm_eps is not None:
        options, kind = {"mixer_rms_eps": c.inner_norm_eps}, "FalconMamba"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=c.padded_vocab_size, hidden_size=c.d_model, state_size=c.d_state, num_hidden_layers=c.n_layer,
        conv_kernel=c.d_conv, expand=c.expand, use_conv_bias=c.conv_bias, use_bias=c.bias, time_step_rank=c.rank,
        tie_word_embeddings=c.tie_embeddings, layer_norm_epsilon=c.norm_eps, residual_in_fp32=True,
        **options,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_equals_transformers(changes):
    """The same random weights, under the same names, give the same logits."""
    torch.manual_seed(1)
    ours = MambaLM(SMALL.replace(**changes))
    theirs = their_model(ours.config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():  # larger than at initialisation, so that every part matters
            if not name.endswith("A_log"):
                p.add_(0.2 * torch.randn(p.shape))
    weights = {k.replace("embeddings.", "embedding."): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    ours.tie_weights()
    ids = tokens(t=37, vocabulary=ours.config.vocab_size)
    with torch.no_grad():
        got, want = ours(ids).logits, theirs(ids).logits
    assert float(want.abs().max()) > 1
    assert float((got - want).abs().max()) <= 1e-4


# ---- the published sizes ---------------------------------------------------------------------------------------

PUBLISHED = {
    "130m": 129_135_360,
    "370m": 371_516_416,
    "790m": 793_204_224,
    "1.4b": 1_372_178_432,
    "2.8b": 2_768_345_600,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_presets(name):
    with torch.device("meta"):
        model = MambaLM(MambaConfig.preset(name))
    assert model.num_params() == PUBLISHED[name]
    assert model.num_params(embedding=False) == PUBLISHED[name] - 50280 * model.config.d_model


def test_names_and_shapes_of_the_published_checkpoints():
    with torch.device("meta"):
        model = MambaLM(MambaConfig.preset("130m"))
    m, d, n, r, w, v = 768, 1536, 16, 48, 4, 50280
    mixer = {"in_proj.weight": (2 * d, m), "conv1d.weight": (d, 1, w), "conv1d.bias": (d,),
             "x_proj.weight": (r + 2 * n, d), "dt_proj.weight": (d, r), "dt_proj.bias": (d,), "A_log": (d, n),
             "D": (d,), "out_proj.weight": (m, d)}  # fmt: skip
    want = {"backbone.embedding.weight": (v, m), "backbone.norm_f.weight": (m,), "lm_head.weight": (v, m)}
    for i in range(24):
        want |= {f"backbone.layers.{i}.mixer.{k}": s for k, s in mixer.items()}
        want |= {f"backbone.layers.{i}.norm.weight": (m,)}
    assert {k: tuple(p.shape) for k, p in model.state_dict().items()} == want
    assert model.lm_head.weight is model.backbone.embedding.weight


# ---- config ----------------------------------------------------------------------------------------------------


def test_config_refuses_unknown_keys():
    with pytest.raises(AnymambaError, match=r"unknown config key 'd_modle': did you mean 'd_model'\? known keys are"):
        MambaConfig.from_dict({"d_modle": 3})
    with pytest.raises(AnymambaError, match="unknown config key 'zzz': known keys are"):
        SMALL.replace(zzz=1)
    with pytest.raises(AnymambaError, match="unknown preset '7b': known presets are tiny, small, 130m"):
        MambaConfig.preset("7b")
    with pytest.raises(AnymambaError, match="unknown config key 'layers'"):
        MambaConfig.preset("tiny", layers=3)


@pytest.mark.parametrize(
    "changes", [{"d_model": 0}, {"n_layer": -1}, {"d_state": 2.5}, {"vocab_size": 0}, {"expand": True}]
)
def test_config_refuses_impossible_sizes(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(
        AnymambaError, match=re.escape(f"config: {name}={value!r}, but it must be a whole number of at")
    ):
        SMALL.replace(**changes)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"norm_eps": 0}, "a finite number > 0"),
        ({"norm_eps": "1e-5"}, "a finite number > 0"),
        ({"dt_min": -1e-3}, "a finite number > 0"),
        ({"dt_max": math.inf}, "a finite number > 0"),
        ({"dt_max": 1e-4}, "at least dt_min=0.001"),
        ({"dt_scale": math.nan}, "a finite number > 0"),
        ({"dt_init_floor": None}, "a finite number ≥ 0"),
        ({"initializer_range": True}, "a finite number ≥ 0"),
        ({"inner_norm_eps": 0}, "None or a finite number > 0"),
        ({"bias": 1}, "True or False"),
        ({"conv_bias": None}, "True or False"),
        ({"tie_embeddings": "no"}, "True or False"),
    ],
)
def test_config_refuses_impossible_numbers_and_switches(changes, rule):
    (name, value), *_ = changes.items()
    with pytest.raises(AnymambaError, match=re.escape(f"config: {name}={value!r}, but it must be {rule}")):
        SMALL.replace(**changes)


def test_config_takes_whole_numbers_for_others():
    SMALL.replace(dt_scale=1, dt_max=1, initializer_range=0, dt_init_floor=0)


def test_config_is_frozen_and_survives_json():
    with pytest.raises(AttributeError):
        SMALL.d_model = 3
    assert MambaConfig.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL
    assert MambaConfig.preset("130m", n_layer=2).padded_vocab_size == 50280
    assert SMALL.padded_vocab_size == 24


# ---- initialisation --------------------------------------------------------------------------------------------


def test_initialisation():
    """Each line of the table in `reset_parameters`."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=1000, d_model=128, n_layer=4, bias=True)
    model = MambaLM(config)
    d, r = 256, 8

    def is_uniform(p, bound):  # its largest entry and its standard deviation
        assert float(p.abs().max()) <= bound
        assert float(p.abs().max()) > 0.9 * bound
        assert float(p.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)

    embedding = model.backbone.embedding.weight
    assert embedding.std().item() == pytest.approx(0.02, rel=0.02)
    assert float(embedding.mean()) == pytest.approx(0, abs=1e-3)
    for block in model.backbone.layers:
        mixer = block.mixer
        is_uniform(mixer.in_proj.weight, 128**-0.5)
        is_uniform(mixer.x_proj.weight, d**-0.5)
        is_uniform(mixer.out_proj.weight, d**-0.5 / 2)
        is_uniform(mixer.conv1d.weight, 0.5)
        is_uniform(mixer.conv1d.bias, 0.5)
        is_uniform(mixer.dt_proj.weight, r**-0.5)
        dt = nn.functional.softplus(mixer.dt_proj.bias.double())
        assert 1e-3 * 0.999 <= float(dt.min()) < 2e-3
        assert 5e-2 < float(dt.max()) <= 1e-1 * 1.001
        assert float(dt.log().mean()) == pytest.approx(math.log(1e-2), abs=0.4)  # the middle of a log-uniform
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(d, 16))
        assert (mixer.D == 1).all()
        assert (block.norm.weight == 1).all()
        assert not mixer.in_proj.bias.any()
        assert not mixer.out_proj.bias.any()
    assert (model.backbone.norm_f.weight == 1).all()


def test_initialisation_floor_scale_and_untied_head():
    model = make_model(dt_min=1e-6, dt_max=1e-5, dt_scale=0.5, tie_embeddings=False)
    mixer = model.backbone.layers[0].mixer
    torch.testing.assert_close(nn.functional.softplus(mixer.dt_proj.bias), torch.full((64,), 1e-4), rtol=1e-3, atol=0)
    assert float(mixer.dt_proj.weight.abs().max()) <= 0.5 * 2**-0.5
    assert float(model.lm_head.weight.abs().max()) <= 32**-0.5
    assert model.lm_head.weight is not model.backbone.embedding.weight


def test_initialisation_survives_reset_and_meta():
    """Frameworks build on the meta device and reset: nothing may depend on what was there before."""
    want = make_model()
    with torch.device("meta"):
        model = MambaLM(SMALL)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for m in (model, want):
        torch.manual_seed(0)
        m.reset_parameters()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), want.parameters(), strict=True))


def test_param_groups():
    model = make_model(bias=True, tie_embeddings=False)
    decay, free = model.param_groups(0.1)
    assert (decay["weight_decay"], free["weight_decay"]) == (0.1, 0)
    names = {id(p): re.sub(r"backbone\.(layers\.\d+\.)?", "", name) for name, p in model.named_parameters()}
    found = [{names[id(p)] for p in group["params"]} for group in (decay, free)]
    linears = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    assert found[0] == {*(f"mixer.{k}.weight" for k in linears), "embedding.weight", "lm_head.weight"}
    biases = (f"mixer.{k}.bias" for k in linears if k != "x_proj")
    assert found[1] == {*biases, "mixer.A_log", "mixer.D", "norm.weight", "norm_f.weight"}
    assert len(decay["params"]) + len(free["params"]) == len(names)
    model.backbone.embedding.weight.requires_grad_(False)
    assert len(model.param_groups()[0]["params"]) == len(decay["params"]) - 1


def test_flops_of_the_linear_layers():
    from torch.utils.flop_counter import FlopCounterMode

    model, t = make_model(), 8
    c = model.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(1, t))
    rest = c.n_layer * (2 * c.d_conv * c.d_inner + 9 * c.d_inner * c.d_state)
    assert counter.get_total_flops() == t * (model.flops_per_token() - rest)


def test_bytes_per_step():
    model = make_model()
    weights = 4 * model.num_params()
    state = 3 * (2 * (64 * 3 * 4 + 64 * 4 * 4) + 8)
    assert model.bytes_per_step(3) == weights + 2 * state


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [24, 1000, -1])
def test_token_outside_the_vocabulary(bad):
    ids = tokens()
    ids[1, 3] = bad
    message = f"token id {bad} is outside the vocabulary of 23: was the text encoded with another tokenizer?"
    with pytest.raises(AnymambaError, match=re.escape(message)):
        make_model()(ids)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "uint8", "uint16", "uint32"])
def test_ids_may_be_tensors_arrays_and_lists(dtype):
    model, ids = make_model(), tokens()
    want = model(ids).logits
    array = ids.numpy().astype(dtype)
    for given in (array, torch.as_tensor(array), ids.tolist(), tuple(map(tuple, ids.tolist()))):
        assert torch.equal(model(given).logits, want)


def test_bad_input_is_refused():
    model, ids = make_model(), tokens()
    for arguments, message in [
        ({"ids": ids[0]}, "ids are (9,) torch.int64, but must be integers (batch ≥ 1, seqlen ≥ 1)"),
        ({"ids": ids.float()}, "ids are (2, 9) torch.float32, but must be integers"),
        ({"ids": ids[:, :0]}, "ids are (2, 0) torch.int64, but must be integers (batch ≥ 1, seqlen ≥ 1)"),
        ({"ids": ids[:0]}, "ids are (0, 9) torch.int64, but must be integers (batch ≥ 1, seqlen ≥ 1)"),
        ({"ids": ids > 3}, "ids are (2, 9) torch.bool, but must be integers"),
        ({"ids": [1, 2]}, "ids are (2,) torch.int64, but must be integers (batch ≥ 1, seqlen ≥ 1)"),
        ({"ids": [[1, 2], [3]]}, "ids: a list that makes no tensor"),
        ({"ids": "text"}, "ids: a str that makes no tensor"),
        ({"ids": [[0.5]]}, "ids are (1, 1) torch.float64, but must be integers"),
        ({}, "give ids (b,t) or embeddings (b,t,m), one of the two"),
        ({"ids": ids, "embeddings": torch.zeros(2, 9, 32)}, "give ids (b,t) or embeddings (b,t,m), one of the two"),
        ({"embeddings": torch.zeros(2, 9, 31)}, "embeddings are (2, 9, 31), but must be (b,t,32)"),
        ({"ids": ids, "lengths": torch.tensor([1, 10])}, "lengths are [1, 10], but must be 2 integers from 0 to 9"),
        ({"ids": ids, "lengths": torch.tensor([1])}, "lengths are [1], but must be 2 integers from 0 to 9, one a row"),
        ({"ids": ids, "lengths": "all"}, "lengths: a str that makes no tensor"),
        ({"ids": ids[:1], "cu_seqlens": [9]}, "cu_seqlens is (1,) torch.int64, but must be at least 2 integers"),
        ({"ids": ids[:1], "cu_seqlens": [0.0, 9.0]}, "cu_seqlens is (2,) torch.float64, but must be"),
        ({"ids": ids, "state": (1, 2)}, "state is a tuple, but must be a MambaState: `.state` of an earlier output"),
        ({"ids": ids, "lengths": torch.tensor([1, 2]), "padding_side": "top"}, "padding_side='top', but it must be"),
        ({"ids": ids[:1], "lengths": torch.tensor([1]), "cu_seqlens": torch.tensor([0, 9])}, "not both"),
        ({"ids": ids[:1], "cu_seqlens": [0, 8]}, "cu_seqlens is [0, 8], but it must start at 0"),
        ({"ids": ids, "cu_seqlens": torch.tensor([0, 9])}, "with a batch of 2, but then the sequences lie end to"),
    ]:  # fmt: skip
        with pytest.raises(AnymambaError, match=re.escape(message)):
            model(**arguments)


# ---- features instead of tokens --------------------------------------------------------------------------------


def test_features_model():
    model = make_model(vocab_size=None)
    assert not any("embedding" in k or "lm_head" in k for k in model.state_dict())
    x = torch.randn(2, 9, 32)
    out = model(embeddings=x)
    assert out.logits is None
    assert out.hidden.shape == (2, 9, 32)
    first = model(embeddings=x[:, :4])
    second = model(embeddings=x[:, 4:], state=first.state)
    torch.testing.assert_close(torch.cat([first.hidden, second.hidden], 1), out.hidden, rtol=1e-5, atol=1e-5)
    with pytest.raises(AnymambaError, match="this model has no vocabulary; give embeddings"):
        model(tokens())
    assert model.flops_per_token() == make_model().flops_per_token() - 2 * 32 * 24


def test_features_model_files(tmp_path):
    model = make_model(vocab_size=None)
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 32)
    assert torch.equal(MambaLM.from_pretrained(tmp_path)(embeddings=x).hidden, model(embeddings=x).hidden)


# ---- dtypes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_conversion_keeps_what_sets_the_memory(dtype):
    for model in (make_model().to(dtype), make_model().to("cpu", dtype), MambaLM(SMALL).to(torch.float64).to(dtype)):
        for name, p in model.named_parameters():
            kept = name.endswith(("A_log", "mixer.D", "dt_proj.bias"))
            assert (p.dtype != dtype) == kept, name
        out = model(tokens(), labels=tokens())
        out.loss.backward()
        assert out.hidden.isfinite().all()
        assert {layer.ssm.dtype for layer in out.state.layers} == {torch.float32}
    assert make_model().to(dtype).backbone.layers[0].mixer.A_log.dtype == torch.float32


def test_bfloat16_is_close_to_float32():
    model = make_model()
    want = model(tokens()).logits
    got = model.bfloat16()(tokens()).logits.float()
    assert float((got - want).abs().max() / want.abs().max()) < 0.05


# ---- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "bias": True, "conv_bias": False}])
def test_save_and_load(tmp_path, changes):
    model = make_model(**changes)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = MambaLM.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert again.fingerprint() == model.fingerprint()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert (again.lm_head.weight is again.backbone.embedding.weight) == model.config.tie_embeddings
    assert all(p.requires_grad for p in again.parameters())
    lower = MambaLM.from_pretrained(tmp_path / "new" / "folder", dtype=torch.bfloat16)
    assert lower.lm_head.weight.dtype == torch.bfloat16
    assert lower.backbone.layers[0].mixer.A_log.dtype == torch.float32


@pytest.fixture
def saved(tmp_path):
    make_model().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_load_names_every_wrong_tensor(saved):
    def change(tensors):
        del tensors["backbone.layers.0.mixer.D"], tensors["backbone.norm_f.weight"]
        tensors["backbone.layers.0.mixer.E"] = torch.zeros(3)
        tensors["backbone.layers.1.mixer.A_log"] = torch.zeros(64, 5)

    rewrite(saved, change)
    with pytest.raises(AnymambaError) as error:
        MambaLM.from_pretrained(saved)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[0] == f"the weights in {saved} are not those of the model that its config describes:"
    assert lines[1:] == [
        "missing     backbone.layers.0.mixer.D (64,)",
        "missing     backbone.norm_f.weight (32,)",
        "unexpected  backbone.layers.0.mixer.E (3,)",
        "misshapen   backbone.layers.1.mixer.A_log (64, 5), the config says (64, 4)",
    ]


def test_load_of_another_size_stays_on_one_screen(saved):
    config = json.loads((saved / "config.json").read_text())
    config["model"] |= {"n_layer": 9}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(AnymambaError, match=r"missing     backbone\.layers\.2") as error:
        MambaLM.from_pretrained(saved)
    assert len(str(error.value).splitlines()) < 25
    assert "… and 50 more" in str(error.value)


@pytest.mark.parametrize("keep", [0, 7, 200, 0.9])
def test_load_refuses_a_truncated_file(saved, keep):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(AnymambaError, match=r"is damaged or cut short .*; copy or save it again"):
        MambaLM.from_pretrained(saved)


def test_load_refuses_bad_configs(saved):
    path = saved / "config.json"
    good = json.loads(path.read_text())
    for text, message in [
        (
            json.dumps(good | {"model": good["model"] | {"d_stat": 3}}),
            "unknown config key 'd_stat': did you mean 'd_state'?",
        ),
        (json.dumps({"hidden_size": 3}), 'is of no format that anymamba knows: it has no "format" (ours), no'),
        (json.dumps({"format": "anymamba-1"}), 'has no "model", the sizes'),
        (json.dumps(good | {"format": "anymamba-2"}), "is of format 'anymamba-2', and this version of anymamba reads"),
        ("{", "is not JSON (JSONDecodeError"),
        ("[]", "holds a list, but it must be an object"),
    ]:
        path.write_text(text)
        with pytest.raises(AnymambaError, match=re.escape(message)):
            MambaLM.from_pretrained(saved)
    path.unlink()
    with pytest.raises(AnymambaError, match=r"no config.json in .*: a model folder holds config.json and model.safet"):
        MambaLM.from_pretrained(saved)


def test_load_of_nothing(tmp_path, saved):
    with pytest.raises(AnymambaError, match=r"no config.json in"):
        MambaLM.from_pretrained(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(AnymambaError, match=r"no model.safetensors in .*: a model folder holds"):
        MambaLM.from_pretrained(saved)


@pytest.mark.parametrize("writer", ["safetensors.torch.save_file", "anymamba.files.os.replace"])
def test_a_failed_save_leaves_the_old_files(saved, monkeypatch, writer):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, full_disk)
    with pytest.raises(AnymambaError, match=r"cannot write .*No space left on device; free some space or"):
        make_model(seed=1).save_pretrained(saved)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_save_where_a_file_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AnymambaError, match="cannot write"):
        make_model().save_pretrained(tmp_path / "file")


# ---- what torch and others do with a model ---------------------------------------------------------------------


def test_compile_fullgraph():
    model, ids = make_model(), tokens()
    want = model(ids, labels=ids)
    want_gradients = torch.autograd.grad(want.loss, list(model.parameters()))
    torch.compiler.reset()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.hidden, want.hidden, rtol=1e-5, atol=1e-5)
    for i, j in zip(torch.autograd.grad(got.loss, list(model.parameters())), want_gradients, strict=True):
        torch.testing.assert_close(i, j, rtol=1e-4, atol=1e-6)


def test_compile_with_a_state():
    model, ids = make_model(), tokens()
    with torch.no_grad():
        state = model(ids).state
        want = model(ids[:, :3], state)
        torch.compiler.reset()
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids[:, :3], state)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.state.layers[1].ssm, want.state.layers[1].ssm, rtol=1e-5, atol=1e-5)


def test_export():
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make_model()

        def forward(self, ids):
            return self.model(ids).logits

    module = Logits().eval()
    program = torch.export.export(module, (tokens(),), dynamic_shapes=({1: torch.export.Dim("t", min=2, max=4096)},))
    for t in (9, 20):
        with torch.no_grad():
            torch.testing.assert_close(program.module()(tokens(2, t)), module(tokens(2, t)), rtol=1e-5, atol=1e-5)


def test_every_linear_is_called():
    """Adapters hang on `forward` of in_proj, x_proj, dt_proj and out_proj, and must get a gradient."""
    model, called = make_model(), []
    linears = {k: v for k, v in model.named_modules() if isinstance(v, nn.Linear)}
    adapters = {}
    for name, linear in linears.items():
        adapters[name] = nn.Parameter(torch.zeros(linear.out_features, linear.in_features))

        def hook(module, args, out, name=name):
            called.append(name)
            return out + nn.functional.linear(args[0], adapters[name])

        linear.register_forward_hook(hook)
    model.requires_grad_(False)
    model(tokens(), labels=tokens()).loss.backward()
    assert set(called) == set(linears)
    assert {k.rsplit(".")[-1] for k in called} == {"in_proj", "x_proj", "dt_proj", "out_proj", "lm_head"}
    assert all(p.grad is not None and p.grad.any() for p in adapters.values())


def test_fingerprint_tells_models_apart():
    model = make_model()
    assert model.fingerprint() == make_model().fingerprint()
    assert model.fingerprint() != make_model(seed=1).fingerprint()
    assert model.fingerprint().startswith("mamba d_model=32 n_layer=2 vocab_size=23 ")


def test_labels():
    """Mean cross-entropy of what should follow; -100 is not counted."""
    model, ids = make_model(), tokens()
    labels = ids.clone()
    labels[0, 2:] = -100
    out = model(ids, labels=labels)
    assert out.logits is None
    log_p = model(ids).logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    kept = torch.cat([log_p[0, :2], log_p[1]])
    torch.testing.assert_close(out.loss, -kept.mean())
    last = model(ids, labels=labels, last_only=True)
    assert torch.equal(last.loss, out.loss)
    torch.testing.assert_close(last.logits, model.lm_head(out.hidden)[:, -1:])


@pytest.mark.parametrize("source", ["ids", "embeddings"])
@pytest.mark.parametrize("last_only", [False, True])
def test_a_long_text_is_read_in_pieces(source, last_only, monkeypatch):
    """Without gradients, more than PIECE tokens are read piece by piece, to the same end."""
    model = make_model()
    ids = torch.randint(0, model.config.vocab_size, (2, 50))
    given = {"ids": ids} if source == "ids" else {"embeddings": model.backbone.embedding(ids).detach()}
    whole = model(**given, last_only=last_only)
    sizes = []
    model.backbone.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[:2])))
    monkeypatch.setattr("anymamba.model.PIECE", 32)
    with torch.no_grad():
        pieces = model(**given, last_only=last_only)
    assert sizes == [(2, 16), (2, 16), (2, 16), (2, 2)]
    for got, want in ((pieces.logits, whole.logits), (pieces.hidden, whole.hidden)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for got, want in zip(pieces.state.layers, whole.state.layers, strict=True):
        torch.testing.assert_close(got.ssm, want.ssm, rtol=1e-5, atol=1e-5)
    assert pieces.state.seen.tolist() == [50, 50]


@pytest.mark.parametrize("labels", [torch.zeros(5, 2, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int32)])
def test_labels_that_do_not_fit(labels):
    with pytest.raises(AnymambaError, match=r"labels are .* but must be \(batch, seqlen\) = \(2, 5\) torch.int64"):
        make_model()(torch.zeros(2, 5, dtype=torch.int64), labels=labels)
