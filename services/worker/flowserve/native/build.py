"""Builds the kernels: three instruction sets, one library with a C interface, no Python and no torch in it.

Runs when the package is built or installed (`hatch_build.py` calls `build`), or by hand: `python build.py`. Never at
run time. Needs g++ 11 or newer (`CXX`: another command). This module must know nothing but the standard
library: it runs before anything is installed.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "libflowserve.so"

_FLAGS = [
    *(
        "-std=c++20",
        "-O3",
        "-fPIC",
        "-pthread",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
    ),
    # Sums round as they are written, so that all builds give the same bits.
    *("-ffp-contract=off", "-fno-math-errno"),
    "-fno-gnu-unique",  # nothing of ours is shared with other libraries of the process
    # GCC 12's own AVX-512 header trips these.
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
]
_AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")]
_TARGETS = {  # linked in this order: of a function that several instantiate alike, the linker keeps the first
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [*_AVX512, "-mfma"],
    "avx512bf16": [*_AVX512, "-mavx512bf16", "-mfma"],
}


class BuildError(Exception):
    """Why there is no library: no compiler, another processor, or the compiler's own words."""


def sources_digest() -> str:
    """Over every source and this file: a library says what it was built from."""
    digest = blake2b(digest_size=16)
    for path in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h"), Path(__file__).resolve()]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build(library: Path = LIBRARY) -> Path:
    """Compile and link; the library appears by a rename, and a failed build leaves none. Raises BuildError."""
    library.unlink(missing_ok=True)
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"no kernels for {sys.platform} on {platform.machine()} yet")
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if not shutil.which(compiler[0]):
        raise BuildError("no C++ compiler: install g++ (Debian: apt-get install g++)")
    with tempfile.TemporaryDirectory() as folder:
        objects = Path(folder)
        jobs = {
            objects / f"{isa}.o": [*flags, f"-DISA={isa}", "-c", str(HERE / "step.cpp")]
            for isa, flags in _TARGETS.items()
        }
        digest = f'-DSOURCES="{sources_digest()}"'
        jobs[objects / "library.o"] = [digest, "-c", str(HERE / "library.cpp")]
        with ThreadPoolExecutor() as pool:
            list(
                pool.map(
                    lambda job: _run([*compiler, *_FLAGS, *job[1], "-o", str(job[0])]), jobs.items()
                )
            )
        exports = objects / "exports.map"
        exports.write_text("{ global: fs_*; local: *; };")
        partial = library.with_suffix(f".{os.getpid()}.so")
        linked = [
            "-shared",
            "-pthread",
            "-static-libstdc++",
            "-static-libgcc",
            "-s",
            "-Wl,--exclude-libs,ALL",
            f"-Wl,--version-script={exports}",
        ]
        _run([*compiler, *linked, *map(str, jobs), "-o", str(partial)])
        partial.replace(library)
    return library


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command[:1])} failed:\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(str(error))
