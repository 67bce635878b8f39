"""The byte budget of request bodies in hand: from before a body is read until its answer is finished.

A body costs its length times a small factor in other forms (values, text, token ids), so what bounds the bodies bounds
the memory of calls in flight. This module must not know HTTP.
"""

from __future__ import annotations

from shared.errors import Overloaded

RETRY_AFTER_S = 1.0


class BodyBudget:
    """At most `limit` bytes at once; a body that is alone is always taken."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, num_bytes: int) -> Held:
        """Room for a body of at most `num_bytes`. Raises Overloaded."""
        if self.held and self.held + num_bytes > self.limit:
            raise Overloaded(
                "the requests in flight take up all the memory set aside for them",
                retry_after_s=RETRY_AFTER_S,
            )
        return Held(self, num_bytes)


class Held:
    """A share of the budget; a context manager that gives it back."""

    def __init__(self, budget: BodyBudget, num_bytes: int) -> None:
        self._budget = budget
        self._num_bytes = 0
        self.resize(num_bytes)

    def resize(self, num_bytes: int) -> None:
        """The body turned out to have `num_bytes`."""
        self._budget.held += num_bytes - self._num_bytes
        self._num_bytes = num_bytes

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *error: object) -> None:
        self.resize(0)
