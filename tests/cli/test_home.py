"""A home: one instance at a time, and a file that describes it to other processes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from deepflow.cli import ports
from deepflow.cli.home import Home, Instance

INSTANCE = Instance(
    pid=1,
    url="http://127.0.0.1:8000",
    models=["m"],
    ready=True,
    nats_url="nats://127.0.0.1:1",
    realm="deepflow",
    user="operator",
    password="secret",
    producer="local",
    producer_password="secret",
    services={"nats": 2},
)


def test_a_home_is_taken_once(tmp_path: Path) -> None:
    """The second instance is told that the first one is there, until that one has gone."""
    first, second = (Home(tmp_path / "home", tmp_path / "cache") for _ in range(2))
    assert not first.is_taken()
    assert first.take()
    assert second.is_taken()
    assert not second.take()
    first.release()
    assert not second.is_taken()
    assert second.take()
    second.release()


def test_an_instance_is_described_to_others_and_to_nobody_else(tmp_path: Path) -> None:
    """What is written is read back; the file, which holds credentials, is the owner's only."""
    home = Home(tmp_path / "home", tmp_path / "cache")
    assert home.running() is None
    assert home.take()
    assert home.running() is None
    home.describe(INSTANCE)
    assert Home(home.path, home.cache).running() == INSTANCE
    assert (home.path / "instance.json").stat().st_mode & 0o777 == 0o600
    home.release()
    assert home.running() is None
    assert not (home.path / "instance.json").exists()


def test_a_killed_instance_leaves_its_home_free(tmp_path: Path) -> None:
    """The kernel gives the lock back, and the file that stayed behind counts for nothing."""
    script = (
        "import os, signal, sys; from pathlib import Path; from deepflow.cli.home import Home; "
        f"home = Home(Path({str(tmp_path)!r}) / 'home', Path('/nowhere')); assert home.take(); "
        "(home.path / 'instance.json').write_text('{}'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    home = Home(tmp_path / "home", tmp_path / "cache")
    assert home.running() is None
    assert home.take()
    home.release()


def test_with_a_home_alone_the_cache_lies_below_it(tmp_path: Path) -> None:
    """DEEPFLOW_CACHE falls to DEEPFLOW_HOME/cache, and both to the user's folders."""
    home = Home.from_env({"DEEPFLOW_HOME": str(tmp_path)})
    assert (home.path, home.cache) == (tmp_path, tmp_path / "cache")
    home = Home.from_env({"DEEPFLOW_HOME": str(tmp_path), "DEEPFLOW_CACHE": "/elsewhere"})
    assert home.cache == Path("/elsewhere")


def test_a_taken_port_is_replaced_by_a_free_one() -> None:
    """The wanted port where it is free, any other where somebody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wanted = taken.getsockname()[1]
        chosen = ports.choose("127.0.0.1", wanted)
        assert chosen not in (0, wanted)
    assert ports.choose("127.0.0.1", wanted) == wanted
