"""Mixers other than the published Mamba: the same laws and interface, and nothing quietly computes another."""

import copy
import shutil

import pytest
import torch

from anymamba import AnymambaError, MambaConfig, MambaLM, MambaState, SamplingConfig, export, lora
from anymamba.generate import generate
from anymamba.generate.decode import Decoder, _kernels_for
from anymamba.layers import Block, quantize, sequence
from anymamba.layers.inner import takes
from anymamba.layers.mixers import KINDS
from anymamba.layers.step import block_weights
from anymamba.reference import discretize, hippo, lti
from anymamba.state import LayerState, state_info
from anymamba.train import TrainConfig, load_run, resume, train

SIZES = {"vocab_size": 23, "d_model": 16, "n_layer": 2}
CASES = {
    "s4": {"mixer": "s4", "d_state": 6, "bias": True, "discretization": "bilinear"},
    "s4-bare": {"mixer": "s4", "gate": False, "use_conv": False, "d_state": 2, "discretization": "zoh"},
    "s4d": {"mixer": "s4d", "d_state": 6, "discretization": "zoh"},
    "s4d-bare": {"mixer": "s4d", "gate": False, "use_conv": False, "s4d_init": "legs", "discretization": "bilinear"},
    "rnn": {"mixer": "rnn"},
    "lstm": {"mixer": "lstm", "expand": 1},
    "gru": {"mixer": "gru", "bias": True},
    "none": {"selective": ""},
    "B": {"selective": "B", "bias": True},
    "C": {"selective": "C", "inner_norm_eps": 1e-5},
    "dt": {"selective": "dt", "d_conv": 1},
    "B,dt": {"selective": "dt,B", "gate": False},
    "bare": {"selective": "B,C", "gate": False, "use_conv": False},
}
OTHERS = [name for name, case in CASES.items() if "mixer" in case]
cases = pytest.mark.parametrize("name", CASES)


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(**SIZES | CASES[name], initializer_range=1.0)).to(dtype)
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.out_proj.weight.mul_(4)  # what the mixers say must count
    return model


def tokens(b, t, seed=0):
    return torch.randint(23, (b, t), generator=torch.Generator().manual_seed(seed))


def assert_state(got, want):
    assert torch.equal(got.seen, want.seen)
    for i, j in zip(export.flatten(got), export.flatten(want), strict=True):
        torch.testing.assert_close(i, j, rtol=1e-10, atol=1e-11)


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@cases
def test_split_and_step_are_whole(name):
    m, ids = make(name), tokens(2, 140)
    want = m(ids)
    first = m(ids[:, :131])
    second = m(ids[:, 131:], first.state)
    assert_same(torch.cat([first.logits, second.logits], 1), want.logits)
    assert_state(second.state, want.state)
    state = first.state
    for i in range(131, 140):
        out = m(ids[:, i : i + 1], state)
        state = out.state
        assert_same(out.logits[:, 0], want.logits[:, i])
    assert_state(state, want.state)
    assert float((m(ids[:, 131:]).logits - second.logits).abs().max()) > 1e-3  # the state matters


@cases
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_is_unpadded(name, side):
    m, ids, lengths = make(name), tokens(4, 9), [4, 0, 9, 1]
    before = m(tokens(4, 3, seed=1)).state
    for state in (None, before):
        out = m(ids, state, torch.tensor(lengths), padding_side=side)
        for row, length in enumerate(lengths):
            mine = None if state is None else state.select([row])
            if length == 0:
                want = MambaState.zeros(m.config, 1).to(dtype=torch.float64, ssm_dtype=torch.float64)
                assert_state(out.state.select([row]), mine or want)
                continue
            real = slice(0, length) if side == "right" else slice(9 - length, 9)
            alone = m(ids[row : row + 1, real], mine)
            assert_same(out.logits[row : row + 1, real], alone.logits)
            assert_state(out.state.select([row]), alone.state)


@cases
def test_packed_and_states_on_the_way(name):
    m, ids, bounds = make(name), tokens(1, 10), torch.tensor([0, 3, 3, 10])
    before = m(tokens(3, 2, seed=1)).state
    out = m(ids, before, cu_seqlens=bounds)
    alone = m(ids[:, 3:], before.select([2]))
    assert_same(out.logits[:, 3:], alone.logits)
    assert_state(out.state.select([2]), alone.state)
    assert_state(out.state.select([1]), before.select([1]))
    ids = tokens(2, 10)
    history = m(ids, return_states=4)
    assert_same(history.logits, m(ids).logits)
    assert_state(history.states.after([4, 8]), MambaState.cat([m(ids[:1, :4]).state, m(ids[1:, :8]).state]))


@cases
def test_gradients_reach_everything_and_pass_through_the_state(name):
    m, ids = make(name), tokens(2, 12)
    labels, parameters = tokens(2, 12, seed=1), list(m.parameters())
    whole = torch.autograd.grad(m(ids, labels=labels).loss, parameters)
    assert all(float(g.abs().max()) > 0 for g in whole)
    first = m(ids[:, :5], labels=labels[:, :5])
    second = m(ids[:, 5:], first.state, labels=labels[:, 5:])
    halves = torch.autograd.grad((first.loss * 5 + second.loss * 7) / 12, parameters)
    for got, want in zip(halves, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@cases
def test_states_and_models_as_files(name, tmp_path):
    m, ids = make(name, torch.float32), tokens(2, 5)
    state = m(ids).state
    assert [v.shape for v in export.flatten(state)] == [v.shape for v in export.flatten(MambaState.zeros(m.config, 2))]
    state.save(tmp_path / "state", m)
    found = MambaState.load(tmp_path / "state", m)
    for i, j in zip(export.flatten(found), export.flatten(state), strict=True):
        assert torch.equal(i, j)
    assert state_info(tmp_path / "state").ssm == (2, m.config.d_inner, m.config.state_width)
    forked = m(tokens(4, 3), state.fork(2)).state.select([1, 2])
    assert forked.batch_size == 2
    m.save_pretrained(tmp_path / "model")
    again = MambaLM.from_pretrained(tmp_path / "model")
    assert again.config == m.config
    assert torch.equal(again(ids).logits, m(ids).logits)
    assert again.fingerprint() == m.fingerprint() != make("none" if name != "none" else "B").fingerprint()
    for kind in ("hf", "state-spaces", "gguf"):
        with pytest.raises(AnymambaError, match=f"the format {kind} is for the published Mamba.*save it as native"):
            m.save_pretrained(tmp_path / kind, kind)


@cases
def test_no_kernel_computes_another_model(name):
    """What decodes and trains whole blocks knows the published one; the engine goes by the model's forward instead."""
    m, ids = make(name, torch.float32), tokens(2, 6)
    assert block_weights(m.backbone.layers[0]) is None
    assert _kernels_for(m) is None
    if m.config.mixer == "mamba":
        assert not takes(m.backbone.layers[0].mixer, torch.zeros(2, 6, 32))
    state = m(ids[:, :-1]).state
    logits, after = Decoder(m).step(ids[:, -1], state)
    torch.testing.assert_close(logits[:, :23], m(ids).logits[:, -1, :23], rtol=1e-4, atol=1e-4)
    assert int(after.seen[0]) == 6
    greedy = SamplingConfig(temperature=0)
    assert len(generate(m, ids[:1], max_new_tokens=5, sampling=greedy)[0].ids) == 5


@cases
def test_16_bits(name):
    """The SSM's own parameters and the states stay in float32."""
    m = make(name, torch.float32)
    low, ids = copy.deepcopy(m).bfloat16(), tokens(2, 40)
    exact = ("A_log", "A_imag", "P", "B", "C", "D", "log_dt", "dt_bias")
    own = [v for n, v in low.named_parameters() if n.rpartition(".")[2] in exact]
    assert all(v.dtype == torch.float32 for v in own)
    out, want = low(ids), m(ids)
    assert out.logits.dtype == torch.bfloat16
    assert out.state.layers[0].ssm.dtype == torch.float32
    assert float((out.logits - want.logits).norm() / want.logits.norm()) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        out = m(ids, labels=ids)
    out.loss.backward()
    assert out.state.layers[0].ssm.dtype == torch.float32


@cases
def test_numbers_of_parameters(name):
    """Counted by hand: a part that is switched off leaves no parameter behind."""
    c = MambaConfig(**SIZES | CASES[name])
    m, d, n, r, w = c.d_model, c.d_inner, c.d_state, c.rank, c.d_conv
    bias = c.bias * m
    if c.mixer in ("rnn", "lstm", "gru"):
        gates = {"rnn": 1, "lstm": 4, "gru": 3}[c.mixer]
        want = gates * d * (m + d + 2) + d * m + bias
    else:
        want = (1 + c.gate) * d * (m + c.bias) + c.use_conv * d * (w + 1) + d + d * m + bias  # + D
        if c.mixer == "s4":
            want += 2 * d * n // 2 + 3 * d * n + d
        elif c.mixer == "s4d":
            want += 2 * d * n // 2 + d * n + d
        else:
            on = c.selects
            want += d * n + d + ("dt" in on) * (d * r + r * d) + sum(d * n for _ in ("B", "C"))
    got = sum(p.numel() for p in Block(c).mixer.parameters())
    assert got == want
    model = MambaLM(c)
    assert model.num_params(embedding=False) == c.n_layer * (want + m) + m


def test_s4d_is_the_convolution_of_its_kernel():
    """The mixer against the formulas, without its chunks."""
    mixer = make("s4d-bare").backbone.layers[0].mixer
    u = torch.randn(1, 150, 16, dtype=torch.float64)
    x = torch.nn.functional.silu(mixer.in_proj(u))
    A = hippo.s4d_legs(8).expand(32, 8)
    A_bar, B_bar = discretize(A, torch.ones_like(A), mixer.log_dt.exp()[:, None], "bilinear")[:2]
    K = lti.kernel_by_powers(A_bar, B_bar, torch.view_as_complex(mixer.C.detach()), 150)
    y = torch.stack([(K[:, : i + 1].flip(-1).T * x[0, : i + 1]).sum(0) for i in range(150)])
    want = mixer.out_proj(y + mixer.D * x[0])
    torch.testing.assert_close(mixer(u)[0][0], want, rtol=1e-5, atol=1e-6)  # A passes through a float32 parameter


def test_constants_are_those_of_the_selective_model():
    """A selective model whose x_proj says nothing but a constant is the one with constants."""
    usual = MambaLM(MambaConfig(**SIZES)).double()
    constant = MambaLM(MambaConfig(**SIZES, selective="")).double()
    shared = {k: v for k, v in usual.state_dict().items() if k in constant.state_dict()}
    constant.load_state_dict(shared, strict=False)
    with torch.no_grad():
        for one, other in zip(usual.backbone.layers, constant.backbone.layers, strict=True):
            one.mixer.x_proj = _Constant(one.mixer.config)
            other.mixer.B.copy_(one.mixer.x_proj.row[1:17].expand(32, -1))
            other.mixer.C.copy_(one.mixer.x_proj.row[17:].expand(32, -1))
            step = one.mixer.dt_proj.weight[:, 0] * one.mixer.x_proj.row[0]
            other.mixer.dt_bias.copy_(one.mixer.dt_proj.bias + step)
    ids = tokens(2, 30)
    assert_same(constant(ids).logits, usual(ids).logits)


class _Constant(torch.nn.Linear):
    """Row [dt; B; C] whatever the input."""

    def __init__(self, config):
        super().__init__(1, 1)
        self.row = torch.randn(config.rank + 2 * config.d_state, dtype=torch.float64)

    def forward(self, x):
        return self.row.expand(*x.shape[:2], -1)


@pytest.mark.parametrize("name", OTHERS)
def test_mixers_alone_refuse_states_that_do_not_fit(name):
    mixer = make(name).backbone.layers[0].mixer
    u = torch.randn(2, 3, 16, dtype=torch.float64)
    _, state = mixer(u)
    with pytest.raises(AnymambaError, match="one row a sequence"):
        mixer(u[:1], state)
    with pytest.raises(AnymambaError, match="must start at 0, never fall, and end at seqlen = 3"):
        mixer(u[:1], cu_seqlens=torch.tensor([0, 2]))
    with pytest.raises(AnymambaError, match="return_states=0"):
        mixer(u, return_states=0)


def test_weight_decay_spares_constants():
    for name in ("none", "s4", "s4d"):
        model = make(name)
        decayed, free = (group["params"] for group in model.param_groups(0.1))
        names = {id(p): n.rpartition("mixer.")[2] for n, p in model.named_parameters()}
        assert {"A_log", "C"} <= {names[id(p)] for p in free}
        assert {"in_proj.weight", "out_proj.weight"} <= {names[id(p)] for p in decayed}


def test_quantised_and_adapted():
    m, ids = make("s4d", torch.float32), tokens(2, 6)
    want = m(ids).logits
    small = quantize(copy.deepcopy(m), "int8")
    assert float((small(ids).logits - want).norm() / want.norm()) < 0.05
    pytest.importorskip("peft")
    adapter = lora.attach(m, targets=("in_proj", "out_proj"))
    torch.testing.assert_close(adapter.model(ids).logits, want)


@pytest.mark.parametrize("name", ["none", "s4", "s4d", "gru"])
def test_mixers_alone_refuse_input_that_does_not_fit(name):
    mixer, u = make(name).float().backbone.layers[0].mixer, torch.randn(2, 5, SIZES["d_model"])
    for bad in (u[0], u[..., :3], u.long()):
        with pytest.raises(AnymambaError, match=r"u is \(.*, but must be real numbers \(batch, seqlen, d_model = "):
            mixer(bad)
    with pytest.raises(AnymambaError, match="cu_seqlens with a batch of 2"):
        mixer(u, None, [0, 5])
    with pytest.raises(AnymambaError, match="must be at least 2 integers"):
        mixer(u[:1], None, torch.tensor([0.0, 5.0]))
    with pytest.raises(AnymambaError, match="return_states with cu_seqlens"):
        mixer(u[:1], None, [0, 5], 2)
    whole, _ = mixer(u[:1], None, [0, 2, 5])
    torch.testing.assert_close(whole[:, 2:], mixer(u[:1, 2:])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["none", "s4", "s4d", "gru"])
def test_nothing_to_read_changes_nothing(name):
    model = make(name).float()
    features = MambaLM(model.config.replace(vocab_size=None))
    u = torch.randn(2, 5, SIZES["d_model"])
    state = features(embeddings=u).state
    out = features(embeddings=u[:, :0], state=state)
    assert out.hidden.shape == (2, 0, SIZES["d_model"])
    assert torch.equal(out.state.layers[0].ssm, state.layers[0].ssm)
    assert features(embeddings=u[:0]).hidden.shape == (0, 5, SIZES["d_model"])


@cases
def test_a_mixer_alone_begins_as_in_a_model(name):
    config = MambaConfig(**SIZES | CASES[name], initializer_range=1.0)
    torch.manual_seed(0)
    alone, within = KINDS[config.mixer](config), MambaLM(config).backbone.layers[0].mixer
    for (key, p), q in zip(alone.named_parameters(), within.parameters(), strict=True):
        assert bool(p.isfinite().all()), key
        assert float(p.detach().abs().max()) == pytest.approx(float(q.detach().abs().max()), rel=0.5, abs=1e-6), key


@cases
def test_rows_that_are_all_padding(name):
    out = make(name)(tokens(2, 5), lengths=[0, 0])
    assert float(out.hidden.abs().max()) == 0
    assert out.state.seen.tolist() == [0, 0]


@pytest.mark.parametrize(("change", "says"), [
    ({"mixer": "mamba3"}, "one of mamba, s4, s4d, rnn, lstm, gru"),
    ({"selective": "A"}, 'some of B, C and dt with commas between'),
    ({"selective": "B,B"}, 'some of B, C and dt'),
    ({"selective": ("B",)}, 'some of B, C and dt'),
    ({"mixer": "lstm", "gate": False}, "gate=False with mixer='lstm', which has nothing that it changes"),
    ({"mixer": "s4", "d_state": 3}, "d_state=3, but it must be even for mixer='s4'"),
    ({"mixer": "s4", "discretization": "euler"}, "another than Euler's for mixer='s4'"),
    ({"mixer": "s4", "s4d_init": "legs"}, "s4d_init='legs' with mixer='s4'.*take mixer='s4d'"),
    ({"mixer": "s4d", "selective": "B"}, "selective='B' with mixer='s4d'.*take mixer='mamba'"),
    ({"s4d_init": "inv"}, "s4d_init='inv' with mixer='mamba'"),
    ({"mixer": "s4d", "s4d_init": "fout"}, "one of lin, inv, real, legs"),
    ({"mixer": "s4d", "discretization": "euler"}, "another than Euler's for mixer='s4d'"),
    ({"mixer": "s4d", "d_state": 3}, "d_state=3, but it must be even for mixer='s4d'"),
    ({"gate": 1}, "gate=1, but it must be True or False"),
])  # fmt: skip
def test_configs_that_cannot_be(change, says):
    with pytest.raises(AnymambaError, match=says):
        MambaConfig(**change)


def test_selective_has_one_spelling():
    assert MambaConfig(selective="dt,C").selective == MambaConfig(selective="C,dt").selective == "C,dt"
    assert MambaConfig(selective="dt,B,C") == MambaConfig()
    assert MambaLM(MambaConfig(**SIZES, selective="dt,B,C")).config.published


@pytest.mark.parametrize(
    "changes",
    [
        {"mixer": "s4"},
        {"mixer": "s4d", "s4d_init": "legs", "use_conv": False},
        {"mixer": "lstm"},
        {"selective": "B", "gate": False},
        {"discretization": "zoh"},
    ],
)
def test_a_run_of_another_model_resumes_as_if_it_had_not_stopped(changes, tmp_path):
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 200)
    sizes = {"d_model": 16, "n_layer": 1, "batch_size": 2, "seqlen": 16, "eval_tokens": 64, "final_tokens": 64}
    config = TrainConfig(data=(str(tmp_path / "text.txt"),), steps=4, save_every=2, sample_tokens=2, **sizes, **changes)
    whole = train(config.replace(out=str(tmp_path / "whole")))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    [last] = [path for path in (tmp_path / "again").rglob("*") if path.is_dir() and path.name == "step-00000004"]
    shutil.rmtree(last)
    again = resume(tmp_path / "again")
    first, second = (load_run(result.run)[0] for result in (whole, again))
    assert {name: getattr(first.config, name) for name in changes} == changes
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)


@pytest.mark.parametrize("name", ["s4", "s4-bare", "s4d", "s4d-bare", "rnn", "lstm", "gru"])
def test_packed_side_by_side_is_one_by_one(name, monkeypatch):
    """Outputs, states and gradients of sequences of similar lengths, one empty, that go on from states."""
    torch.manual_seed(0)
    block = make(name).backbone.layers[0]
    lengths = [7, 0, 9, 8, 5]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    c = block.mixer.config
    out = []
    for waste in (4, 0):
        monkeypatch.setattr(sequence, "WASTE", waste)
        torch.manual_seed(1)
        real = {"dtype": torch.float64, "requires_grad": True}
        u = torch.randn(1, sum(lengths), c.d_model, **real)
        state = LayerState(torch.randn(5, c.d_inner, c.conv_width, **real),
                           torch.randn(5, c.d_inner, c.state_width, **real))  # fmt: skip
        y, after = block.mixer(u, state, bounds)
        total = y.square().sum() + after.ssm.cos().sum() + after.conv.cos().sum()
        leaves = [v for v in (u, *state, *block.mixer.parameters()) if v.numel()]
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        out.append([y, *after, *gradients])
    for together, alone in zip(*out, strict=True):
        assert_same(together, alone)
