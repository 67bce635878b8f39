"""TEs that come and go while requests do. Data; `cluster.py` has it happen."""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.policy.base import COLOCATED


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """`num` TEs more of a role from `at` on, or (a negative number) fewer.

    New ones are made like the first of their role, and have to load; those that go finish what they have.
    """

    at: float
    num: int
    role: str = COLOCATED
