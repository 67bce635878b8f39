"""A real nats-server for tests: a fresh one on a free loopback port, killed and started again at will."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path


def binary() -> str:
    """The nats-server of this environment, else the one on PATH."""
    beside = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "no nats-server: install the extra `embedded`"
    return found


class NatsServer:
    """One server process with its store. `url` stays the same over restarts."""

    def __init__(self, folder: Path, extra: str = "") -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._config = folder / "nats.conf"
        self._port = -1
        self._extra = extra
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> None:
        """Start, and wait until the port answers."""
        self._config.write_text(
            f"listen: 127.0.0.1:{self._port}\nmax_payload: 8MB\nports_file_dir: {self._folder}\n"
            f"jetstream {{ store_dir: {self._folder / 'js'}, sync_interval: 2m }}\n{self._extra}\n"
        )
        with (self._folder / "nats.log").open("ab") as log:
            self._process = subprocess.Popen(
                [binary(), "-c", str(self._config)], stdout=log, stderr=log
            )
        ports = self._folder / f"nats-server_{self._process.pid}.ports"
        give_up = time.monotonic() + 10
        while True:
            assert self._process.poll() is None, (self._folder / "nats.log").read_text()[-2000:]
            assert time.monotonic() < give_up, "nats-server did not start"
            if ports.exists() and (text := ports.read_text()):
                self.url = json.loads(text)["nats"][0]
                self._port = int(self.url.rsplit(":", 1)[1])
                return
            time.sleep(0.005)

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def pause(self) -> None:
        """SIGSTOP, and wait until all its threads have stopped: one that runs may still answer."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self._process.pid}/task")
        while any(not _is_stopped(thread / "stat") for thread in threads.iterdir()):
            time.sleep(0.001)

    def stop(self) -> None:
        """End it, whatever its state."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()

    def restart(self) -> None:
        """kill -9 and start again on the same port and store."""
        self.kill()
        self.start()


if __name__ == "__main__":
    sys.exit("this module is for tests")


def _is_stopped(stat: Path) -> bool:
    """Whether this thread's state, the word behind its name, says so."""
    return stat.read_text().rpartition(")")[2].split()[0] in "Tt"
