"""The arena's folder: ours alone, owned by one, and named so that everybody on the host agrees."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from shared.arena.place import ArenaError, Place, arena_dir, automatic_bytes, read_host
from shared.config import Reader


def test_the_folder_follows_from_home_or_is_named() -> None:
    """Two homes have two arenas; `DEEPFLOW_ARENA_DIR` wins."""
    one, two = arena_dir(Reader({}), Path("/a")), arena_dir(Reader({}), Path("/b"))
    assert one != two
    assert one.parent == Path("/dev/shm")
    assert str(os.getuid()) in one.name
    assert arena_dir(Reader({"DEEPFLOW_ARENA_DIR": "/x/y"}), Path("/a")) == Path("/x/y")


def test_one_owner_at_a_time_and_one_name_for_ever(tmp_path: Path) -> None:
    """A second owner is told to wait; the host's name outlives owners, and each has its own epoch."""
    folder = tmp_path / "arena"
    assert read_host(folder) == ""
    place = Place.own(folder)
    assert place is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    assert read_host(folder) == place.host != ""
    assert Place.own(folder) is None
    place.close()

    again = Place.own(folder)
    assert again is not None
    assert again.host == place.host
    assert again.epoch == place.epoch + 1
    again.close()


def test_an_owner_killed_makes_room_for_the_next(tmp_path: Path) -> None:
    """The lock ends with the process, by whatever signal."""
    code = (
        "import sys, time; from pathlib import Path; from shared.arena.place import Place;"
        "place = Place.own(Path(sys.argv[1])); print(place.epoch, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        epoch = int(owner.stdout.readline())
        assert Place.own(tmp_path) is None
        owner.kill()
    place = Place.own(tmp_path)
    assert place is not None
    assert place.epoch == epoch + 1
    place.close()


def test_two_folders_are_two_hosts(tmp_path: Path) -> None:
    """Names are drawn, not derived: containers with private folders are different hosts."""
    places = [Place.own(tmp_path / name) for name in ("a", "b")]
    hosts = {place.host for place in places if place is not None}
    assert len(hosts) == 2
    for place in places:
        assert place is not None
        place.close()


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    """Neither owned nor believed: somebody could have planted what is in it."""
    place = Place.own(tmp_path)
    assert place is not None
    place.close()
    tmp_path.chmod(0o777)
    with pytest.raises(ArenaError, match="others may write"):
        Place.own(tmp_path)
    assert read_host(tmp_path) == ""
    tmp_path.chmod(0o700)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """Even for root: its owner could change it at will."""
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(ArenaError, match="12345"):
        Place.own(tmp_path)
    os.chown(tmp_path, 0, -1)


def test_a_full_file_system_is_said_and_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Where not even the host's name can be written, the owner is told why, and can try again later."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        with pytest.raises(ArenaError, match="cannot be used"):
            Place.own(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    place = Place.own(tmp_path)
    assert place is not None
    assert read_host(tmp_path) == place.host
    place.close()


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A link in place of the folder, of the lock or of the host file is refused."""
    real, linked = tmp_path / "real", tmp_path / "linked"
    real.mkdir(mode=0o700)
    linked.symlink_to(real)
    with pytest.raises(ArenaError):
        Place.own(linked)
    (tmp_path / "target").write_text("0123456789abcdef")
    (real / "host").symlink_to(tmp_path / "target")
    assert read_host(real) == ""
    (real / "lock").symlink_to(tmp_path / "target")
    with pytest.raises(ArenaError):
        Place.own(real)
    assert (tmp_path / "target").read_text() == "0123456789abcdef"


def test_the_automatic_size_leaves_room(tmp_path: Path) -> None:
    """Never more than half of what the file system has, whether the folder exists or not."""
    free = os.statvfs(tmp_path)
    room = free.f_bavail * free.f_frsize
    assert 0 < automatic_bytes(tmp_path / "not" / "yet") <= room // 2
    assert 0 < automatic_bytes(tmp_path) <= room // 2 + 1
