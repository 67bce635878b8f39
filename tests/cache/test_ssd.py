"""The SSD tier: what is read is what was appended, under any crash, damage and lack of room."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.cache import ssd as ssd_module
from services.cache.ssd import Ssd
from shared.arena.place import ArenaError
from shared.arena.segment import PageKind

KIND = PageKind("model", "recipe", 10_000)
RECORD = 12_288  # a page of 10,000 bytes and its header, on boundaries of 4,096
FIRST = (
    4096 + 4096
)  # where the first page's record starts: after the file's header and the kind's record


def name(number: int) -> bytes:
    """A page hash."""
    return number.to_bytes(16, "big")


def data(number: int) -> bytes:
    """What a page of this number holds."""
    return bytes([number % 251]) * KIND.slot_bytes


def readable(ssd: Ssd, numbers: range) -> set[int]:
    """The pages that can be read, each of which must be right."""
    found = set()
    for number in numbers:
        out = bytearray(KIND.slot_bytes)
        if ssd.read(KIND, name(number), out):
            assert out == data(number), "a wrong byte was read"
            found.add(number)
    return found


def logs(folder: Path) -> list[Path]:
    """The files, oldest first."""
    return sorted(folder.glob("*.log"))


def test_pages_survive_the_process(tmp_path: Path) -> None:
    """What was appended is there for this process and for the next one, with its model."""
    ssd = Ssd.open(tmp_path, max_bytes=10**7)
    assert all(ssd.append(KIND, name(number), data(number)) for number in range(10))
    assert ssd.append(KIND, name(3), data(3)), "it is there already"
    assert readable(ssd, range(12)) == set(range(10))
    assert set(ssd.drain_events()["model"].stored) == {name(number) for number in range(10)}
    ssd.check()
    ssd.close()

    ssd = Ssd.open(tmp_path, max_bytes=10**7)
    assert readable(ssd, range(12)) == set(range(10))
    assert set(ssd.drain_events()["model"].stored) == set(ssd.pages("model"))
    assert ssd.holds(KIND, [name(number) for number in (0, 1, 99, 2)]) == 2
    assert ssd.ledger()["dropped"] == 0
    ssd.check()
    ssd.close()


def test_only_what_was_asked_for_is_read(tmp_path: Path) -> None:
    """Another kind, another length or an unknown page is a miss and forgets nothing."""
    ssd = Ssd.open(tmp_path, max_bytes=10**7)
    other = PageKind("other", "recipe", 10_000)
    ssd.append(KIND, name(1), data(1))
    assert not ssd.read(other, name(1), bytearray(10_000))
    assert not ssd.read(KIND, name(2), bytearray(10_000))
    assert ssd.append(other, name(2), data(2))
    assert ssd.holds(KIND, [name(1), name(2)]) == 1
    assert not ssd.append(KIND, b"short", data(1))
    assert not ssd.append(KIND, name(3), bytes(10_001))
    assert readable(ssd, range(5)) == {1}
    ssd.close()


def test_the_oldest_file_goes_whole(tmp_path: Path) -> None:
    """The bytes on disk stay within the budget, and the pages of a removed file are reported as removed."""
    budget = 10 * RECORD
    ssd = Ssd.open(tmp_path, max_bytes=budget, file_bytes=4 * RECORD)
    removed: set[bytes] = set()
    for number in range(50):
        assert ssd.append(KIND, name(number), data(number))
        assert sum(path.stat().st_size for path in logs(tmp_path)) <= budget
        changes = ssd.drain_events()["model"]
        assert changes.stored == [name(number)]
        removed.update(changes.removed)
        ssd.check()
    left = readable(ssd, range(50))
    assert left == {n for n in range(50) if name(n) not in removed}
    assert left == set(range(min(left), 50)), "the newest are left"
    assert len(left) >= 5
    ssd.close()
    smaller = Ssd.open(tmp_path, max_bytes=5 * RECORD)
    smaller.check()
    assert readable(smaller, range(50)) < left
    smaller.close()


def test_a_page_larger_than_the_budget_is_refused(tmp_path: Path) -> None:
    """And nothing that is there goes for it."""
    ssd = Ssd.open(tmp_path, max_bytes=4 * RECORD)
    assert ssd.append(KIND, name(1), data(1))
    assert not ssd.append(PageKind("model", "recipe", 10**6), name(2), bytes(10**6))
    assert readable(ssd, range(3)) == {1}
    ssd.check()
    ssd.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Two writers would number their files alike: the second is told no."""
    ssd = Ssd.open(tmp_path, max_bytes=10**7)
    with pytest.raises(ArenaError, match="another process"):
        Ssd.open(tmp_path, max_bytes=10**7)
    ssd.close()
    Ssd.open(tmp_path, max_bytes=10**7).close()


KILLED = """
import os, signal, sys
from pathlib import Path
from services.cache import ssd as module
from shared.arena.segment import PageKind

folder, cut = Path(sys.argv[1]), int(sys.argv[2])
log = module.Ssd.open(folder, max_bytes=10**7)
kind = PageKind("model", "recipe", 10_000)
for number in range(3):
    assert log.append(kind, number.to_bytes(16, "big"), bytes([number]) * 10_000)
write = os.pwritev

def torn(fd, buffers, offset):
    write(fd, [b"".join(buffers)[:cut]], offset)
    os.kill(os.getpid(), signal.SIGKILL)

os.pwritev = torn
log.append(kind, (3).to_bytes(16, "big"), bytes([3]) * 10_000)
"""


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 5000, 10_063])
def test_killed_in_mid_append(tmp_path: Path, cut: int) -> None:
    """However much of the last record reached the file, it is dropped; all before it are there; appending goes on."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(cut)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    ssd = Ssd.open(tmp_path, max_bytes=10**7)
    assert readable(ssd, range(5)) == {0, 1, 2}
    assert ssd.append(KIND, name(3), data(3))
    assert readable(ssd, range(5)) == {0, 1, 2, 3}
    ssd.check()
    ssd.close()


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A process that appends as fast as it can is killed somewhere: whatever is found afterwards is right."""
    code = (
        "import sys; from pathlib import Path; from services.cache.ssd import Ssd;"
        "from shared.arena.segment import PageKind\n"
        "ssd, kind = Ssd.open(Path(sys.argv[1]), max_bytes=10**7), PageKind('model', 'recipe', 10000)\n"
        "for n in range(10**6):\n"
        "    ssd.append(kind, n.to_bytes(16, 'big'), bytes([n % 251]) * 10000)\n"
        "    print(n, flush=True)\n"
    )
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            for _ in range(60):
                last = int(process.stdout.readline())
            process.kill()
        ssd = Ssd.open(tmp_path, max_bytes=10**7)
        assert set(range(last)) <= readable(ssd, range(last + 3000))
        ssd.check()
        ssd.close()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_anywhere_is_found(data_: st.DataObject) -> None:
    """Bytes flipped or cut off at any place, while the log is open or before it is: pages are right or missing, and a
    single flipped byte costs at most the pages it is in, or those of a file whose own header it is in."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        ssd = Ssd.open(path, max_bytes=10**7, file_bytes=5 * RECORD)
        numbers = range(8)
        for number in numbers:
            assert ssd.append(KIND, name(number), data(number))
        file = data_.draw(st.sampled_from(logs(path)))
        reopened = data_.draw(st.booleans())
        if reopened:
            ssd.close()
        at = data_.draw(st.integers(0, file.stat().st_size - 1))
        cut = data_.draw(st.booleans())
        if cut:
            os.truncate(file, at)
        else:
            with file.open("r+b") as stream:
                stream.seek(at)
                (byte,) = stream.read(1)
                stream.seek(at)
                stream.write(bytes([byte ^ data_.draw(st.integers(1, 255))]))
        if reopened:
            ssd = Ssd.open(path, max_bytes=10**7, file_bytes=5 * RECORD)
        found = readable(ssd, numbers)
        assert cut or at < FIRST or len(found) >= 7
        assert readable(ssd, numbers) == found
        for number in numbers:
            assert ssd.append(KIND, name(number), data(number))
        assert readable(ssd, numbers) >= found
        ssd.check()
        ssd.close()
        ssd = Ssd.open(path, max_bytes=10**7)
        readable(ssd, numbers)
        ssd.check()
        ssd.close()


def test_a_slow_disk_keeps_nobody_else_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a page is being written, pages are looked up and read, and changes are told of."""
    ssd = Ssd.open(tmp_path, max_bytes=10**7)
    assert ssd.append(KIND, name(0), data(0))
    writing, go_on = threading.Event(), threading.Event()
    write = os.pwritev

    def slow(*args: Any) -> int:
        writing.set()
        assert go_on.wait(30)
        return write(*args)

    monkeypatch.setattr(os, "pwritev", slow)
    with ThreadPoolExecutor(2) as threads:
        try:
            appended = threads.submit(ssd.append, KIND, name(1), data(1))
            assert writing.wait(30)
            told = threads.submit(ssd.drain_events)
            assert told.result(timeout=30)["model"].stored == [name(0)]
            assert threads.submit(ssd.pages, "model").result(timeout=30) == [name(0)]
            assert threads.submit(readable, ssd, range(3)).result(timeout=30) == {0}
        finally:
            go_on.set()
        assert appended.result(timeout=30)
    assert readable(ssd, range(3)) == {0, 1}
    ssd.close()


def test_there_are_never_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs a descriptor: a process that is started again and again does not use them up, and a large log has
    large files."""
    monkeypatch.setattr(ssd_module, "MAX_FILES", 4)
    for number in range(8):
        ssd = Ssd.open(tmp_path, max_bytes=10**7)
        assert ssd.append(KIND, name(number), data(number))
        assert len(logs(tmp_path)) <= 4
        ssd.check()
        assert readable(ssd, range(9)) == set(range(max(0, number - 3), number + 1))
        ssd.close()
    ssd = Ssd.open(tmp_path / "large", max_bytes=40 * RECORD, file_bytes=1)
    for number in range(39):
        assert ssd.append(KIND, name(number), data(number))
        assert len(logs(tmp_path / "large")) <= 4
    assert len(readable(ssd, range(39))) >= 20
    ssd.close()


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    """A link among the files goes, and what it leads to is left alone; a folder in the place of a file is an error of
    the kind that is expected."""
    target = tmp_path / "target"
    target.write_text("mine")
    folder = tmp_path / "log"
    folder.mkdir(mode=0o700)
    (folder / f"{5:016x}.log").symlink_to(target)
    ssd = Ssd.open(folder, max_bytes=10**7)
    assert ssd.append(KIND, name(1), data(1))
    assert readable(ssd, range(3)) == {1}
    assert len(logs(folder)) == 1
    assert target.read_text() == "mine"
    ssd.close()
    (folder / f"{9:016x}.log").mkdir()
    with pytest.raises(ArenaError, match="cannot be used"):
        Ssd.open(folder, max_bytes=10**7)
    (folder / f"{9:016x}.log").rmdir()
    Ssd.open(folder, max_bytes=10**7).close()


def test_a_full_disk_is_a_refusal(tmp_path: Path) -> None:
    """Where the file system takes no more, the page is not there, those before it are, and nothing is raised."""
    ssd = Ssd.open(tmp_path, max_bytes=10**7)
    assert ssd.append(KIND, name(0), data(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FIRST + RECORD + 5000, hard))
    before = ssd.ledger()
    try:
        for number in range(10, 40):
            assert not ssd.append(KIND, name(number), data(number))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ssd.ledger() == before, "nothing went for what was refused"
    assert sum(path.stat().st_size for path in logs(tmp_path)) == before["bytes"]
    assert ssd.append(KIND, name(2), data(2))
    assert readable(ssd, range(4)) == {0, 2}
    ssd.check()
    ssd.close()
    ssd = Ssd.open(tmp_path, max_bytes=10**7)
    assert readable(ssd, range(4)) == {0, 2}
    ssd.close()
