"""Segments: what is read is what was written under this very name and generation, or nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.arena.reader import Reader
from shared.arena.segment import (
    ALIGNMENT,
    Layout,
    PageKind,
    SegmentError,
    SlotHeader,
    State,
    create_segment,
    new_name,
    open_segment,
    path_of,
    remove_unlocked,
)
from shared.arena.writer import Writer, WriteSegment
from shared.rtc_messages import Slot

KIND = PageKind("model", "recipe", 5000)
PAGE = b"p" * 16
DATA = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A fresh segment of four slots."""
    name = new_name()
    create_segment(tmp_path, name, Layout(KIND, 4))
    return name


def slot(name: str, index: int = 0, generation: int = 1) -> Slot:
    """A slot of the segment."""
    return Slot(segment=name, index=index, generation=generation)


def test_a_page_comes_back_as_it_was_written(tmp_path: Path, name: str) -> None:
    """Every slot holds its own page, also one that is shorter than the slot."""
    writer, reader = Writer(tmp_path), Reader(tmp_path)
    assert writer.lock([name]) == []
    for index in range(4):
        assert writer.write(slot(name, index), bytes([index]) * 16, DATA[: 4997 + index])
    for index in range(4):
        out = np.zeros(4997 + index, np.uint8)
        assert reader.read(slot(name, index), bytes([index]) * 16, out)
        assert np.array_equal(out, DATA[: 4997 + index])
    writer.close()


def test_only_what_was_asked_for_is_read(tmp_path: Path, name: str) -> None:
    """Another generation, page, length, slot or segment, or a slot never written, is a miss."""
    segment, reader = WriteSegment.open(tmp_path, name), Reader(tmp_path)
    segment.write(slot(name, 0, 7), PAGE, DATA)
    out = bytearray(5000)

    assert reader.read(slot(name, 0, 7), PAGE, out)
    assert not reader.read(slot(name, 0, 6), PAGE, out)
    assert not reader.read(slot(name, 0, 8), PAGE, out)
    assert not reader.read(slot(name, 0, 7), b"q" * 16, out)
    assert not reader.read(slot(name, 0, 7), PAGE, bytearray(4999))
    assert not reader.read(slot(name, 1, 7), PAGE, out)
    assert not reader.read(slot(name, 4, 7), PAGE, out)
    assert not reader.read(slot(name, -1, 7), PAGE, out)
    assert not reader.read(slot(new_name(), 0, 7), PAGE, out)
    segment.close()


def test_a_slot_given_to_another_page_is_a_miss_for_the_first(tmp_path: Path, name: str) -> None:
    """Once it is written as a later generation, the earlier one is gone, and never comes back."""
    segment, reader, out = WriteSegment.open(tmp_path, name), Reader(tmp_path), bytearray(5000)
    assert segment.write(slot(name, 0, 1), PAGE, DATA)
    assert segment.write(slot(name, 0, 2), b"q" * 16, DATA[::-1].copy())

    assert not segment.write(slot(name, 0, 1), PAGE, DATA), "a late word about an old generation"
    assert not segment.write(slot(name, 0, 2), PAGE, DATA)
    assert not reader.read(slot(name, 0, 1), PAGE, out)
    assert reader.read(slot(name, 0, 2), b"q" * 16, out)
    segment.close()


def test_a_slot_that_is_written_over_while_it_is_read(tmp_path: Path) -> None:
    """What is read is the page of the generation asked for, whole, or a miss: never two pages mixed."""
    name, size, num_generations = new_name(), 300_000, 400
    create_segment(tmp_path, name, Layout(PageKind("model", "recipe", size), 1))
    segment, reader = WriteSegment.open(tmp_path, name), Reader(tmp_path)
    newest = [1]

    def write() -> None:
        for generation in range(2, num_generations):
            assert segment.write(slot(name, 0, generation), PAGE, bytes([generation % 256]) * size)
            newest[0] = generation

    assert segment.write(slot(name, 0, 1), PAGE, b"\1" * size)
    out, num_hits, num_misses = np.empty(size, np.uint8), 0, 0
    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write)
        while not writing.done():
            generation = newest[0]
            if reader.read(slot(name, 0, generation), PAGE, out):
                assert (out == generation % 256).all()
                num_hits += 1
            else:
                num_misses += 1
        writing.result()
    assert reader.read(slot(name, 0, num_generations - 1), PAGE, out)
    assert num_hits + num_misses > 0
    segment.close()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_flipped_byte_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Wherever a byte of a slot's header or payload changes, the page is a miss."""
    folder = tmp_path_factory.mktemp("arena")
    name, kind = new_name(), PageKind("model", "recipe", 64)
    layout = Layout(kind, 2)
    create_segment(folder, name, layout)
    segment, reader, out = WriteSegment.open(folder, name), Reader(folder), bytearray(64)
    payload = data.draw(st.binary(min_size=64, max_size=64))
    assert segment.write(slot(name, 1), PAGE, payload)
    segment.close()
    assert reader.read(slot(name, 1), PAGE, out)
    assert out == payload

    start, size = data.draw(st.sampled_from([(layout.header(1), 56), (layout.payload(1), 64)]))
    at = start + data.draw(st.integers(0, size - 1))
    with path_of(folder, name).open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ data.draw(st.integers(1, 255))]))
    assert not reader.read(slot(name, 1), PAGE, out)


@given(st.integers(1, 1 << 20), st.integers(0, 1 << 24))
def test_a_layout_fills_what_it_is_given(slot_bytes: int, num_bytes: int) -> None:
    """No two parts overlap, everything lies inside, and one slot more would not fit."""
    kind = PageKind("model", "recipe", slot_bytes)
    layout = Layout.fit(kind, num_bytes)
    if layout is None:
        assert Layout(kind, 1).num_bytes > num_bytes
        return
    last = layout.num_slots - 1
    assert layout.header(last) + 64 <= layout.payload(0)
    assert layout.payload(last) + slot_bytes <= layout.num_bytes <= num_bytes
    assert layout.payload(0) % ALIGNMENT == layout.payload(last) % ALIGNMENT == 0
    assert Layout(kind, layout.num_slots + 1).num_bytes > num_bytes
    assert Layout.unpack(layout.pack()) == layout
    with pytest.raises(IndexError):
        layout.header(layout.num_slots)


@given(
    st.sampled_from(State), st.integers(1, 2**64 - 1), st.binary(min_size=16, max_size=16),
    st.integers(0, 2**63), st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_slot_headers_survive_packing(
    state: State, generation: int, page_hash: bytes, length: int, checksum: int
) -> None:
    """What is packed is unpacked; a header cut in half and mended with zeros is none."""
    header = SlotHeader(state, generation, page_hash, length, checksum)
    raw = header.pack()
    assert len(raw) == 64
    assert SlotHeader.unpack(raw) == header
    assert SlotHeader.unpack(raw[:32] + bytes(32)) is None
    assert SlotHeader.unpack(bytes(64)) == SlotHeader(State.FREE, 0)


@pytest.mark.parametrize(
    "name",
    ["", "../" * 5 + "etc/passwd", "0123456789abcde", "0123456789abcdef0", "0123456789ABCDEF",
     "0123456789abcde/", "0123456789abcdef\n", "0123456789abcdef/../x", "\0" * 16, "٠" * 16],
)  # fmt: skip
def test_names_are_not_paths(tmp_path: Path, name: str) -> None:
    """Whatever comes from the bus as a name stays inside the folder: all but 16 hex digits are refused."""
    with pytest.raises(SegmentError):
        path_of(tmp_path, name)
    assert not Reader(tmp_path).read(slot(name), PAGE, bytearray(10))
    assert Writer(tmp_path).lock([name]) == [name]


def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    """A truncated file, one of another version, one with a damaged header, a link and a folder are no segments."""
    good = path_of(tmp_path, name).read_bytes()

    def refused(content: bytes) -> bool:
        other = new_name()
        path_of(tmp_path, other).write_bytes(content)
        with pytest.raises(SegmentError):
            open_segment(tmp_path, other)
        return not Reader(tmp_path).read(slot(other), PAGE, bytearray(10))

    assert refused(b"")
    assert refused(good[:100])
    assert refused(good[:-1])
    assert refused(good.replace(b"DFARENA\n\1", b"DFARENA\n\2"))
    assert refused(good.replace(b"recipe", b"recipf"))
    link, folder = new_name(), new_name()
    path_of(tmp_path, link).symlink_to(path_of(tmp_path, name))
    path_of(tmp_path, folder).mkdir()
    for other in (link, folder):
        with pytest.raises(SegmentError):
            open_segment(tmp_path, other)


def test_a_file_truncated_or_unlinked_after_it_was_mapped_is_a_miss(
    tmp_path: Path, name: str
) -> None:
    """The reader looks at the file before it touches the mapping, so no signal ends the process."""
    segment, reader, out = WriteSegment.open(tmp_path, name), Reader(tmp_path), bytearray(5000)
    segment.write(slot(name), PAGE, DATA)
    segment.close()
    assert reader.read(slot(name), PAGE, out)
    os.truncate(path_of(tmp_path, name), 4096)
    assert not reader.read(slot(name), PAGE, out)
    path_of(tmp_path, name).unlink()
    assert not reader.read(slot(name), PAGE, out)


def test_a_reader_lets_go_of_files_that_are_gone(tmp_path: Path, name: str) -> None:
    """After a sweep the memory of an unlinked segment is not held by its mapping."""
    reader = Reader(tmp_path)
    assert reader.segment(name) is not None
    maps = Path("/proc/self/maps")
    assert name in maps.read_text()
    path_of(tmp_path, name).unlink()
    reader.sweep()
    assert name not in maps.read_text()


def test_a_segment_has_one_writer(tmp_path: Path, name: str) -> None:
    """A second open, in this process or in another one, is refused until the first is closed."""
    first = WriteSegment.open(tmp_path, name)
    with pytest.raises(SegmentError, match="another process"):
        WriteSegment.open(tmp_path, name)
    probe = (
        "import sys; from pathlib import Path; from shared.arena.writer import Writer;"
        "sys.exit(len(Writer(Path(sys.argv[1])).lock([sys.argv[2]])))"
    )
    command = [sys.executable, "-c", probe, str(tmp_path), name]
    assert subprocess.run(command, check=False).returncode == 1
    first.close()
    WriteSegment.open(tmp_path, name).close()


def test_programs_that_a_writer_starts_do_not_keep_its_lock(tmp_path: Path, name: str) -> None:
    """The lock is gone with its writer although a child of its lives; one forked without exec would keep it."""
    segment = WriteSegment.open(tmp_path, name)
    with subprocess.Popen(["sleep", "60"]) as child:
        segment.close()
        second = WriteSegment.open(tmp_path, name)
        second.close()
        assert child.poll() is None
        child.kill()


def test_a_closed_segment_is_not_written_to(tmp_path: Path, name: str) -> None:
    """What was given back is refused by the writer, and the caller is told."""
    writer = Writer(tmp_path)
    writer.lock([name])
    assert writer.held == [name]
    assert writer.give_back([name, "ffffffffffffffff"]) == [name]
    assert writer.held == []
    assert not writer.write(slot(name), PAGE, DATA)


def test_pages_that_do_not_fit_are_the_callers_fault(tmp_path: Path, name: str) -> None:
    """Too long, empty, or for a slot that is not there: an error, and nothing is written."""
    segment = WriteSegment.open(tmp_path, name)
    with pytest.raises(ValueError, match="5001 bytes"):
        segment.write(slot(name), PAGE, bytes(5001))
    with pytest.raises(IndexError):
        segment.write(slot(name, 4), PAGE, DATA)
    segment.close()
    assert not Reader(tmp_path).read(slot(name), PAGE, bytearray(5000))


def test_no_room_leaves_no_file(tmp_path: Path) -> None:
    """Memory is taken when a segment is made; where there is none, there is an error and nothing else."""
    huge = Layout(PageKind("model", "recipe", 1 << 40), 1 << 22)  # beyond what any file may hold
    with pytest.raises(OSError, match=r".") as caught:
        create_segment(tmp_path, new_name(), huge)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_go_when_nobody_has_them(tmp_path: Path, name: str) -> None:
    """A file whose lock is taken stays; a free one is unlinked, whatever is in it."""
    fd = os.open(path_of(tmp_path, name), os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert remove_unlocked(tmp_path, name) == Layout(KIND, 4).num_bytes
    os.close(fd)
    assert remove_unlocked(tmp_path, name) == 0
    assert not path_of(tmp_path, name).exists()


def test_files_are_private(tmp_path: Path, name: str) -> None:
    """Nobody but the user may read or write a segment."""
    assert path_of(tmp_path, name).stat().st_mode & 0o777 == 0o600
