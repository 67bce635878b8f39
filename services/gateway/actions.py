"""What a request's state machine (`delivery`) wants done; `streams` does it. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import DeepFlowError
from shared.messages import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Submit:
    """Send the request to a JE, as this attempt, after a pause."""

    attempt: int
    delay_s: float
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the TE to send again from `have[choice]` on."""

    te: str
    attempt: int
    have: list[int]


@dataclass(frozen=True, slots=True)
class Drop:
    """Tell a TE (or the JE that has it) to drop attempts up to this one, of one choice or all."""

    to: str
    attempt: int
    choice: int | None = None
    keep: int | None = None


@dataclass(frozen=True, slots=True)
class Emit:
    """New tokens of one choice for the client. `finish` (stop | length | failed) marks the choice's one last Emit."""

    choice: int
    ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: str | None = None
    stop_id: int | None = None
    failure: DeepFlowError | None = None


Action = Submit | Ask | Drop | Emit
