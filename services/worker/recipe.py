"""What keys, values and tokens of a model depend on, as one digest; and the model's entry in the catalogue.

Two TEs whose digests are equal compute equal KV pages, so the digest is part of every page hash's root. This module
must not know how a recipe is executed (no torch).
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

from services.worker.flowserve.backend import arithmetic, bytes_per_block
from services.worker.flowserve.config import ModelConfig
from shared.messages import ModelEntry

if TYPE_CHECKING:
    from services.worker.settings import WorkerSettings
    from shared.catalog import ModelFolder

# Changes with every change of the arithmetic that changes keys or values.
_ARITHMETIC = "flowserve 2"


def recipe_digest(folder: ModelFolder, *, dtype: str, kernels: str, page: int) -> str:
    """32 hex characters over weights, arithmetic, KV type and layout. Raises ModelError."""
    config = ModelConfig.from_folder(folder.path)
    used = arithmetic(config, dtype=dtype, kernels=kernels)
    parts = (folder.weights_digest, _ARITHMETIC, used, str(page))
    return blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def served_context(folder: ModelFolder, settings: WorkerSettings, *, page: int) -> int:
    """The longest sequence that a TE with these settings takes: the model's context, or its whole KV pool where that is
    smaller. It is the engine's own answer, known before any weights are loaded. Raises ModelError."""
    config = ModelConfig.from_folder(folder.path)
    if settings.kv_tokens:
        num_blocks = -(-settings.kv_tokens // page)
    else:
        per_block = bytes_per_block(config, page, dtype=settings.dtype, kernels=settings.kernels)
        num_blocks = settings.kv_bytes // per_block
    return min(config.context, num_blocks * page)


def model_entry(
    folder: ModelFolder, *, dtype: str, kernels: str, page: int, context: int
) -> ModelEntry:
    """How the catalogue describes this model, served in `dtype` with KV pages of `page` tokens. Raises ModelError."""
    return ModelEntry(
        name=folder.name,
        folder=folder.path.name,
        context=context,
        vocab=folder.vocab,
        page=page,
        eos_ids=folder.eos_ids,
        tokenizer_digest=folder.tokenizer_digest,
        template_digest=folder.template_digest,
        recipe_digest=recipe_digest(folder, dtype=dtype, kernels=kernels, page=page),
        created=folder.created,
    )
