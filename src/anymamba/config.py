"""Model configuration: one frozen dataclass, presets of the published sizes, no key accepted that is not known.

Axis letters used throughout: b batch, t time, m d_model, d d_inner, n d_state, r dt_rank, w d_conv, v vocabulary.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Self

from anymamba.errors import AnymambaError

DISCRETIZATIONS = ("mamba", "zoh", "bilinear", "euler")  # those whose state is h alone


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """A Mamba language model or feature model (Gu & Dao 2023, arXiv 2312.00752; letters are the paper's).

    `vocab_size=None` makes a model without token embedding and head: features in, hidden states out.
    Raises AnymambaError for an impossible size.
    """

    vocab_size: int | None = 257  # V: as the tokenizer has it; the embedding is padded, see padded_vocab_size
    d_model: int = 256  # D: width of the residual stream
    n_layer: int = 4  # number of blocks
    d_state: int = 16  # N: state entries per channel
    d_conv: int = 4  # W: width of the causal convolution
    expand: int = 2  # E: d_inner = E·D
    dt_rank: int | None = None  # R: rank of the Δ projection; None: ceil(D / 16)
    conv_bias: bool = True
    bias: bool = False  # of in_proj and out_proj
    norm_eps: float = 1e-5
    inner_norm_eps: float | None = None  # of norms on dt, B and C, without weights, as in Falcon-Mamba; None: no norms
    tie_embeddings: bool = True  # head = embedding
    pad_vocab_size_multiple: int = 8
    discretization: str = "mamba"  # from A, B and Δ to a step: DISCRETIZATIONS, defined in reference.discretize
    dt_min: float = 1e-3  # initial step sizes Δ are log-uniform in [dt_min, dt_max] …
    dt_max: float = 1e-1
    dt_init_floor: float = 1e-4  # … and at least this
    dt_scale: float = 1.0  # scale of dt_proj's initial weight
    initializer_range: float = 0.02  # standard deviation of the embedding
    mixer: str = "mamba"  # what mixes along time: "mamba", "s4", "s4d", "rnn", "lstm", "gru"
    selective: str = "B,C,dt"  # which of them depend on the input; the others are learned constants
    gate: bool = True  # multiply by silu(z)
    use_conv: bool = True  # the convolution before the SSM
    s4d_init: str = "lin"  # what A of S4D begins as: "lin", "inv", "real", "legs"

    def __post_init__(self):
        for name in ("d_model", "n_layer", "d_state", "d_conv", "expand", "pad_vocab_size_multiple"):
            _positive(name, getattr(self, name))
        for name in ("vocab_size", "dt_rank"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        for name in ("conv_bias", "bias", "tie_embeddings", "gate", "use_conv"):
            _require(name, getattr(self, name), "True or False", lambda v: isinstance(v, bool))
        for name in ("norm_eps", "dt_min", "dt_max", "dt_scale"):
            _require(name, getattr(self, name), "a finite number > 0", lambda v: _is_number(v) and v > 0)
        _require("inner_norm_eps", self.inner_norm_eps, "None or a finite number > 0",
                 lambda v: v is None or (_is_number(v) and v > 0))  # fmt: skip
        for name in ("dt_init_floor", "initializer_range"):
            _require(name, getattr(self, name), "a finite number ≥ 0", lambda v: _is_number(v) and v >= 0)
        _require("dt_max", self.dt_max, f"at least dt_min={self.dt_min}", lambda v: v >= self.dt_min)
        self._check_mixer()

    def _check_mixer(self):
        for name, known in _CHOICES.items():
            _require(name, getattr(self, name), f"one of {', '.join(known)}", lambda v, known=known: v in known)
        _require("selective", self.selective, 'some of B, C and dt with commas between, as in "B,dt"; "" for none of '
                 "them", _is_selection)  # fmt: skip
        given = self.selective.split(",")
        object.__setattr__(self, "selective", ",".join(name for name in SELECTIVE if name in given))
        for names, mixers in _BELONGS:
            for name in names:
                got, default = getattr(self, name), getattr(type(self), name)
                if self.mixer not in mixers and got != default:
                    raise AnymambaError(f"config: {name}={got!r} with mixer={self.mixer!r}, which has nothing that it "
                                        f"changes: leave it out, or take mixer={mixers[0]!r}")  # fmt: skip
        if self.mixer in ("s4", "s4d"):
            _require("discretization", self.discretization, f"another than Euler's for mixer={self.mixer!r}, whose "
                     "fast oscillations it would blow up", lambda v: v != "euler")  # fmt: skip
            _require("d_state", self.d_state, f"even for mixer={self.mixer!r}, whose states are pairs of conjugates",
                     lambda v: v % 2 == 0)  # fmt: skip

    @property
    def d_inner(self) -> int:
        """E·D, channels of the SSM."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """R with the default filled in."""
        return self.dt_rank or math.ceil(self.d_model / 16)

    @property
    def selects(self) -> tuple[str, ...]:
        """Which of B, C and dt depend on the input."""
        return tuple(name for name in self.selective.split(",") if name)

    @property
    def conv_width(self) -> int:
        """Inputs that a layer keeps for its convolution: W - 1, or none."""
        return self.d_conv - 1 if self.mixer in CONVOLVING and self.use_conv else 0

    @property
    def state_width(self) -> int:
        """Real numbers of state that a layer keeps per channel."""
        return {"rnn": 1, "gru": 1, "lstm": 2}.get(self.mixer, self.d_state)

    @property
    def published(self) -> bool:
        """Whether the blocks are those of the published models: what fused kernels and foreign file formats know."""
        return all(getattr(self, name) == getattr(type(self), name)
                   for name in ("mixer", "discretization", "selective", "gate", "use_conv"))  # fmt: skip

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up, because aligned matrices are faster."""
        multiple = self.pad_vocab_size_multiple
        return -(-(self.vocab_size or 0) // multiple) * multiple

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; unknown names are refused."""
        return type(self).from_dict(dataclasses.asdict(self) | changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The config of a dict as `to_dict` gives it. Raises AnymambaError for a key that does not exist."""
        check_keys(cls, values, "unknown config key")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A named size, see PRESETS; keyword arguments override its fields."""
        if name not in PRESETS:
            raise AnymambaError(f"unknown preset {name!r}: known presets are {', '.join(PRESETS)}")
        return cls.from_dict(PRESETS[name] | changes)


def check_config(config: Any) -> MambaConfig:
    """The config itself. Raises AnymambaError for anything else."""
    if not isinstance(config, MambaConfig):
        raise AnymambaError(f"a config is a {type(config).__name__}, but must be a MambaConfig: MambaConfig(**sizes), "
                            "or MambaConfig.preset(name)")  # fmt: skip
    return config


SELECTIVE = ("B", "C", "dt")
CONVOLVING = ("mamba", "s4", "s4d")
_CHOICES = {
    "mixer": ("mamba", "s4", "s4d", "rnn", "lstm", "gru"),
    "discretization": DISCRETIZATIONS,
    "s4d_init": ("lin", "inv", "real", "legs"),
}
# fields, and the mixers that have what they change: asked of another one, they would be ignored
_BELONGS = (
    (("selective", "inner_norm_eps", "dt_rank", "dt_scale"), ("mamba",)),
    (("discretization",), CONVOLVING),
    (("s4d_init",), ("s4d",)),
    (("gate", "use_conv", "d_conv", "conv_bias", "d_state", "dt_min", "dt_max", "dt_init_floor"), CONVOLVING),
)


def _is_selection(value):
    given = value.split(",") if isinstance(value, str) else ["?"]
    return value == "" or (len(set(given)) == len(given) and set(given) <= set(SELECTIVE))


def check_keys(kind: type, values: dict[str, Any], what: str) -> None:
    """Raises AnymambaError, which begins with `what`, for a key that is no field of the dataclass `kind`."""
    known = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise AnymambaError(f"{what} {key!r}: {hint}known keys are {', '.join(known)}")


def _positive(name, value):
    rule = "a whole number of at least 1"
    _require(name, value, rule, lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1)


def _require(name, value, rule, holds):
    if not holds(value):
        raise AnymambaError(f"config: {name}={value!r}, but it must be {rule}")


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_PILE = {"vocab_size": 50277, "pad_vocab_size_multiple": 8}  # the GPT-NeoX tokenizer, padded to 50280
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 128, "n_layer": 4},
    "small": {"d_model": 256, "n_layer": 8},
    "130m": {"d_model": 768, "n_layer": 24, **_PILE},
    "370m": {"d_model": 1024, "n_layer": 48, **_PILE},
    "790m": {"d_model": 1536, "n_layer": 48, **_PILE},
    "1.4b": {"d_model": 2048, "n_layer": 48, **_PILE},
    "2.8b": {"d_model": 2560, "n_layer": 64, **_PILE},
}
