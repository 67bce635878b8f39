"""Backends beside sockets and shared files: the seam, with one inside the process, and Mooncake's engine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.distflow.backend import chosen
from shared.distflow.faults import Fault, TransferError
from shared.distflow.flow import DistFlow
from shared.distflow.memory import Memory, Source, readable
from shared.distflow.region import Piece, Region
from shared.errors import InvalidRequest, Unavailable
from tests.shared.distflow_peer import pattern

SIZE = 6 << 20


class InProcess:
    """A fabric that reaches all memory of this process: handles are keys of a table. Counts what goes by it."""

    scheme = "in-process"

    def __init__(self, table: dict[bytes, Source], fails: bool = False) -> None:
        self.table = table
        self.fails = fails
        self.num_reads = self.num_closed = 0

    def export(self, memory: Source) -> bytes | None:
        key = str(id(memory)).encode()
        self.table[key] = memory
        return key

    def withdraw(self, memory: Source) -> None:
        self.table.pop(str(id(memory)).encode(), None)

    def attach(self, handle: bytes, num_bytes: int, timeout_s: float) -> Reach:
        if self.fails:
            raise TransferError(Fault.FAILED, "out of reach")
        return Reach(self, handle)

    def close(self) -> None:
        self.num_closed += 1


class Reach:
    def __init__(self, backend: InProcess, handle: bytes) -> None:
        self.backend, self.handle = backend, handle

    def read(
        self, offset: int, length: int, into: memoryview | Memory, start: int, timeout_s: float
    ) -> None:
        source = self.backend.table.get(self.handle)
        if source is None:
            raise TransferError(Fault.PEER_LOST, "gone")
        self.backend.num_reads += 1
        assert not isinstance(source, Memory)
        assert not isinstance(into, Memory)
        into[start : start + length] = readable(source)[offset : offset + length]

    def close(self) -> None:
        self.backend.num_closed += 1


def read(flow: DistFlow, holder: DistFlow, region: Region) -> bytearray:
    link = flow.link(holder.offer("b"), timeout_s=5)
    into = bytearray(region.num_bytes)
    piece = Piece(region.id, region.generation, 0, region.num_bytes, into)
    flow.transfer(link, [piece], timeout_s=10).wait()
    return into


def test_a_common_backend_carries_the_bytes() -> None:
    """Where both sides have a backend of one scheme the bytes go by it, and are still checked over the link."""
    table: dict[bytes, Source] = {}
    near, far = InProcess(table), InProcess(table)
    with DistFlow(name="a", backends=[far]) as a, DistFlow(name="b", backends=[near]) as b:
        memory = pattern(SIZE).data
        region = a.register(memory)
        assert read(b, a, region) == pattern(SIZE).tobytes()
        assert near.num_reads > 0
        a.renew(region)
        with pytest.raises(TransferError) as raised:
            read(b, a, region)
        assert raised.value.fault == Fault.STALE
        a.unregister(region)
        assert not table
    assert near.num_closed >= 2  # what was attached, and itself
    assert far.num_closed == 1


@pytest.mark.parametrize("case", ["the reader has none", "the holder has none", "it fails"])
def test_without_a_common_backend_sockets_carry_them(case: str) -> None:
    """A backend that one side lacks, or that does not reach the memory, costs nothing but its speed."""
    table: dict[bytes, Source] = {}
    far = [] if case == "the holder has none" else [InProcess(table)]
    near = [] if case == "the reader has none" else [InProcess(table, fails=True)]
    with DistFlow(name="a", backends=far) as a, DistFlow(name="b", backends=near) as b:
        memory = pattern(SIZE).data
        assert read(b, a, a.register(memory)) == pattern(SIZE).tobytes()
    assert all(not backend.num_reads for backend in near)


def test_only_what_is_asked_for_is_loaded() -> None:
    """DEEPFLOW_DISTFLOW is empty, or mooncake; without the latter nothing of Mooncake is imported."""
    assert chosen("", "127.0.0.1") == []
    with pytest.raises(InvalidRequest, match="only mooncake"):
        chosen("carrier-pigeon", "127.0.0.1")
    code = "import shared.distflow.flow, sys; sys.exit(any('mooncake' in m for m in sys.modules))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


_HOLDER = """
import sys
import numpy as np
from shared.distflow.backend import chosen
from shared.distflow.flow import DistFlow
from tests.shared.distflow_peer import as_json, pattern
import json
with DistFlow(name="a", backends=chosen("mooncake", "127.0.0.1")) as flow:
    region = flow.register(pattern(int(sys.argv[1])).data)
    offer = as_json(flow.offer("b"))
    print(json.dumps([offer, [region.id, region.generation, region.num_bytes]]), flush=True)
    sys.stdin.read()
"""


def test_mooncake_carries_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two processes over the engine's TCP transport; a holder that is killed is an error."""
    try:
        backends = chosen("mooncake", "127.0.0.1")
    except Unavailable as error:
        pytest.skip(error.message)
    import json

    from shared.distflow import mooncake
    from shared.rtc_messages import LinkOffer

    reads: list[int] = []
    plain: Callable[..., None] = mooncake._Attached.read

    def counted(self: mooncake._Attached, offset: int, length: int, *more: object) -> None:
        reads.append(length)
        plain(self, offset, length, *more)

    monkeypatch.setattr(mooncake._Attached, "read", counted)
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(SIZE)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        offer, fields = json.loads(holder.stdout.readline())
        region = Region(*fields)
        with DistFlow(name="b", backends=backends) as flow:
            link = flow.link(
                LinkOffer(**{**offer, "token": bytes.fromhex(offer["token"])}), timeout_s=5
            )
            into = np.zeros(SIZE, np.uint8)
            piece = Piece(region.id, 1, 0, SIZE, into.data)
            flow.transfer(link, [piece], timeout_s=10).wait()
            assert np.array_equal(into, pattern(SIZE))
            assert sum(reads) == SIZE
            holder.kill()
            with pytest.raises(TransferError):
                flow.transfer(link, [piece], timeout_s=5).wait()
