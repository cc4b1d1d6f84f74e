"""anymamba merge"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tyro.conf import Positional, arg

from anymamba import lora
from anymamba.data import load_tokenizer
from anymamba.data.tokenizer import FILE_NAME
from anymamba.errors import AnymambaError

DESCRIPTION = """Add an adapter to the weights of its model, and write them as a model that needs neither.

examples:
  anymamba merge runs/NAME -o merged/                    a run of `anymamba train --lora`
  anymamba merge adapter/ --base model/ -o merged/       an adapter of peft that does not say which model it is for
"""


@dataclass
class Options:
    run: Annotated[Positional[str], arg(metavar="RUN")]  # folder of a run or adapter
    out: Annotated[str, arg(aliases=["-o"])]  # folder to write
    base: str | None = None  # folder of the model; the one that the adapter names if none
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the weights; 16 bits round them
    force: bool = False  # overwrite a model in that folder


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="anymamba merge", args=argv, description=DESCRIPTION)
    run, out = Path(options.run), Path(options.out)
    if not lora.matches(run):
        raise AnymambaError(f"{run} holds no adapter ({lora.CONFIG}): there is nothing to merge")
    if out.exists() and out.samefile(run):
        raise AnymambaError(f"{out} is the adapter itself: choose another folder to write")
    if (out / "config.json").exists() and not options.force:
        raise AnymambaError(f"{out} holds a model; choose another folder, or --force to overwrite it")
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    model = lora.load(run, base=options.base, dtype=dtype)
    model.save_pretrained(out)
    if (run / FILE_NAME).is_file():  # peft's own folders have none
        load_tokenizer(run).save(out)
    print(f"{model.num_params() / 1e6:.2f}M parameters in {out}")
    return 0
