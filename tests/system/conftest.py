"""The stack that the system ring shares: the real model on two TEs, started once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import test_cache
from tests.system.stack import Stack

MODEL = "smollm2-135m"


@pytest.fixture(scope="session")
def stack(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """`deepflow up --model smollm2-135m --workers 2`, stopped by Ctrl-C at the end of the ring."""
    instance = Stack(
        tmp_path_factory.mktemp("stack") / "home", test_cache(), models=[MODEL], workers=2
    )
    instance.env["DEEPFLOW_JOB_LEASE_S"] = "2"
    try:
        instance.start()
        yield instance
    finally:
        if instance.process is not None:
            instance.stop()
