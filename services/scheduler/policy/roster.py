"""The policies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from services.scheduler.policy.algorithm1 import Algorithm1
from services.scheduler.policy.base import Policy
from services.scheduler.policy.baselines import (
    CacheAware,
    KvCost,
    LeastLoad,
    RoundRobin,
    StrictPrefix,
)
from shared.config import ConfigError

_MAKERS: Final[tuple[Callable[[], Policy], ...]] = (
    Algorithm1,
    RoundRobin,
    LeastLoad,
    StrictPrefix,
    CacheAware,
    KvCost,
)
NAMES: Final = tuple(maker().name for maker in _MAKERS)
DEFAULT: Final = NAMES[0]


def make(name: str) -> Policy:
    """A fresh policy. Raises ConfigError for a name that is none."""
    for maker in _MAKERS:
        policy = maker()
        if policy.name == name:
            return policy
    raise ConfigError(f"there is no policy {name!r}; there are: {', '.join(NAMES)}")
