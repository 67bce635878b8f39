"""Steps on their way: each is computed and sampled in the order launched, in place or on a thread of its own.

On the thread a step may be launched while the one before it runs. Rows whose token that one is still to sample are
filled in just before the step is run, so the device goes from step to step without waiting for the engine's Python. In
a pipeline steps overlap by themselves, and none waits for a token of another. This module must not know scheduling, or
the life of a request.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from typing import Protocol

from services.worker.flowserve import sampler
from services.worker.flowserve.decoder import Decoder, Floats, Pipeline, StepInput, as_pipeline
from services.worker.flowserve.plan import StepPlan
from services.worker.flowserve.sampler import Row, Sampled


@dataclass(slots=True, kw_only=True, eq=False)
class Launch:
    """One step, first as it is to be run, then with what came of it.

    `rows` and `drafts` are those of `plan.sampled`, and so are `results`: the tokens of each, one and as many more as
    its guesses were right. `unknown` are pairs (row of the input, index into `before.results`). `is_sent`: it will run,
    or has run, by itself. `error`: what it raised, or what the step before it raised; then it `was_skipped`.
    `duration_s`: what it took, in a pipeline what it held up the steps behind it.
    """

    plan: StepPlan
    input: StepInput
    rows: list[Row]
    drafts: list[list[int] | tuple[()]] | None
    unknown: list[tuple[int, int]]
    before: Launch | None
    is_sent: bool = False
    results: list[list[Sampled]] = field(default_factory=list)
    error: Exception | None = None
    was_skipped: bool = False
    duration_s: float = 0.0
    has_run: threading.Event = field(default_factory=threading.Event)  # on its stream's thread
    entered: float = 0.0  # the pipeline
    logits: Floats | None = None  # once it has left the pipeline

    def run(self, decoder: Decoder) -> None:
        """Compute and sample. Never raises for a fault in it."""
        before, self.before = self.before, None
        if before is not None and before.error is not None:
            self.error, self.was_skipped = before.error, True
            return
        started = perf_counter()
        try:
            for row, index in self.unknown:
                assert before is not None
                self.input.tokens[row] = before.results[index][0].token
            self.sample(decoder.forward(self.input))
        except Exception as error:
            self.error = error
        self.duration_s = perf_counter() - started

    def sample(self, logits: Floats) -> None:
        """Take the results from the step's logits [len(input.sample_rows), vocab]."""
        if self.drafts is None:
            self.results = [[sampled] for sampled in sampler.sample(logits, self.rows)]
        else:
            self.results = sampler.sample_drafts(logits, self.rows, self.drafts)


class Stream(Protocol):
    """Computes up to `depth` launches one after the other. Launch and collect from one thread, in one order.

    `fills_in`: whether a launch may have rows whose token the launch before it is to sample.
    """

    depth: int
    fills_in: bool

    def launch(self, launch: Launch) -> None:
        """Compute it after all that were launched before, at the latest when it is collected."""
        ...

    def collect(self, launch: Launch) -> None:
        """Wait until the oldest launch has its results. After an interrupt it may be called again."""
        ...

    def close(self) -> None:
        """Nothing is launched any more, and all was collected."""
        ...


def open_stream(decoder: Decoder, *, asynchronous: bool) -> Stream:
    """The stream for a decoder. A pipeline is asynchronous in itself."""
    pipeline = as_pipeline(decoder)
    if pipeline is not None:
        return PipelineStream(pipeline)
    return ThreadStream(decoder) if asynchronous else PlainStream(decoder)


class PlainStream:
    """`collect` itself runs the launch, so there is one at a time."""

    depth = 1
    fills_in = False

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def launch(self, launch: Launch) -> None:
        """It waits to be collected."""

    def collect(self, launch: Launch) -> None:
        """As `Stream`."""
        launch.run(self._decoder)

    def close(self) -> None:
        """Nothing runs by itself."""


class ThreadStream:
    """Launches run on a thread, one ahead of the engine. It ends with `close` or with the stream."""

    depth = 2
    fills_in = True

    def __init__(self, decoder: Decoder) -> None:
        self._inbox: SimpleQueue[Launch | None] = SimpleQueue()
        # The thread knows the queue only: a stream that nobody holds any more ends it.
        arguments = (self._inbox, decoder)
        self._thread = threading.Thread(target=_run_all, args=arguments, name="steps", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._inbox.put, None)

    def launch(self, launch: Launch) -> None:
        """As `Stream`."""
        launch.is_sent = True
        self._inbox.put(launch)

    def collect(self, launch: Launch) -> None:
        """As `Stream`."""
        launch.has_run.wait()

    def close(self) -> None:
        """End the thread, after what was launched."""
        self._inbox.put(None)
        self._thread.join()


def _run_all(inbox: SimpleQueue[Launch | None], decoder: Decoder) -> None:
    while (launch := inbox.get()) is not None:
        launch.run(decoder)
        launch.has_run.set()


class PipelineStream:
    """Launches enter the pipeline at once; `collect` takes out the oldest. A fault in one leaves the others be."""

    fills_in = False

    def __init__(self, pipeline: Pipeline) -> None:
        self.depth = pipeline.num_stages
        self._pipeline = pipeline
        self._last_out = 0.0  # when the last one left

    def launch(self, launch: Launch) -> None:
        """As `Stream`."""
        launch.entered = perf_counter()
        try:
            self._pipeline.begin(launch.input)
        except Exception as error:
            launch.error = error
        launch.is_sent = True

    def collect(self, launch: Launch) -> None:
        """As `Stream`."""
        if launch.error is None:  # it is inside
            try:
                if launch.logits is None:
                    launch.logits = self._pipeline.finish()
                launch.sample(launch.logits)
            except Exception as error:
                launch.error = error
        now = perf_counter()
        launch.duration_s = now - max(launch.entered, self._last_out)
        self._last_out = now

    def close(self) -> None:
        """Nothing runs by itself."""
