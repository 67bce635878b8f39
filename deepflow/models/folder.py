"""A folder in Hugging Face form: which of its files make a model, and whether they are whole.

Only safetensors are taken: a pickle (`.bin`, `.pt`) may run any code when it is read.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from deepflow.models import store
from shared import catalog
from shared.errors import InvalidRequest

INDEX = "model.safetensors.index.json"
NEEDED = ("config.json", "tokenizer.json")
OPTIONAL = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_HEADER_BYTES = 100 << 20
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
_BITS |= {"I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}


def select(folder: Path) -> list[Path]:
    """The files of the model in `folder`, found whole. Raises InvalidRequest naming what is missing or damaged."""
    for name in NEEDED:
        if not (folder / name).is_file():
            hint = ""
            if name == "tokenizer.json" and (folder / "tokenizer.model").is_file():
                hint = ", only tokenizer.model: save it with transformers' fast tokenizer first"
            raise InvalidRequest(f"{folder} has no {name}{hint}", param="model")
    weights = _weights(folder)
    files = [folder / name for name in (*NEEDED, *OPTIONAL) if (folder / name).is_file()]
    if (folder / INDEX).is_file():
        files.append(folder / INDEX)
    return files + weights


def take(files: list[Path], model: Path) -> None:
    """Puts the files into the model folder: weights linked, the rest copied."""
    for path in files:
        if path.suffix == ".safetensors":
            store.link_file(path, model / path.name)
        else:
            store.copy_file(path, model / path.name)


def _weights(folder: Path) -> list[Path]:
    """The safetensors files: those of the index, else model.safetensors, else the only one."""
    if (folder / INDEX).is_file():
        return _sharded(folder)
    found = sorted(folder.glob("*.safetensors"))
    if folder / "model.safetensors" in found:
        found = [folder / "model.safetensors"]
    if not found:
        if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
            raise InvalidRequest(
                f"{folder} holds weights only as pickles (.bin, .pt), which may run any code when read; "
                "convert them to safetensors",
                param="model",
            )
        raise InvalidRequest(f"{folder} has no *.safetensors", param="model")
    if len(found) > 1:
        raise InvalidRequest(f"{folder} has several *.safetensors but no {INDEX}", param="model")
    tensor_names(found[0])
    return found


def _sharded(folder: Path) -> list[Path]:
    try:
        weight_map = catalog.read_json(folder / INDEX)["weight_map"]
        wanted: dict[str, set[str]] = {}
        for tensor, file in weight_map.items():
            wanted.setdefault(str(file), set()).add(tensor)
    except (KeyError, AttributeError, ValueError) as error:
        raise InvalidRequest(f"{INDEX} is damaged: {error}", param="model") from error
    for file, tensors in wanted.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InvalidRequest(
                f"{INDEX} names {file!r}, which is no file beside it", param="model"
            )
        if not (folder / file).is_file():
            raise InvalidRequest(f"{folder} has no {file}, which its index names", param="model")
        missing = sorted(tensors - tensor_names(folder / file))
        if missing:
            raise InvalidRequest(f"{file} lacks the tensor {missing[0]}", param="model")
    return [folder / file for file in sorted(wanted)]


def tensor_names(path: Path) -> set[str]:
    """The tensors in a safetensors file. Raises InvalidRequest unless header and size agree, so that a download cut
    short is found now and not when the model is served."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError("its header is implausibly large")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 0
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            bits = _BITS.get(entry["dtype"])
            if bits is not None and (stop - start) * 8 != math.prod(entry["shape"]) * bits:
                raise ValueError(f"the size of {name} does not fit its shape")
            end = max(end, stop)
        if path.stat().st_size != 8 + length + end:
            raise ValueError(f"it has {path.stat().st_size} bytes instead of {8 + length + end}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidRequest(f"{path.name} is no whole safetensors file: {error}") from error
    return set(header)
