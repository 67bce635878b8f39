"""Weights on disk: one `model.safetensors`, or shards with their index. Never pickle, never code from the folder.

Tensors are handed out one at a time, mapped rather than read, so that a loader which converts them as it goes never
holds the model twice. This module must not know what a tensor is for.
"""

from __future__ import annotations

import json
from pathlib import Path

from services.worker.flowserve.config import ModelError
from services.worker.flowserve.quantise import Floats
from services.worker.flowserve.tensorfile import FLOATS, Array, TensorFile, as_floats

_SINGLE = "model.safetensors"


class Checkpoint:
    """The tensors of a model folder by name. Raises ModelError naming the file or tensor that is missing or odd."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, TensorFile] = {}  # by file name
        self._places: dict[str, str] = {}  # tensor name -> file name
        index = folder / "model.safetensors.index.json"
        if (folder / _SINGLE).exists():
            self._places = dict.fromkeys(self._open(_SINGLE).names, _SINGLE)
        elif index.exists():
            try:
                self._places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{index} is no index of weights: {error!r}") from error
        else:
            raise ModelError(f"{folder} holds neither {_SINGLE} nor its index")

    def files(self) -> list[TensorFile]:
        """All files that hold tensors, in the order of their names."""
        return [self._open(name) for name in sorted(set(self._places.values()))]

    def stored(
        self, name: str, shape: tuple[int, ...], *, rows: range | None = None
    ) -> tuple[Array, str]:
        """The tensor `name`, or those of its `rows` that there are, as it is stored, a read-only view of the file, and
        its type: F32, F16 or BF16."""
        if name not in self._places:
            raise ModelError(f"{self._folder}: tensor {name!r} is missing")
        file = self._open(self._places[name])
        if name not in file.names:  # the index names a shard that does not hold it
            raise ModelError(f"{file.path}: tensor {name!r} is missing")
        if file.shape(name) != shape:
            raise ModelError(
                f"{self._folder}: tensor {name!r} has shape {file.shape(name)}, not {shape}"
            )
        dtype = file.dtype(name)
        if dtype not in FLOATS:
            raise ModelError(f"{self._folder}: tensor {name!r} has type {dtype}, no float")
        array = file.array(name)
        return (array if rows is None else array[rows.start : rows.stop]), dtype

    def floats(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        rows: range | None = None,
        columns: range | None = None,
    ) -> Floats:
        """A float32 copy of the tensor `name`, or of its `rows` and `columns`: no more is read than that."""
        array, dtype = self.stored(name, shape, rows=rows)
        if columns is not None:
            array = array[..., columns.start : columns.stop]
        return as_floats(array, dtype)

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            path = self._folder / file
            if path.parent != self._folder:
                raise ModelError(f"{self._folder}: the index names a file outside: {file!r}")
            self._files[file] = TensorFile(path)
        return self._files[file]
