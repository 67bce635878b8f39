"""One choice of a request in a simulated engine: plain state, moved on by the engine.

This module must not know budgets, pools or time.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum

from shared.fairness import Share
from shared.messages import Band


class Status(Enum):
    """Where a sequence is."""

    NEW = "new"
    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    ENDED = "ended"


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One choice. It knows how many tokens it will generate; the engine looks no further than the next of them.

    `hashes` are of the full pages of its first `num_prompt` tokens. `carried`: the KV of that many tokens came with a
    hand-over, the last page's too, which has no hash. `keeps`: it ends with its first token (a prefill task).
    """

    order: int
    band: Band
    tenant: str
    hashes: SequenceOf[bytes]
    num_prompt: int
    num_output: int
    expected: int = 0  # tokens of output; 0: unknown
    carried: int = 0
    keeps: bool = False
    share: Share[Sequence] | None = None  # its tenant's, in the engine that has it
    status: Status = Status.NEW
    table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_indexed: int = 0  # pages
    num_paid: int = 0  # rows that its tenant has paid for, of one that was preempted
    num_cached: int | None = None  # tokens found at its first admission
    num_done: int = 0  # tokens generated, unless it decodes: then see `begun`
    begun: int = 0  # the engine's count of steps, less the tokens generated

    @property
    def rank(self) -> tuple[int, int]:
        """Its band and its age: the last one gives way first."""
        return self.band, self.order

    @property
    def num_known(self) -> int:
        """Of a sequence that does not decode."""
        return self.num_prompt + self.num_done


def share_of(sequence: Sequence) -> Share[Sequence]:
    """Its tenant's share, once an engine has it."""
    assert sequence.share is not None, "no engine has it"
    return sequence.share
