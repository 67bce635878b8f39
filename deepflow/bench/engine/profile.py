"""Where the time of a step goes: linears, attention, glue, sampling, Python.

The decoder says what its parts took; what is asked of it and of the sampler is timed here, from outside, and what is
left of the wall clock is Python: scheduling, bookkeeping, the loop around. So the split is true only where nothing
runs side by side, that is in synchronous mode. It must not know what the time was spent for.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Final, ParamSpec, TypeAlias, TypeVar

from services.worker.flowserve import sampler
from services.worker.flowserve.engine import Engine

Split: TypeAlias = dict[str, float]  # seconds by part; together the wall clock

PARTS: Final = ("linears", "attention", "glue", "decoder", "sampling", "python")
_LINEARS = ("linears", "head")  # in a decoder's words

P = ParamSpec("P")
T = TypeVar("T")


class Clocks:
    """Running totals of one engine, in seconds: `decoder`, `sampling`, and `decoder.<part>` where the decoder tells.

    Made once in a process, before the engine's first step.
    """

    def __init__(self, engine: Engine) -> None:
        self._decoder = engine.decoder
        self._totals = {"decoder": 0.0, "sampling": 0.0}
        self._is_running = False
        for name, owner, function in (
            ("decoder", self._decoder, "forward"),
            ("sampling", sampler, "sample"),
            ("sampling", sampler, "sample_drafts"),
        ):
            setattr(owner, function, self._clocked(name, getattr(owner, function)))

    def read(self) -> dict[str, float]:
        """All of them, now."""
        parts = {f"decoder.{name}": value for name, value in self._decoder.timings.items()}
        return {**self._totals, **parts}

    def split(self, before: Mapping[str, float], wall_s: float) -> Split:
        """What became of `wall_s` seconds since `before` was read."""
        spent = {name: value - before.get(name, 0.0) for name, value in self.read().items()}
        return split_of(wall_s, spent)

    def _clocked(self, name: str, work: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(work)
        def clocked(*args: P.args, **kwargs: P.kwargs) -> T:
            if self._is_running:  # drafts are sampled by the same function as the rest
                return work(*args, **kwargs)
            self._is_running = True
            began = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self._totals[name] += time.perf_counter() - began
                self._is_running = False

        return clocked


def split_of(wall_s: float, spent: Mapping[str, float]) -> Split:
    """The parts of `wall_s` from what `Clocks` counted in it; `decoder` as one part if it does not tell its own.

    `glue` is what the decoder spent on neither: norms, rotary, quantising, the way in and out of native code.
    """
    decoder, sampling = spent.get("decoder", 0.0), spent.get("sampling", 0.0)
    parts = {
        name.removeprefix("decoder."): seconds
        for name, seconds in spent.items()
        if name.startswith("decoder.")
    }
    split: Split = {}
    if any(parts.values()):
        split["linears"] = sum(parts.get(name, 0.0) for name in _LINEARS)
        split["attention"] = parts.get("attention", 0.0)
        split["glue"] = decoder - split["linears"] - split["attention"]
    else:
        split["decoder"] = decoder
    split["sampling"] = sampling
    split["python"] = wall_s - decoder - sampling
    return split
