"""Where instances listen and how they connect: a Unix socket in the host's shared folder, and TCP.

An address is `unix:<host>/<name of the socket>` (of use where the folder of the same host is at hand, wherever it is
mounted) or `tcp:<ip>:<port>`. It must not know tokens or frames.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_BACKLOG: Final = 128
_KEEPALIVE: Final = (
    ("TCP_KEEPIDLE", 5),
    ("TCP_KEEPINTVL", 5),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", 20_000),
)


def listen_tcp(ip: str) -> socket.socket:
    """On a free port of this address. Raises OSError; ValueError for a wildcard, which no peer could connect to."""
    if ip in ("", "0.0.0.0", "::", "[::]"):
        raise ValueError(f"{ip!r} is no address peers can reach; name one of this machine's")
    family, _, _, _, address = socket.getaddrinfo(ip.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def tcp_address(listener: socket.socket) -> str:
    """As peers read it."""
    ip, port = listener.getsockname()[:2]
    return f"tcp:{ip}:{port}"


def listen_unix(directory: Path) -> tuple[socket.socket, str]:
    """A socket of a new name in `directory`, and that name. Raises OSError."""
    name = f"flow-{secrets.token_hex(8)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(directory) as folder:
            listener.bind(f"{folder}/{name}")
        (directory / name).chmod(0o600)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener, name


def connect_tcp(address: str, timeout_s: float) -> socket.socket:
    """`address` is what follows `tcp:`. Raises OSError."""
    ip, _, port = address.rpartition(":")
    connection = socket.create_connection((ip, int(port)), timeout_s)
    tune(connection)
    return connection


def connect_unix(directory: Path, name: str, timeout_s: float) -> socket.socket:
    """Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        with _short(directory) as folder:
            connection.connect(f"{folder}/{Path(name).name}")
        tune(connection)
    except OSError:
        connection.close()
        raise
    return connection


def tune(connection: socket.socket) -> None:
    """For either side of a connection: small frames go at once, and a host that vanished is noticed."""
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    """Another path of the folder, short enough for a socket's address (108 bytes)."""
    if len(os.fsencode(directory)) < 70 or not Path("/proc/self/fd").exists():
        yield str(directory)
        return
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
