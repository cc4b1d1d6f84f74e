"""anymamba convert"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tyro.conf import Positional, arg

from anymamba import checkpoint
from anymamba.checkpoint.hub import TOKENIZER_FILES
from anymamba.data import ByteTokenizer, load_tokenizer
from anymamba.data.byte_level import byte_level_tokenizer
from anymamba.errors import AnymambaError
from anymamba.model import MambaLM

DESCRIPTION = """Write a model in another format, for other software or for less room; its tokenizer travels along.

examples:
  anymamba convert runs/NAME for-transformers --to hf
  anymamba convert runs/NAME book.gguf --to gguf --dtype q8_0   for llama.cpp, its tokenizer in the file
  anymamba convert runs/NAME half --to native --dtype bfloat16
  anymamba convert state-spaces/mamba-130m mine --to native     from the Hugging Face hub
  anymamba convert tiiuae/falcon-mamba-7b@main falcon --to native --dtype bfloat16
"""


@dataclass
class Options:
    model: Annotated[Positional[str], arg(metavar="MODEL")]  # folder of a run or model of any format, or a hub name
    out: Annotated[Positional[str], arg(metavar="OUT")]  # folder to write, or a file that ends in .gguf
    to: Literal[tuple(checkpoint.FORMATS)]  # native; hf, for transformers; state-spaces, for mamba-ssm; gguf, llama.cpp
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None  # of the weights; q8_0 goes with gguf
    tokenizer: bool = True  # take along what lies beside the model; into a GGUF file not every kind can go
    force: bool = False  # write into a folder that is not empty


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="anymamba convert", args=argv, description=DESCRIPTION)
    source, out = checkpoint.locate(options.model), Path(options.out)
    if out.exists() and source.exists() and out.samefile(source):
        raise AnymambaError(f"{out} is the model itself: choose another folder to write")
    if out.is_dir() and any(out.iterdir()) and not options.force:
        raise AnymambaError(f"{out} is not empty: choose another folder, or --force to overwrite the model in it")
    if out.suffix == ".gguf" and options.to != "gguf":
        raise AnymambaError(f"{out} is the name of a GGUF file, and --to {options.to} writes a folder: choose another")
    if out.is_file() and not options.force:
        raise AnymambaError(f"{out} is a file: choose another name, or --force to overwrite it")
    if options.dtype == "q8_0" and options.to != "gguf":
        raise AnymambaError("--dtype q8_0 goes with --to gguf; --quantize makes integers of others as they load")
    begin = time.perf_counter()
    whole = options.dtype in (None, "q8_0")
    model = checkpoint.load(source, dtype=None if whole else getattr(torch, options.dtype))
    loaded = time.perf_counter()
    names = (_save_gguf if options.to == "gguf" else _save_folder)(model, source, out, options)
    files = [out] if out.is_file() else [v for v in out.iterdir() if v.suffix in (".safetensors", ".bin", ".gguf")]
    print(f"{model.num_params():,} parameters, {sum(v.stat().st_size for v in files) / 1e6:,.1f} MB in {out}")
    print(f"time        read in {loaded - begin:.1f} s, written in {time.perf_counter() - loaded:.1f} s")
    print(f"tokenizer   {', '.join(names) or 'none'}")
    return 0


def _save_folder(model: MambaLM, source: Path, out: Path, options: Options) -> list[str]:
    """Writes model and tokenizer; the names of the tokenizer's files."""
    checkpoint.save(model, out, options.to)
    names = _copy_tokenizer(source, out) if options.tokenizer else []
    if options.to == "hf" and "tokenizer.json" in names:
        _tell_transformers(out)
    return names


def _save_gguf(model: MambaLM, source: Path, out: Path, options: Options) -> list[str]:
    """Writes one file; what it has of the tokenizer."""
    tokenizer = None
    if options.tokenizer and (source.is_file() or (source / "tokenizer.json").is_file()):
        tokenizer = load_tokenizer(source)
    checkpoint.gguf.save(model, out, dtype="Q8_0" if options.dtype == "q8_0" else None, tokenizer=tokenizer)
    return [f"{tokenizer.name}, in the file"] if tokenizer is not None else []


def _copy_tokenizer(source: Path, out: Path) -> list[str]:
    """The names of the tokenizer's files beside the model, or in its GGUF file, which are now in `out`, too."""
    if source.is_file() and checkpoint.gguf.has_tokenizer(source):
        load_tokenizer(source).save(out)
        return [name for name in TOKENIZER_FILES if (out / name).is_file()]
    names = [name for name in TOKENIZER_FILES if source.is_dir() and (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, out / name)
    return names


def _tell_transformers(out: Path) -> None:
    """What transformers expects: a tokenizer.json of its own kind, and in the config which token ends a text."""
    tokenizer, settings = load_tokenizer(out), checkpoint.folder.read_settings(out)
    if isinstance(tokenizer, ByteTokenizer):
        byte_level_tokenizer().save(str(out / "tokenizer.json"))
    settings["eos_token_id"] = tokenizer.eos_id
    checkpoint.folder.write_settings(out, settings)
