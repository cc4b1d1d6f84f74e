"""SequenceModel: measurements in, answers out. Time series, audio, sensors, anything that is no text.

Axes: b batch, t time, f features, k steps after patching (t without), m d_model.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anymamba.checkpoint.assemble import fill
from anymamba.checkpoint.folder import CONFIG, read_settings, read_tensors, write_safetensors, write_settings
from anymamba.config import MambaConfig, check_config
from anymamba.errors import AnymambaError
from anymamba.ids import WHOLE, as_tensor
from anymamba.layers import Bidirectional, Linear
from anymamba.layers.heads import Patches, Pool
from anymamba.model import MambaLM
from anymamba.padding import as_lengths
from anymamba.state import MambaState, check_state

FORMAT = "anymamba-sequence-1"


class SequenceOutput(NamedTuple):
    y: Tensor  # (b,outputs), or without a pool (b,k,outputs)
    state: MambaState | None  # after each row's last step, `seen` counts samples; None if bidirectional


class SequenceModel(nn.Module):
    """Patches → Mamba blocks → pool → linear head, from features (b,t,f) to `outputs` numbers, which the loss
    gives their meaning.

    Classification: one output a class and `F.cross_entropy(y, classes)`; regression: one a target and `F.mse_loss`;
    the same at every step with pool=None.

    Args:
        config: sizes of the blocks, with vocab_size=None.
        inputs: f, features of a sample; 1 for a waveform.
        outputs: numbers to predict.
        pool: "mean", "last" or "attention" for one answer a sequence, None for one a step; see `layers.heads.Pool`.
        patch, stride: each step of the blocks sees `patch` samples, one step every `stride` (patch if None); see
            `layers.heads.Patches`.
        bidirectional: two mixers a block, one for each direction, instead of one that looks back.

    Raises AnymambaError for a config with a vocabulary, or impossible sizes.
    """

    def __init__(self, config: MambaConfig, *, inputs: int, outputs: int, pool: str | None = "mean", patch: int = 1,
                 stride: int | None = None, bidirectional: bool = False, device=None,
                 dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__()
        stride = patch if stride is None else stride
        self.settings = {"inputs": inputs, "outputs": outputs, "pool": pool, "patch": patch, "stride": stride,
                         "bidirectional": bidirectional}  # fmt: skip
        _check(config, self.settings)
        kw = {"device": device, "dtype": dtype}
        self.config = config
        self.patches = Patches(inputs, config.d_model, patch, stride, **kw)
        self.mamba = MambaLM(config, **kw)
        if bidirectional:
            for block, other in zip(self.mamba.backbone.layers, MambaLM(config, **kw).backbone.layers, strict=True):
                block.mixer = Bidirectional(block.mixer, other.mixer)
        self.pool = None if pool is None else Pool(pool, config.d_model, **kw)
        self.head = Linear(config.d_model, outputs, **kw)

    def forward(self, x: Tensor, lengths: Tensor | None = None, state: MambaState | None = None, *,
                delta: Tensor | None = None) -> SequenceOutput:  # fmt: skip
        """Read features.

        Args:
            x: (b,t,f) real numbers, a tensor, an array or lists, which become of the model's dtype.
            lengths: (b,) samples of each row; the others, on the right, are padding and change nothing. Without a pool
                y is 0 there; a row of no samples gives NaN with one.
            state: of an earlier call, to go on from; then the pool covers what this call reads. Every call before the
                last must read a multiple of `stride` samples of each row, for a patch that was filled up with zeros is
                no part of a longer signal. Not if patches overlap, or if bidirectional.
            delta: (b,t) gaps in time, as `MambaLM.forward` takes them; only without patches.

        Raises AnymambaError for what does not fit the model.
        """
        x = self._as_features(x)
        self._check_state(state, len(x))
        if delta is not None and self.settings["patch"] > 1:
            raise AnymambaError(f"delta needs a model of single samples, and this one has patches of "
                                f"{self.settings['patch']}")  # fmt: skip
        b, t, _ = x.shape
        lengths = None if lengths is None else as_lengths(lengths, b, t, x.device)
        x = self.patches(x, lengths)
        steps = None if lengths is None else self.patches.count(lengths)
        out = self.mamba(embeddings=x, state=state, lengths=steps, delta=delta)
        after = None if out.state is None else _counted(out.state, state, t if lengths is None else lengths)
        if self.pool is not None:
            return SequenceOutput(self.head(self.pool(out.hidden, steps)), after)
        y = self.head(out.hidden)
        if steps is not None:
            y = y.masked_fill((torch.arange(y.shape[1], device=y.device) >= steps[:, None])[..., None], 0)
        return SequenceOutput(y, after)

    def _as_features(self, x):
        """x as a tensor (b,t,f) of the model's dtype, on its device if it was none."""
        f, device, dtype = self.settings["inputs"], self.mamba.device, self.mamba.backbone.norm_f.weight.dtype
        x = as_tensor(x, "x", device)
        want = f"real numbers (batch ≥ 1, seqlen ≥ 1, {f})"
        if x.dtype in WHOLE:
            raise AnymambaError(f"x is {x.dtype}, but must be {want}: give x.float(), and for sound of 16 bits "
                                "x.float() / 32768, so that its numbers are of the order of 1")  # fmt: skip
        if x.dim() != 3 or x.shape[2] != f or x.numel() == 0 or not x.is_floating_point():
            cure = ": for one feature a sample, give x.unsqueeze(-1)" if x.dim() == 2 and f == 1 else ""
            raise AnymambaError(f"x is {tuple(x.shape)} {x.dtype}, but must be {want}{cure}")
        if x.device != device:
            raise AnymambaError(f"x is on {x.device}, the model on {device}: give x.to({str(device)!r})")
        return x.to(dtype)

    def _check_state(self, state, rows):
        patch, stride, both = (self.settings[name] for name in ("patch", "stride", "bidirectional"))
        if state is None:
            return
        if patch != stride or both:
            why = "is bidirectional" if both else f"has patches of {patch} every {stride}"
            raise AnymambaError(f"this model {why}, and cannot go on from a state: give it whole sequences")
        check_state(state, self.config, rows)
        if stride > 1 and not torch.compiler.is_compiling() and bool((state.seen % stride).any()):
            raise AnymambaError(f"the state has read {state.seen.tolist()} samples, which are not whole patches of "
                                f"{stride}: only the last call may end within one")  # fmt: skip

    param_groups = MambaLM.param_groups

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `config.json` and `model.safetensors`, each atomically. Raises AnymambaError if that fails."""
        write_safetensors(Path(folder), self.state_dict())
        write_settings(Path(folder), {"format": FORMAT, "model": self.config.to_dict(), "sequence": self.settings})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, device: torch.device | str | None = None,
                        dtype: torch.dtype | None = None) -> "SequenceModel":  # fmt: skip
        """The model that `save_pretrained` wrote, in the stored dtype or `dtype`.

        Raises AnymambaError if it is missing, damaged, of another kind, or if the weights are not the config's.
        """
        settings = read_settings(Path(folder))
        if settings.get("format") != FORMAT:
            raise AnymambaError(f"{Path(folder) / CONFIG} is of format {settings.get('format')!r}, but a SequenceModel "
                                f"is {FORMAT!r}: load language models by MambaLM.from_pretrained")  # fmt: skip
        try:
            with torch.device("meta"):
                model = cls(MambaConfig.from_dict(settings["model"]), **settings["sequence"])
        except (KeyError, TypeError) as error:
            raise AnymambaError(f"{Path(folder) / CONFIG} does not describe a SequenceModel ({error}): copy or save it "
                                "again, or update anymamba") from None  # fmt: skip
        fill(model, read_tensors(Path(folder)), folder, device=device, dtype=dtype)
        return model


def _counted(after, before, samples):
    """The state with how many samples it has seen, not how many patches."""
    seen = samples + (torch.zeros_like(after.seen) if before is None else before.seen)
    return dataclasses.replace(after, seen=seen)


def _check(config: MambaConfig, settings: dict[str, Any]) -> None:
    check_config(config)
    if not isinstance(settings["bidirectional"], bool):
        got = settings["bidirectional"]
        raise AnymambaError(f"SequenceModel: bidirectional={got!r}, but it must be True or False")
    if config.vocab_size is not None:
        raise AnymambaError(f"a SequenceModel reads features, but its config has vocab_size={config.vocab_size}: make "
                            "it with vocab_size=None")  # fmt: skip
    for name in ("inputs", "outputs", "patch", "stride"):
        value = settings[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AnymambaError(f"SequenceModel: {name}={value!r}, but it must be a whole number of at least 1")
