"""What an index gained and lost since somebody last asked, by model: the stuff of block events. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Changes:
    """Pages that a model's index gained and lost; each is in one of the two."""

    stored: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)


class ChangeLog:
    """The latest word about each page that changed. It grows with those until somebody drains it."""

    def __init__(self) -> None:
        self._events: dict[str, dict[bytes, bool]] = {}

    def stored(self, model: str, page_hash: bytes) -> None:
        """The index has it now."""
        self._events.setdefault(model, {})[page_hash] = True

    def removed(self, model: str, page_hash: bytes) -> None:
        """The index has it no more."""
        self._events.setdefault(model, {})[page_hash] = False

    def drain(self) -> dict[str, Changes]:
        """Everything since the last call."""
        events, self._events = self._events, {}
        return {
            model: Changes(
                [page for page, stored in pages.items() if stored],
                [page for page, stored in pages.items() if not stored],
            )
            for model, pages in events.items()
        }
