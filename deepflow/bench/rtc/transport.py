"""Bytes: populate out of the arena, DistFlow over shared memory and over TCP, each in turns with what a program without
any of it would do: memcpy, a bare socket.

The ratio of the medians counts, of rounds that follow each other, so that a busy machine is busy for both. memcpy and
sockets use as many threads as DistFlow does (where others compete for the cores, more threads get more of them); what
several would do is told beside.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from deepflow.bench.distribution import percentile
from deepflow.bench.rtc.plan import MODEL, PROMPT_LEN, Plan
from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.native_decoder import bytes_per_block
from services.worker.flowserve.rtc.master import RtcMaster
from shared.arena.reader import Reader
from shared.arena.segment import Layout, PageKind, create_segment, new_name
from shared.arena.writer import WriteSegment
from shared.distflow.flow import DistFlow, default_streams
from shared.distflow.link import Link
from shared.distflow.region import Piece, Region
from shared.errors import Internal
from shared.rtc_messages import LinkOffer, Slot

_NUM_STREAMS: Final = default_streams()
_NUM_MORE: Final = 2 * _NUM_STREAMS
_TIMEOUT_S: Final = 60.0
Bytes = npt.NDArray[np.uint8]


def populate(plan: Plan) -> dict[str, float]:
    """4,096 tokens out of a real segment into the blocks of a device, by way of the RTC master; and the other way.

    Blocks are as large as those of SmolLM2-135M in the native layout, and in memory as `NativeDecoder` has them.
    """
    num_bytes = bytes_per_block(ModelConfig.from_dict(MODEL), plan.page)
    num_pages = PROMPT_LEN // plan.page
    hashes = [number.to_bytes(16, "little") for number in range(num_pages)]
    kind = PageKind("bench", "bench", num_bytes)
    blocks = _on_a_page(np.zeros(2 * num_pages * num_bytes + 4096, np.uint8))
    blocks = blocks[: 2 * num_pages * num_bytes].reshape(2 * num_pages, num_bytes)
    source = np.random.default_rng(0).integers(0, 256, (num_pages, num_bytes), np.uint8)
    target = np.ones_like(source)
    with tempfile.TemporaryDirectory(dir=_tmpfs()) as folder:
        layout = Layout.fit(kind, num_pages * (num_bytes + 4096 + 64) + (1 << 20))
        if layout is None or layout.num_slots < num_pages:
            raise Internal("a segment is too small for the prompt of the bench")
        name, generation = new_name(), 0
        create_segment(Path(folder), name, layout)
        writer, reader = WriteSegment.open(Path(folder), name), Reader(Path(folder))

        def copy_out() -> None:
            nonlocal generation
            generation += 1
            for index, page_hash in enumerate(hashes):
                slot = Slot(segment=name, index=index, generation=generation)
                if not writer.write(slot, page_hash, source[index].data):
                    raise Internal("a page did not go into the arena")

        def copy_in() -> None:
            master = RtcMaster(2 * num_pages)
            ticket = master.populate(hashes, None)
            assert ticket is not None
            for index, block in enumerate(ticket.blocks):
                slot = Slot(segment=name, index=index, generation=generation)
                if not reader.read(slot, hashes[index], blocks[block].data):
                    raise Internal("a page did not come out of the arena")
            master.landed(ticket, num_pages)
            master.close(ticket)

        def memcpy() -> None:
            for index in range(num_pages):
                np.copyto(target[index], source[index])

        copy_out()
        for way in (copy_in, memcpy):  # touches all memory
            way()
        took_s = _in_turns({"in": copy_in, "out": copy_out, "memcpy": memcpy}, plan.num_rounds)
        writer.close()
        reader.close()
    total = num_pages * num_bytes
    return {
        "populate_vs_memcpy": took_s["memcpy"] / took_s["in"],
        "copy_vs_memcpy": took_s["memcpy"] / took_s["out"],
        "populate_4096_ms": 1000 * took_s["in"],
        "populate_gb_s": total / took_s["in"] / 1e9,
        "copy_gb_s": total / took_s["out"] / 1e9,
        "populate_ops_s": num_pages / took_s["in"],
        "page_bytes": num_bytes,
    }


def distflow(plan: Plan) -> dict[str, float]:
    """Between two processes of this machine: all of a region, and one page at a time."""
    size = plan.transfer_bytes
    into = _on_a_page(np.zeros(size + 4096, np.uint8))[:size]
    source = _on_a_page(np.ones(size + 4096, np.uint8))[:size]
    page_bytes = bytes_per_block(ModelConfig.from_dict(MODEL), plan.page)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_tmpfs())))
        pool = stack.enter_context(ThreadPoolExecutor(_NUM_MORE))
        peer = stack.enter_context(_peer(size, folder))
        regions = [Region(*fields) for fields in peer["regions"]]
        offers = [
            LinkOffer(**fields | {"token": bytes.fromhex(fields["token"])})
            for fields in peer["offers"]
        ]
        near = stack.enter_context(DistFlow(name="reader", directory=folder, host="bench"))
        far = stack.enter_context(DistFlow(name="reader"))
        by_shm = near.link(offers[0], timeout_s=_TIMEOUT_S)
        by_tcp = far.link(offers[1], timeout_s=_TIMEOUT_S)
        sockets = [stack.enter_context(_connect(peer["port"])) for _ in range(_NUM_MORE)]

        def memcpy(num: int) -> None:
            share = size // num
            parts = [slice(n * share, (n + 1) * share) for n in range(num)]
            list(pool.map(lambda part: np.copyto(into[part], source[part]), parts))

        def bare(num: int) -> None:
            views = [into.data[n * (size // num) :][: size // num] for n in range(num)]
            list(pool.map(_receive, sockets[:num], views, [num] * num))

        ways: dict[str, Callable[[], object]] = {
            "shm": lambda: _transfer(near, by_shm, regions[0], into),
            "memcpy": lambda: memcpy(_NUM_STREAMS),
            "memcpy_more": lambda: memcpy(_NUM_MORE),
            "tcp": lambda: _transfer(far, by_tcp, regions[1], into),
            "socket": lambda: bare(_NUM_STREAMS),
            "socket_more": lambda: bare(_NUM_MORE),
            "unix": lambda: _transfer(near, by_shm, regions[1], into),
        }
        expected = np.arange(size, dtype=np.uint8)
        for way in ("shm", "tcp", "unix", "socket_more"):
            into[:] = 0
            ways[way]()
            if not np.array_equal(into, expected):
                raise Internal(f"{way} brought other bytes than were sent")
        took_s = _in_turns(ways, plan.num_rounds)
        page = into[: min(page_bytes, size)]
        small = {
            "shm": _small(near, by_shm, regions[0], page, plan.num_small),
            "tcp": _small(far, by_tcp, regions[1], page, plan.num_small),
        }
    found = {
        "shm_vs_memcpy": took_s["memcpy"] / took_s["shm"],
        "tcp_vs_socket": took_s["socket"] / took_s["tcp"],
        "unix_vs_socket": took_s["socket"] / took_s["unix"],
        **{f"{way}_gb_s": size / way_s / 1e9 for way, way_s in took_s.items()},
        "num_streams": _NUM_STREAMS,
    }
    for way, times_s in small.items():
        found[f"{way}_page_p50_us"] = 1e6 * statistics.median(times_s)
        found[f"{way}_page_p99_us"] = 1e6 * percentile(times_s, 99)
        found[f"{way}_page_ops_s"] = 1 / statistics.mean(times_s)
    return found


def _transfer(flow: DistFlow, link: Link, region: Region, into: Bytes) -> None:
    piece = Piece(region.id, region.generation, 0, len(into), into.data)
    flow.transfer(link, [piece], timeout_s=_TIMEOUT_S).wait()


def _small(flow: DistFlow, link: Link, region: Region, into: Bytes, num: int) -> list[float]:
    times_s = []
    for _ in range(num):
        began = time.perf_counter()
        _transfer(flow, link, region, into)
        times_s.append(time.perf_counter() - began)
    return times_s


def _receive(connection: socket.socket, view: memoryview, share: int) -> None:
    connection.sendall(bytes([share]))
    while len(view):
        view = view[connection.recv_into(view) :]


def _in_turns(ways: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, float]:
    """Seconds of each, the median."""
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times_s[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in times_s.items()}


def _on_a_page(memory: Bytes) -> Bytes:
    """From where a page of memory begins, as `NativeDecoder.allocate` does."""
    return memory[-memory.ctypes.data % 4096 :]


def _connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


@contextmanager
def _peer(num_bytes: int, folder: Path) -> Iterator[dict[str, Any]]:
    """The other process; what it says."""
    command = [
        sys.executable,
        "-m",
        "deepflow.bench.rtc.peer",
        str(num_bytes),
        str(folder),
        "bench",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise Internal("the other process of the bench did not start")
            yield orjson.loads(line)
        finally:
            process.kill()


def _tmpfs() -> str | None:
    """Where files are memory."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
