"""A request between its client and its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepflow.sim.trace import Call
from services.scheduler.work import Length

if TYPE_CHECKING:
    from deepflow.sim.te import Held


@dataclass(slots=True, eq=False, kw_only=True)
class Flight:
    """What its gateway knows of a request. `hashes` are those of the full pages of its prompt, chained."""

    number: int
    call: Call
    hashes: tuple[bytes, ...]
    length: Length
    arrived: float
    attempt: int = 0
    held: Held | None = None  # by the TE that has it, as far as its gateway has heard
    je: str = ""  # that took the attempt
    moving: bool = False  # between a prefill and a decode TE
    num_had: int = 0  # tokens of output that its client has from attempts before this one
    first_at: float | None = None
    num_cached: int | None = None  # tokens of its prompt that the first TE found, which is
    prefill_te: str = ""
    num_losses: int = 0
    num_refusals: int = 0
    avoid: tuple[str, ...] = ()
    over: bool = False

    @property
    def id(self) -> str:
        return f"request-{self.number}"


class Names:
    """Chained names of pages: equal for equal prefixes, whatever the ids of a trace are worth."""

    def __init__(self) -> None:
        self._names: dict[tuple[bytes, int], bytes] = {}

    def chain(self, ids: Iterable[int]) -> tuple[bytes, ...]:
        """One name for each, which stands for all ids up to it."""
        names, before, found = self._names, b"", []
        for one in ids:
            key = (before, one)
            name = names.get(key)
            if name is None:
                name = names[key] = len(names).to_bytes(16, "little")
            found.append(name)
            before = name
        return tuple(found)
