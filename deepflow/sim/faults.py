"""What goes wrong, and when. Data; `cluster.py` has it happen.

TEs and JEs are named by their number in the scenario, counted from 0. Times are seconds from the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class TeDeath:
    """A TE's process dies. Its pod host says so after `down_after_s`; None: its silence has to tell.

    With `restart_after_s` another one takes its place, which then has to load.
    """

    at: float
    te: int
    down_after_s: float | None = 0.05
    restart_after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JeDeath:
    """A JE's process dies, and one that knows nothing takes its place after `restart_after_s`; None: nobody does."""

    at: float
    je: int
    restart_after_s: float | None = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A TE works on, but nobody hears of it and it hears of nobody. What it announced meanwhile is lost, what it owes
    to clients and JEs is told afterwards."""

    at: float
    te: int
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Beats:
    """Beats and news of pages come late by up to `late_s`, in any order, and `lost` of them not at all; of one TE or
    all (None), to one JE or all."""

    at: float
    for_s: float
    lost: float = 0.0
    late_s: float = 0.0
    te: int | None = None
    je: int | None = None


Fault: TypeAlias = TeDeath | JeDeath | Partition | Beats
