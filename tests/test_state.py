"""MambaState: what it refuses and how it says so. That its operations change nothing stands in test_laws.py."""

import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from anymamba import AnymambaError, MambaConfig, MambaLM, MambaState

CONFIG = MambaConfig(vocab_size=23, d_model=16, n_layer=2, d_state=4)


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return MambaLM(CONFIG.replace(**changes))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def state(model):
    with torch.no_grad():
        return model(torch.randint(23, (3, 5))).state


def tensors(state):
    return [v for layer in state.layers for v in layer]


def same(a, b):
    return torch.equal(a.seen, b.seen) and all(torch.equal(i, j) for i, j in zip(tensors(a), tensors(b), strict=True))


def test_zeros_are_the_state_before_the_first_token(model):
    zeros, ids = MambaState.zeros(model.config, 2), torch.randint(23, (2, 4))
    assert torch.equal(model(ids, zeros).logits, model(ids).logits)
    assert zeros.batch_size == 2
    assert zeros.seen.tolist() == [0, 0]


@pytest.mark.parametrize(("dtype", "conv_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_nbytes(dtype, conv_bytes):
    """A layer: d_inner · (w - 1) past inputs and d_inner · n float32; a row: one count."""
    state = MambaState.zeros(CONFIG, 3, dtype=dtype)
    assert state.nbytes == 3 * (2 * (32 * 3 * conv_bytes + 32 * 4 * 4) + 8)


def test_size_does_not_grow_with_the_text(model):
    with torch.no_grad():
        sizes = {model(torch.randint(23, (1, t))).state.nbytes for t in (1, 10, 300)}
    assert len(sizes) == 1


def test_to_changes_the_parts_that_are_named(state):
    lower = state.to(dtype=torch.bfloat16)
    assert {v.dtype for layer in lower.layers for v in (layer.conv,)} == {torch.bfloat16}
    assert {layer.ssm.dtype for layer in lower.layers} == {torch.float32}
    assert {layer.ssm.dtype for layer in state.to(ssm_dtype=torch.bfloat16).layers} == {torch.bfloat16}
    assert state.to("meta").seen.device.type == "meta"
    assert same(state.to("cpu"), state)


def test_lowered_state_can_be_read_on_from(model, state):
    out = model(torch.randint(23, (3, 2)), state.to(dtype=torch.bfloat16, ssm_dtype=torch.bfloat16))
    assert out.logits.isfinite().all()
    assert out.state.layers[0].ssm.dtype == torch.float32


def test_copy_has_storage_of_its_own(state):
    copy = state.copy()
    before = state.layers[0].ssm.clone()
    copy.layers[0].ssm.zero_()
    assert torch.equal(state.layers[0].ssm, before)


def test_is_immutable(state):
    with pytest.raises(AttributeError):
        state.seen = None


@pytest.mark.parametrize("rows", [[3], [-1], [0, 1, 7]])
def test_select_refuses_rows_that_do_not_exist(state, rows):
    message = f"state.select: rows {rows}, but the state has rows 0 … 2"
    with pytest.raises(AnymambaError, match=re.escape(message)):
        state.select(rows)


def test_select_takes_lists_and_tensors(state):
    assert same(state.select([2, 0]), state.select(torch.tensor([2, 0])))
    assert state.select([]).batch_size == 0


def test_cat_refuses_states_of_two_models(state):
    other = MambaState.zeros(CONFIG.replace(d_state=8), 1)
    with pytest.raises(AnymambaError, match=r"MambaState.cat: 2 states of 2 models; states must be of one"):
        MambaState.cat([state, other])
    with pytest.raises(AnymambaError, match=r"MambaState.cat: 0 states"):
        MambaState.cat([])


@pytest.mark.parametrize("changes", [{"d_state": 8}, {"n_layer": 3}, {"expand": 4}])
def test_model_refuses_a_state_of_other_sizes(state, changes):
    with pytest.raises(AnymambaError, match=r"the state has 2 layers of \(rows, d_inner, d_state\) = \(3, 32, 4\)"):
        make_model(**changes)(torch.zeros(3, 1, dtype=torch.int64), state)


def test_model_refuses_another_number_of_rows(model, state):
    with pytest.raises(AnymambaError, match=r"use state.select or fork for other rows"):
        model(torch.zeros(2, 1, dtype=torch.int64), state)


def test_model_refuses_another_width_of_convolution(state):
    """d_conv is not part of the SSM state's shape."""
    with pytest.raises(AnymambaError, match="initial_state"):
        make_model(d_conv=3)(torch.zeros(3, 1, dtype=torch.int64), state)


# ---- files -----------------------------------------------------------------------------------------------------


def test_save_and_load(model, state, tmp_path):
    path = tmp_path / "text.state"
    state.save(path, model)
    assert same(MambaState.load(path, model), state)
    assert os.listdir(tmp_path) == ["text.state"]


def test_load_with_the_bfloat16_copy_of_the_model(model, state, tmp_path):
    state.save(tmp_path / "s", model)
    assert same(MambaState.load(tmp_path / "s", make_model().bfloat16()), state)


@pytest.mark.parametrize("other", [{"seed": 1}, {"n_layer": 3}, {"norm_eps": 1e-6}])
def test_load_refuses_another_model_by_name(model, state, tmp_path, other):
    state.save(tmp_path / "s", model)
    stranger = make_model(**other)
    with pytest.raises(AnymambaError) as error:
        MambaState.load(tmp_path / "s", stranger)
    message = str(error.value)
    assert "is the state of another model" in message
    assert f"state of  {model.fingerprint()}" in message
    assert f"this is   {stranger.fingerprint()}" in message
    assert "Load the model that read the text, or read it again with this one." in message


def test_load_refuses_what_is_not_a_state(model, tmp_path):
    with pytest.raises(AnymambaError, match="no state file at"):
        MambaState.load(tmp_path / "nowhere", model)
    (tmp_path / "text").write_text("To be, or not to be" * 100)
    with pytest.raises(AnymambaError, match=r"is not a readable state file .*; read the text again"):
        MambaState.load(tmp_path / "text", model)
    save_file({"a": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(AnymambaError, match="is not an anymamba state: it says 'no anymamba format'"):
        MambaState.load(tmp_path / "weights", model)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_load_refuses_a_truncated_file(model, state, tmp_path, keep):
    path = tmp_path / "s"
    state.save(path, model)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(AnymambaError, match=r"is not a readable state file .*; read the text again"):
        MambaState.load(path, model)


def test_load_refuses_a_state_with_a_tensor_missing(model, state, tmp_path):
    path = tmp_path / "s"
    state.save(path, model)
    rest = {k: v for k, v in load_file(path).items() if k != "layers.1.ssm"}
    save_file(rest, path, metadata={"format": "anymamba-state-1", "model": model.fingerprint()})
    with pytest.raises(AnymambaError, match=r"layers\.1\.ssm"):
        MambaState.load(path, model)


def test_a_failed_save_leaves_the_old_file(model, state, tmp_path, monkeypatch):
    path = tmp_path / "s"
    state.save(path, model)
    before = path.read_bytes()

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(AnymambaError, match=r"cannot write .*No space left on device.*free some space"):
        state.select([0]).save(path, model)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["s"]


def test_save_makes_the_folder(model, state, tmp_path):
    state.save(tmp_path / "new" / "s", model)
    assert os.listdir(tmp_path / "new") == ["s"]


def test_save_where_no_folder_can_be(model, state, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AnymambaError, match=r"cannot write .*file"):
        state.save(tmp_path / "file" / "s", model)


def test_a_saved_state_can_be_read_by_others(model, state, tmp_path):
    (tmp_path / "plain").write_text("")
    state.save(tmp_path / "s", model)
    assert (tmp_path / "s").stat().st_mode == (tmp_path / "plain").stat().st_mode
