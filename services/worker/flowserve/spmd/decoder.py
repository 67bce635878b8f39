"""One model over several executors, as the engine sees it: a decoder, whose rank 0 computes in the caller's thread.

Each step is told to the other ranks first, through the ring, and then computed with them. A pipeline's logits come back
from the last stage through shared memory. `begin` computes rank 0's own stage before it returns: it hands the rows on
without waiting for whoever takes them, so while the caller goes on to the next step the stages behind are at work, and
a thread for it would only move the wait. This module must not know requests or sampling.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.decoder import Floats, StepInput
from services.worker.flowserve.device.device import Device
from services.worker.flowserve.rank import Rank
from services.worker.flowserve.spmd import orders
from services.worker.flowserve.spmd.board import Board, make_board
from services.worker.flowserve.spmd.collective import Distributed
from services.worker.flowserve.spmd.crew import Command, Crew, Loss
from services.worker.flowserve.spmd.delta import StepEncoder
from services.worker.flowserve.spmd.heartbeat import Heartbeats
from services.worker.flowserve.spmd.job import Job
from services.worker.flowserve.spmd.ring import RingWriter, Stalled
from services.worker.flowserve.torch_decoder import TorchDecoder
from services.worker.settings import compute_env, read_graphs
from shared.config import Reader

_EXECUTOR: Final = "services.worker.flowserve.spmd.executor"
_STALLED_S: Final = 60.0  # far beyond a step; a rank that hangs is found by its heartbeat
_LOOK_S: Final = 0.2  # how often a wait for logits looks whether they can still come
_END_S: Final = 5.0


class SpmdDecoder:
    """A `decoder.Pipeline` of pp stages, each of tp ranks. Made by `start`, ended by `close` or with its process."""

    def __init__(
        self,
        own: TorchDecoder,
        rank: Rank,
        crew: Crew,
        ring: RingWriter,
        board: Board,
        parts: contextlib.ExitStack,
    ) -> None:
        self.config: ModelConfig = own.config
        self.num_stages = rank.pp_size
        self._own = own
        self._rank = rank
        self._crew = crew
        self._ring = ring
        self._board = board
        self._encoder = StepEncoder()
        self._under_way: deque[int] = deque()  # rows of logits of each step in the pipeline
        self._is_interrupted = False
        self._end = weakref.finalize(self, parts.close)

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        dtype: str,
        cache_dir: Path,
        device: Device,
        tp: int,
        pp: int,
        threads: int,
        on_loss: Callable[[Loss], None] | None = None,
    ) -> Self:
        """Starts ranks 1 and up, loads the model in all, and has them meet. `threads` is each rank's.

        `on_loss` is called from another thread when a rank is lost later on; a process that lives for this model alone
        ends itself there, for the caller's thread may hang in a collective. Without it, calls raise Internal where they
        can. Raises ModelError with the words of the rank that could not load, Internal for any other end of one.
        """
        if sys.platform != "linux":
            raise ModelError(f"a model over {tp * pp} executors needs Linux")
        rank = Rank(tp_size=tp, pp_size=pp)
        rank.part(ModelConfig.from_folder(folder))  # raises before anything is started
        with contextlib.ExitStack() as parts:
            ring = RingWriter(rank.size - 1)
            parts.callback(ring.close)
            heartbeats, store = Heartbeats.make(rank.size), os.memfd_create("deepflow-store")
            # One slot more than steps on their way: logits stay while the caller reads them.
            slots, laid = make_board(pp + 1)
            for fd in (heartbeats, *slots, laid):
                parts.callback(os.close, fd)
            jobs = [
                Job(
                    rank=Rank(tp=index % tp, tp_size=tp, pp=index // tp, pp_size=pp),
                    folder=str(folder),
                    dtype=dtype,
                    cache_dir=str(cache_dir),
                    device=device.name,
                    threads=threads,
                    parent=os.getpid(),
                    heartbeats=heartbeats,
                    store=store,
                    ring=ring.handles(index - 1),
                    slots=slots,
                    laid=laid,
                )
                for index in range(1, rank.size)
            ]
            commands = [_command(job) for job in jobs]
            crew = Crew(commands, Heartbeats(heartbeats, rank.size), on_loss)
            collective = Distributed(
                rank, backend=device.collective, place=device.place, store=store
            )
            parts.callback(collective.close)
            parts.callback(crew.close)
            crew.start()
            own = TorchDecoder.load(
                folder,
                dtype=dtype,
                cache_dir=cache_dir,
                device=device,
                rank=rank,
                collective=collective,
                graphs=read_graphs(Reader(os.environ)),
            )
            crew.wait_loaded()
            collective.connect()
            return cls(own, rank, crew, ring, Board(slots, laid), parts.pop_all())

    @property
    def description(self) -> str:
        """What computes, in a few words."""
        return f"{self._own.description}, tensor parallel {self._rank.tp_size}, stages {self._rank.pp_size}"

    @property
    def timings(self) -> dict[str, float]:
        """Rank 0's own."""
        return self._own.timings

    def bytes_per_block(self, page: int) -> int:
        """Memory of one KV block of `page` positions, in the rank with the most layers."""
        own = len(self._rank.layers(self.config.num_layers))
        most = -(-self.config.num_layers // self._rank.pp_size)
        return self._own.bytes_per_block(page) // own * most

    def allocate(self, num_blocks: int, page: int) -> None:
        """Makes the KV cache, each rank its share."""
        with self._together():
            self._ring.write(orders.allocate(num_blocks, page), timeout_s=_STALLED_S)
            self._own.allocate(num_blocks, page)

    def forward(self, step: StepInput) -> Floats:
        """Computes `step` on all ranks and returns logits [len(step.sample_rows), vocab]."""
        if self.num_stages == 1:
            with self._together():
                logits = self._compute(step)
            self._interrupt()
            return logits
        assert not self._under_way, "steps are in the pipeline"
        self.begin(step)
        return self.finish()

    def begin(self, step: StepInput) -> None:
        """Let a step in; returns once its rows have left the first stage, which is computed here. At most `num_stages`
        may be inside."""
        assert len(self._under_way) < self.num_stages, "the pipeline is full"
        with self._together():
            self._compute(step)
            self._under_way.append(len(step.sample_rows))

    def finish(self) -> Floats:
        """Wait for the oldest step inside; its logits, valid until the next call of `finish`. Only after an interrupt
        is it still inside."""
        self._interrupt()
        shape = (self._under_way[0], self.config.vocab)
        while (logits := self._board.read(shape, timeout_s=_LOOK_S)) is None:
            if self._crew.loss is not None:
                self._under_way.popleft()
                raise self._crew.broken()
        self._under_way.popleft()
        return logits

    def close(self) -> None:
        """End the other ranks. Nothing may be called afterwards."""
        if self._end.alive and self._crew.loss is None:
            with contextlib.suppress(Stalled):
                self._ring.write(orders.end(), timeout_s=_END_S)
                self._crew.close(_END_S)
        self._end()

    def _compute(self, step: StepInput) -> Floats:
        self._ring.write(orders.step(self._encoder.encode(step)), timeout_s=_STALLED_S)
        return self._own.forward(step)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """No rank can go on from a step that rank 0 did not finish, so Ctrl-C waits until it has."""
        if self._crew.loss is not None:
            raise self._crew.broken()
        handler = None
        if threading.current_thread() is threading.main_thread():
            handler = signal.signal(signal.SIGINT, self._note_interrupt)
        try:
            yield
        except Exception as error:
            raise self._crew.broken(error) from error
        finally:
            if handler is not None:
                signal.signal(signal.SIGINT, handler)

    def _note_interrupt(self, *_: object) -> None:
        self._is_interrupted = True

    def _interrupt(self) -> None:
        """Where nothing is left half done: let the Ctrl-C that came in a step have its effect."""
        if self._is_interrupted:
            self._is_interrupted = False
            signal.raise_signal(signal.SIGINT)


def _command(job: Job) -> Command:
    return Command(
        module=_EXECUTOR,
        argument=job.dump(),
        descriptors=job.descriptors,
        env=os.environ | compute_env(job.threads),
    )
