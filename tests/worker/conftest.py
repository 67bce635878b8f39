"""Fixtures of the engine's tests."""

from __future__ import annotations

from typing import Any

import pytest

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Decoder
from tests.worker.arithmetic import ArithmeticDecoder, make_config
from tests.worker.bench import GREEDY, SEEDED, Bench, request


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return make_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def decoder(tiny_config: ModelConfig) -> ArithmeticDecoder:
    return ArithmeticDecoder(tiny_config)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step before the next is planned, and one ahead."""
    monkeypatch.setattr(Bench, "mode", {"asynchronous": request.param})


@pytest.fixture(scope="module", params=[GREEDY, SEEDED], ids=["greedy", "seeded"])
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    fields: dict[str, Any] = request.param
    return fields


@pytest.fixture(scope="module")
def alone(decoder: Decoder, kind: dict[str, Any]) -> list[int]:
    """The tokens of the request by itself, its prompt computed at once, nothing cached."""
    bench = Bench(decoder)
    bench.submit(request(**kind))
    bench.run()
    assert bench.cached["r"] == 0
    assert len(bench.tokens()) == 24
    return bench.tokens()
