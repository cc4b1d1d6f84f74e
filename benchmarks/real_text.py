"""A real text for the benchmarks that need one."""

import lzma
import os
from pathlib import Path

from anymamba.data import documents

SHARED = Path(os.environ.get("ANYMAMBA_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def real_text(size: int) -> tuple[bytes, str]:
    """So many bytes of English, and whose: Bleak House, which the model that comes with the package has never seen,
    from $ANYMAMBA_DATA or `shared/data` beside the repository; where that is missing, Python's own library."""
    book = SHARED / "gutenberg" / "bleak_house.txt.xz"
    if book.exists():
        text, name = lzma.decompress(book.read_bytes()), "Bleak House"
    else:
        text, name = "".join(document.text for document in documents(None)).encode(), "Python's library"
    return (text * -(-size // len(text)))[:size], name
