"""The variables of the cache service."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cache.settings import CacheSettings
from shared.config import ConfigError


def test_the_arena_is_automatic_off_or_so_large(tmp_path: Path) -> None:
    """Unset and 0 let the service choose, a number is the budget in bytes, "off" is none at all."""
    env = {"DEEPFLOW_HOME": str(tmp_path)}
    assert CacheSettings.load(env).arena_bytes == 0
    assert CacheSettings.load({**env, "DEEPFLOW_ARENA_BYTES": "1048576"}).arena_bytes == 1 << 20
    assert CacheSettings.load({**env, "DEEPFLOW_ARENA_BYTES": "off"}).arena_bytes is None
    assert CacheSettings.load(env).ssd_bytes == 0
    assert CacheSettings.load(env).ssd_dir == tmp_path / "ssd"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DEEPFLOW_ARENA_BYTES", "-1"),
        ("DEEPFLOW_ARENA_BYTES", "lots"),
        ("DEEPFLOW_SEGMENT_BYTES", "1"),
        ("DEEPFLOW_SSD_BYTES", "-5"),
        ("DEEPFLOW_SSD_ALL", "maybe"),
        ("DEEPFLOW_FETCH_BYTES", "0"),
        ("DEEPFLOW_LEASE_BYTES", "0"),
    ],
)
def test_a_bad_value_names_its_variable(name: str, value: str) -> None:
    """What is not in range stops the service, which says which variable it was."""
    with pytest.raises(ConfigError, match=name):
        CacheSettings.load({name: value})
