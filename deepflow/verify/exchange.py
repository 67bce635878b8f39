"""`python -m deepflow.verify.exchange`: one of two ranks that exchange tensors over their device's own backend.

Both are asked the same question and must find the same numbers, which whole numbers make exact in every type. This
module must not know models.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from pathlib import Path
from typing import Any, Final

import torch

from deepflow.bench.child import conversation
from services.worker.flowserve.device.pick import open_device
from services.worker.flowserve.rank import Rank
from services.worker.flowserve.spmd.collective import Distributed

SIZE: Final = 2
_SHAPES: Final = ((1, 1), (3, 576), (256, 4096))
_DTYPES: Final = (torch.float32, torch.bfloat16)
_ROUNDS: Final = 5  # timed, of the largest


def main() -> None:
    """Answer one question: which rank this is, on what device, and where the other is met. Then wait to be let go:
    whoever leaves takes what he sent with him."""
    with contextlib.ExitStack() as connected, conversation() as (questions, answer):
        for question in questions:
            try:
                answer({"state": "passed", **_exchange(connected, **question)})
            except Exception as error:
                traceback.print_exc()
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                answer({"state": "failed", "reason": reason})


def _exchange(
    connected: contextlib.ExitStack, device: str, rank: int, stages: bool, store: str
) -> dict[str, Any]:
    """With `stages`, rank 0 sends and rank 1 receives; without, both add up and gather."""
    # One device a rank; the CPU is everybody's.
    opened = open_device(device, 0 if device == "cpu" else rank)
    place = Rank(pp=rank, pp_size=SIZE) if stages else Rank(tp=rank, tp_size=SIZE)
    descriptor = os.open(Path(store), os.O_RDWR)
    collective = Distributed(place, backend=opened.collective, place=opened.place, store=descriptor)
    collective.connect()
    connected.callback(collective.close)
    work = _hand_on if stages else _add_up
    found: dict[str, Any] = {"backend": opened.collective}
    for dtype in _DTYPES:
        for shape in _SHAPES:
            work(collective, rank, opened.place, shape, dtype)
    began = time.perf_counter()
    for _ in range(_ROUNDS):
        work(collective, rank, opened.place, _SHAPES[-1], torch.bfloat16)
    name = "send_and_recv_ms" if stages else "all_reduce_and_gather_ms"
    found[name] = round((time.perf_counter() - began) / _ROUNDS * 1e3, 3)
    return found


def _pattern(shape: tuple[int, ...], rank: int, place: torch.device, dtype: torch.dtype) -> Any:
    """Small whole numbers that differ by place and rank."""
    numbers = torch.arange(shape[0] * shape[1], device=place) % 61
    return (numbers + 7 * rank).reshape(shape).to(dtype)


def _add_up(
    collective: Distributed,
    rank: int,
    place: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    patterns = [_pattern(shape, other, place, dtype) for other in range(SIZE)]
    _same(
        "all_reduce", collective.all_reduce(patterns[rank].clone()), sum(patterns[1:], patterns[0])
    )
    gathered = collective.all_gather(patterns[rank].clone())
    _same("all_gather", gathered, torch.cat(patterns, dim=-1))


def _hand_on(
    collective: Distributed,
    rank: int,
    place: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    expected = _pattern(shape, 1, place, dtype)
    if rank == 0:
        collective.send(expected)
    else:
        _same("send and recv", collective.recv(shape, dtype), expected)


def _same(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(found.cpu(), expected.cpu()):
        shape = tuple(expected.shape)
        raise AssertionError(f"{what} of {expected.dtype} {shape} gives other numbers")


if __name__ == "__main__":
    main()
    os._exit(0)  # a backend's own threads may hang at the end
