"""Who is alive: a pure judge over beats. The clock is passed in; nothing here waits or does I/O.

An instance that was heard of and then is silent for `timeout_s`, or beats while it makes no progress, is lost. Two
things are not the instance's fault and are forgiven: our own bus connection being away (`hold` ... `resume`), and our
own process having been stalled between two checks.
"""

from __future__ import annotations


class Liveness:
    """Last signs of life of a set of instances of one kind.

    A lost instance is reported once; a later beat brings it back.
    """

    def __init__(self, timeout_s: float = 1.5) -> None:
        self.timeout_s = timeout_s
        self._seen: dict[str, float] = {}  # instance -> when it last showed life
        self._held = False
        self._checked: float | None = None

    def beat(self, instance: str, now: float, *, stalled: bool = False) -> None:
        """A beat came in; a `stalled` one proves a process, not progress, so the old sign of life keeps aging."""
        if not stalled or instance not in self._seen:
            self._seen[instance] = now

    def down(self, instance: str) -> bool:
        """Declared dead by somebody who knows. True if it counted as alive until now."""
        return self._seen.pop(instance, None) is not None

    def alive(self, instance: str) -> bool:
        """Whether it was heard of and has not been lost since."""
        return instance in self._seen

    def all(self) -> list[str]:
        """Every instance that counts as alive."""
        return list(self._seen)

    def lost(self, now: float) -> list[str]:
        """Instances that have died since the last call, each once. Call it several times per `timeout_s`."""
        before, self._checked = self._checked, now
        if self._held:
            return []
        if before is not None and now - before > self.timeout_s / 2:
            # We were not running: beats may wait unread in our own socket. Judge after they had a chance.
            self._restart(now)
            return []
        dead = [name for name, seen in self._seen.items() if now - seen > self.timeout_s]
        for name in dead:
            del self._seen[name]
        return dead

    def hold(self) -> None:
        """Our bus connection is away: nobody can be heard, so nobody is judged."""
        self._held = True

    def resume(self, now: float) -> None:
        """The bus is back: every clock starts again."""
        self._held = False
        self._restart(now)

    def _restart(self, now: float) -> None:
        for name in self._seen:
            self._seen[name] = now
