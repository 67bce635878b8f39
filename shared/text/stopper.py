"""Stop strings in text that arrives in pieces.

A stop string counts as soon as it is complete: the one that completes first wins, of several that complete with the
same character the longest. So the outcome does not depend on how the text was cut, and nothing ever waits for a longer
stop string. This module must not know about tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from shared.errors import InvalidRequest


class StopStrings:
    """Passes text on up to the first stop string, holding back only what may yet become one.

    `include` keeps the stop string itself in the text. Raises InvalidRequest for an empty stop string.
    """

    def __init__(self, stops: Iterable[str], *, include: bool = False) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._include = include
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can be shown now, and the stop string if one is complete; after that nothing comes."""
        if self.hit is not None:
            return "", self.hit
        if not self._matchers:
            return text, None
        text, start = self._held + text, len(self._held)
        for end in range(start + 1, len(text) + 1):
            complete = [m.stop for m in self._matchers if m.advance(text[end - 1])]
            if complete:
                self.hit = max(complete, key=len)
                self._held = ""
                return text[: end if self._include else end - len(self.hit)], self.hit
        safe = len(text) - max(matcher.matched for matcher in self._matchers)
        self._held = text[safe:]
        return text[:safe], None

    def finish(self) -> str:
        """The text held back, once it is known that nothing follows."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Knuth-Morris-Pratt: after each character, how long a prefix of `stop` the text ends with."""

    def __init__(self, stop: str) -> None:
        if not stop:
            raise InvalidRequest("a stop string must not be empty", param="stop")
        self.stop = stop
        self.matched = 0
        # For each prefix, the length of its longest proper prefix that is also its suffix.
        self._borders = [0] * (len(stop) + 1)
        border = 0
        for index in range(1, len(stop)):
            while border and stop[index] != stop[border]:
                border = self._borders[border]
            border += stop[index] == stop[border]
            self._borders[index + 1] = border

    def advance(self, character: str) -> bool:
        """Whether `stop` is complete with this character."""
        while self.matched and character != self.stop[self.matched]:
            self.matched = self._borders[self.matched]
        self.matched += character == self.stop[self.matched]
        return self.matched == len(self.stop)
