"""Publishing: whole or not at all, whoever is killed when; one build for many pulls; damage is found and mended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deepflow.models.pull import pull
from shared import catalog
from shared.errors import InvalidRequest, ModelNotFound, NotFound
from tests.cli.gguf_file import write_gguf
from tests.worker.tiny import make_tiny

ROOT = Path(__file__).parents[2]


class Steps:
    """A Progress that remembers the steps and how many bytes of each were not done."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.missing: list[int] = []

    def step(self, name: str, total_bytes: int) -> None:
        """Remembered."""
        self.names.append(name)
        self.missing.append(total_bytes)

    def advance(self, num_bytes: int) -> None:
        """Subtracted."""
        self.missing[-1] -= num_bytes


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small GGUF file."""
    return write_gguf(make_tiny(tmp_path / "hf"), tmp_path / "tiny.gguf")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache folder."""
    return tmp_path / "cache"


def start(reference: Path | str, cache: Path, name: str, stop_at: int) -> subprocess.Popen[str]:
    """A child that pulls and stops at an event."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cli.puller", str(reference), str(cache), name, str(stop_at)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def read_until(child: subprocess.Popen[str], start: str) -> str:
    """The child's next line that begins so."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(start):
            return line.strip()
    raise AssertionError(f"the child ended without {start!r}")


def entries(cache: Path) -> list[str]:
    """What lies in the folder of models, lock files left out."""
    return sorted(p.name for p in (cache / "models").iterdir() if not p.name.startswith(".lock-"))


def test_a_pull_tells_its_steps_and_is_found(source: Path, cache: Path) -> None:
    """Steps advance by exactly their size; the manifest lists every file with size and hash."""
    steps = Steps()
    model = pull(str(source), cache, progress=steps)
    assert steps.names == ["converting weights", "checksums"]
    assert steps.missing == [0, 0]
    assert model == catalog.open_model(cache, "tiny")
    manifest = json.loads((model.path / "manifest.json").read_text())
    names = {path.name: path.stat().st_size for path in model.path.iterdir()}
    del names["manifest.json"]
    assert names == {file["name"]: file["size"] for file in manifest["files"]}
    assert entries(cache) == ["tiny"]


def test_pulling_again_returns_at_once(source: Path, cache: Path) -> None:
    """What is there is not built again; `verify` reads all of it."""
    first = pull(str(source), cache)
    steps = Steps()
    assert first == pull(str(source), cache, progress=steps)
    assert steps.names == []
    assert first == pull(str(source), cache, progress=steps, verify=True)
    assert steps.names == ["verifying"]


@pytest.mark.parametrize("verify", [False, True])
def test_damage_is_mended(source: Path, cache: Path, verify: bool) -> None:
    """A file of the wrong size is always found, changed content with `verify`; the model is then built anew."""
    model = pull(str(source), cache)
    path = model.path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1] if verify else []))
    steps = Steps()
    pull(str(source), cache, verify=verify, progress=steps)
    assert "converting weights" in steps.names
    assert whole == path.read_bytes()
    assert entries(cache) == ["tiny"]


def test_a_changed_source_is_pulled_anew(source: Path, cache: Path) -> None:
    """The same file with new content replaces the model; another file under a taken name is refused."""
    before = pull(str(source), cache)
    write_gguf(make_tiny(source.parent / "hf2", seed=1), source)
    after = pull(str(source), cache)
    assert before.weights_digest != after.weights_digest
    other = source.parent / "other" / "tiny.gguf"
    other.parent.mkdir()
    other.write_bytes(source.read_bytes())
    with pytest.raises(InvalidRequest, match="taken"):
        pull(str(other), cache)
    assert pull(str(other), cache, name="org/tiny").name == "org/tiny"
    assert [model.name for model in catalog.list_models(cache)] == ["org/tiny", "tiny"]


@pytest.mark.parametrize("stop_at", [1, 5, 21, 22, 24])
def test_a_killed_pull_leaves_nothing_half_done(source: Path, cache: Path, stop_at: int) -> None:
    """Killed while converting or hashing: no model is there, and the next pull sweeps and succeeds."""
    child = start(source, cache, "", stop_at)
    read_until(child, "stopped")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert entries(cache)[0].startswith(f".tmp-{child.pid}-")
    with pytest.raises(ModelNotFound):
        catalog.open_model(cache, "tiny")
    assert pull(str(source), cache, verify=True).name == "tiny"
    assert entries(cache) == ["tiny"]


def test_a_kill_while_replacing_leaves_a_pull_to_mend_it(source: Path, cache: Path) -> None:
    """Killed while a damaged model is rebuilt: the damaged one stays until the new one is whole."""
    path = pull(str(source), cache).path / "model.safetensors"
    path.write_bytes(b"")
    child = start(source, cache, "", 4)
    read_until(child, "stopped")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert path.read_bytes() == b""
    pull(str(source), cache)
    assert path.stat().st_size > 0
    assert entries(cache) == ["tiny"]


def test_two_pulls_of_one_model_build_it_once(source: Path, cache: Path) -> None:
    """The second waits, says so, and takes what the first published."""
    first = start(source, cache, "", 3)
    read_until(first, "stopped")
    second = start(source, cache, "", 0)
    read_until(second, "waiting for another pull of tiny")
    output, _ = first.communicate("\n")
    assert output.splitlines()[-1] == f"pulled {cache / 'models' / 'tiny'}"
    output, _ = second.communicate()
    assert output.splitlines() == [f"pulled {cache / 'models' / 'tiny'}"]
    assert entries(cache) == ["tiny"]


def test_a_living_pull_is_not_swept(source: Path, cache: Path) -> None:
    """Another model's pull clears away the dead only."""
    living = start(source, cache, "a", 3)
    read_until(living, "stopped")
    (cache / "models" / ".tmp-1-dead").mkdir()  # process 1 lives, but holds no lock on it
    pull(str(source), cache, name="b")
    assert entries(cache)[1:] == ["b"]
    assert entries(cache)[0].startswith(f".tmp-{living.pid}-")
    output, _ = living.communicate("\n")
    assert output.splitlines()[-1].startswith("pulled")
    assert entries(cache) == ["a", "b"]


def test_an_interrupted_pull_cleans_up_itself(source: Path, cache: Path) -> None:
    """Ctrl-C leaves no temporary folder behind."""
    child = start(source, cache, "", 3)
    read_until(child, "stopped")
    os.kill(child.pid, signal.SIGINT)
    child.communicate()
    assert entries(cache) == []


@pytest.mark.parametrize("name", ["", "a" * 300, "/" * 100])
def test_impossible_names_are_refused(source: Path, cache: Path, name: str) -> None:
    """A name that makes no file name is the caller's error (an empty one stands for the default)."""
    if not name:
        assert pull(str(source), cache, name=name).name == "tiny"
        return
    with pytest.raises(InvalidRequest):
        pull(str(source), cache, name=name)


@pytest.mark.parametrize("reference", ["absent", "org/name", "./absent.gguf", ""])
def test_a_reference_that_leads_nowhere_says_what_would(cache: Path, reference: str) -> None:
    """The error lists what is known and how a hub's model is written."""
    with pytest.raises(NotFound, match=r"smollm2-135m.*hf:org/name"):
        pull(reference, cache)


def test_a_sweep_meets_a_pull_that_just_ended(source: Path, cache: Path) -> None:
    """A temporary folder that vanishes between being listed and being opened stops nobody."""
    models = cache / "models"
    models.mkdir(parents=True)
    (models / ".tmp-1-gone").symlink_to(models / "nowhere")  # listed, but not there to be opened
    assert pull(str(source), cache).name == "tiny"
