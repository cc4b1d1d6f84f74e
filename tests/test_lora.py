"""Adapters: gradients, merging, files, runs that train them, and fine-tuning of whole models."""

import json
import re
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from anymamba import AnymambaError, MambaConfig, MambaLM, backends, lora, quantize
from anymamba.data import load_tokenizer, train_bpe
from anymamba.generate import SamplingConfig, generate
from anymamba.generate.decode import _kernels_for
from anymamba.train import TrainConfig, evaluate, load_run, log, resume, train
from test_train import TINY, StopAfter, sums, timeless

peft = pytest.importorskip("peft")
SMALL = {"d_model": 32, "n_layer": 2}


def small(**changes):
    torch.manual_seed(0)
    return MambaLM(MambaConfig(**SMALL | changes))


@torch.no_grad()
def disturbed(model, scale=0.05):
    """Adapters that change something: new ones do not."""
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p), alpha=scale)
    return model


def lora_layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}


# ---- gradients ----


@pytest.mark.parametrize("targets", [lora.TARGETS, lora.VOCABULARY], ids=["blocks", "vocabulary"])
def test_gradients_are_those_of_the_merged_weights(targets):
    """dA = s Bᵀ dW, dB = s dW Aᵀ, for the W that the adapter is merged into: through scan, convolution and head."""
    adapter = lora.attach(small(), rank=3, alpha=6, targets=targets)
    disturbed(adapter.model)
    ids = torch.randint(257, (2, 17))
    adapter.model(ids, labels=ids.roll(-1, 1)).loss.backward()
    got = {}
    for name, layer in lora_layers(adapter.model).items():
        sides = (layer.lora_embedding_A, layer.lora_embedding_B) if name.endswith("embedding") else (
            layer.lora_A, layer.lora_B)  # fmt: skip
        A, B = (
            side["default"] if isinstance(side, torch.nn.ParameterDict) else side["default"].weight for side in sides
        )
        got[name] = (A.detach().clone(), B.detach().clone(), A.grad, B.grad)
    assert len(got) == (2 * 4 if targets == lora.TARGETS else 2)
    merged = adapter.merge()
    merged(ids, labels=ids.roll(-1, 1)).loss.backward()
    for name, (A, B, dA, dB) in got.items():
        dW = merged.get_submodule(name).weight.grad
        dW = dW.T if name.endswith("embedding") else dW  # peft keeps its transpose
        torch.testing.assert_close(dA, 2 * B.T @ dW, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(dB, 2 * dW @ A.T, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_natural_call_of_peft(precision):
    """Every adapter gets a gradient, nothing else does, and a few steps learn."""
    base = small()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=list(lora.TARGETS)))
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = torch.randint(257, (2, 33)), []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(ids[:, :-1], labels=ids[:, 1:]).loss
        adam.zero_grad()
        loss.backward()
        losses.append(loss.item())
        adam.step()
    assert losses[-1] < losses[0] - 0.2
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name), name
        assert (p.grad is not None and bool(p.grad.any())) == ("lora_" in name), name


def test_an_adapter_on_a_layer_that_is_not_called_is_named():
    adapter = lora.attach(small(), rank=64, targets=["in_proj", "conv1d"])
    ids = torch.randint(257, (1, 5))
    adapter.model(ids, labels=ids).loss.backward()
    with pytest.raises(AnymambaError) as error:
        adapter.check_gradients()
    assert "adapter on backbone.layers.0.mixer.conv1d and 1 more gets no gradient" in str(error.value)
    assert "in_proj, x_proj, dt_proj, out_proj, embedding, lm_head" in str(error.value)


# ---- merging ----


@pytest.mark.parametrize("targets", [lora.TARGETS, ("dt_proj", "embedding", "lm_head")], ids=str)
def test_merged_is_adapted_and_decodes_fast_again(targets):
    model, ids = small(), torch.randint(257, (2, 19))
    with torch.no_grad():
        plain = model(ids).logits
        adapter = lora.attach(model, targets=targets)
        assert torch.equal(model(ids).logits, plain)  # a new one changes nothing
        disturbed(model)
        want = model(ids).logits
        assert (want - plain).abs().max() > 0.1
        written = generate(model, [[65, 66]], max_new_tokens=12, sampling=SamplingConfig(temperature=0))[0].ids
        assert _kernels_for(model) is None  # they would not see the adapter
        merged = adapter.merge()
        torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-4)
        if backends.explain("cpu", torch.float32, "decode")[0] == "numba":
            assert _kernels_for(merged) is not None
        assert generate(merged, [[65, 66]], max_new_tokens=12, sampling=SamplingConfig(temperature=0))[0].ids == written
        assert not lora_layers(merged)
        assert all(p.requires_grad for p in merged.parameters())
        close = quantize(merged)(ids).logits
        assert (close - want).abs().max() < 0.1 * want.abs().max()


# ---- files ----


@pytest.fixture
def saved(tmp_path):
    """A base in a folder, an adapter of it in another, ids, and the logits of the two together."""
    small().save_pretrained(tmp_path / "base")
    adapter = lora.attach(small(), rank=4, targets=("in_proj", "dt_proj", "embedding"), base=str(tmp_path / "base"))
    disturbed(adapter.model)
    adapter.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(257, (1, 11))
    with torch.no_grad():
        return tmp_path / "base", tmp_path / "adapter", ids, adapter.model(ids).logits


def test_our_files_are_pefts(saved):
    base, folder, ids, want = saved
    with torch.no_grad():
        torch.testing.assert_close(lora.load(folder)(ids).logits, want, rtol=1e-4, atol=1e-4)
        model = MambaLM.from_pretrained(base)
        before = model(ids).logits
        theirs = peft.PeftModel.from_pretrained(model, folder)
        assert torch.equal(theirs(ids).logits, want)
        with theirs.disable_adapter():
            assert torch.equal(theirs(ids).logits, before)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["peft_type"], config["r"], config["target_modules"]) == (
        "LORA", 4, ["dt_proj", "embedding", "in_proj"])  # fmt: skip


def test_pefts_files_are_ours(tmp_path):
    base = small(tie_embeddings=False).bfloat16()
    base.save_pretrained(tmp_path / "base")
    base.float()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["x_proj", "lm_head"], use_rslora=True))
    disturbed(model)
    ids = torch.randint(257, (1, 11))
    with torch.no_grad():
        want = model(ids).logits
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        with pytest.raises(AnymambaError, match="does not say which model it is for: name it by  anymamba merge"):
            lora.load(tmp_path / "adapter")
        merged = lora.load(tmp_path / "adapter", base=tmp_path / "base")
        assert merged.lm_head.weight.dtype == torch.float32
        torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-4)
        low = lora.load(tmp_path / "adapter", base=tmp_path / "base", dtype=torch.bfloat16)
        assert low.lm_head.weight.dtype == torch.bfloat16


def test_what_does_not_belong_together_is_refused(saved, tmp_path):
    base, folder, _, _ = saved
    small(d_model=48).save_pretrained(tmp_path / "wide")
    with pytest.raises(
        AnymambaError, match=r"not an adapter of this model:\n  misshapen (.|\n)*in_proj.* \(4, 32\), this .*\(4, 48\)"
    ):
        lora.load(folder, base=tmp_path / "wide")
    small(n_layer=3).save_pretrained(tmp_path / "deep")
    with pytest.raises(AnymambaError, match=r"missing     .*layers\.2\.mixer\.dt_proj\.lora_A"):
        lora.load(folder, base=tmp_path / "deep")
    other = small()
    torch.nn.init.normal_(other.backbone.layers[0].mixer.in_proj.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AnymambaError, match=r"belongs to another model:\n  made for  mamba d_model=32"):
        lora.load(folder, base=tmp_path / "other")
    base.rename(tmp_path / "moved")
    with pytest.raises(AnymambaError, match=r"is for the model .*base, which cannot be loaded(.|\n)*--base MODEL"):
        lora.load(folder)
    assert lora.load(folder, base=tmp_path / "moved").config.tie_embeddings is False


def test_spoiled_files_are_refused(saved):
    base, folder, _, _ = saved
    weights, config = folder / lora.WEIGHTS, folder / lora.CONFIG
    whole, tensors = weights.read_bytes(), load_file(weights)
    save_file(tensors | {"more": torch.ones(1)}, weights)
    with pytest.raises(AnymambaError, match="unexpected  more"):
        lora.load(folder)
    weights.write_bytes(whole[:-9])
    with pytest.raises(AnymambaError, match="missing or damaged"):
        lora.load(folder)
    weights.unlink()
    with pytest.raises(AnymambaError, match="missing or damaged"):
        lora.load(folder)
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"peft_type": "NEW"}))
    with pytest.raises(AnymambaError, match=r"missing or is no adapter config \(KeyError"):
        lora.load(folder)
    peft.IA3Config(target_modules=["in_proj"], feedforward_modules=[]).save_pretrained(folder)
    with pytest.raises(AnymambaError, match="only LoRA can be added"):
        lora.load(folder, base=base)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank=0, but it must be a whole number of at least 1"),
        ({"rank": 2.0}, r"rank=2\.0, but it must be"),
        ({"alpha": 0}, "alpha=0, but it must be above 0"),
        ({"targets": ["in_proj", "out"]}, "no layer is called 'out'; targets are names of layers: in_proj, x_proj"),
        ({"targets": []}, "no targets; targets are names of layers"),
        ({"targets": ["norm"]}, r"peft cannot attach this adapter \((.|\n)*targets are names of layers"),
        ({"targets": ["conv1d"], "rank": 3}, "groups"),
    ],
)
def test_attach_refuses(options, words):
    with pytest.raises(AnymambaError, match=words):
        lora.attach(small(), **options)


def test_the_usual_targets_are_those_that_there_are():
    adapter = lora.attach(small(mixer="s4d", d_state=6))
    changed = {name.split(".")[-4] for name, _ in adapter.model.named_parameters() if "lora_A" in name}
    assert changed == {"in_proj", "out_proj"}


def test_attach_refuses_models_that_cannot_have_one(monkeypatch):
    with pytest.raises(AnymambaError, match=r"quantised model cannot be trained.* merge, and quantise that"):
        lora.attach(quantize(small()))
    with pytest.raises(AnymambaError, match="has an adapter already"):
        lora.attach(lora.attach(small()).model)
    with pytest.raises(AnymambaError, match="DoRA on dt_proj does not compute what is merged"):
        lora._attach(small(), peft.LoraConfig(target_modules=["dt_proj"], use_dora=True))
    with pytest.raises(AnymambaError, match=r"no layer is called 'lm_head'; .*out_proj$"):
        lora.attach(small(vocab_size=None), targets=["lm_head"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AnymambaError, match=r"LoRA needs peft .*pip install 'anymamba\[lora\]'"):
        lora.attach(small())


# ---- runs ----


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A text, and a model with its tokenizer in a folder, weights in bfloat16."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "text.txt").write_text(sums())
    small().bfloat16().save_pretrained(folder / "model")
    load_tokenizer("bytes").save(folder / "model")
    return folder


def config(start, out, **changes):
    kept = {k: v for k, v in TINY.items() if k not in SMALL}
    options = {"data": (str(start / "text.txt"),), "init": str(start / "model"), "lr": 1e-2, "out": str(out)}
    return TrainConfig(**kept | options | changes)


@pytest.mark.parametrize("options", [{"lora": True, "carry": True}, {}], ids=["lora", "full"])
def test_fine_tuning_learns_and_resumed_is_never_stopped(start, tmp_path, options):
    options |= {"steps": 12, "eval_every": 6}
    display = StopAfter()
    whole = train(config(start, tmp_path / "whole", **options), display)
    assert train(config(start, tmp_path / "run", **options), StopAfter(5)).interrupted == signal.SIGINT
    done = resume(tmp_path / "run")
    assert done.evaluation == whole.evaluation
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "run")
    files = ("adapter_model" if "lora" in options else "model", "training")
    one, other = ({k: v for file in files for k, v in load_file(tmp_path / name / "checkpoints" / "step-00000012" /
                                                                f"{file}.safetensors").items()}
                  for name in ("whole", "run"))  # fmt: skip
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []

    measured = [(r["step"], r["heldout_nats"]) for r in log.read(tmp_path / "run") if "heldout_nats" in r]
    assert [step for step, _ in measured] == [0, 6, 12]
    assert measured[0][1] > measured[1][1] > measured[2][1]
    data, base = whole.run / "tokens" / "heldout.bin", load_run(start / "model")[0].float()
    heldout = torch.from_file(str(data), size=data.stat().st_size // 2, dtype=torch.uint16).numpy()
    assert evaluate(base, heldout, carry=False, max_tokens=512).nats == pytest.approx(measured[0][1], rel=1e-5)
    most = {"max_tokens": whole.evaluation.tokens}
    again = evaluate(load_run(whole.run)[0], heldout, **most).nats
    assert again == pytest.approx(whole.evaluation.nats, rel=1e-4)

    said = " ".join(display.notes)
    names = {p.name for p in whole.run.iterdir()}
    if "lora" in options:
        assert re.search(r"M parameters, 0\.007M of them trained \(\d+\.\d+%\)", said)
        assert names >= {"adapter_config.json", "adapter_model.safetensors"}
        assert not names & {"model.safetensors", "config.json"}
        assert (whole.run / "adapter_model.safetensors").stat().st_size < 70_000
    else:
        assert "of them trained" not in said
        assert (
            load_file(whole.run / "model.safetensors")["lm_head.weight" if False else "backbone.embedding.weight"].dtype
            == torch.float32
        )


def test_a_run_with_an_adapter_in_the_commands(start, tmp_path, command):
    run, text = tmp_path / "run", start / "text.txt"
    sizes = ["--seqlen", 64, "--eval-tokens", 512, "--final-tokens", 512, "--precision", "fp32", "--sample-tokens", 8]
    code, out, errors = command("train", "--init", start / "model", "--lora", "--lora-rank", 4, "--lora-alpha", 8,
                                "--lora-targets", "in_proj", "embedding", "--data", text, "--steps", 6, "--lr", 0.02,
                                "--out", run, *sizes)  # fmt: skip
    assert code == 0, errors
    assert f"adapter     {run / 'adapter_model.safetensors'} after 6 steps" in out
    assert f"anymamba merge {run} -o FOLDER" in out
    prompt = ("--prompt", "two and", "--greedy", "--max-new-tokens", 20)
    code, written, errors = command("generate", run, *prompt)
    assert (code, errors) == (0, "")
    assert written != command("generate", start / "model", *prompt)[1]
    merged = tmp_path / "merged"
    code, out, _ = command("merge", run, "-o", merged)
    assert code == 0
    assert re.fullmatch(rf"0\.\d\dM parameters in {merged}\n", out)
    assert command("generate", merged, *prompt)[1] == written
    size = (merged / "model.safetensors").stat().st_size
    assert command("merge", run, "-o", merged, "--force", "--dtype", "bf16")[0] == 0
    assert (merged / "model.safetensors").stat().st_size < 0.6 * size

    again = TrainConfig.from_file(run / "train.json")  # an adapter of a model that is itself base and adapter
    assert again.lora_targets == ("in_proj", "embedding")
    more = train(config(start, tmp_path / "more", steps=1, init=str(run), lora=True))
    assert load_run(more.run)[0].config == load_run(merged)[0].config

    for arguments, words in (
        ((merged, "-o", tmp_path / "x"), "holds no adapter"),
        ((run, "-o", merged), "holds a model; choose another folder, or --force"),
        ((run, "-o", tmp_path / "x", "--base", "nowhere"), "no config.json in nowhere"),
    ):
        code, out, errors = command("merge", *arguments)
        assert (code, out) == (2, "")
        assert words in errors


def test_a_run_whose_model_has_changed_or_gone(start, tmp_path):
    model = tmp_path / "model"
    small().save_pretrained(model)
    load_tokenizer("bytes").save(model)
    run = train(config(start, tmp_path / "run", steps=4, lora=True, init=str(model)), StopAfter(2)).run
    small(tie_embeddings=False).save_pretrained(model)
    with pytest.raises(AnymambaError, match="belongs to another model"):
        resume(run)
    for path in model.iterdir():
        path.unlink()
    with pytest.raises(AnymambaError, match=r"no config\.json in .*model"):
        resume(run)
    small().save_pretrained(model)
    assert resume(run).step == 4


def test_default_learning_rates():
    assert TrainConfig().lr == TrainConfig(init="m", lora=True).lr == 6e-3
    assert TrainConfig(init="m").lr == 3e-4
    assert TrainConfig(init="m", lr=1e-3).lr == TrainConfig(lr=1e-3).replace(init="m").lr == 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": True, "init": None}, "lora trains an adapter of a model: name that with --init"),
        ({"d_state": 8}, "d_state with init=.*the sizes are those of the model"),
        ({"preset": "small"}, "preset with init="),
        ({"lora_rank": 4}, "lora_rank says how an adapter is made: it needs --lora"),
        ({"lora": True, "lora_rank": 0}, "lora_rank=0, but it must be a whole number of at least 1"),
        ({"lora": True, "lora_alpha": -1.0}, r"lora_alpha=-1\.0, but it must be a finite number above 0"),
        ({"lora": True, "lora_targets": ("in_porj",)}, "no layer is called 'in_porj'; targets are names of layers"),
        ({"lora": True, "lora_targets": ("conv1d",), "lora_rank": 64}, "conv1d and 1 more gets no gradient"),
        ({"init": "nowhere"}, "no config.json in nowhere"),
        ({"tokenizer": "bpe"}, "is not the one that .*model was trained with.*drop --tokenizer"),
    ],
)
def test_runs_that_cannot_be_meant(start, tmp_path, changes, words):
    if changes.get("tokenizer"):  # as many tokens as the model knows, but others
        train_bpe([sums(100)], 257, tmp_path / "bpe.json")
        changes = {"tokenizer": str(tmp_path / "bpe.json")}
    with pytest.raises(AnymambaError, match=words):
        train(config(start, tmp_path / "run", **{"steps": 1} | changes))
    if "gradient" not in words:  # known only when it has begun
        assert not (tmp_path / "run").exists()
