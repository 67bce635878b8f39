"""A peer's own virtual environment, made once: `DEEPFLOW_CACHE/peers/<name>`.

A marker in it says what it was made from; one that is not there, or says something else, means making it again. It must
not know what is run in it.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from asyncio import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import orjson

from deepflow.bench.peers.roster import Peer
from shared.errors import Unavailable

_MARKER: Final = "deepflow.json"
_TAIL_LINES: Final = 6
# The requirements of installed distributions, extras left out, a line each.
_LIST_REQUIREMENTS: Final = """
import importlib.metadata, sys
for name in sys.argv[1:]:
    for line in importlib.metadata.requires(name) or ():
        if "extra ==" not in line:
            print(line)
"""


async def ensure(peer: Peer, root: Path, log: Path) -> Path:
    """The environment's folder, made if need be; what the tools said goes to `log`.

    Raises Unavailable with pip's last lines.
    """
    folder = root / peer.name
    recipe = _recipe(peer)
    if _marker(folder) == recipe:
        return folder
    await asyncio.to_thread(_clear, folder, log)
    python = str(python_of(folder))
    await _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], {}, log)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-input"]
    pip += ["--progress-bar", "off", "--disable-pip-version-check"]
    await _run([*pip, *peer.packages], peer.build_env, log)
    if peer.bare:
        await _run([*pip, "--no-deps", *peer.bare], peer.build_env, log)
        names = [_name(requirement) for requirement in peer.bare]
        listed = await _run([python, "-c", _LIST_REQUIREMENTS, *names], {}, log)
        needed = [line for line in listed.splitlines() if _name(line) not in peer.leave_out]
        await _run([*pip, *peer.packages, *needed], peer.build_env, log)
    (folder / _MARKER).write_bytes(orjson.dumps(recipe))
    return folder


def _recipe(peer: Peer) -> Any:
    """What makes an environment what it is, as it reads when it comes back from the marker."""
    made_of = {**asdict(peer), "python": sys.version, "minutes": None}
    return orjson.loads(orjson.dumps(made_of))


def _clear(folder: Path, log: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / "bin" / "python"


def _name(requirement: str) -> str:
    """The distribution that a requirement is about."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return match[0].lower() if match else ""


def _marker(folder: Path) -> Any:
    try:
        return orjson.loads((folder / _MARKER).read_bytes())
    except (OSError, ValueError):
        return None


async def _run(command: Sequence[str], env: dict[str, str], log: Path) -> str:
    """Its standard output. Raises Unavailable with the end of the log if it fails; ends with us."""
    with log.open("ab") as sink:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=clean_env() | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=sink,
            start_new_session=True,
        )
        try:
            output, _ = await process.communicate()
        except asyncio.CancelledError:
            os.killpg(process.pid, 9)
            await process.wait()
            raise
        sink.write(output)
    if process.returncode != 0:
        raise Unavailable(f"{' '.join(command[:6])} ... failed:\n{last_lines(log)}")
    return output.decode(errors="replace")


def clean_env() -> dict[str, str]:
    """Our environment without what would lead another Python to our packages."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in ours}


def last_lines(log: Path) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-_TAIL_LINES:])
