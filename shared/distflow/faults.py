"""How a link or a transfer fails: two errors, and one word each for what went wrong.

It must not know who retries, or what is done instead.
"""

from __future__ import annotations

from enum import StrEnum

from shared.errors import DeepFlowError


class Fault(StrEnum):
    """What went wrong. The values cross the wire."""

    REFUSED = "refused"  # unknown, used or expired token, wrong name, or no more links
    UNREACHABLE = "unreachable"  # nobody answers at any address of the offer
    TAMPERED = "tampered"  # a proof or a frame's MAC does not hold
    PEER_LOST = "peer_lost"  # the connection ended in the middle
    DEADLINE = "deadline"  # the peer is stopped or slow
    UNKNOWN_REGION = "unknown_region"  # never registered, or not any more
    STALE = "stale"  # the region has another generation than asked for, before or after the bytes were read
    OUT_OF_BOUNDS = "out_of_bounds"
    CORRUPT = "corrupt"  # the bytes that came are not the bytes that were sent
    FAILED = "failed"  # the holder could not read its own memory, or a relay's source gave up
    CANCELLED = "cancelled"
    CLOSED = "closed"  # this link, or this DistFlow, was closed here


class LinkError(DeepFlowError):
    """No link, or not any more. Ask the peer for another offer."""

    code = "link_failed"
    status = 503

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class TransferError(DeepFlowError):
    """A transfer did not deliver: whatever it wrote into its destinations is to be thrown away."""

    code = "transfer_failed"
    status = 503

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault
