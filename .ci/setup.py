"""Makes `.venv` with the extras `all` and `dev`, or keeps it while pyproject.toml stays the same.

On Linux torch is a CUDA build of 2.8 GB on PyPI, and a CPU build of 192 MB on PyTorch's own index. So: plain
pip where that already resolves to a CPU build; else PyTorch's CPU index, if it answers and there is no accelerator;
else plain pip, after saying the size.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PIP = [str(VENV / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
LOG = VENV / "setup.log"
STAMP = VENV / "setup.stamp"
NATIVE = ROOT / "services/worker/flowserve/native"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ACCELERATORS = ("/dev/nvidia0", "/dev/davinci0", "/dev/dxg")


def main() -> int:
    """Set up; the exit code."""
    project = (ROOT / "pyproject.toml").read_bytes()
    # The interpreter and the place count too: a venv survives neither a move nor a new Python.
    wanted = hashlib.sha256(project + sys.version.encode() + bytes(ROOT)).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return build_kernels()
    if not (VENV / "bin/python").exists():
        print("Making .venv ...", flush=True)
        venv.create(VENV, with_pip=True, symlinks=True)
    STAMP.unlink(missing_ok=True)
    torch = next(
        line
        for line in tomllib.loads(project.decode())["project"]["optional-dependencies"]["worker"]
        if line.startswith("torch==")
    )
    os.environ["DEEPFLOW_SKIP_KERNELS"] = "1"  # built below, where their errors are seen
    print(
        "Installing DeepFlow and what it needs; pip's own words are in .venv/setup.log", flush=True
    )
    if not install([*torch_options(torch), "--editable", f"{ROOT}[all,dev]"]):
        print("pip failed:", *LOG.read_text().splitlines()[-15:], sep="\n  ", file=sys.stderr)
        return 1
    STAMP.write_text(wanted)
    return build_kernels()


def build_kernels() -> int:
    """Build the native kernels if their sources changed, or say why there are none; the exit code."""
    stamp = VENV / "kernels.stamp"
    sys.path.insert(0, str(NATIVE))
    from build import LIBRARY, BuildError, build, sources_digest

    digest = sources_digest()
    if LIBRARY.exists() and stamp.exists() and stamp.read_text() == digest:
        return 0
    print("Building the native kernels ...", flush=True)
    try:
        build()
    except BuildError as error:
        print(f"No native kernels, the engine will use torch, several times slower: {error}")
    else:
        stamp.write_text(digest)
    return 0


def torch_options(torch: str) -> list[str]:
    """What to tell pip so that it takes the right build of `torch` (a pinned requirement)."""
    resolved = resolve(torch)
    if resolved is not None and is_cpu_build(resolved):
        return []
    accelerator = any(Path(device).exists() for device in ACCELERATORS)
    if not accelerator and answers(f"{CPU_INDEX}/torch/"):
        return [f"{torch}+cpu", "--extra-index-url", CPU_INDEX]
    why = "for the accelerator here" if accelerator else "as PyTorch's CPU index does not answer"
    print(f"Taking the CUDA build of {torch} {why}: about 2.8 GB.", flush=True)
    return []


def resolve(torch: str) -> dict[str, object] | None:
    """The metadata of the build that plain pip would take, or None if it finds none."""
    command = [*PIP, "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed"]
    found = subprocess.run(
        [*command, "--report", "-", torch], capture_output=True, text=True, check=False
    )
    if found.returncode != 0:
        return None
    metadata: dict[str, object] = json.loads(found.stdout)["install"][0]["metadata"]
    return metadata


def is_cpu_build(metadata: dict[str, object]) -> bool:
    """Whether this build of torch needs no CUDA libraries on this machine."""
    needs = metadata.get("requires_dist", [])
    assert isinstance(needs, list)
    return sys.platform != "linux" or not any(
        str(need).startswith(("nvidia-", "cuda-")) for need in needs
    )


def answers(url: str) -> bool:
    """Whether `url` is there, within five seconds."""
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return bool(page.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def install(arguments: list[str]) -> bool:
    """Run pip with its output in the log and a sign of life now and then; whether it succeeded."""
    started = told = time.monotonic()
    with LOG.open("w") as log:
        # Bytecode is made when a module is first used: most of what is installed never is.
        command = [*PIP, "install", "--no-compile", *arguments]
        pip = subprocess.Popen(command, stdout=log, stderr=log)
        while pip.poll() is None:
            time.sleep(0.2)
            if time.monotonic() - told > 15:
                told = time.monotonic()
                print(f"  {told - started:3.0f} s  {stage()}", flush=True)
    if pip.returncode == 0:
        print(f"  installed in {time.monotonic() - started:.0f} s", flush=True)
    return pip.returncode == 0


def stage() -> str:
    """What pip is doing, in its own words."""
    verbs = ("Collecting", "Downloading", "Building", "Installing")
    lines = [line.strip() for line in LOG.read_text(errors="replace").splitlines()]
    return next((line[:70] for line in reversed(lines) if line.startswith(verbs)), "")


if __name__ == "__main__":
    sys.exit(main())
