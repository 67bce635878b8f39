"""The processes that tests of DistFlow use one after the other end with the last of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.shared.distflow_peer import Peer


@pytest.fixture(scope="session", autouse=True)
def no_peer_is_left() -> Iterator[None]:
    """Whatever tests did."""
    yield
    Peer.end_all()
