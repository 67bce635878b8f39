"""A safetensors file, mapped: its tensors as numpy views of the page cache, bfloat16 among them.

The library's own numpy reader knows no bfloat16 and copies what it reads. The format is a length, a JSON header, and
the tensors' bytes without gaps. This module must not know what a tensor is for.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from services.worker.flowserve.config import ModelError
from services.worker.flowserve.quantise import Floats, from_bfloat16

Array: TypeAlias = npt.NDArray[Any]

FLOATS: Final = ("F32", "F16", "BF16")
# bfloat16 has no numpy type: its bits stand for it.
NUMPY_TYPES: Final[dict[str, type[np.generic]]] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "U8": np.uint8,
}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's own bound


class TensorFile:
    """The tensors of one file by name; `fd`, where there is one, is that file, which need not lie at `path` (nor where
    this process can see it). Raises ModelError naming the file, where it is none or was cut off."""

    def __init__(self, path: Path, fd: int | None = None) -> None:
        self.path = path
        try:
            with path.open("rb") if fd is None else open(fd, "rb", closefd=False) as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelError(f"{path} does not exist") from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelError(f"{path} is no safetensors file: {error}") from error
        try:
            self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is no safetensors file: {error!r}") from error

    def _read_header(self) -> None:
        length = int.from_bytes(self._map[:_LENGTH_BYTES], "little")
        self._data = _LENGTH_BYTES + length  # where the tensors begin
        if not 2 <= length <= min(_MAX_HEADER_BYTES, len(self._map) - _LENGTH_BYTES):
            raise ValueError("its header is cut off")
        self.header: bytes = self._map[_LENGTH_BYTES : self._data]
        entries: dict[str, Any] = json.loads(self.header)
        self.metadata: dict[str, str] = entries.pop("__metadata__", {})
        self._entries = entries
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        if self._data + end != len(self._map):
            raise ValueError("its tensors are cut off")

    @property
    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self._entries)

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return len(self._map)

    def dtype(self, name: str) -> str:
        """The type of a tensor in the format's own words: F32, BF16, ..."""
        return str(self._entries[name]["dtype"])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._entries[name]["shape"])

    def array(self, name: str) -> Array:
        """A read-only view of the tensor `name`, whose dtype is one of `NUMPY_TYPES`."""
        kind, shape = np.dtype(NUMPY_TYPES[self.dtype(name)]), self.shape(name)
        start, end = self._entries[name]["data_offsets"]
        count = math.prod(shape)
        if (
            not 0 <= start <= end <= len(self._map) - self._data
            or end - start != count * kind.itemsize
        ):
            raise ModelError(f"{self.path}: the bytes of tensor {name!r} do not fit its shape")
        return np.frombuffer(self._map, kind, count, self._data + start).reshape(shape)


def as_floats(array: Array, dtype: str) -> Floats:
    """A float32 copy of a tensor stored as `dtype`, one of `FLOATS`."""
    return from_bfloat16(array) if dtype == "BF16" else array.astype(np.float32)
