"""Telling what others do on the machine from what we do."""

from __future__ import annotations

import time

from deepflow.bench.others import Others


def _spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_what_is_not_ours_is_others() -> None:
    """A busy processor counts, unless the time is told to be our own; nothing watched is nothing."""
    assert Others().cores == 0
    others, nobody = Others(), Others()
    with others.watched(lambda: 0.0):
        _spin(0.2)
    assert others.cores > 0
    with nobody.watched(lambda: 1000 * time.process_time()):
        _spin(0.05)
    assert nobody.cores == 0
