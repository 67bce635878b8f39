"""Weights on disk: one `model.safetensors`, or shards with their index. Never pickle, never code from the folder.

Tensors are handed out one at a time, mapped rather than read, so that a loader which converts them as it goes never
holds the model twice. This module must not know what a tensor is for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from services.worker.flowserve.config import ModelError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Checkpoint:
    """The tensors of a model folder by name. Raises ModelError naming the file or tensor that is missing or odd."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[
            str, Any
        ] = {}  # file name -> safetensors handle, which has no public type
        self._places: dict[str, str] = {}  # tensor name -> file name
        index = folder / "model.safetensors.index.json"
        if (folder / "model.safetensors").exists():
            self._places = dict.fromkeys(
                self._open("model.safetensors").keys(), "model.safetensors"
            )
        elif index.exists():
            try:
                self._places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{index} is no index of weights: {error!r}") from error
        else:
            raise ModelError(f"{folder} holds neither model.safetensors nor its index")

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor `name` as stored (float32, bfloat16 or float16), a view of the file where the platform maps it."""
        if name not in self._places:
            raise ModelError(f"{self._folder}: tensor {name!r} is missing")
        try:
            tensor: torch.Tensor = self._open(self._places[name]).get_tensor(name)
        except SafetensorError as error:  # the index names a shard that does not hold it
            raise ModelError(f"{self._folder}: tensor {name!r} cannot be read: {error}") from error
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{self._folder}: tensor {name!r} has shape {tuple(tensor.shape)}, not {shape}"
            )
        if tensor.dtype not in _FLOATS:
            raise ModelError(f"{self._folder}: tensor {name!r} has type {tensor.dtype}, no float")
        return tensor

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._folder / file
            if path.parent != self._folder:
                raise ModelError(f"{self._folder}: the index names a file outside: {file!r}")
            try:
                self._files[file] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise ModelError(f"{path} does not exist") from None
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is no safetensors file: {error}") from error
        return self._files[file]
