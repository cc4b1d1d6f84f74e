"""anymamba export"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from anymamba import export
from anymamba.cli.state import check_output
from anymamba.errors import AnymambaError
from anymamba.train.runs import load_run

DESCRIPTION = """Write a model as an ONNX graph: token ids and a state in, logits and the next state out.

One file for a text of any length, and for every runtime of ONNX. The text is encoded by whoever runs it; zeros are the
state before the first token.

examples:
  anymamba export runs/NAME -o step.onnx                 one token at a time
  anymamba export runs/NAME -o read.onnx --length 64     64 tokens at a time: reads a prompt faster
"""


@dataclass
class Options:
    run: Annotated[Positional[str], arg(metavar="RUN")]  # folder of a run or model
    out: Annotated[str, arg(aliases=["-o"])]  # ONNX file to write
    length: int = 1  # tokens that the graph reads at once
    batch_size: int = 1  # rows that it reads side by side
    force: bool = False  # overwrite the file if there is one


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="anymamba export", args=argv, description=DESCRIPTION)
    if Path(options.out).suffix != ".onnx":
        raise AnymambaError(f"-o {options.out}, but what is written is ONNX: give a name that ends with .onnx")
    check_output(options.out, options.force)
    model, tokenizer = load_run(options.run)
    export.onnx(model, options.out, length=options.length, batch_size=options.batch_size)
    c, rows = model.config, options.batch_size
    conv, ssm = (rows, c.d_inner, c.conv_width), (rows, c.d_inner, c.state_width)
    print(f"{Path(options.out).stat().st_size / 1e6:.1f} MB in {options.out}")
    print(f"in   ids {(rows, options.length)} int64, tokens of {tokenizer.name!r}, and the state:")
    print(f"     conv_i {conv}, ssm_i {ssm} float32 for i = 0 … {c.n_layer - 1}")
    print(f"out  logits {(rows, options.length, c.vocab_size)} float32, next_conv_i, next_ssm_i")
    return 0
