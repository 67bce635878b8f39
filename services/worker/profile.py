"""What is known of a model on this machine from TEs that ran it: stored, so that the next one need not find it out.

One small file for each recipe, device and size of KV cache: the KV blocks that were given, the memory a TE takes, how
long loading took, and what the dummy request came to, which tells right weights from wrong ones. A file of another
version, of something else, or that makes no sense, is as good as none. This module must not know engines.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from pathlib import Path

VERSION: Final = 2  # changes with what the dummy request is, and with the fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """What the dummy request came to: for each of its tokens the id, its log-probability, and by how much that is above
    the next best one's."""

    ids: list[int]
    logprobs: list[float]
    gaps: list[float]

    def equals(self, other: Canary, tolerance: float) -> bool:
        """Whether `other` comes of the same weights. Where two tokens lie within twice the `tolerance` either may win,
        and what follows is another text."""
        if len(self.ids) != len(other.ids):
            return False
        for index, (mine, its) in enumerate(zip(self.ids, other.ids, strict=True)):
            if mine != its:
                return max(self.gaps[index], other.gaps[index]) <= 2 * tolerance
            if abs(self.logprobs[index] - other.logprobs[index]) > tolerance:
                return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Of one recipe on one device."""

    recipe: str
    device: str
    num_blocks: int
    canary: Canary


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileKey:
    """What a profile is about: `recipe` as in `recipe.py`, the `device` in words, and the `room` that is asked for."""

    recipe: str
    device: str
    room: str

    def path(self, cache_dir: Path) -> Path:
        """Where it is kept."""
        parts = "\n".join((self.recipe, self.device, self.room))
        return (
            cache_dir / "profiles" / f"{blake2b(parts.encode(), digest_size=16).hexdigest()}.json"
        )


def read_profile(key: ProfileKey, cache_dir: Path) -> Profile | None:
    """What is stored under `key`, if it is of this version and whole."""
    try:
        raw = orjson.loads(key.path(cache_dir).read_bytes())
        if raw.pop("version") != VERSION or raw.pop("room") != key.room:
            return None
        profile = Profile(**raw | {"canary": Canary(**raw["canary"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    ours = (profile.recipe, profile.device) == (key.recipe, key.device)
    return profile if ours and _makes_sense(profile) else None


def write_profile(profile: Profile, key: ProfileKey, cache_dir: Path) -> None:
    """Store it, whole or not at all: what TEs that start together write is of equal worth. Raises OSError."""
    path = key.path(cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.write_bytes(orjson.dumps({"version": VERSION, "room": key.room, **asdict(profile)}))
        partial.rename(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def _makes_sense(profile: Profile) -> bool:
    canary = profile.canary
    lists: list[list[Any]] = [canary.ids, canary.logprobs, canary.gaps]
    if not all(type(one) is list for one in lists) or len(set(map(len, lists))) != 1:
        return False
    return (
        type(profile.num_blocks) is int
        and profile.num_blocks > 0
        and bool(canary.ids)
        and all(type(one) is int for one in canary.ids)
        and all(type(one) is float for one in canary.logprobs + canary.gaps)
    )
