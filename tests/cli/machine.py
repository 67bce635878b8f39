"""A machine that runs docker-compose.yml without a container engine: the file's own commands, environment and mounts.

Each service is a process in mount and IPC namespaces of its own (`container.py`); all share one network namespace, in
which every service name is an address of loopback. Needs root and util-linux.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
_LOOPBACK_UP = """
import fcntl, socket, struct, sys
with socket.socket() as one:
    fcntl.ioctl(one, 0x8914, struct.pack("16sh14x", b"lo", 0x49))
print("up", flush=True)
sys.stdin.read()
"""


def can_run() -> str:
    """Why this machine cannot make the namespaces; empty if it can."""
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter")):
        return "unshare and nsenter of util-linux are needed"
    tried = subprocess.run(
        ["unshare", "--mount", "--ipc", "--net", "true"], capture_output=True, check=False
    )
    return (
        "" if os.geteuid() == 0 and tried.returncode == 0 else "root's right to unshare is needed"
    )


def read(variables: dict[str, str], profile: str = "cpu") -> dict[str, Any]:
    """docker-compose.yml as compose understands it: `variables` filled in as from the environment, and of the services
    and of what they depend on those that `profile` leaves."""

    def fill(match: re.Match[str]) -> str:
        return variables.get(match["name"]) or match["default"] or ""

    text = (ROOT / "docker-compose.yml").read_text()
    pattern = r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}"
    parsed: dict[str, Any] = yaml.safe_load(re.sub(pattern, fill, text))
    services = parsed["services"]
    active = {name for name, one in services.items() if profile in one.get("profiles", [profile])}
    parsed["services"] = {name: services[name] for name in services if name in active}
    for service in parsed["services"].values():
        needs = service.get("depends_on", {})
        assert all(name in active or not how.get("required", True) for name, how in needs.items())
        service["depends_on"] = {name: needs[name] for name in needs if name in active}
    return parsed


class Machine:
    """Volumes, a network, and the processes of the services."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.services: dict[str, dict[str, Any]] = read(variables)["services"]
        self.volumes = folder / "volumes"
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._network = subprocess.Popen(
            ["unshare", "--net", sys.executable, "-c", _LOOPBACK_UP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._network.stdout is not None
        assert self._network.stdout.readline() == b"up\n"

    # ----------------------------------------------------------------------------------------------------- services

    def volume(self, name: str) -> Path:
        """The folder of a named volume."""
        path = self.volumes / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, service: str) -> str:
        """All that a service has printed."""
        return (self._folder / f"{service}.log").read_text(errors="replace")

    def inside(self, command: list[str]) -> list[str]:
        """`command`, in the machine's network."""
        return ["nsenter", f"--net=/proc/{self._network.pid}/ns/net", *command]

    def start(self, service: str, command: list[str] | None = None) -> subprocess.Popen[bytes]:
        """Start a service, or another command in its place."""
        with (self._folder / f"{service}.log").open("ab") as log:
            process = subprocess.Popen(
                self._command(service, command), stdout=log, stderr=log, start_new_session=True
            )
        if command is None:
            self._processes[service] = process
        return process

    def _command(self, service: str, command: list[str] | None = None) -> list[str]:
        described = self.services[service]
        own = [*described.get("entrypoint", []), *described["command"]]
        scripts, base = sysconfig.get_path("scripts"), Path(sys.base_prefix)
        spec = {
            "command": command or own,
            # What an image brings by itself, and nothing else of ours.
            "environment": {
                "PATH": f"{scripts}:/usr/local/bin:/usr/bin:/bin",
                "HOME": "/tmp",
                "LANG": "C.UTF-8",
                **described.get("environment", {}),
            },
            "workdir": "/tmp",
            "hosts": "".join(f"127.0.0.1 {name}\n" for name in ("localhost", *self.services)),
            "visible": [str(ROOT), str(Path(sys.prefix)), str(base)],
            "mounts": [self._mount(volume) for volume in described.get("volumes", [])],
        }
        path = self._folder / f"{service}-{time.monotonic_ns()}.json"
        path.write_text(json.dumps(spec))
        container = [sys.executable, str(Path(__file__).with_name("container.py")), str(path)]
        return self.inside(["unshare", "--mount", "--ipc", "--propagation", "private", *container])

    def _mount(self, volume: str) -> tuple[str, str, bool]:
        source, target, *options = volume.split(":")
        where = (ROOT / source).resolve() if source.startswith((".", "/")) else self.volume(source)
        return str(where), target, options == ["ro"]

    def wait_healthy(self, service: str, within_s: float = 60) -> None:
        """Until the service's own health check passes, run inside its own surroundings."""
        check = self.services[service]["healthcheck"]["test"]
        assert check[0] == "CMD"
        give_up = time.monotonic() + within_s
        while self.start(service, check[1:]).wait() != 0:
            assert self._processes[service].poll() is None, self.log(service)
            assert time.monotonic() < give_up, self.log(service)
            time.sleep(0.2)

    def stop(self, service: str) -> int:
        """What compose does: SIGTERM, and SIGKILL after the service's grace period. The exit code."""
        process = self._processes[service]
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(float(self.services[service]["stop_grace_period"].rstrip("s")))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()

    def start_order(self) -> list[str]:
        """The services, each after those it depends on."""
        order: list[str] = []
        while len(order) < len(self.services):
            order += [
                name
                for name, service in self.services.items()
                if name not in order and set(service.get("depends_on", {})) <= set(order)
            ]
        return order

    def close(self) -> None:
        """End all that still runs."""
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert self._network.stdin is not None
        assert self._network.stdout is not None
        self._network.stdin.close()
        self._network.stdout.close()
        self._network.wait(10)
