"""anymamba tokenizer"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from anymamba.data import documents, train_bpe
from anymamba.errors import AnymambaError

USAGE = """usage: anymamba tokenizer train FILES … [options]

  train   make a byte-level BPE tokenizer from text

anymamba tokenizer train --help tells the options.
"""

DESCRIPTION = """Train a byte-level BPE tokenizer on text.

examples:
  anymamba tokenizer train book.txt notes/ --vocab-size 4096 -o tokenizer.json
  anymamba train --data book.txt notes/ --tokenizer tokenizer.json
"""


@dataclass
class Options:
    data: Annotated[Positional[tuple[str, ...]], arg(metavar="FILE …")] = ()  # files and folders
    vocab_size: int = 4096  # tokens, the 256 bytes and the end of a document among them
    out: Annotated[str, arg(aliases=["-o"])] = "tokenizer.json"  # file to write
    field: str = "text"  # where a JSONL object or a Parquet row keeps its text


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] != "train":
        raise AnymambaError(f"there is no tokenizer {argv[0]!r}: the one subcommand is train")
    options = tyro.cli(Options, prog="anymamba tokenizer train", args=argv[1:], description=DESCRIPTION)
    out = Path(options.out)
    pieces = (text for document in documents(options.data or None, options.field) for text in document.pieces)
    with warnings.catch_warnings(record=True) as caught:
        tokenizer = train_bpe(pieces, options.vocab_size, out)
    for warning in caught:
        print(f"note: {warning.message}")
    print(f"{tokenizer.vocab_size} tokens in {out}\ntrain with it:\n  anymamba train --tokenizer {out} --data …")
    return 0
