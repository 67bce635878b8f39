"""Opening weights: single files and shards, and errors that name the tensor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelError
from tests.worker.drive import Driver, Sequence, load, random_ids
from tests.worker.tiny import make_tiny

NAME = "model.layers.1.mlp.down_proj.weight"


def test_shards_equal_the_single_file(tmp_path: Path) -> None:
    """A model split into two shards with an index gives the very logits of the single file."""
    whole, shards = (make_tiny(tmp_path / name) for name in ("whole", "shards"))
    tensors = load_file(shards / "model.safetensors")
    (shards / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    ids = random_ids(20)
    a, b = (Driver(load(x)).run(Sequence(ids)).logits for x in (whole, shards))
    assert np.array_equal(a, b)


def _rewrite(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (None, "missing"),
        (torch.zeros(3, 5), r"shape \(3, 5\), not \(64, 160\)"),
        (torch.zeros(64, 160, dtype=torch.int8), "I8"),
    ],
)
def test_a_bad_tensor_is_named(tmp_path: Path, tensor: torch.Tensor | None, says: str) -> None:
    """A tensor that is missing, misshapen or no float is named, with what is wrong about it."""
    folder = make_tiny(tmp_path / "tiny")
    _rewrite(folder, NAME, tensor)
    with pytest.raises(ModelError, match=f"{NAME}.*{says}"):
        load(folder)


def test_a_missing_untied_head_is_named(tmp_path: Path) -> None:
    """A model that says its head is its own, but holds none, is refused."""
    folder = make_tiny(tmp_path / "tiny", "mistral")
    _rewrite(folder, "lm_head.weight", None)
    with pytest.raises(ModelError, match=r"lm_head\.weight.*missing"):
        load(folder)


def test_damaged_or_absent_files(tmp_path: Path) -> None:
    """A folder without weights, a truncated file, a lying or escaping index: each a ModelError naming the file."""
    with pytest.raises(ModelError, match="neither"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(ModelError, match="index"):
        Checkpoint(tmp_path)
    for file, says in (("gone.safetensors", "gone"), ("../x.safetensors", "outside")):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(ModelError, match=says):
            Checkpoint(tmp_path).floats("a", (1,))


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    """Only the arithmetics that exist can be asked for."""
    with pytest.raises(ModelError, match="int3"):
        load(make_tiny(tmp_path / "tiny"), dtype="int3")
