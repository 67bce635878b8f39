"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from services.worker.flowserve.model import Decoder
from tests.worker.bench import GREEDY, SEEDED, Bench, request
from tests.worker.tiny import make_tiny


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A tiny model's products are too small to share between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return Decoder.load(make_tiny(tmp_path_factory.mktemp("tiny")))


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
