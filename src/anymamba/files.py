"""Writing files whole or not at all."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from anymamba.errors import AnymambaError


def write_atomically(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, then put the result in its place, synced to the disk.

    Raises AnymambaError if that fails, on a full disk for example; what was at `path` before is then untouched.
    """
    from safetensors import SafetensorError  # what safetensors raises instead of OSError

    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # safetensors would make a file that only its owner can read
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise AnymambaError(
            f"cannot write {path}: {error}; free some space or choose another folder. "
            "What was there before is untouched."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
