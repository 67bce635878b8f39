"""What the executors of one model exchange in a step: sums and slices within a stage, rows from stage to stage.

A protocol, `Alone` for a model that one executor holds, and torch.distributed for more. They find each other through an
anonymous file that they inherit, and the CPU's connections are on loopback: no port, name or file that others could
see, or that could be taken or left behind. This module must not know what the tensors mean.
"""

from __future__ import annotations

import os
from collections import deque
from datetime import timedelta
from typing import Final, Protocol

import torch
import torch.distributed as dist

from services.worker.flowserve.rank import Rank

# An executor that lags is no fault here, and one that hangs is found by its heartbeat long before.
TIMEOUT: Final = timedelta(minutes=5)


class Collective(Protocol):
    """Every rank calls the same in the same order. Results may take the place of their inputs.

    `in_graphs`: `all_reduce` and `all_gather` may be recorded in a device's graph.
    """

    @property
    def in_graphs(self) -> bool: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all x of this stage, the same bits on each of its ranks."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """All x of this stage side by side along the last dimension, by rank."""
        ...

    def send(self, x: torch.Tensor) -> None:
        """Hand x to the same slice of the next stage; does not wait until that is ready for it."""
        ...

    def recv(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What the same slice of the stage before sent."""
        ...


class Alone:
    """One executor holds the whole model."""

    in_graphs = True

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x."""
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x."""
        return x

    def send(self, x: torch.Tensor) -> None:
        """There is no next stage."""
        raise AssertionError("the only stage is the last one")

    def recv(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """There is no stage before."""
        raise AssertionError("the only stage is the first one")


class Distributed:
    """torch.distributed between the executors of one model. There is one in a process; `connect` comes first.

    `backend` is gloo, nccl or hccl, `store` the descriptor of a file that all ranks inherited. It must stay open to the
    process's end: torch opens the file anew whenever it lets go of the last part of a group.
    """

    def __init__(self, rank: Rank, *, backend: str, place: torch.device, store: int) -> None:
        self._rank = rank
        self._backend = backend
        self._place = place
        self._store = store
        self._stage: dist.ProcessGroup | None = None
        # With the tensors, which must stay until they are gone.
        self._sending: deque[tuple[dist.Work, torch.Tensor]] = deque()

    @property
    def in_graphs(self) -> bool:
        """See `Collective`: gloo's run on the host, which a replay does not come by; of hccl's it is not known."""
        return self._backend == "nccl" or self._rank.tp_size == 1

    def connect(self) -> None:
        """Meet all the others. Raises RuntimeError where one does not come."""
        rank = self._rank
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            self._backend,
            store=dist.FileStore(  # type: ignore[attr-defined]  # documented, and there
                f"/proc/self/fd/{self._store}", rank.size
            ),
            rank=rank.index,
            world_size=rank.size,
            timeout=TIMEOUT,
        )
        for stage in range(rank.pp_size):  # everybody makes every group
            ranks = list(range(stage * rank.tp_size, (stage + 1) * rank.tp_size))
            group = dist.new_group(ranks, timeout=TIMEOUT)
            if stage == rank.pp:
                self._stage = group

    def close(self) -> None:
        """Leave, after the others."""
        self._sending.clear()
        if self._stage is not None:
            self._stage = None
            dist.destroy_process_group()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `Collective`.

        On the CPU every rank adds all of them up, in the order of ranks: gloo's own sums are the same on every rank
        too, but add a row in an order that depends on its place in the batch.
        """
        if self._rank.tp_size == 1:
            return x
        if self._backend != "gloo":
            x = x.contiguous()
            dist.all_reduce(x, group=self._stage)
            return x
        first, *others = self._gather(x)
        for other in others:
            first += other
        return first

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See `Collective`."""
        return x if self._rank.tp_size == 1 else torch.cat(self._gather(x), dim=-1)

    def send(self, x: torch.Tensor) -> None:
        """See `Collective`."""
        if len(self._sending) > self._rank.pp_size:  # no more steps are in the pipeline
            self._sending[0][0].wait()
            self._sending.popleft()
        x = x.contiguous()
        work = dist.isend(x, self._rank.index + self._rank.tp_size)
        assert work is not None
        self._sending.append((work, x))

    def recv(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See `Collective`."""
        x = torch.empty(shape, dtype=dtype, device=self._place)
        dist.recv(x, self._rank.index - self._rank.tp_size)
        return x

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self._rank.tp_size)]
        dist.all_gather(parts, x, group=self._stage)
        return parts
