"""Which TCP port to listen on: the wanted one where it is free, else any."""

from __future__ import annotations

import socket


def choose(host: str, wanted: int) -> int:
    """`wanted` if it can be bound on `host`, else a free port. Raises OSError if `host` is not of this machine."""
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    for port in (wanted, 0):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A port whose last connections are still in TIME_WAIT is free for a listener.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                # On Linux two sockets with SO_REUSEADDR may bind the same port; only one of them may listen.
                probe.listen(1)
            except OSError:
                if port == 0:
                    raise
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("port 0 is always free or an error")
