"""The GGUF container, versions 2 and 3: metadata, and tensors where they lie in the file.

The `gguf` package reads such files too, but needs seconds for the metadata of a large vocabulary, and keeps it.
"""

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anymamba.errors import AnymambaError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # for `struct`


class Kind(NamedTuple):
    """How the numbers of a tensor are stored: in blocks along its last axis."""

    name: str
    items: int  # of a block
    nbytes: int  # of a block


KINDS = {0: Kind("F32", 1, 4), 1: Kind("F16", 1, 2), 30: Kind("BF16", 1, 2), 8: Kind("Q8_0", 32, 34),
         2: Kind("Q4_0", 32, 18)}  # fmt: skip
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHERS = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
          15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
          23: "IQ4_XS", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}  # fmt: skip


class TensorInfo(NamedTuple):
    """Where a tensor lies."""

    kind: Kind
    shape: tuple[int, ...]  # as torch has it; the file has it the other way round
    offset: int  # from the start of the file


class GgufFile:
    """A GGUF file: `fields` by key, `tensors` by name, and `read`, which loads one of them.

    Raises AnymambaError for a file that is none, is cut short, or stores a tensor in a way that is not known here.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self.fields, self.tensors, self._at = Path(path), {}, {}, 0
        try:
            with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self._data:
                self._parse()
        except AnymambaError:
            raise
        except UnicodeDecodeError:
            raise self._damaged(f"a text before byte {self._at} is not UTF-8") from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise AnymambaError(f"{self.path} cannot be read ({error}): give the path of a .gguf file") from None

    def read(self, name: str) -> Tensor:
        """The tensor `name`, a copy; float32 for the quantised kinds."""
        kind, shape, offset = self.tensors[name]
        size = math.prod(shape) // kind.items * kind.nbytes
        raw = np.fromfile(self.path, np.uint8, size, offset=offset)  # mapped, the whole file would stay in memory
        if kind.name in PLAIN:
            return torch.from_numpy(raw).view(PLAIN[kind.name]).view(shape)
        blocks = raw.reshape(-1, kind.nbytes)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        if kind.name == "Q8_0":
            values = blocks[:, 2:].view(np.int8)
        else:  # Q4_0: the first half of a block in the low bits, the second in the high ones
            values = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.int8) - 8
        return torch.from_numpy(scale * values).view(shape)

    # ---- the header ----

    def _parse(self):
        if self._data[:4] != MAGIC:
            raise AnymambaError(f"{self.path} is no GGUF file: it begins with {self._data[:4]!r}, not {MAGIC!r}")
        self._at = 4
        version = self._scalar("I")
        if version not in VERSIONS:
            why = "is big-endian" if version > 1 << 16 else f"has version {version}"
            raise AnymambaError(f"{self.path} {why}, but little-endian GGUF of versions 2 and 3 is read here: "
                                "convert it again with a current llama.cpp")  # fmt: skip
        tensors, fields = self._scalar("Q"), self._scalar("Q")
        for _ in range(fields):
            key = self._string()
            self.fields[key] = self._value(self._scalar("I"))
        infos = [self._info() for _ in range(tensors)]
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"its alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        for name, kind, shape, offset in infos:
            if shape[-1] % kind.items or start + offset + math.prod(shape) // kind.items * kind.nbytes > len(
                self._data
            ):
                raise self._damaged(f"{name} {shape} {kind.name} at {start + offset} of {len(self._data)} bytes")
            self.tensors[name] = TensorInfo(kind, shape, start + offset)

    def _info(self):
        name, axes = self._string(), self._scalar("I")
        if not 1 <= axes <= 4:
            raise self._damaged(f"{name} has {axes} axes")
        shape = tuple(reversed(self._scalars("Q", axes)))
        number, offset = self._scalar("I"), self._scalar("Q")
        if number not in KINDS:
            raise AnymambaError(
                f"{self.path}: {name} is stored as {OTHERS.get(number, f'type {number}')}, which is not read here, "
                f"only {', '.join(kind.name for kind in KINDS.values())}: take the model's F16, BF16 or Q8_0 file; "
                "its weights can be made smaller after loading, with --quantize int4"
            )
        return name, KINDS[number], shape, offset

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(self._code(kind))
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind == STRING:
            return [self._string() for _ in range(count)]
        return list(self._scalars(self._code(kind), count))

    def _code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self._damaged(f"there is no metadata type {kind}")
        return SCALARS[kind]

    def _scalar(self, code: str):
        return self._scalars(code, 1)[0]

    def _scalars(self, code: str, count: int) -> tuple:
        end = self._at + count * struct.calcsize(f"<{code}")
        if end > len(self._data):  # before they are unpacked: a damaged count would ask for all memory
            raise self._damaged(f"{count} numbers at {self._at} of {len(self._data)} bytes")
        values, self._at = struct.unpack_from(f"<{count}{code}", self._data, self._at), end
        return values

    def _string(self) -> str:
        size = self._scalar("Q")
        if self._at + size > len(self._data):
            raise self._damaged(f"a string of {size} bytes at {self._at} of {len(self._data)}")
        self._at += size
        return self._data[self._at - size : self._at].decode()

    def _damaged(self, what: str) -> AnymambaError:
        return AnymambaError(f"{self.path} is damaged or cut short ({what}): download, copy or convert it again")
