"""The NPU path without an NPU: torch-npu's operators as its wheel declares and documents them, on CPU tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import test_cache as cache_folder
from tests.npu.schemas import define
from tests.npu.wheel import Wheel, fetch

FOLDER = Path(__file__).parent
TIMEOUT_S = 300  # the first test of the first run waits for the wheel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is an `npu` test."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker("npu")
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def npu_wheel() -> Wheel:
    """The wheel of torch-npu. Fails, rather than skips, where it cannot be had."""
    return fetch(cache_folder())


@pytest.fixture(scope="session")
def npu_operators(npu_wheel: Wheel) -> Iterator[None]:
    """`torch.ops.npu` with the operators we call, for CPU tensors."""
    if importlib.util.find_spec("torch_npu") is not None:
        pytest.skip("torch-npu is installed and defines the real operators: use `deepflow verify`")
    library = define(npu_wheel)
    yield
    library._destroy()  # type: ignore[no-untyped-call]
