"""The rotated checkpoint: the same model, in other coordinates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.device.cpu import CpuDevice
from services.worker.flowserve.rank import Rank
from services.worker.flowserve.rotation import RotatedCheckpoint, Rotation
from services.worker.flowserve.torch_decoder import TorchDecoder
from services.worker.flowserve.torch_weights import from_checkpoint
from tests.worker.drive import Driver, Sequence, random_ids
from tests.worker.tiny import FAMILIES, make_tiny

CASES: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | {
    "llama-untied-biased": (
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-odd-sizes": ("llama", {"hidden_size": 72, "head_dim": 20}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rotated_model_is_the_same_model(tmp_path: Path, case: str) -> None:
    """In fp32, logits are those of the checkpoint as it is, for every family, with biases, tied or not."""
    family, overrides = CASES[case]
    folder = make_tiny(tmp_path / "tiny", family, with_tokenizer=False, **overrides)
    config, plain = ModelConfig.from_folder(folder), Checkpoint(folder)
    ids, logits = random_ids(100), []
    for checkpoint in (plain, RotatedCheckpoint(config, plain)):
        weights = from_checkpoint(config, checkpoint, "fp32", CpuDevice(), Rank())
        decoder = TorchDecoder(config, weights, "fp32", device=CpuDevice())
        logits.append(Driver(decoder, num_blocks=8).run(Sequence(ids)).logits)
    assert not np.array_equal(logits[0], logits[1])
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-3)


@pytest.mark.parametrize("width", [1, 20, 64, 576])
def test_a_rotation_keeps_lengths_and_spreads_outliers(width: int) -> None:
    """Rows keep their norms, and a single large value is shared by its whole block."""
    rotation = Rotation(width)
    rows = np.random.default_rng(0).standard_normal((5, width)).astype(np.float32)
    turned = rotation(rows)
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-5
    )
    outlier = np.zeros((1, width), np.float32)
    outlier[0, 0] = 1.0
    block = min(64, width & -width)
    np.testing.assert_allclose(np.abs(rotation(outlier)[0, :block]), block**-0.5, rtol=1e-6)
