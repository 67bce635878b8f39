"""The rotated checkpoint: the same model, in other coordinates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.decoder import Floats
from services.worker.flowserve.device.cpu import CpuDevice
from services.worker.flowserve.device.cuda import CudaDevice
from services.worker.flowserve.rank import Rank
from services.worker.flowserve.rotation import RotatedCheckpoint, Rotation
from services.worker.flowserve.torch_decoder import TorchDecoder
from services.worker.flowserve.torch_weights import from_checkpoint
from tests.worker.drive import Driver, Sequence, random_ids
from tests.worker.tiny import FAMILIES, make_tiny

EMBED = "model.embed_tokens.weight"
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


def _change(folder: Path, name: str, change: Callable[[Floats], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors")


def test_w8a8_on_an_accelerator_computes_the_rotated_model(tmp_path: Path) -> None:
    """Norms that blow up a channel, which the products behind take back, leave W8A8 close to fp32: there is no norm
    left before rows are quantised."""
    folder = make_tiny(tmp_path / "tiny", "mistral", with_tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor[0] *= 500
        elif not any(part in name for part in ("embed_tokens", "o_proj", "down_proj")):
            tensor[:, 0] /= 500
    save_file(tensors, folder / "model.safetensors")
    ids, logits = random_ids(150), []
    for dtype in ("fp32", "w8a8"):
        device = CudaDevice(torch.device("cpu"))
        decoder = TorchDecoder.load(folder, dtype=dtype, cache_dir=tmp_path, device=device)
        logits.append(torch.from_numpy(Driver(decoder).run(Sequence(ids)).logits).log_softmax(-1))
    exact, found = logits
    assert 0 < (exact.exp() * (exact - found)).sum(-1).mean() < 0.03


@pytest.mark.parametrize(
    "name", [EMBED, "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"]
)
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, name: str) -> None:
    """W8A8 on an accelerator names the tensor that holds it."""
    folder = make_tiny(tmp_path / "tiny", with_tokenizer=False)

    def spoil(values: Floats) -> None:
        values[5] = np.nan

    _change(folder, name, spoil)
    device = CudaDevice(torch.device("cpu"))
    with pytest.raises(ModelError, match=f"'{name}'.*not finite"):
        TorchDecoder.load(folder, dtype="w8a8", cache_dir=tmp_path, device=device)


def test_some_rows_of_the_embeddings(tmp_path: Path) -> None:
    """Those that there are of a range, as they are in the whole; no others are looked at."""
    folder = make_tiny(tmp_path / "tiny", with_tokenizer=False)
    config, shape = ModelConfig.from_folder(folder), (512, 64)
    for kind in (lambda plain: plain, lambda plain: RotatedCheckpoint(config, plain)):
        whole, dtype = kind(Checkpoint(folder)).stored(EMBED, shape)
        rows, _ = kind(Checkpoint(folder)).stored(EMBED, shape, rows=range(300, 600))
        assert np.array_equal(rows, whole[300:])
        assert dtype == "F32"

    def spoil(values: Floats) -> None:
        values[299] = np.nan

    _change(folder, EMBED, spoil)
    rotated = RotatedCheckpoint(config, Checkpoint(folder))
    assert np.array_equal(rotated.stored(EMBED, shape, rows=range(300, 600))[0], rows)
