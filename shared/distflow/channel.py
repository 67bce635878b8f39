"""Frames over one connected socket: numbered, authenticated, and never later than a deadline.

A frame is header, body, MAC (HMAC-SHA256 cut to 128 bits over both, with a key of this connection and direction), and
perhaps bytes after it: the MAC covers their length and checksum, not themselves. A frame that is changed, repeated,
left out or out of its place fails. It must not know what frames mean.
"""

from __future__ import annotations

import array
import contextlib
import hmac
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Final, TypeAlias

from shared.distflow.faults import Fault, TransferError

# How many seconds are left; raises TransferError when none are, or nobody waits any more.
Remaining: TypeAlias = Callable[[], float]

MAX_BODY_BYTES: Final = 256 << 10
_HEADER: Final = struct.Struct("<BxxxIQ")  # kind, bytes of the body, number of the frame
_MAC_BYTES: Final = 16
_REST_S: Final = 5.0  # for the rest of a frame whose beginning was waited for without a deadline
_SLICE_S: Final = 0.2  # how long a wait goes on before `Remaining` is asked again
_MIN_WAIT_S: Final = 0.001  # to the kernel, none would be for ever
_TIMEVAL: Final = struct.Struct("@ll")
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(array.array("i").itemsize)


class Kind(IntEnum):
    """What a frame is; bodies are described where they are packed (holder.py, link.py)."""

    READY = 1
    READ = 2
    CHUNK = 3
    DONE = 4
    FAULT = 5
    WAITING = 6
    MAP = 7
    MAPPED = 8
    CHECK = 9


class Channel:
    """One socket. One thread at a time uses it, but any may `close` it, which wakes the one that does.

    The kernel bounds each wait: Python's own time-outs would be two more system calls for each one that moves bytes.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        self._socket = connection
        self._waits_s: dict[int, float] = {}  # as the kernel was told, by option
        self._passes_files = connection.family == socket.AF_UNIX
        self._send_key = self._receive_key = b""
        self._num_sent = self._num_received = 0
        self._in_step = True

    def secure(self, send_key: bytes, receive_key: bytes) -> None:
        """From here on frames can be exchanged."""
        self._send_key, self._receive_key = send_key, receive_key

    @property
    def passes_files(self) -> bool:
        """Whether descriptors can be handed over: both ends are on one host."""
        return self._passes_files

    @property
    def in_step(self) -> bool:
        """Whether everything that was begun here, a frame or its bytes, was written or read to its end."""
        return self._in_step

    def is_open(self) -> bool:
        """Whether the peer still has its end open, as far as is known. Only for a channel nobody is reading from."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """`close`, and give the descriptor back: for the thread that uses it, or after that has ended."""
        self.close()
        self._socket.close()

    # ------------------------------------------------------------------------------------------------------- frames

    def send(
        self,
        kind: Kind,
        body: bytes,
        remaining: Remaining,
        *,
        payload: memoryview | None = None,
        fd: int | None = None,
    ) -> None:
        """One frame, the bytes that belong to it, and a descriptor with it. Raises TransferError."""
        remaining()  # a frame is begun in time, or not at all
        head = _HEADER.pack(kind, len(body), self._num_sent) + body
        head += _mac(self._send_key, head)
        self._num_sent += 1
        ancillary = []
        if fd is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        self.write(
            [memoryview(head), payload] if payload else [memoryview(head)], remaining, ancillary
        )

    def receive(self, remaining: Remaining | None) -> tuple[Kind, memoryview, int | None]:
        """The next frame: kind, body, and the descriptor that came with it, which is now the caller's.

        `remaining` None waits for its beginning for ever (and then a little for the rest). Raises TransferError.
        """
        header = bytearray(_HEADER.size)
        fd = self._read_first(header, remaining)
        try:
            kind, num_bytes, number = _HEADER.unpack(header)
            if num_bytes > MAX_BODY_BYTES or number != self._num_received:
                raise TransferError(Fault.TAMPERED, "a frame is not the one that is due")
            rest = memoryview(bytearray(num_bytes + _MAC_BYTES))
            self.read_into(rest, remaining or within(_REST_S))
            body, mac = rest[:num_bytes], rest[num_bytes:]
            if not hmac.compare_digest(_mac(self._receive_key, bytes(header) + body), mac):
                raise TransferError(Fault.TAMPERED, "a frame is not as it was sent")
            self._num_received += 1
            try:
                return Kind(kind), body, fd
            except ValueError as error:
                raise TransferError(
                    Fault.TAMPERED, f"there are no frames of kind {kind}"
                ) from error
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise

    # -------------------------------------------------------------------------------------------------------- bytes

    def write(
        self,
        parts: Sequence[memoryview],
        remaining: Remaining,
        ancillary: Sequence[tuple[int, int, array.array[int]]] = (),
    ) -> None:
        """All bytes of `parts`, in order. Raises TransferError."""
        self._in_step = False
        left = list(parts)
        while left:
            self._wait_at_most(socket.SO_SNDTIMEO, remaining())
            try:
                num_sent = self._socket.sendmsg(left, ancillary)
            except BlockingIOError:
                continue
            except OSError as error:
                raise _lost(error) from error
            ancillary = ()
            while left and num_sent >= len(left[0]):
                num_sent -= len(left.pop(0))
            if left:
                left[0] = left[0][num_sent:]
        self._in_step = True

    def read_into(self, view: memoryview, remaining: Remaining) -> None:
        """Fill `view`. Raises TransferError."""
        self._in_step = False
        while len(view):
            self._wait_at_most(socket.SO_RCVTIMEO, remaining())
            try:
                num_read = self._socket.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                continue
            except OSError as error:
                raise _lost(error) from error
            if not num_read:
                raise TransferError(Fault.PEER_LOST, "the peer ended the connection")
            view = view[num_read:]
        self._in_step = True

    def _read_first(self, header: bytearray, remaining: Remaining | None) -> int | None:
        """Fill `header`; the descriptor that came with it, if one did."""
        view, fds = memoryview(header), array.array("i")
        try:
            while len(view):
                self._wait_at_most(socket.SO_RCVTIMEO, remaining() if remaining else None)
                try:
                    num_read = self._receive_some(view, fds)
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise _lost(error) from error
                if not num_read:
                    raise TransferError(Fault.PEER_LOST, "the peer ended the connection")
                view = view[num_read:]
                remaining = remaining or within(_REST_S)
            if len(fds) > 1:
                raise TransferError(Fault.TAMPERED, "a frame came with several descriptors")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds[0] if fds else None

    def _receive_some(self, view: memoryview, fds: array.array[int]) -> int:
        """What there is, and descriptors with it. Raises OSError."""
        if not self._passes_files:
            return self._socket.recv_into(view)
        num_read, messages, _, _ = self._socket.recvmsg_into(
            [view], _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
        for _level, _type, data in messages:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        return num_read

    def _wait_at_most(self, option: int, wait_s: float | None) -> None:
        """Bound the next wait; None: not at all."""
        wait_s = 0.0 if wait_s is None else max(min(wait_s, _SLICE_S), _MIN_WAIT_S)
        if self._waits_s.get(option) == wait_s:
            return
        try:
            self._socket.setsockopt(
                socket.SOL_SOCKET, option, _TIMEVAL.pack(int(wait_s), int(wait_s % 1 * 1e6))
            )
        except OSError as error:
            raise _lost(error) from error
        self._waits_s[option] = wait_s


def within(seconds: float) -> Remaining:
    """A deadline that begins now."""
    end = time.monotonic() + seconds

    def remaining() -> float:
        remaining_s = end - time.monotonic()
        if remaining_s <= 0:
            raise TransferError(Fault.DEADLINE, "the peer did not answer in time")
        return remaining_s

    return remaining


def _mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")[:_MAC_BYTES]


def _lost(error: OSError) -> TransferError:
    return TransferError(Fault.PEER_LOST, f"the connection is lost: {error.strerror or error}")
