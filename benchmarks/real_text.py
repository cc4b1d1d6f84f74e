"""A real text for the benchmarks that need one."""

import os
from pathlib import Path

from anymamba.data import documents

SHARED = Path(os.environ.get("ANYMAMBA_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def real_text(size: int) -> tuple[bytes, str]:
    """So many bytes of English, and whose: Bleak House, which the model that comes with the package has never seen,
    from $ANYMAMBA_DATA or `shared/data` beside the repository; where that is missing, Python's own library. Read as
    training reads it, without its CRs: a model that knows none would be measured on them."""
    book = SHARED / "gutenberg" / "bleak_house.txt.xz"
    paths, name = ([book], "Bleak House") if book.exists() else (None, "Python's library")
    text = "".join(document.text for document in documents(paths)).encode()
    return (text * -(-size // len(text)))[:size], name
