"""A model as one GGUF file, the format of llama.cpp, which reads and runs what `save` writes.

Reading needs no other package, writing the `gguf` package. In the file A stands for A_log; a tied head is left out.
"""

import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anymamba.checkpoint import gguf_vocabulary
from anymamba.checkpoint.folder import check_published
from anymamba.checkpoint.gguf_file import MAGIC, PLAIN, GgufFile
from anymamba.config import MambaConfig
from anymamba.errors import AnymambaError
from anymamba.files import write_atomically
from anymamba.layers import QuantizedLinear
from anymamba.model import MambaLM

ARCHITECTURE, CONFIG = "mamba", "anymamba.config"
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")  # that matrices can be written in; all else is F32, as llama.cpp has it
TOP = {"backbone.embedding.weight": "token_embd.weight", "backbone.norm_f.weight": "output_norm.weight",
       "lm_head.weight": "output.weight"}  # fmt: skip
LAYER = {"norm.weight": "attn_norm.weight", "mixer.in_proj.weight": "ssm_in.weight",
         "mixer.conv1d.weight": "ssm_conv1d.weight", "mixer.conv1d.bias": "ssm_conv1d.bias",
         "mixer.x_proj.weight": "ssm_x.weight", "mixer.dt_proj.weight": "ssm_dt.weight",
         "mixer.dt_proj.bias": "ssm_dt.bias", "mixer.A_log": "ssm_a", "mixer.D": "ssm_d",
         "mixer.out_proj.weight": "ssm_out.weight"}  # fmt: skip
MATRICES = ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_out.weight")


def matches(path: str | os.PathLike) -> bool:
    """Whether `path` is a GGUF file, by its first bytes."""
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def has_tokenizer(path: str | os.PathLike) -> bool:
    """Whether the file holds a tokenizer, of any kind."""
    return GgufFile(Path(path)).fields.get("tokenizer.ggml.model", "no_vocab") != "no_vocab"


# ---- reading ----


def read_config(path: str | os.PathLike) -> MambaConfig:
    """The config of a GGUF file. Raises AnymambaError if it is damaged, or another architecture than Mamba-1."""
    return _config(GgufFile(path))


def tensors(path: str | os.PathLike) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter of the model, read one at a time; a tied head is not among them.

    In the file's dtypes: that of the matrices, float32 for quantised ones, and float32 for all else. Raises
    AnymambaError, before the first one, naming every tensor that is missing, unexpected or misshapen.
    """
    file = GgufFile(path)
    config = _config(file)
    names = _checked(file, config)
    for ours, theirs in names.items():
        v = file.read(theirs)
        if ours.endswith("A_log"):
            v = logarithm(v)
        elif ours.endswith("conv1d.weight"):
            v = v.unsqueeze(1)
        yield ours, v


def logarithm(A: Tensor) -> Tensor:
    """A_log, float32, such that -exp(A_log) is A < 0, to the bit where float32 has such a number.

    It has for every A that was made so, though not always one: below 1 neighbours of A_log have the same exp.
    """
    best = torch.log(-A.double()).float()
    for side in (math.inf, -math.inf):
        other = torch.nextafter(best, torch.tensor(side))
        best = torch.where((torch.exp(best) != -A) & (torch.exp(other) == -A), other, best)
    return best


def _config(file: GgufFile) -> MambaConfig:
    found = _value(file, "general.architecture", str)
    if found != ARCHITECTURE:
        raise AnymambaError(f"{file.path} holds a model of the architecture {found!r}, which is not supported yet: "
                            f"anymamba reads Mamba-1, {ARCHITECTURE!r}")  # fmt: skip
    size = {name: _value(file, f"mamba.{key}", int) for name, key in {
        "d_model": "embedding_length", "n_layer": "block_count", "d_state": "ssm.state_size",
        "d_conv": "ssm.conv_kernel", "d_inner": "ssm.inner_size", "dt_rank": "ssm.time_step_rank",
    }.items()}  # fmt: skip
    d_inner = size.pop("d_inner")
    if size["d_model"] < 1 or d_inner % size["d_model"]:
        raise AnymambaError(f"{file.path}: ssm.inner_size={d_inner}, but it must be a multiple of the width "
                            f"embedding_length={size['d_model']}")  # fmt: skip
    # float32 in the file: 1e-5, not 9.9999997e-06
    eps = float(str(np.float32(_value(file, "mamba.attention.layer_norm_rms_epsilon", float))))
    if file.fields.get("mamba.ssm.dt_b_c_rms"):
        size["inner_norm_eps"] = eps  # Falcon-Mamba; llama.cpp knows one number for all norms
    told = {**size, "expand": d_inner // size["d_model"], "norm_eps": eps, **_vocabulary(file),
            "tie_embeddings": "output.weight" not in file.tensors}  # fmt: skip
    config = MambaConfig.from_dict(told)
    return _own(file, config) if CONFIG in file.fields else config


def _own(file: GgufFile, config: MambaConfig) -> MambaConfig:
    """The config that `save` put into the file, which says more than GGUF has words for, if it says the same."""
    try:
        own = MambaConfig.from_dict(json.loads(file.fields[CONFIG]) | {"conv_bias": True})
    except (ValueError, TypeError) as error:
        raise AnymambaError(f"{file.path}: {CONFIG} is no config ({error}); save the model again") from None
    for name in ("padded_vocab_size", "d_model", "n_layer", "d_state", "d_conv", "d_inner", "rank", "tie_embeddings"):
        if getattr(own, name) != getattr(config, name):
            raise AnymambaError(f"{file.path} contradicts itself: {name} is {getattr(own, name)} by {CONFIG} and "
                                f"{getattr(config, name)} by the rest; save the model again")  # fmt: skip
    return own


def _vocabulary(file: GgufFile) -> dict[str, int]:
    """vocab_size, the tokens in use, and the padding that makes the rows of the embedding of it."""
    if "token_embd.weight" not in file.tensors:
        raise AnymambaError(f"{file.path} has no token_embd.weight: download, copy or convert it again")
    rows = file.tensors["token_embd.weight"].shape[0]
    tokens, types = (file.fields.get(f"tokenizer.ggml.{key}") or [] for key in ("tokens", "token_type"))
    known = gguf_vocabulary.used(tokens, types) if len(tokens) == len(types) == rows else rows
    sizes = (8, 1, 16, 32, 64, 128, rows)
    return {"vocab_size": known, "pad_vocab_size_multiple": next(m for m in sizes if -(-known // m) * m == rows)}


def _value(file: GgufFile, key: str, kind: type) -> Any:
    value = file.fields.get(key)
    if not isinstance(value, kind):
        raise AnymambaError(f"{file.path}: {key} is {value!r}, but must be a {kind.__name__}; convert the model again")
    return value


def _checked(file: GgufFile, config: MambaConfig) -> dict[str, str]:
    """The file's name for each parameter, if they are all there in the right shapes."""
    last = f"blk.{config.n_layer - 1}.{LAYER['norm.weight']}"  # first, for a damaged number would make a huge model
    if last not in file.tensors:
        raise AnymambaError(f"{file.path} has no {last}, but its metadata say block_count={config.n_layer}: "
                            "download, copy or convert it again")  # fmt: skip
    shapes = _shapes(config)
    names = _names(shapes)
    wanted = {theirs: shapes[ours] for ours, theirs in names.items()}
    found = {name: info.shape for name, info in file.tensors.items()}
    problems = [f"missing     {k} {shape}" for k, shape in wanted.items() if k not in found]
    problems += [f"unexpected  {k} {shape}" for k, shape in found.items() if k not in wanted]
    problems += [f"misshapen   {k} {found[k]}, its metadata say {shape}" for k, shape in wanted.items()
                 if found.get(k, shape) != shape]  # fmt: skip
    if problems:
        shown = "\n  ".join(problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise AnymambaError(f"{file.path} does not hold the model that its metadata describe:\n  {shown}")
    return names


def _shapes(config: MambaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter in a file, by its name here."""
    with torch.device("meta"):
        state = MambaLM(config).state_dict()
    if config.tie_embeddings:
        del state["lm_head.weight"]
    return {name: tuple(v.squeeze(1).shape if name.endswith("conv1d.weight") else v.shape) for name, v in state.items()}


def _names(ours: Iterator[str]) -> dict[str, str]:
    """Each name of ours → GGUF's."""
    found = {}
    for name in ours:
        layer, _, rest = name.removeprefix("backbone.layers.").partition(".")
        found[name] = TOP[name] if name in TOP else f"blk.{layer}.{LAYER[rest]}"
    return found


# ---- writing ----


def save(model: MambaLM, path: str | os.PathLike, *, dtype: torch.dtype | str | None = None, tokenizer: Any = None):
    """Write a file that llama.cpp loads, atomically, one tensor after the other.

    Args:
        path: of the file, or of the folder for a `model.gguf` if it does not end in .gguf.
        dtype: of the matrices: "F32", "F16", "BF16", "Q8_0", "Q4_0", a torch dtype, or None, the model's own; "F16" in
            place of "Q…" for a matrix whose rows are no whole blocks of 32.
        tokenizer: goes into the file; without one llama.cpp works on token ids only.

    Raises AnymambaError for a model that llama.cpp cannot run: expand other than 2, biases in in_proj and out_proj, no
    vocabulary; for one that is quantised; and if the file cannot be written.
    """
    state, kind = _writable(model), _kind(model, dtype)
    try:
        import gguf
    except ImportError:
        raise AnymambaError("writing GGUF needs the gguf package: pip install 'anymamba[gguf]'") from None
    fields = _fields(model.config) | gguf_vocabulary.fields(tokenizer, model.config.padded_vocab_size)
    kinds = {name: gguf.GGMLQuantizationType[_stored_as(kind, name, v)] for name, v in state.items()}

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}  # fmt: skip
        try:
            for key, value in fields.items():
                add[type(value)](key, value)
            for name, v in state.items():
                items, nbytes = gguf.GGML_QUANT_SIZES[kinds[name]]
                writer.add_tensor_info(name, v.shape, np.dtype(np.float32), v.numel() // items * nbytes, kinds[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, v in state.items():
                v = v.detach().float().cpu()
                data = (-torch.exp(v) if name.endswith("ssm_a") else v).contiguous().numpy()
                writer.write_tensor_data(gguf.quants.quantize(data, kinds[name]))
        finally:
            writer.close()

    path = Path(path)
    write_atomically(path if path.suffix == ".gguf" else path / "model.gguf", write)


def _fields(c: MambaConfig) -> dict[str, Any]:
    """The metadata of a model, as llama.cpp wants them, and the config itself, as `read_config` does."""
    inner = c.to_dict().get("inner_norm_eps")
    if inner is not None and inner != c.norm_eps:
        warnings.warn(f"llama.cpp will run the norms of dt, B and C with norm_eps={c.norm_eps} instead of "
                      f"inner_norm_eps={inner}: GGUF has one number for both", stacklevel=3)  # fmt: skip
    told = {
        "context_length": 1 << 20, "embedding_length": c.d_model, "feed_forward_length": 0, "block_count": c.n_layer,
        "attention.head_count": 0, "attention.layer_norm_rms_epsilon": c.norm_eps, "vocab_size": c.padded_vocab_size,
        "ssm.conv_kernel": c.d_conv, "ssm.inner_size": c.d_inner, "ssm.state_size": c.d_state,
        "ssm.time_step_rank": c.rank, "ssm.dt_b_c_rms": inner is not None,
    }  # fmt: skip
    told = {f"{ARCHITECTURE}.{key}": value for key, value in told.items()}
    return told | {"general.quantization_version": 2, CONFIG: json.dumps(c.to_dict())}


def _writable(model: MambaLM) -> dict[str, Tensor]:
    """The model's parameters by their names in the file."""
    c, cure = model.config, 'save it with format="native"'
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise AnymambaError(
            'a quantised model cannot be saved: save the model that it was made from, with dtype="Q8_0"'
        )
    check_published(model, "gguf")
    if c.vocab_size is None or c.bias or c.expand != 2:
        raise AnymambaError(f"llama.cpp runs Mamba with a vocabulary, expand=2 and bias=False; this has vocab_size="
                            f"{c.vocab_size}, expand={c.expand}, bias={c.bias}: {cure}")  # fmt: skip
    state, shapes = model.state_dict(), _shapes(c)
    if extra := sorted(set(state) - set(shapes) - {"lm_head.weight"}):
        raise AnymambaError(
            f"the model has parameters that GGUF has no name for, such as {extra[0]}: merge or remove adapters"
        )
    out = {theirs: state[ours].squeeze(1) if ours.endswith("conv1d.weight") else state[ours]
           for ours, theirs in _names(shapes).items()}  # fmt: skip
    if not c.conv_bias:  # llama.cpp wants one
        out |= {f"blk.{i}.ssm_conv1d.bias": torch.zeros(c.d_inner) for i in range(c.n_layer)}
    return out


def _kind(model: MambaLM, dtype: torch.dtype | str | None) -> str:
    """The name of the kind that matrices are written in."""
    dtype = model.backbone.layers[0].mixer.in_proj.weight.dtype if dtype is None else dtype
    kind = dtype if isinstance(dtype, str) else next((k for k, v in PLAIN.items() if v == dtype), str(dtype))
    if kind not in KINDS:
        raise AnymambaError(f"save: dtype={kind!r}, but GGUF is written in {', '.join(KINDS)}; choose one of them")
    return kind


def _stored_as(kind: str, name: str, v: Tensor) -> str:
    """The kind of one tensor, when matrices are to be `kind`."""
    if not name.endswith(MATRICES):
        return "F32"
    return "F16" if kind[0] == "Q" and v.shape[-1] % 32 else kind
