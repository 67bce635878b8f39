"""An instance with nothing but DistFlow, as a process of its own: it is told what to do line by line, in JSON.

Tests start it with `Peer`; `python -m tests.shared.distflow_peer` is what runs in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from shared.distflow.flow import DistFlow
from shared.distflow.link import Link
from shared.distflow.region import Piece, Region
from shared.distflow.relay import Patience, Relayed
from shared.distflow.shm import SharedBuffer
from shared.distflow.ticket import Ticket
from shared.rtc_messages import LinkOffer

ENDED = '"ended"\n'
ROOT = Path(__file__).parents[2]


def pattern(num_bytes: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes that a test can make again."""
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


class SlowMemory:
    """Memory the host is said not to address, which takes `load_s` for each chunk that is read from it."""

    def __init__(self, num_bytes: int, load_s: float = 0.0) -> None:
        self.bytes = bytearray(num_bytes)
        self.num_bytes = num_bytes
        self.load_s = load_s
        self.num_loads = 0

    def staging(self, num_bytes: int) -> bytearray:
        return bytearray(num_bytes)

    def load(self, offset: int, into: memoryview) -> None:
        self.num_loads += 1
        time.sleep(self.load_s)
        into[:] = self.bytes[offset : offset + len(into)]

    def save(self, offset: int, data: memoryview) -> None:
        self.bytes[offset : offset + len(data)] = data


class Peer:
    """One instance in a process, from the test's side. The process is used again by another one after `end`."""

    _idle: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, name: str, directory: Path, host: str) -> None:
        self.name = name
        self.process = self._idle.pop() if self._idle else _start()
        self.tell("begin", name=name, directory=str(directory), host=host)
        self.answer()

    def ask(self, verb: str, **arguments: Any) -> Any:
        """What the verb returns there; RuntimeError with the fault if it failed."""
        self.tell(verb, **arguments)
        return self.answer()

    def tell(self, verb: str, **arguments: Any) -> None:
        """Have it done; `answer` later."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([verb, arguments]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        ok, value = json.loads(self.process.stdout.readline())
        if not ok:
            raise RuntimeError(value)
        return value

    def offer(self, by: str, **arguments: Any) -> LinkOffer:
        fields = self.ask("offer", by=by, **arguments)
        return LinkOffer(**{**fields, "token": bytes.fromhex(fields["token"])})

    def register(self, num_bytes: int, seed: int = 0, **arguments: Any) -> Region:
        return Region(*self.ask("register", num_bytes=num_bytes, seed=seed, **arguments))

    def stop(self) -> None:
        """Returns when every thread of it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        while any(_state(task) != "T" for task in tasks.iterdir()):
            time.sleep(0.001)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Close the instance, unless it has ended. Idempotent."""
        assert self.process.stdout is not None
        if self in _ended:
            return
        _ended.add(self)
        self.go_on()
        try:
            self.tell("end")
            while self.process.stdout.readline() != ENDED:  # answers nobody asked for
                if self.process.poll() is not None:
                    raise BrokenPipeError
            self._idle.append(self.process)
        except BrokenPipeError:
            _discard(self.process)

    @classmethod
    def end_all(cls) -> None:
        """End the processes that nobody uses any more."""
        while cls._idle:
            _discard(cls._idle.pop())


_ended: weakref.WeakSet[Peer] = weakref.WeakSet()


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.shared.distflow_peer"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _discard(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it was killed with something still to be written
        process.stdin.close()
    process.stdout.close()
    process.wait(5)


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def as_json(offer: LinkOffer) -> dict[str, Any]:
    """To hand it on to another peer."""
    return {
        "to": offer.to,
        "token": offer.token.hex(),
        "addresses": offer.addresses,
        "ttl_ms": offer.ttl_ms,
    }


class _Instance:
    """The verbs, in the process."""

    def __init__(self, flow: DistFlow) -> None:
        self._flow = flow
        self._regions: dict[int, Region] = {}
        self._memory: dict[int, Any] = {}
        self._links: dict[str, Link] = {}
        self._relayed: Relayed | None = None
        self._into: Any = None

    def offer(self, by: str, ttl_s: float = 10.0) -> dict[str, Any]:
        return as_json(self._flow.offer(by, ttl_s=ttl_s))

    def register(
        self, num_bytes: int, seed: int, shared: bool = False, slow_s: float | None = None
    ) -> list[int]:
        memory = self._allocate(num_bytes, shared, slow_s)
        _view(memory)[:] = memoryview(pattern(num_bytes, seed))
        return self._keep(self._flow.register(memory), memory)

    def renew(self, region: int) -> list[int]:
        return self._keep(self._flow.renew(self._regions[region]), self._memory[region])

    def hurry(self, region: int) -> None:
        """Slow memory is slow no more."""
        self._memory[region].load_s = 0.0

    def change(self, region: int) -> None:
        """The next generation, whose bytes are all zero, also in a chunk of the old one that is being loaded."""
        self._flow.renew(self._regions[region])
        memory = self._memory[region]
        memory.bytes[:] = bytes(memory.num_bytes)

    def unregister(self, region: int) -> None:
        self._flow.unregister(self._regions[region])

    def link(self, offer: dict[str, Any]) -> str:
        fields = {**offer, "token": bytes.fromhex(offer["token"])}
        link = self._links[offer["to"]] = self._flow.link(LinkOffer(**fields), timeout_s=10)
        return link.scheme

    def read(self, peer: str, region: list[int], timeout_s: float = 10.0) -> int:
        """Read all of it; the sum of its bytes."""
        id, generation, num_bytes = region
        into = np.zeros(num_bytes, np.uint8)
        piece = Piece(id, generation, 0, num_bytes, into)
        self._flow.transfer(self._links[peer], [piece], timeout_s=timeout_s).wait()
        return int(into.sum(dtype=np.int64))

    def relay(
        self,
        sources: list[tuple[str, list[int]]],
        timeout_s: float = 20.0,
        stall_s: float = 0.5,
        floor_bytes_s: float = 0.0,
        shared: bool = False,
        slow_s: float | None = None,
    ) -> list[int]:
        """Read from these peers in turn, as far as there are links to them."""

        def draw() -> Iterator[tuple[Link, Region]]:
            for peer, region in sources:
                yield self._links[peer], Region(*region)

        self._into = self._allocate(sources[0][1][2], shared, slow_s)
        self._relayed = self._flow.relay(
            draw(), self._into, timeout_s=timeout_s, patience=Patience(stall_s, floor_bytes_s)
        )
        return self._keep(self._relayed.region, self._into)

    def wait(self) -> int:
        """Until the relay has all; the sum of its bytes."""
        assert self._relayed is not None
        ticket: Ticket = self._relayed.ticket
        ticket.wait()
        return int(np.frombuffer(_view(self._into), np.uint8).sum(dtype=np.int64))

    def _allocate(self, num_bytes: int, shared: bool, slow_s: float | None) -> Any:
        if slow_s is not None:
            return SlowMemory(num_bytes, slow_s)
        return self._flow.allocate(num_bytes) if shared else bytearray(num_bytes)

    def _keep(self, region: Region, memory: Any) -> list[int]:
        self._regions[region.id], self._memory[region.id] = region, memory
        return [region.id, region.generation, region.num_bytes]


def _view(memory: Any) -> memoryview:
    if isinstance(memory, SharedBuffer):
        return memory.view
    return memoryview(memory.bytes if isinstance(memory, SlowMemory) else memory)


def main() -> None:
    flow: DistFlow | None = None
    instance: _Instance | None = None
    for line in sys.stdin:
        verb, arguments = json.loads(line)
        answer: list[Any] = [True, None]
        try:
            if verb == "begin":
                arguments["directory"] = Path(arguments["directory"])
                flow = DistFlow(**arguments)
                flow.start()
                instance = _Instance(flow)
            elif verb == "end":
                assert flow is not None
                flow.close()
                flow = instance = None
                print(ENDED, end="", flush=True)  # noqa: T201 - the protocol
                continue
            else:
                answer = [True, getattr(instance, verb)(**arguments)]
        except Exception as error:  # the test is told
            fault = getattr(error, "fault", type(error).__name__)
            answer = [False, str(fault)]
        print(json.dumps(answer), flush=True)  # noqa: T201 - the protocol
    os._exit(0)


if __name__ == "__main__":
    main()
