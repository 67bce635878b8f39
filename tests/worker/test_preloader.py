"""The pre-loader, on real files and the kernel's own word about them."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import pytest

from services.worker.preloader import PAGE, Preloader, bring_in, drop, resident_bytes, warm_share
from shared import subjects
from tests.worker.peers import make_model
from tests.worker.tiny import make_tiny

NUM_BYTES = 4 << 20


def on_disk(folder: Path) -> bool:
    """Whether the page cache of this file system gives pages back when asked to."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(bytes(NUM_BYTES))
        file.flush()
        os.fsync(file.fileno())
        drop(Path(file.name))
        return resident_bytes(Path(file.name)) == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if not on_disk(tmp_path):
        pytest.skip("files here lie in memory alone")
    return tmp_path


def make_file(path: Path, num_bytes: int = NUM_BYTES) -> Path:
    """A file that is on the disk, and not in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(os.urandom(num_bytes))
        file.flush()
        os.fsync(file.fileno())
    drop(path)
    return path


def make_models(cache: Path, *names: str) -> list[Path]:
    """Models whose checkpoints are not in memory."""
    made = []
    for name in names:
        make_model(cache)
        target = cache / "models" / subjects.encode(name)
        if not target.exists():
            make_tiny(target, context=128)
            manifest = (cache / "models" / "tiny" / "manifest.json").read_text()
            (target / "manifest.json").write_text(manifest.replace('"tiny"', f'"{name}"', 1))
        made.append(make_file(target / "model.safetensors"))
    return made


def test_drop_and_hit_can_be_seen(folder: Path) -> None:
    """What was read is in memory, what was dropped is not, and looking changes nothing."""
    path = make_file(folder / "weights")
    assert (resident_bytes(path), warm_share([path])) == (0, 0)
    heard: list[int] = []
    assert bring_in(path, heard.append) == NUM_BYTES
    assert (resident_bytes(path), warm_share([path])) == (NUM_BYTES, 1)
    assert heard == sorted(heard)
    assert heard[-1] == NUM_BYTES
    drop(path)
    assert resident_bytes(path) == 0


def test_files_of_odd_sizes(folder: Path) -> None:
    """A last page that is not full counts for what it holds; an empty file and a missing one hold nothing."""
    path = make_file(folder / "odd", 3 * PAGE + 5)
    assert bring_in(path) == resident_bytes(path) == 3 * PAGE + 5
    (folder / "empty").touch()
    for name in ("empty", "missing"):
        assert bring_in(folder / name) == resident_bytes(folder / name) == 0
        assert warm_share([folder / name]) == 0


def test_the_share_of_what_is_here_is_the_bytes(folder: Path) -> None:
    """Half of one file, all of a smaller one: the sample tells the share of all bytes, to a few hundredths."""
    large, small = make_file(folder / "large"), make_file(folder / "small", NUM_BYTES // 4)
    bring_in(small)
    bring_in(large)
    with large.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, NUM_BYTES // 2, os.POSIX_FADV_DONTNEED)
    assert resident_bytes(large) == NUM_BYTES // 2
    assert warm_share([large, small, folder / "missing"]) == pytest.approx(3 / 5, abs=0.05)


async def test_the_most_wanted_are_kept_within_the_budget(folder: Path) -> None:
    """Two of three fit: the first two are brought in; when wishes change, what is not wanted any more is dropped."""
    a, b, c = make_models(folder, "a", "b", "c")
    loader = Preloader(2 * NUM_BYTES + 1, folder, prepared=False)
    await loader.want(["a", "b", "c"])
    assert loader.kept == ["a", "b"]
    assert [resident_bytes(path) for path in (a, b, c)] == [NUM_BYTES, NUM_BYTES, 0]
    assert loader.resident("a") == loader.weights_bytes("a") == NUM_BYTES
    await loader.want(["c", "a"])
    assert loader.kept == ["c", "a"]
    assert [resident_bytes(path) for path in (a, b, c)] == [NUM_BYTES, 0, NUM_BYTES]
    await loader.want([])
    assert loader.kept == []
    assert loader.resident("a") == loader.resident("c") == 0


async def test_what_a_te_has_mapped_is_not_taken_from_it(folder: Path) -> None:
    """Dropping a model lets go only of pages that nobody has mapped."""
    (path,) = make_models(folder, "a")
    loader = Preloader(NUM_BYTES, folder, prepared=False)
    await loader.want(["a"])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::PAGE]) > 0  # every page is mapped now
        await loader.want([])
        assert loader.resident("a") == NUM_BYTES


async def test_models_that_are_not_here_or_too_large_are_left_out(folder: Path) -> None:
    """No file, no budget: nothing happens, and nothing is raised."""
    make_models(folder, "a")
    loader = Preloader(NUM_BYTES - 1, folder, prepared=False)
    await loader.want(["missing", "a"])
    assert loader.kept == []
    assert loader.resident("missing") == loader.weights_bytes("missing") == 0


def test_weights_that_are_not_prepared_yet_have_an_estimate(folder: Path) -> None:
    """Before the first TE has run nothing is resident, and the size is the checkpoint's."""
    make_models(folder, "a")
    loader = Preloader(NUM_BYTES, folder)
    assert loader.files("a") == []
    assert (loader.resident("a"), loader.weights_bytes("a")) == (0, NUM_BYTES)
