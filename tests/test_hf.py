"""transformers' models on our ops: the same numbers, everything around them works on, and it can be undone."""

import copy
import importlib.util
import io
import sys

import pytest
import torch
import transformers
from torch import nn

from anymamba import AnymambaError, hf
from anymamba.hf import patch, unpatch

KINDS = {"mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
         "falcon": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM)}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)
GREEDY = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def build(kind="mamba", seed=0, **changes):
    """A random model whose weights all matter: biases, D and A_log are no round numbers."""
    torch.manual_seed(seed)
    make_config, make = KINDS[kind]
    sizes = {"vocab_size": 97, "hidden_size": 36, "num_hidden_layers": 2, "state_size": 5, "time_step_rank": 3}
    model = make(make_config(**sizes | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1 or p.shape[1] == changes.get("state_size", 5):
                p.add_(0.3 * torch.rand_like(p))
    return model


def ids_of(*shape, seed=1):
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(seed))


def padded(side):
    ids, mask = ids_of(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, count in enumerate((5, 0, 1)):
        padding = slice(0, count) if side == "left" else slice(9 - count, 9)
        mask[row, padding] = 0
        ids[row, padding] = 0
    return ids, mask


@kinds
@pytest.mark.parametrize("changes", [{}, {"use_bias": True, "use_conv_bias": False},
                                     {"conv_kernel": 2, "state_size": 1},
                                     {"conv_kernel": 7, "expand": 3, "state_size": 17}])  # fmt: skip
@pytest.mark.parametrize("t", [1, 2, 63])
def test_logits(kind, changes, t, launches):
    model, ids = build(kind, **changes), ids_of(2, t)
    with torch.no_grad():
        want = model(ids, output_hidden_states=True)
        assert not launches
        got = patch(model)(ids, output_hidden_states=True)
    assert len(launches) >= 4
    for a, b in zip((got.logits, *got.hidden_states), (want.logits, *want.hidden_states), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@kinds
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_padding_is_as_there(kind, side, use_bias):
    model, (ids, mask) = build(kind, use_bias=use_bias), padded(side)
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        got = patch(model)(ids, attention_mask=mask).logits
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        if side == "left":  # the mask matters
            assert not torch.allclose(got[mask.bool()], model(ids).logits[mask.bool()], atol=1e-3)


@kinds
def test_a_left_padded_row_is_that_row_alone(kind):
    model, (ids, mask) = patch(build(kind)), padded("left")
    both = model.generate(ids, attention_mask=mask, **GREEDY)
    for row in range(3):
        own = ids[row : row + 1, mask[row].bool()]
        assert model.generate(own, **GREEDY)[0, own.shape[1] :].tolist() == both[row, 9:].tolist()


WAYS = {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"do_sample": True, "top_k": 9, "temperature": 1.3},
        "beams, sampled": {"num_beams": 2, "do_sample": True}, "no cache": {"use_cache": False},
        "several": {"num_beams": 4, "num_return_sequences": 3}, "penalty": {"repetition_penalty": 1.4},
        "static": {"cache_implementation": "static"}}  # fmt: skip


@kinds
@pytest.mark.parametrize("way", WAYS)
def test_generate(kind, way):
    model, (ids, mask) = build(kind), padded("left")
    options = GREEDY | WAYS[way] | {"attention_mask": mask, "return_dict_in_generate": True, "output_scores": True}

    def generate():
        torch.manual_seed(3)
        return model.generate(ids, **options)

    want = generate()
    patch(model)
    got = generate()
    assert got.sequences.tolist() == want.sequences.tolist()
    for a, b in zip(got.scores, want.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@kinds
def test_cache_after_each_step(kind):
    """States mean what transformers' mean: one can read and the other go on."""
    theirs, ids = build(kind), ids_of(2, 6)
    ours = patch(copy.deepcopy(theirs))
    with torch.no_grad():
        caches = [model(ids, use_cache=True).cache_params for model in (ours, theirs)]
        for step in range(3):
            for layer in range(2):
                for name in ("get_conv_state", "get_recurrent_state"):
                    got, want = (getattr(cache, name)(layer) for cache in caches)
                    assert got.dtype == want.dtype
                    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
            token = ids_of(2, 1, seed=step)
            swapped = ours(token, cache_params=caches[1]).logits, theirs(token, cache_params=caches[0]).logits
            torch.testing.assert_close(*swapped, atol=2e-5, rtol=1e-4)


@kinds
@pytest.mark.parametrize("parts", [(4, 3, 6), (1, 12), (2, 1, 10), (12, 1)])
def test_continuing_a_cache_by_any_number_of_tokens(kind, parts):
    model, ids = patch(build(kind)), ids_of(2, 13)
    with torch.no_grad():
        whole, cache, logits = model(ids).logits, None, []
        for piece in ids.split(parts, dim=1):
            out = model(piece, cache_params=cache, use_cache=True)
            cache = out.cache_params
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, atol=2e-5, rtol=1e-4)


def test_mask_of_all_tokens_when_a_cache_goes_on():
    model, (ids, mask) = patch(build()), padded("left")
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits[:, 6:]
        cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).cache_params
        got = model(ids[:, 6:], attention_mask=mask, cache_params=cache).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_reset_and_reorder():
    model, ids = patch(build()), ids_of(2, 5)
    with torch.no_grad():
        want = model(ids, use_cache=True)
        cache = model(ids_of(2, 4, seed=9), use_cache=True).cache_params
        cache.reset()
        torch.testing.assert_close(model(ids, cache_params=cache).logits, want.logits, atol=2e-5, rtol=1e-4)
        token, order = ids_of(2, 1), torch.tensor([1, 0])
        straight = model(token, cache_params=copy.deepcopy(want.cache_params)).logits
        want.cache_params.reorder_cache(order)
        torch.testing.assert_close(model(token[order], cache_params=want.cache_params).logits, straight[order])


@kinds
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(kind, checkpointing):
    ids, mask = padded("right")
    labels = ids.masked_fill(mask == 0, -100)

    def gradients(model):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    want, got = gradients(build(kind)), gradients(patch(build(kind)))
    assert got.keys() == want.keys()
    for name, g in want.items():
        assert g.abs().max() > 0, name
        torch.testing.assert_close(got[name], g, atol=1e-5 * float(g.abs().max()) + 1e-7, rtol=1e-3, msg=name)


def test_trainer(tmp_path):
    """The same losses as without, checkpoints that both can load, and states of the optimizer that fit."""
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in ids_of(2, 10).repeat(6, 1)]

    def train(model, folder):
        arguments = transformers.TrainingArguments(
            folder, max_steps=6, per_device_train_batch_size=2, learning_rate=3e-3, logging_steps=1, seed=0,
            report_to=[], save_steps=6, use_cpu=True, gradient_checkpointing=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    theirs, ours = build(), patch(build())
    want, got = train(theirs, tmp_path / "theirs"), train(ours, tmp_path / "ours")
    assert got == pytest.approx(want, abs=2e-4)
    assert got[-1] < got[0]
    loaded = transformers.MambaForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-6").eval()
    ids = ids_of(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, ours.eval()(ids).logits, atol=2e-5, rtol=1e-4)


@kinds
def test_unpatch_leaves_no_trace(kind):
    model, ids = build(kind), ids_of(2, 9)
    with torch.no_grad():
        want = model(ids).logits
    before = [(id(module), type(module), set(vars(module))) for module in model.modules()]
    parameters = {name: id(p) for name, p in model.named_parameters()}
    state = {name: v.clone() for name, v in model.state_dict().items()}
    assert patch(model) is model
    patch(model)  # twice is once
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert model.state_dict().keys() == state.keys()
    assert unpatch(model) is model
    assert [(id(module), type(module), set(vars(module))) for module in model.modules()] == before
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


def test_an_optimizer_made_before_goes_on():
    model, ids = build().train(), ids_of(2, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    patch(model)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def test_save_copy_and_pickle(tmp_path):
    model, ids = patch(build()), ids_of(1, 7)
    model.save_pretrained(tmp_path)
    loaded = transformers.MambaForCausalLM.from_pretrained(tmp_path).eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        want = model(ids).logits
        torch.testing.assert_close(loaded(ids).logits, want, atol=2e-5, rtol=1e-4)
        assert torch.equal(pickled(ids).logits, want)
        assert torch.equal(copy.deepcopy(model)(ids).logits, want)
    assert type(loaded.backbone.layers[0].mixer).__module__.startswith("transformers.")


def test_sixteen_bits():
    """No further from the truth than transformers is."""
    model, ids = build(), ids_of(2, 40)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids).logits
        plain = model.bfloat16()(ids).logits
        got = patch(model)(ids).logits
    error, allowed = ((v.double() - exact).abs().max() for v in (got, plain))
    assert got.dtype == plain.dtype
    assert error <= 1.5 * allowed


def test_embeddings_backbone_and_float64():
    model = build().double()
    backbone, x = model.backbone, torch.randn(2, 6, 36, dtype=torch.float64)
    with torch.no_grad():
        want = backbone(inputs_embeds=x).last_hidden_state
        torch.testing.assert_close(patch(backbone)(inputs_embeds=x).last_hidden_state, want, atol=1e-6, rtol=1e-6)
    assert type(model.lm_head) is nn.Linear  # not part of what was patched


@pytest.mark.parametrize("first", ["adapters", "patch"])
@pytest.mark.parametrize("targets", [["in_proj", "x_proj"], ["dt_proj"]])
def test_adapters(first, targets):
    """LoRA works, on dt_proj as well, where transformers' own mixer passes it by."""
    peft = pytest.importorskip("peft")
    plain, ids = build(), ids_of(2, 9)
    with torch.no_grad():
        want = plain(ids).logits
    config = peft.LoraConfig(r=2, target_modules=targets, lora_alpha=8)
    if first == "adapters":
        model = patch(peft.get_peft_model(plain, config))
    else:
        model = peft.get_peft_model(patch(plain), config)
    torch.testing.assert_close(model(ids).logits, want, atol=2e-5, rtol=1e-4)
    model(ids, labels=ids).loss.backward()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapters
    assert all(p.grad.abs().max() > 0 for name, p in adapters.items() if "lora_B" in name)
    with torch.no_grad():
        for p in adapters.values():
            p.add_(0.1)
        changed = model(ids).logits
        assert not torch.allclose(changed, want, atol=1e-3)
        torch.testing.assert_close(unpatch(model.merge_and_unload())(ids).logits, changed, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("first", ["offload", "patch"])
def test_offloaded(first, launches):
    accelerate = pytest.importorskip("accelerate")
    model, ids = build(), ids_of(1, 6)
    with torch.no_grad():
        want = model(ids).logits
        if first == "patch":
            model = accelerate.cpu_offload(patch(model), execution_device="cpu")
        else:
            model = patch(accelerate.cpu_offload(model, execution_device="cpu"))
        assert model.backbone.layers[0].mixer.A_log.device.type == "meta"
        torch.testing.assert_close(model(ids).logits, want, atol=2e-5, rtol=1e-4)
        assert len(launches) >= 4
        del launches[:]
        torch.testing.assert_close(unpatch(model)(ids).logits, want)
        assert not launches


def tiny(name, **sizes):
    config = getattr(transformers, f"{name}Config")(vocab_size=31, hidden_size=16, **sizes)
    return getattr(transformers, f"{name}Model")(config)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: tiny("Mamba2", num_hidden_layers=1, num_heads=4, head_dim=8, state_size=4, n_groups=1),
     "nothing to do for this Mamba2Model, its mixers are Mamba2Mixer: transformers' Mamba and FalconMamba models"),
    (lambda: tiny("Jamba", num_hidden_layers=2, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1,
                  attn_layer_period=2, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1, mamba_d_state=4),
     "its mixers are JambaMambaMixer"),
    (lambda: nn.Sequential(nn.Linear(3, 3)), "nothing to do for this Sequential, it holds no Mamba mixers"),
    (lambda: build(hidden_act="gelu"), "hidden_act='gelu', and our convolution knows silu only"),
])  # fmt: skip
def test_what_cannot_be_patched(make, message):
    model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(AnymambaError, match=message):
        patch(model)
    assert [type(module) for module in model.modules()] == kinds


def test_other_versions(monkeypatch):
    def load():
        spec = importlib.util.spec_from_file_location("again", hf.__file__)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    with monkeypatch.context() as patched:
        patched.delattr("transformers.cache_utils.Cache.get_conv_state")
        with pytest.raises(AnymambaError, match=r"needs transformers 5\.21 or newer, and this is 5"):
            load()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AnymambaError, match="needs transformers: pip install"):
        load()
