"""Pulling a local folder in Hugging Face form: linked, checked, and refused where it is not whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from deepflow.models import store
from deepflow.models.folder import INDEX
from deepflow.models.pull import pull
from shared.errors import InvalidRequest
from tests.worker.tiny import make_tiny

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model."""
    return make_tiny(tmp_path / "Tiny-1.0")


def shard(folder: Path) -> None:
    """The weights in two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_weights_are_linked_and_texts_copied(folder: Path, tmp_path: Path) -> None:
    """The folder's name is the model's; no byte of the weights is written again; strangers stay behind."""
    (folder / "README.md").write_text("x")
    model = pull(str(folder), tmp_path / "cache")
    assert model.name == "Tiny-1.0"
    assert os.path.samefile(model.path / WEIGHTS, folder / WEIGHTS)
    assert not os.path.samefile(model.path / "config.json", folder / "config.json")
    assert not (model.path / "README.md").exists()
    assert model.eos_ids == [0, 2]


def test_across_file_systems_a_symbolic_link_serves(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no hard link can be, a symbolic one is made."""

    def no_link(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(store.os, "link", no_link)
    model = pull(str(folder), tmp_path / "cache")
    assert (model.path / WEIGHTS).is_symlink()
    assert os.path.samefile(model.path / WEIGHTS, folder / WEIGHTS)


def test_sharded_weights(folder: Path, tmp_path: Path) -> None:
    """With an index, exactly its files are taken."""
    shard(folder)
    save_file({}, folder / "stranger.safetensors")
    model = pull(str(folder), tmp_path / "cache")
    names = {path.name for path in model.path.glob("*.safetensors*")}
    assert names == {"a.safetensors", "b.safetensors", INDEX}


def test_a_changed_folder_is_pulled_anew(folder: Path, tmp_path: Path) -> None:
    """New content in the same folder replaces the model."""
    before = pull(str(folder), tmp_path / "cache")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 77}
    (folder / "config.json").write_text(json.dumps(config))
    assert pull(str(folder), tmp_path / "cache").context == 77 != before.context


def damage(folder: Path, kind: str) -> None:
    """One kind of damage."""
    weights = folder / WEIGHTS
    match kind:
        case "config.json" | "tokenizer.json":
            (folder / kind).unlink()
        case "tokenizer.model":
            (folder / "tokenizer.json").rename(folder / kind)
        case "pickle":
            weights.rename(folder / "pytorch_model.bin")
        case "none":
            weights.unlink()
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "empty":
            weights.write_bytes(b"")
        case "header":
            weights.write_bytes(b"\xff" * 100)
        case "several":
            weights.rename(folder / "a.safetensors")
            save_file({}, folder / "b.safetensors")
        case "not a tokenizer":
            (folder / "tokenizer.json").write_text("{}")
        case "no context":
            (folder / "config.json").write_text('{"vocab_size": 9}')
        case "shard missing":
            shard(folder)
            (folder / "b.safetensors").unlink()
        case "tensor missing":
            shard(folder)
            save_file({}, folder / "b.safetensors")
        case "index outside":
            (folder / INDEX).write_text('{"weight_map": {"x": "../x.safetensors"}}')
        case "index damaged":
            (folder / INDEX).write_text('{"weight_map": 3}')


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("config.json", r"no config\.json"),
        ("tokenizer.json", r"no tokenizer\.json"),
        ("tokenizer.model", r"only tokenizer\.model"),
        ("pickle", "pickles"),
        ("none", r"no \*\.safetensors"),
        ("cut", "no whole safetensors file"),
        ("empty", "no whole safetensors file"),
        ("header", "implausibly large"),
        ("several", "several"),
        ("not a tokenizer", "cannot read the tokenizer"),
        ("no context", "max_position_embeddings"),
        ("shard missing", r"no b\.safetensors"),
        ("tensor missing", "lacks the tensor"),
        ("index outside", r"\.\./x\.safetensors"),
        ("index damaged", "damaged"),
    ],
)
def test_what_is_not_whole_is_refused(folder: Path, tmp_path: Path, kind: str, named: str) -> None:
    """The error names what is missing or damaged, and nothing is published."""
    damage(folder, kind)
    with pytest.raises(InvalidRequest, match=named):
        pull(str(folder), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/models/[!.]*"))
    assert not list(tmp_path.glob("cache/models/.tmp-*"))
