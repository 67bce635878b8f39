"""What an executor is told as it starts: its place, its model, and the descriptors that it inherits.

One JSON argument of the command line. This module must not know processes or torch.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Self

from services.worker.flowserve.rank import Rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One executor's. Descriptors are equal in parent and child."""

    rank: Rank
    folder: str
    dtype: str
    cache_dir: str
    device: str
    threads: int
    parent: int  # the process to die with
    heartbeats: int
    store: int  # where the collective's ranks meet
    ring: tuple[int, int, int]
    slots: tuple[int, ...]  # of the board for logits; none without a pipeline
    laid: int

    def dump(self) -> str:
        """As the command line's argument."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def parse(cls, argument: str) -> Self:
        """From the command line's argument."""
        fields = json.loads(argument)
        fields["rank"] = Rank(**fields["rank"])
        fields["ring"] = tuple(fields["ring"])
        fields["slots"] = tuple(fields["slots"])
        return cls(**fields)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All that the child must inherit."""
        return tuple({self.heartbeats, self.store, *self.ring, *self.slots, self.laid} - {-1})
