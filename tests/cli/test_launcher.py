"""`deepflow up` with a tiny model and real processes: starting, looking, mending, stopping."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deepflow.cli.home import Home, Instance
from deepflow.cli.status import ask
from services.scheduler.heatmap import Heatmap
from shared.arena.place import arena_dir
from shared.config import EXIT_CODE, Reader
from shared.errors import DeepFlowError
from shared.scaling_messages import Step
from tests.worker.tiny import make_tiny

pytestmark = [pytest.mark.system, pytest.mark.apart, pytest.mark.timeout(180)]
ASK = {"model": "tiny", "prompt": "Hello", "max_tokens": 4}
NAMES = {"launcher", "nats", "gateway", "scheduler", "worker", "cache"}


class Command:
    """The `deepflow` command in a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        make_tiny(self.home / "cache" / "models" / "tiny")
        self.output = folder / "up.out"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("DEEPFLOW_")}
        self.env |= {"DEEPFLOW_HOME": str(self.home), "DEEPFLOW_GRACE_S": "5"}
        self._started: list[psutil.Process] = []

    def run(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """One command, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "deepflow.cli.main", *arguments],
            env=self.env, input=text, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip

    def up(self, *arguments: str, ready: bool = True) -> subprocess.Popen[bytes]:
        """`deepflow up` in the foreground, until it says that it is ready, or at least has started all services."""
        with self.output.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "deepflow.cli.main", "up", "--model", "tiny", *arguments],
                env=self.env, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self._started.append(psutil.Process(process.pid))
        wait(
            lambda: (
                process.poll() is not None
                or ("ready at" in self.said() if ready else self.instance() is not None)
            ),
            self.said,
        )
        return process

    def instance(self) -> Instance | None:
        """The running instance, as other commands find it."""
        return Home(self.home, self.home / "cache").running()

    def said(self) -> str:
        """What `deepflow up` has printed."""
        return self.output.read_text()

    def family(self) -> list[psutil.Process]:
        """Every process of this home, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("DEEPFLOW_HOME") == str(self.home)
            except psutil.Error:
                continue
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def close(self) -> None:
        """End all that still runs."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(arena_dir(Reader({}), self.home), ignore_errors=True)  # a killed one's


def wait(until: Callable[[], bool], explain: Callable[[], object], within_s: float = 60) -> None:
    """Until it is so."""
    give_up = time.monotonic() + within_s
    while not until():
        assert time.monotonic() < give_up, explain()
        time.sleep(0.1)


def post(url: str, body: dict[str, Any]) -> str:
    """The answer to a POST."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        text: str = response.read().decode()
        return text


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """A fresh home with a tiny model in its cache."""
    made = Command(tmp_path)
    yield made
    made.close()


def test_ctrl_c_stops_what_up_started(command: Command) -> None:
    """Up says one ready line, with the gateway's address first; Ctrl-C drains and leaves nothing behind."""
    process = command.up("--port", "0")
    said = command.said()
    assert said.count("ready at") == 1, said
    url = re.findall(r"http://[^\s/]+", said)[0]
    result = command.run("status", "--json")
    assert result.returncode == 0, result.stderr
    status = json.loads(result.stdout)
    assert status["url"] == url
    assert {service["name"] for service in status["services"]} == NAMES
    assert [(te["model"], te["role"], te["state"]) for te in status["tes"]] == [
        ("tiny", "colocated", "ready")
    ]
    assert psutil.pid_exists(status["tes"][0]["pid"])

    again = command.run("up", "--model", "tiny")
    assert again.returncode == 1
    assert url in again.stderr

    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0, command.said()
    wait(lambda: not command.family(), command.family, 5)
    assert not (command.home / "instance.json").exists()
    assert command.run("status").returncode == 1


def test_roles_stand_side_by_side(command: Command) -> None:
    """--pd starts TEs of both roles, beside colocated ones if asked; a prompt for which the heatmap says so goes from
    one to the other; and what was kept in memory is gone at the end."""
    heatmap = Heatmap(
        prefill_lens=(1, 4096),
        ratios=(0.01, 100.0),
        rates=(1.0,),
        values=(((9.0, 9.0), (9.0, 9.0)),),
        source="engine",
    )
    (command.home / "heatmaps").mkdir()
    (command.home / "heatmaps/tiny.json").write_bytes(heatmap.to_json())
    arena = arena_dir(Reader({}), command.home)
    arena.mkdir(mode=0o700)  # a killed one left it behind
    (arena / "left").touch(0o600)
    command.env |= {"DEEPFLOW_PD_MIN_TOKENS": "4", "DEEPFLOW_ARENA_BYTES": str(64 << 20)}
    process = command.up("--port", "0", "--pd", "1p1d", "--workers", "1")

    def tes() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(command.run("status", "--json").stdout)["tes"]
        return [te for te in found if te["state"] == "ready"]

    wait(lambda: len(tes()) == 3, tes)
    assert sorted(te["role"] for te in tes()) == ["colocated", "decode", "prefill"]
    chat = command.run("chat", text="Hello, who are you?\n")
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.strip()
    counted = {te["role"]: te["counters"] for te in tes()}
    assert counted["prefill"]["requests_handed"] == 1
    assert counted["decode"]["generation_tokens"] > 0
    assert not counted["colocated"]["generation_tokens"]

    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0, command.said()
    assert not arena.exists()


def test_a_model_is_asleep_until_somebody_asks(command: Command) -> None:
    """With --workers 0..N up is ready without a TE; the first request wakes the model, and `scale` says how many it has
    from then on, and how each of them came up."""
    process = command.up("--port", "0", "--workers", "0..2")
    instance = command.instance()
    assert instance is not None
    assert json.loads(command.run("status", "--json").stdout)["tes"] == []
    stream = post(instance.url + "/v1/completions", {**ASK, "stream": True})
    lines = [line.strip() for line in stream.splitlines() if line.strip()]
    assert lines[0] in (": queued", ": loading 0 %")
    assert lines.index(": warm") < next(n for n, line in enumerate(lines) if line[0] == "d")
    assert lines[-1] == "data: [DONE]"

    scaled = command.run("scale", "tiny", "--to", "2")
    assert scaled.returncode == 0, scaled.stderr
    assert "2 of 2 TEs up" in scaled.stdout
    assert all(step in scaled.stdout for step in Step)
    assert re.search(r"(warm|fork|exec) +(dram|disk|fork) ", scaled.stdout), scaled.stdout
    status = json.loads(command.run("status", "--json").stdout)
    assert [te["state"] for te in status["tes"]] == ["ready", "ready"]
    assert len(status["starts"]) == 2
    assert [(one["model"], one["target"]) for one in status["fleets"]] == [("tiny", 2)]

    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0, command.said()
    wait(lambda: not command.family(), command.family, 5)


def test_a_detached_instance_is_used_mended_and_stopped(command: Command) -> None:
    """--detach returns when it is ready; whatever is killed comes back; `down` ends it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = command.run("up", "--model", "tiny", "--port", str(port), "--detach")
    assert result.returncode == 0, result.stderr
    assert f"Port {port} is taken" in result.stdout

    chat = command.run("chat", text="Hello\n")
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.strip()
    assert "service_started" in command.run("logs", "gateway").stdout
    assert re.search(r"te-\w+ +tiny +colocated +\d+ +ready", command.run("status").stdout)

    before = command.instance()
    assert before is not None
    assert set(before.services) == NAMES - {"launcher"}
    for pid in before.services.values():
        os.kill(pid, signal.SIGKILL)

    def is_mended() -> bool:
        now = command.instance()
        if now is None or any(
            now.services.get(name, pid) == pid for name, pid in before.services.items()
        ):
            return False
        try:
            found = asyncio.run(ask(now))
        except (DeepFlowError, TimeoutError):  # the new bus is not there yet
            return False
        ready = {service["name"] for service in found["services"] if service.get("ready")}
        return ready == NAMES and [te["state"] for te in found["tes"]] == ["ready"]

    wait(is_mended, lambda: (command.home / "logs/launcher.log").read_text())
    mended = command.instance()
    assert mended is not None
    assert mended.nats_url == before.nats_url
    wait(lambda: command.run("chat", text="Hello\n").returncode == 0, command.instance, 30)

    down = command.run("down")
    assert down.returncode == 0, down.stderr
    wait(lambda: not command.family(), command.family, 5)


def test_nobody_outlives_a_killed_launcher(command: Command) -> None:
    """kill -9 of the launcher ends every process of its instance, and the home is free again."""
    process = command.up("--port", "0")
    process.kill()
    process.wait()
    wait(lambda: not command.family(), command.family, 30)
    assert "Nothing runs" in command.run("status").stderr


def test_a_child_that_keeps_dying_ends_everything(command: Command) -> None:
    """After five deaths within a minute the launcher stops the rest, says why, and fails."""
    process = command.up("--port", "0", ready=False)
    killed: set[int | None] = {None}

    def cache() -> int | None:
        """The process that runs now, unless we have killed it."""
        instance = command.instance()
        pid = instance.services.get("cache") if instance is not None else None
        return None if pid in killed else pid

    for _ in range(5):
        wait(lambda: cache() is not None, command.said)
        pid = cache()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
    assert process.wait(60) == 1
    assert "cache was killed by SIGKILL, for the fifth time within a minute" in command.said()
    assert command.family() == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--model", "no-such-model"), "no-such-model"),
        (("--model", "tiny", "--host", "0.0.0.0"), "DEEPFLOW_API_KEYS"),
        (("--model", "tiny", "--pd", "1d1p"), "1p1d"),
        (("--model", "tiny", "--workers", "0"), "--pd"),
    ],
)
def test_what_cannot_start_says_why(
    command: Command, arguments: tuple[str, ...], reason: str
) -> None:
    """A detached start that fails is told like one in the foreground, and leaves nothing behind."""
    result = command.run("up", *arguments, "--detach")
    assert result.returncode in (1, EXIT_CODE)
    assert reason in result.stderr
    assert command.family() == []
