"""The other process of the transport part: holds memory, and gives it away by DistFlow and by a bare socket.

Run as `python -m deepflow.bench.rtc.peer <bytes> <folder> <host>`; says on standard output what it offers, serves until
standard input ends.
"""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import numpy as np
import orjson

from shared.distflow.flow import DistFlow


def _serve(listener: socket.socket, memory: memoryview) -> None:
    """Each byte read from a connection is answered with the whole memory, or the share of it that the byte names."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_answer, args=(connection, memory), daemon=True).start()


def _answer(connection: socket.socket, memory: memoryview) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while asked := connection.recv(1):
            connection.sendall(memory[: len(memory) // asked[0]])


def main() -> None:
    """Until standard input ends."""
    num_bytes, folder, host = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    listener = socket.create_server(("127.0.0.1", 0))
    with DistFlow(name="holder", directory=folder, host=host) as flow:
        shared = flow.allocate(num_bytes)
        memory = np.frombuffer(shared.view, np.uint8)
        memory[:] = np.arange(num_bytes, dtype=np.uint8)
        private = memory.copy()
        threading.Thread(target=_serve, args=(listener, private.data), daemon=True).start()
        regions = [flow.register(shared), flow.register(private.data)]
        offers = [flow.offer("reader", ttl_s=60.0) for _ in range(2)]
        sys.stdout.buffer.write(
            orjson.dumps(
                {
                    "port": listener.getsockname()[1],
                    "regions": [[r.id, r.generation, r.num_bytes] for r in regions],
                    "offers": [
                        {
                            "to": offer.to,
                            "token": offer.token.hex(),
                            "addresses": offer.addresses,
                            "ttl_ms": offer.ttl_ms,
                        }
                        for offer in offers
                    ],
                }
            )
            + b"\n"
        )
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
