"""What a training run does: one frozen dataclass with all defaults, kept as train.json in the run's folder."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from anymamba.config import MambaConfig, check_keys
from anymamba.errors import AnymambaError
from anymamba.lora import TARGETS

DEFAULT_MINUTES = 3.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run. Raises AnymambaError for a value that cannot be meant.

    Names of model sizes are those of `MambaConfig`; None takes the preset's.
    """

    # text
    data: tuple[str, ...] | None = None  # files and folders to read; Python's standard library if none
    field: str = "text"  # where a JSONL object or a Parquet row keeps its text
    tokenizer: str | None = None  # "bytes", a tokenizer.json, or its folder; bytes, or that of --init, if none
    holdout: float = 0.1  # share of the text that is not trained on but measured
    tokens: str | None = None  # folder of the tokenised text, to share among runs; RUN/tokens if none

    # model
    preset: str = "tiny"  # size: tiny, small, 130m, 370m, 790m, 1.4b, 2.8b
    d_model: int | None = None  # width
    n_layer: int | None = None  # number of blocks
    d_state: int | None = None  # state entries per channel
    d_conv: int | None = None  # width of the convolution
    expand: int | None = None  # d_inner = expand * d_model
    dt_rank: int | None = None  # rank of the step projection
    mixer: str | None = None  # what mixes along time: mamba, s4, s4d, rnn, gru, lstm
    selective: str | None = None  # which of B, C and dt depend on the input: "B,C,dt"; "" for none
    discretization: str | None = None  # mamba, zoh, bilinear, euler
    gate: bool = True  # multiply what the mixer gives by a gate
    use_conv: bool = True  # the convolution before the SSM
    s4d_init: str | None = None  # what A of S4D begins as: lin, inv, real, legs

    # fine-tuning
    init: str | None = None  # folder of a run or model to go on from, in place of a new model
    lora: bool = False  # train and save a low-rank adapter of that model only
    lora_rank: int = 8  # rank of its matrices
    lora_alpha: float = 16.0  # its weight: what it adds is scaled by alpha / rank
    lora_targets: tuple[str, ...] = TARGETS  # layers that get one; embedding and lm_head can, too

    # batches
    batch_size: int = 16  # rows of a forward pass
    seqlen: int = 128  # tokens of a row
    accumulate: int = 1  # forward passes per step
    carry: bool = True  # rows continue the text of the step before, state and all (truncated backpropagation)
    packed: bool = False  # the state starts anew at each document within a row
    recompute: bool = False  # compute each block again in backward: less memory, more time

    # optimisation
    steps: int | None = None  # length of the run in steps: then a resumed run is bit-identical
    minutes: float | None = None  # length of the run by the clock; 3 where neither is given
    lr: float | None = None  # highest learning rate; 6e-3 if none, and 3e-4 to fine-tune all of a model
    min_lr: float = 0.0  # the learning rate falls to this, along a cosine
    warmup: float = 0.1  # share of the run in which the learning rate rises
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    weight_decay: float = 0.3  # of matrices; A_log, D, biases and norms have none
    dropout: float = 0.0  # share of what each block adds that is left out in training; against learning by heart
    clip: float = 1.0  # largest norm of the gradient
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where it is faster, tried out at the start
    device: str = "auto"  # auto: a GPU if there are kernels for it, else the CPU
    graph: bool = True  # on a GPU, launch a pass as one CUDA graph
    seed: int = 0

    # reporting
    out: str | None = None  # folder of the run; runs/DATE-TIME if none
    eval_every: int | None = None  # steps between held-out measurements; ten in a run if none
    sample_every: int | None = None  # steps between samples; five in a run if none
    save_every: int | None = None  # steps between checkpoints; one a minute if none
    keep: int = 3  # checkpoints that are kept
    eval_tokens: int = 2**13  # held-out tokens for a measurement during the run
    final_tokens: int = 2**17  # and for that at the end
    sample_tokens: int = 160  # length of a sample
    tensorboard: bool = False  # also write TensorBoard events

    def __post_init__(self):
        if self.lr is None:
            object.__setattr__(self, "lr", 3e-4 if self.init is not None and not self.lora else 6e-3)
        for name in _WHOLE:
            _require(self, name, "a whole number of at least 1", lambda v: _is(v, int) and v >= 1)
        _require(self, "seed", "a whole number from 0 to 2³² - 1", lambda v: _is(v, int) and 0 <= v < 2**32)
        for name in ("minutes", "lr", "clip", "lora_alpha"):
            _require(self, name, "a finite number above 0", lambda v: _number(v) and v > 0)
        for name in ("min_lr", "weight_decay"):
            _require(self, name, "a finite number of at least 0", lambda v: _number(v) and v >= 0)
        _require(self, "min_lr", f"at most lr={self.lr}", lambda v: v <= self.lr)
        _require(self, "warmup", "a share of the run, from 0 to below 1", lambda v: _number(v) and 0 <= v < 1)
        _require(self, "dropout", "a share from 0 to below 1", lambda v: _number(v) and 0 <= v < 1)
        _require(self, "holdout", "a share of the text, between 0 and 1", lambda v: _number(v) and 0 < v < 1)
        _require(self, "betas", "two numbers from 0 to below 1", _are_betas)
        _require(self, "precision", "auto, fp32 or bf16", lambda v: v in ("auto", "fp32", "bf16"))
        if self.steps is not None and self.minutes is not None:
            raise AnymambaError(
                f"steps={self.steps} and minutes={self.minutes}: a run has one length, give one of them"
            )
        if self.carry and self.packed:
            raise AnymambaError(
                "carry takes the state across chunks and packed stops it at documents: with --packed give --no-carry"
            )
        self._check_init()
        self.model_config(vocab_size=1)

    @property
    def seconds(self) -> float | None:
        """The length of a run by the clock; None for one of a fixed number of steps."""
        return None if self.steps is not None else 60 * (self.minutes or DEFAULT_MINUTES)

    def model_config(self, vocab_size: int) -> MambaConfig:
        """The preset with the sizes given here."""
        changes = {name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None}
        return MambaConfig.preset(self.preset, vocab_size=vocab_size, **changes)

    def _check_init(self) -> None:
        default = {f.name: f.default for f in dataclasses.fields(self)}
        given = lambda *names: [name for name in names if getattr(self, name) != default[name]]  # noqa: E731
        if self.init is not None and (sizes := given("preset", *_SIZES)):
            raise AnymambaError(
                f"training: {sizes[0]} with init={self.init!r}: the sizes are those of the model, drop it"
            )
        if self.lora and self.init is None:
            raise AnymambaError("training: lora trains an adapter of a model: name that with --init")
        if not self.lora and (options := given("lora_rank", "lora_alpha", "lora_targets")):
            raise AnymambaError(f"training: {options[0]} says how an adapter is made: it needs --lora")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read what `to_json` wrote. Raises AnymambaError if it is not that, or has a key that does not exist."""
        path = Path(path)
        if not path.is_file():
            raise AnymambaError(f"no training config at {path}: give a train.json, as each run's folder has one")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise AnymambaError(f"{path} is not JSON ({error}); copy the train.json of a run and edit that") from None
        if not isinstance(values, dict):
            raise AnymambaError(f"{path} holds a {type(values).__name__}, but a training config is an object {{…}}")
        check_keys(cls, values, f"{path}: unknown key")
        lists = {
            name: tuple(v) for name in ("data", "betas", "lora_targets") if isinstance(v := values.get(name), list)
        }
        return cls(**(values | lists))


_SIZES = ("d_model", "n_layer", "d_state", "d_conv", "expand", "dt_rank", "mixer", "selective", "discretization",
          "gate", "use_conv", "s4d_init")  # fmt: skip
_WHOLE = ("lora_rank", "batch_size", "seqlen", "accumulate", "steps", "eval_every", "sample_every", "save_every",
          "keep", "eval_tokens", "final_tokens", "sample_tokens")  # fmt: skip


def _require(config, name, rule, holds):
    value = getattr(config, name)
    optional = {f.name for f in dataclasses.fields(config) if f.default is None}
    if not (value is None and name in optional) and not holds(value):
        raise AnymambaError(f"training: {name}={value!r}, but it must be {rule}")


def _is(value, kind):
    return isinstance(value, kind) and not isinstance(value, bool)


def _number(value):
    return _is(value, (int, float)) and math.isfinite(value)


def _are_betas(value):
    return isinstance(value, tuple) and len(value) == 2 and all(_number(v) and 0 <= v < 1 for v in value)
