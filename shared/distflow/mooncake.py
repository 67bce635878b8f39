"""Mooncake's transfer engine as a backend, over TCP, where its wheel is installed. Imported only when it is asked for.

The wheel is `mooncake-transfer-engine-non-cuda`; it needs libibverbs1 and libnl-3-200 of the system also where there is
no InfiniBand. Handles travel over DistFlow's authenticated links, but the engine listens on a port of its own and asks
nobody who he is: whoever reaches that port can read what is registered. So this is for a fabric that only instances
reach. Generations are checked by DistFlow, as for every way.

It must not know links or regions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shared.distflow.backend import Attached
from shared.distflow.faults import Fault, TransferError
from shared.distflow.memory import Memory, Source, readable
from shared.errors import Unavailable

_CHUNK_BYTES: Final = 8 << 20


class MooncakeBackend:
    """See `Backend`. Raises Unavailable without the wheel, or where the engine does not start on `ip`."""

    scheme: Final = "mooncake-tcp"

    def __init__(self, ip: str) -> None:
        try:
            from mooncake.engine import TransferEngine  # type: ignore[import-not-found]
        except ImportError as error:
            raise Unavailable(f"Mooncake's transfer engine cannot be loaded: {error}") from error
        self._engine: Any = TransferEngine()
        if self._engine.initialize(ip, "P2PHANDSHAKE", "tcp", "") != 0:
            raise Unavailable(f"Mooncake's transfer engine does not start on {ip}")
        self._address = f"{ip}:{self._engine.get_rpc_port()}"
        self._lock = threading.Lock()
        self._exported: dict[int, npt.NDArray[np.uint8]] = {}  # by address; keeps the memory

    def export(self, memory: Source) -> bytes | None:
        """The engine's address and the memory's."""
        if isinstance(memory, Memory):
            return None
        array = np.frombuffer(readable(memory), np.uint8)
        address = array.ctypes.data
        with self._lock:
            if address not in self._exported:
                if self._engine.register_memory(address, len(array)) != 0:
                    return None
                self._exported[address] = array
        return f"{self._address} {address}".encode()

    def withdraw(self, memory: Source) -> None:
        """Take it back from the engine."""
        if isinstance(memory, Memory):
            return
        address = np.frombuffer(readable(memory), np.uint8).ctypes.data
        with self._lock:
            if self._exported.pop(address, None) is not None:
                self._engine.unregister_memory(address)

    def attach(self, handle: bytes, num_bytes: int, timeout_s: float) -> Attached:
        """Nothing is said to the peer yet."""
        try:
            peer, address = handle.decode().split(" ")
            return _Attached(self._engine, peer, int(address))
        except ValueError as error:
            raise TransferError(Fault.FAILED, "that is no handle of Mooncake's") from error

    def close(self) -> None:
        """Take all memory back from the engine."""
        with self._lock:
            for address in self._exported:
                self._engine.unregister_memory(address)
            self._exported.clear()


class _Attached:
    """Reads by way of a buffer of its own: the engine knows no deadline, and what it still writes after one must not
    land in a destination that was given up. After a missed deadline it is not used again."""

    def __init__(self, engine: Any, peer: str, address: int) -> None:
        self._engine = engine
        self._peer = peer
        self._address = address
        self._lock = threading.Lock()
        self._bounce: npt.NDArray[np.uint8] = np.empty(_CHUNK_BYTES, np.uint8)
        self._broken = engine.register_memory(self._bounce.ctypes.data, _CHUNK_BYTES) != 0

    def read(
        self, offset: int, length: int, into: memoryview | Memory, start: int, timeout_s: float
    ) -> None:
        """See `Attached`; one read at a time."""
        if not self._lock.acquire(timeout=timeout_s):
            raise TransferError(Fault.DEADLINE, "Mooncake did not get to this in time")
        try:
            for done in range(0, length, _CHUNK_BYTES):
                size = min(_CHUNK_BYTES, length - done)
                self._fetch(self._address + offset + done, size, timeout_s)
                chunk = self._bounce[:size].data
                if isinstance(into, Memory):
                    into.save(start + done, chunk)
                else:
                    into[start + done : start + done + size] = chunk
        finally:
            self._lock.release()

    def close(self) -> None:
        """Take the buffer back, unless the engine may still write to it."""
        if not self._broken:
            self._engine.unregister_memory(self._bounce.ctypes.data)

    def _fetch(self, address: int, size: int, timeout_s: float) -> None:
        if self._broken:
            raise TransferError(Fault.PEER_LOST, "Mooncake lost this peer before")
        local = self._bounce.ctypes.data
        done = _in_thread(lambda: self._engine.transfer_sync_read(self._peer, local, address, size))
        try:
            status = done.result(timeout_s)
        except FutureTimeout as error:
            self._broken = True
            raise TransferError(Fault.DEADLINE, "Mooncake did not bring it in time") from error
        if status != 0:
            raise TransferError(Fault.PEER_LOST, f"Mooncake could not read from {self._peer}")


def _in_thread(call: Callable[[], int]) -> Future[int]:
    future: Future[int] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # the engine's own
            future.set_exception(error)

    threading.Thread(target=run, name="distflow-mooncake", daemon=True).start()
    return future
