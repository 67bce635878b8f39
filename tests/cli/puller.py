"""A child process for tests: pulls a model, tells every step, and stops dead at the event it is told to.

`python -m tests.cli.puller REFERENCE CACHE NAME STOP_AT`: prints each step's name; at event number STOP_AT (steps and
advances count) it prints "stopped" and waits for a line on its standard input. At the end it prints "pulled PATH", or
"failed KIND: MESSAGE".
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from deepflow.models.pull import pull
from shared.errors import DeepFlowError


class Told:
    """A Progress that prints, and stops at one event."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at = stop_at
        self.num_events = 0

    def step(self, name: str, total_bytes: int) -> None:
        """Printed."""
        tell(name)
        self._event()

    def advance(self, num_bytes: int) -> None:
        """Counted."""
        self._event()

    def _event(self) -> None:
        self.num_events += 1
        if self.num_events == self.stop_at:
            tell("stopped")
            sys.stdin.readline()


def tell(line: str) -> None:
    """One line to the parent, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(reference: str, cache: str, name: str, stop_at: str) -> None:
    """See above."""
    # Of a process that was started in the background, its children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        model = pull(reference, Path(cache), name=name or None, progress=Told(int(stop_at)))
        tell(f"pulled {model.path}")
    except DeepFlowError as error:
        tell(f"failed {type(error).__name__}: {error.message}")


if __name__ == "__main__":
    main(*sys.argv[1:])
