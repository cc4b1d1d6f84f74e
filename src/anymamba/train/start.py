"""What a run starts from: its folder, and with fine-tuning the model, its tokenizer and the adapter on it."""

import time
from pathlib import Path

from anymamba import lora
from anymamba.data import Tokenizer, load_tokenizer
from anymamba.data.tokenizer import FILE_NAME
from anymamba.errors import AnymambaError
from anymamba.model import MambaLM
from anymamba.train.config import TrainConfig
from anymamba.train.runs import load_run

CONFIG = "train.json"


def load_start(config: TrainConfig, tokenizer: str | Path | None) -> tuple[MambaLM | None, Tokenizer]:
    """What a run starts from: the model to fine-tune, or None for a new one, and the tokenizer.

    The model is in float32, since small steps would be lost in 16 bits. Raises AnymambaError as `load_run` does, and if
    `tokenizer` names another one than that which lies beside the model.
    """
    if config.init is None:
        return None, load_tokenizer(tokenizer or "bytes")
    model, tokens = load_run(config.init, tokenizer)
    if (Path(config.init) / FILE_NAME).is_file() and load_tokenizer(config.init).fingerprint != tokens.fingerprint:
        raise AnymambaError(
            f"the tokenizer {tokens.name!r} is not the one that {config.init} was trained with, and its tokens mean "
            "other things to this model: drop --tokenizer"
        )
    return model.float(), tokens


def new_adapter(model: MambaLM, config: TrainConfig) -> lora.Adapter | None:
    """The adapter that a run trains, put on its model; None if it trains the model itself."""
    if not config.lora:
        return None
    return lora.attach(model, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets,
                       base=config.init)  # fmt: skip


def absolute(path: str) -> str:
    """The path from the root, or what was given if nothing is there: it may be a name, and is what an error shows."""
    found = Path(path).expanduser()
    return str(found.absolute()) if found.exists() else path


def new_folder(out: str | None) -> Path:
    """The folder of a new run, not made yet: `out`, or runs/DATE-TIME. Raises AnymambaError if it holds one already."""
    run = Path(out).expanduser() if out else Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    if run.is_dir() and (run / CONFIG).exists():
        raise AnymambaError(
            f"{run} holds a run already: go on with it by  anymamba train --resume {run}  or choose another --out"
        )
    if run.exists() and not run.is_dir():
        raise AnymambaError(f"out={run} is a file, but a run is a folder: choose another --out")
    return run
