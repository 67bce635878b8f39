"""The models of this machine: what `deepflow pull` published under the cache folder, opened for reading.

Layout: `<cache>/models/<encoded name>/` holds `manifest.json`, `config.json`, `tokenizer.json`, `*.safetensors`, and
where the model has them `generation_config.json`, `tokenizer_config.json`, `chat_template.jinja`. Folders appear whole,
by one rename, so a folder without a manifest is no model. This module must not know how models are fetched, and it
opens neither weights nor tokenizers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import subjects
from shared.errors import ModelNotFound, Unavailable

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """One served model. `context` and `vocab` are numbers of tokens, `created` is Unix time in seconds.

    The digests are hex SHA-256: of tokenizer.json's bytes, of the chat template's text ("" hashed if there is none;
    both "" for who does without them), and of the weights as the manifest recorded them at publication.
    """

    name: str
    path: Path
    context: int
    vocab: int
    eos_ids: list[int]
    tokenizer_digest: str
    template_digest: str
    weights_digest: str
    created: int


def models_dir(cache_dir: Path) -> Path:
    """Where the model folders of this cache lie."""
    return cache_dir / "models"


def open_model(cache_dir: Path, name: str, *, text: bool = True) -> ModelFolder:
    """The model served as `name`; without `text`, nothing is read that only those need who deal with text.

    Raises ModelNotFound if it was never pulled, Unavailable if its folder is damaged; both name the remedy.
    """
    missing = ModelNotFound(
        f"model {name!r} is not here; `deepflow pull {name}` fetches it", param="model"
    )
    try:
        path = models_dir(cache_dir) / subjects.encode(name)
        present = (path / MANIFEST).is_file()
    except (ValueError, OSError):  # not a possible name: empty, overlong, lone surrogates
        raise missing from None
    if not present:
        raise missing
    return read_model(path, name, text=text)


def read_model(path: Path, name: str, *, text: bool = True) -> ModelFolder:
    """The published folder at `path`, as `open_model`. Raises Unavailable, naming what is wrong, if it is damaged."""
    try:
        manifest = read_json(path / MANIFEST)
        config = read_json(path / "config.json")
        tokenizer = (path / "tokenizer.json").read_bytes() if text else None
        template = read_template(path) or "" if text else None
        return ModelFolder(
            name=str(manifest["name"]),
            path=path,
            context=int(config["max_position_embeddings"]),
            vocab=int(config["vocab_size"]),
            eos_ids=read_eos_ids(path),
            tokenizer_digest="" if tokenizer is None else hashlib.sha256(tokenizer).hexdigest(),
            template_digest="" if template is None else hashlib.sha256(template.encode()).hexdigest(),
            weights_digest=str(manifest["weights_digest"]),
            created=int(manifest["created"]),
        )
    except KeyError as error:
        raise _damaged(name, f"key {error} is missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(name, str(error)) from error


def list_models(cache_dir: Path) -> list[ModelFolder]:
    """All models that can be opened, by name. A damaged one is left out: `open_model` says what is wrong with it."""
    try:
        tokens = sorted(entry.name for entry in models_dir(cache_dir).iterdir())
    except FileNotFoundError:
        return []
    models = []
    for token in tokens:
        try:
            models.append(open_model(cache_dir, subjects.decode(token)))
        except (ValueError, ModelNotFound, Unavailable):  # ValueError: a temporary folder
            continue
    return sorted(models, key=lambda model: model.name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises OSError or ValueError naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return value


def read_template(folder: Path) -> str | None:
    """The chat template of a model in Hugging Face form: its own file, else tokenizer_config.json's (the one named
    "default" of several). None if the model has none."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    template = _optional(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {
            str(entry.get("name")): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None


def read_special_tokens(folder: Path) -> dict[str, str]:
    """The named special tokens (`bos_token`, `eos_token`, ...) of a model in Hugging Face form, as text."""
    tokens: dict[str, str] = {}
    for source in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter wins
        for key, value in _optional(folder / source).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
    return tokens


def read_eos_ids(folder: Path) -> list[int]:
    """The ids that end a generation: generation_config.json's, else config.json's, else the tokenizer's own."""
    for source in ("generation_config.json", "config.json"):
        value = _optional(folder / source).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if ids:
            return [int(one) for one in ids]
    eos = read_special_tokens(folder).get("eos_token")
    if eos is None:
        return []
    tokenizer = read_json(folder / "tokenizer.json")
    added = {str(one["content"]): int(one["id"]) for one in tokenizer.get("added_tokens", [])}
    vocab = tokenizer.get("model", {}).get("vocab", {})
    found = added.get(eos, vocab.get(eos) if isinstance(vocab, Mapping) else None)
    return [] if found is None else [int(found)]


def _optional(path: Path) -> dict[str, Any]:
    """A JSON object from a file that need not exist."""
    return read_json(path) if path.is_file() else {}


def _damaged(name: str, reason: str) -> Unavailable:
    return Unavailable(
        f"the stored model {name!r} is damaged ({reason}); remove it and `deepflow pull {name}`",
        param="model",
    )
