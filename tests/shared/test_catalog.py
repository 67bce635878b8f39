"""The catalogue: what `open_model` and `list_models` make of folders, whole, damaged or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared import catalog, subjects
from shared.errors import ModelNotFound, Unavailable


def write(path: Path, value: Any) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value))


def folder(cache: Path, name: str, **config: Any) -> Path:
    """A minimal published folder."""
    path = cache / "models" / subjects.encode(name)
    path.mkdir(parents=True)
    write(path / "manifest.json", {"name": name, "created": 7, "weights_digest": "w"})
    write(
        path / "config.json",
        {"max_position_embeddings": 64, "vocab_size": 9, "eos_token_id": 2, **config},
    )
    write(
        path / "tokenizer.json",
        {"added_tokens": [{"id": 5, "content": "<e>"}], "model": {"vocab": {"</s>": 3}}},
    )
    return path


def test_opens_a_model_whose_name_holds_a_slash(tmp_path: Path) -> None:
    """All fields come from the folder's files, and the digests are SHA-256."""
    path = folder(tmp_path, "org/Model-1.5")
    model = catalog.open_model(tmp_path, "org/Model-1.5")
    assert path == model.path
    assert (model.name, model.context, model.vocab) == ("org/Model-1.5", 64, 9)
    assert (model.eos_ids, model.weights_digest, model.created) == ([2], "w", 7)
    assert len(model.tokenizer_digest) == len(model.template_digest) == 64


def test_digests_follow_tokenizer_and_template(tmp_path: Path) -> None:
    """Each changes with its own file only, wherever the template is written."""
    path = folder(tmp_path, "m")
    before = catalog.open_model(tmp_path, "m")
    (path / "chat_template.jinja").write_text("x")
    own = catalog.open_model(tmp_path, "m")
    (path / "chat_template.jinja").unlink()
    write(path / "tokenizer_config.json", {"chat_template": "x"})
    assert own == catalog.open_model(tmp_path, "m")
    assert own.tokenizer_digest == before.tokenizer_digest
    assert own.template_digest != before.template_digest
    write(path / "tokenizer.json", {})
    assert catalog.open_model(tmp_path, "m").tokenizer_digest != before.tokenizer_digest


@pytest.mark.parametrize(
    "name", ["absent", "", "a" * 300, "\ud800", "../models", "/" * 100, "a\0b"]
)
def test_an_unknown_or_impossible_name_is_not_found(tmp_path: Path, name: str) -> None:
    """The error names the model and the command that fetches it."""
    folder(tmp_path, "m")
    with pytest.raises(ModelNotFound, match="deepflow pull"):
        catalog.open_model(tmp_path, name)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", "{", r"config\.json is not JSON"),
        ("config.json", "[]", "no JSON object"),
        ("config.json", '{"vocab_size": 9}', "max_position_embeddings"),
        ("manifest.json", '{"name": "m", "created": "x", "weights_digest": ""}', "invalid literal"),
        ("tokenizer.json", None, r"tokenizer\.json"),
        ("generation_config.json", '{"eos_token_id": "x"}', "invalid literal"),
    ],
)
def test_a_damaged_folder_says_what_is_wrong(
    tmp_path: Path, file: str, content: str | None, reason: str
) -> None:
    """It is refused with the remedy by `open_model`, and left out by `list_models`, which shows the others."""
    folder(tmp_path, "whole")
    path = folder(tmp_path, "m")
    if content is None:
        (path / file).unlink()
    else:
        (path / file).write_text(content)
    with pytest.raises(Unavailable, match=reason):
        catalog.open_model(tmp_path, "m")
    assert [model.name for model in catalog.list_models(tmp_path)] == ["whole"]


def test_lists_models_by_name_and_nothing_else(tmp_path: Path) -> None:
    """Temporary folders, lock files and strangers in the folder are no models; no folder at all is no error."""
    assert catalog.list_models(tmp_path) == []
    for name in ("b", "a/x", "c"):
        folder(tmp_path, name)
    (tmp_path / "models" / ".tmp-1-abc").mkdir()
    (tmp_path / "models" / ".lock-b").touch()
    (tmp_path / "models" / "stranger").mkdir()
    assert [model.name for model in catalog.list_models(tmp_path)] == ["a/x", "b", "c"]


@pytest.mark.parametrize(
    ("generation", "config", "tokens", "expected"),
    [
        ({"eos_token_id": [4, 2]}, {}, {}, [4, 2]),
        ({"eos_token_id": 0}, {}, {}, [0]),
        ({}, {}, {}, [2]),
        ({}, {"eos_token_id": None}, {"eos_token": "<e>"}, [5]),
        ({}, {"eos_token_id": None}, {"eos_token": {"content": "</s>"}}, [3]),
        ({}, {"eos_token_id": None}, {"eos_token": "?"}, []),
        ({}, {"eos_token_id": None}, {}, []),
    ],
)
def test_where_the_end_of_sequence_is_found(
    tmp_path: Path, generation: Any, config: Any, tokens: Any, expected: list[int]
) -> None:
    """generation_config.json first, else config.json, else the tokenizer's own token."""
    path = folder(tmp_path, "m", **config)
    write(path / "generation_config.json", generation)
    write(path / "tokenizer_config.json", tokens)
    assert expected == catalog.open_model(tmp_path, "m").eos_ids
