"""`python -m services.worker.flowserve.spmd.executor JOB`: one executor of a model that spans several processes.

It loads its share of the weights, says so on standard output, meets the others, and then does what rank 0 puts into
the ring until that says to end. It dies with the thread that started it, however that ended. It must not know
requests or sampling, nor plan anything.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from services.worker.flowserve.config import ModelError
from services.worker.flowserve.spmd import orders
from services.worker.flowserve.spmd.delta import StepDecoder
from services.worker.flowserve.spmd.heartbeat import BEAT_S, Heartbeats
from services.worker.flowserve.spmd.job import Job
from services.worker.flowserve.spmd.orders import Order
from services.worker.flowserve.spmd.ring import RingReader

if TYPE_CHECKING:
    from services.worker.flowserve.spmd.collective import Distributed
    from services.worker.flowserve.torch_decoder import TorchDecoder
from services.worker.settings import read_graphs
from shared.config import Reader

_PR_SET_PDEATHSIG: Final = 1
_MAX_WORDS: Final = 4000  # of an error's text: one write of a pipe


def run(argument: str) -> NoReturn:
    """Run one executor to its end."""
    job = Job.parse(argument)
    _die_with(job.parent)
    voice = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is log
    threading.Thread(target=_beat, args=(job,), name="heartbeat", daemon=True).start()
    code = 0
    try:
        decoder, collective = _load(job)
        gc.freeze()  # what there is stays: the collector need not visit it again
        _say(voice, {"loaded": decoder.description})
        collective.connect()
        _obey(job, decoder)
    except (
        BaseException
    ) as error:  # whatever it is, it is the end of this process, and rank 0 is to know why
        traceback.print_exc()
        message = (
            error.message if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
        )
        kind = "model" if isinstance(error, ModelError) else "internal"
        _say(voice, {"error": {"kind": kind, "message": message[:_MAX_WORDS]}})
        code = 1
    sys.stderr.flush()
    os._exit(
        code
    )  # nothing of torch is taken down in order: the others may be gone, and it would wait for them


def _load(job: Job) -> tuple[TorchDecoder, Distributed]:
    """The decoder with this rank's weights, and its tie to the others, not met yet. Raises ModelError."""
    import torch

    from services.worker.flowserve.device.pick import open_device
    from services.worker.flowserve.spmd.collective import Distributed
    from services.worker.flowserve.torch_decoder import TorchDecoder

    torch.set_num_threads(job.threads)
    device = open_device(job.device, job.rank.index)
    collective = Distributed(
        job.rank, backend=device.collective, place=device.place, store=job.store
    )
    decoder = TorchDecoder.load(
        Path(job.folder),
        dtype=job.dtype,
        cache_dir=Path(job.cache_dir),
        device=device,
        rank=job.rank,
        collective=collective,
        graphs=read_graphs(Reader(os.environ)),
    )
    return decoder, collective


def _obey(job: Job, decoder: TorchDecoder) -> None:
    """Do what the ring says, until it says to end."""
    from services.worker.flowserve.spmd.board import Board

    ring, steps = RingReader(*job.ring), StepDecoder()
    # The last stage's first slice has the logits; without a pipeline that is rank 0, which keeps them.
    has_logits = job.rank.is_last and job.rank.tp == 0
    board = Board(job.slots, job.laid) if has_logits else None
    while True:
        record = ring.read()
        order = Order(record[0])
        if order is Order.STEP:
            logits = decoder.forward(steps.decode(memoryview(record)[1:]))
            if board is not None:
                board.write(logits)
        elif order is Order.ALLOCATE:
            decoder.allocate(*orders.read_allocate(record))
        else:
            return


def _beat(job: Job) -> None:
    heartbeats = Heartbeats(job.heartbeats, job.rank.size)
    while True:
        heartbeats.beat(job.rank.index)
        time.sleep(BEAT_S)
        if os.getppid() != job.parent:
            os._exit(1)


def _die_with(parent: int) -> None:
    """Have the kernel kill us, stopped or not, when the thread that started us ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # too late for the kernel
        os._exit(1)


def _say(voice: int, words: dict[str, object]) -> None:
    os.write(voice, json.dumps(words).encode() + b"\n")


if __name__ == "__main__":
    run(sys.argv[1])
