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

DESCRIPTION = """Write a model in another format, for other software or for less room; its tokenizer travels along.

examples:
  anymamba convert runs/NAME for-transformers --to hf
  anymamba convert runs/NAME half --to native --dtype bfloat16
  anymamba convert state-spaces/mamba-130m mine --to native     from the Hugging Face hub
  anymamba convert tiiuae/falcon-mamba-7b@main falcon --to native --dtype bfloat16
"""


@dataclass
class Options:
    model: Annotated[Positional[str], arg(metavar="MODEL")]  # folder of a run or model of any format, or a hub name
    out: Annotated[Positional[str], arg(metavar="OUT")]  # folder to write
    to: Literal[tuple(checkpoint.FORMATS)]  # native; hf, for transformers; state-spaces, for mamba-ssm
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; as they are if none
    force: bool = False  # write into a folder that is not empty


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="anymamba convert", args=argv, description=DESCRIPTION)
    source, out = checkpoint.locate(options.model), Path(options.out)
    if out.exists() and source.exists() and out.samefile(source):
        raise AnymambaError(f"{out} is the model itself: choose another folder to write")
    if out.is_dir() and any(out.iterdir()) and not options.force:
        raise AnymambaError(f"{out} is not empty: choose another folder, or --force to overwrite the model in it")
    begin = time.perf_counter()
    model = checkpoint.load(source, dtype=options.dtype and getattr(torch, options.dtype))
    loaded = time.perf_counter()
    checkpoint.save(model, out, options.to)
    names = _copy_tokenizer(source, out)
    if options.to == "hf" and "tokenizer.json" in names:
        _tell_transformers(out)
    size = sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".safetensors", ".bin"))
    print(f"{model.num_params():,} parameters, {size / 1e6:,.1f} MB in {out}")
    print(f"time        read in {loaded - begin:.1f} s, written in {time.perf_counter() - loaded:.1f} s")
    print(f"tokenizer   {', '.join(names) or 'none beside the model'}")
    return 0


def _copy_tokenizer(source: Path, out: Path) -> list[str]:
    """The names of the tokenizer's files beside the model, which are now in `out`, too."""
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
