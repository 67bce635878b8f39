"""What keys, values and tokens of a model depend on, as one digest; and the model's entry in the catalogue.

Two TEs whose digests are equal compute equal KV pages, so the digest is part of every page hash's root. This module
must not know how a recipe is executed (no torch).
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

from services.worker.flowserve.backend import Backend
from services.worker.flowserve.config import ModelConfig
from shared.messages import ModelEntry

if TYPE_CHECKING:
    from services.worker.settings import WorkerSettings
    from shared.catalog import ModelFolder

# Changes with every change of the arithmetic that changes keys or values.
_ARITHMETIC = "flowserve 2"


def pick_backend(folder: ModelFolder, settings: WorkerSettings) -> Backend:
    """What computes this model under these settings. Raises ModelError."""
    return Backend.pick(
        ModelConfig.from_folder(folder.path),
        device=settings.device,
        dtype=settings.dtype,
        kernels=settings.kernels,
        tp=settings.tp,
        pp=settings.pp,
    )


def recipe_digest(folder: ModelFolder, backend: Backend) -> str:
    """32 hex characters over weights, arithmetic, KV type and layout."""
    parts = (folder.weights_digest, _ARITHMETIC, backend.arithmetic, str(backend.page))
    return blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def served_context(backend: Backend, settings: WorkerSettings) -> int:
    """The longest sequence that a TE with these settings takes: the model's context, or its whole KV pool where that is
    smaller. It is the engine's own answer, known before any weights are loaded."""
    by_bytes = settings.kv_bytes // backend.bytes_per_block
    num_blocks = -(-settings.kv_tokens // backend.page) if settings.kv_tokens else by_bytes
    return min(backend.config.context, num_blocks * backend.page)


def model_entry(folder: ModelFolder, backend: Backend, *, context: int) -> ModelEntry:
    """How the catalogue describes this model, computed by `backend`."""
    return ModelEntry(
        name=folder.name,
        folder=folder.path.name,
        context=context,
        vocab=folder.vocab,
        page=backend.page,
        eos_ids=folder.eos_ids,
        tokenizer_digest=folder.tokenizer_digest,
        template_digest=folder.template_digest,
        recipe_digest=recipe_digest(folder, backend),
        created=folder.created,
    )
