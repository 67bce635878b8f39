"""Steps on their way: each is computed and sampled in the order launched, on a thread of its own or in place.

A step may be launched while the one before it runs. Rows whose token that one is still to sample are filled in just
before the step is run, so the device goes from step to step without waiting for the engine's Python. This module must
not know scheduling, or the life of a request.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter

from services.worker.flowserve import sampler
from services.worker.flowserve.decoder import Decoder, StepInput
from services.worker.flowserve.sampler import Row, Sampled
from services.worker.flowserve.scheduler import StepPlan


@dataclass(slots=True, kw_only=True, eq=False)
class Launch:
    """One step, first as it is to be run, then with what came of it.

    `rows` and `drafts` are those of `plan.sampled`, and so are `results`: the tokens of each, one and as many more as
    its guesses were right. `unknown` are pairs (row of the input, index into `before.results`). `error`: what it
    raised, or what the step before it raised; then it `was_skipped`.
    """

    plan: StepPlan
    input: StepInput
    rows: list[Row]
    drafts: list[list[int] | tuple[()]] | None
    unknown: list[tuple[int, int]]
    before: Launch | None
    results: list[list[Sampled]] = field(default_factory=list)
    error: Exception | None = None
    was_skipped: bool = False
    duration_s: float = 0.0

    def run(self, decoder: Decoder) -> None:
        """Compute and sample. Never raises for a fault in it."""
        before, self.before = self.before, None
        if before is not None and before.error is not None:
            self.error, self.was_skipped = before.error, True
            return
        started = perf_counter()
        try:
            if before is not None:
                for row, index in self.unknown:
                    self.input.tokens[row] = before.results[index][0].token
            logits = decoder.forward(self.input)
            if self.drafts is None:
                self.results = [[sampled] for sampled in sampler.sample(logits, self.rows)]
            else:
                self.results = sampler.sample_drafts(logits, self.rows, self.drafts)
        except Exception as error:
            self.error = error
        self.duration_s = perf_counter() - started


class Stream:
    """Runs launches one after the other; `collect` returns them in that order.

    `asynchronous`: on a thread, which ends with `close` or with the stream; else `collect` itself runs them. Launch
    and collect from one thread.
    """

    def __init__(self, decoder: Decoder, *, asynchronous: bool) -> None:
        self._decoder = decoder
        self._inbox: SimpleQueue[Launch | None] = SimpleQueue()
        self._outbox: SimpleQueue[Launch] = SimpleQueue()
        self._thread: threading.Thread | None = None
        if asynchronous:
            # The thread knows the queues only: a stream that nobody holds any more ends it.
            arguments = (self._inbox, self._outbox, decoder)
            self._thread = threading.Thread(
                target=_run_all, args=arguments, name="steps", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, self._inbox.put, None)

    def launch(self, launch: Launch) -> None:
        """Run it after all that were launched before."""
        self._inbox.put(launch)

    def collect(self) -> Launch:
        """Wait for the oldest launch that was not collected yet."""
        if self._thread is not None:
            return self._outbox.get()
        launch = self._inbox.get()
        assert launch is not None
        launch.run(self._decoder)
        return launch

    def close(self) -> None:
        """End the thread, after what was launched."""
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join()


def _run_all(
    inbox: SimpleQueue[Launch | None], outbox: SimpleQueue[Launch], decoder: Decoder
) -> None:
    while (launch := inbox.get()) is not None:
        launch.run(decoder)
        outbox.put(launch)
