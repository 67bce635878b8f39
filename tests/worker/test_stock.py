"""What a pod host knows of its models before and after the first TE of one has come up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.worker.settings import WorkerSettings
from services.worker.stock import Stock
from shared.errors import ModelNotFound
from tests.worker.peers import MODEL, make_model


def stock(folder: Path, **variables: str) -> Stock:
    env = {"DEEPFLOW_HOME": str(folder), "DEEPFLOW_MODELS": MODEL, "DEEPFLOW_WORKERS": "0..3"}
    return Stock(WorkerSettings.load({**env, "DEEPFLOW_DTYPE": "fp32", **variables}))


async def test_a_te_is_estimated_until_one_was_measured(tmp_path: Path) -> None:
    """KV cache and weights are known beforehand; what else a TE takes is read from the first that came up, once."""
    make_model(tmp_path / "cache")
    few = stock(tmp_path, DEEPFLOW_KV_TOKENS="1024")
    many = stock(tmp_path, DEEPFLOW_KV_TOKENS="2048")
    (model,) = many.describe()
    assert (model.name, model.min_tes, model.max_tes, model.num_slots) == (MODEL, 0, 3, 64)
    weights = (tmp_path / "cache" / "models" / MODEL).glob("*.safetensors")
    assert model.weights_bytes == sum(path.stat().st_size for path in weights) > 0
    of_kv = many.costs[MODEL].te_bytes - few.costs[MODEL].te_bytes
    assert of_kv > 0
    assert await many.measure(MODEL, 2**22 + 1) is False  # it has ended: the next one will do
    assert await many.measure(MODEL, os.getpid()) is True
    assert await many.measure(MODEL, os.getpid()) is False
    assert many.costs[MODEL].te_bytes > 2 * of_kv
    assert many.costs[MODEL] != few.costs[MODEL]


def test_a_model_that_is_not_here_is_named(tmp_path: Path) -> None:
    """Before anything is started."""
    with pytest.raises(ModelNotFound, match="deepflow pull nobody"):
        stock(tmp_path, DEEPFLOW_MODELS="nobody")
