"""The wheel of torch-npu as a document: its operator schemas and its documentation, read out of the zip.

The wheel is fetched once with pip and neither installed nor imported: importing it needs CANN and an Ascend driver, and
it would register itself as torch's device. This module must not know which operators we call.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import yaml

VERSION: Final = "2.13.0"  # pairs with the torch that pyproject pins
SCHEMAS: Final = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
DOCUMENTATION: Final = "torch_npu/_op_plugin_docs.py"
SHAPES: Final = "torch_npu/op_plugin/meta/_meta_registrations.py"
FETCH_TIMEOUT_S: Final = 280
# One fixed build whatever machine runs the tests, so that all of them check against the same text.
BUILD: Final = (
    ("--platform", "manylinux_2_28_x86_64"),
    ("--python-version", "3.11"),
    ("--implementation", "cp"),
    ("--abi", "cp311"),
)


class WheelError(RuntimeError):
    """The wheel cannot be had, or is not what we know. An error and no skip: these tests must not silently vanish."""


@dataclass(frozen=True)
class Wheel:
    """A wheel of torch-npu on disk."""

    path: Path

    def read(self, member: str) -> str:
        """The text of one member. Raises WheelError if the wheel does not have it."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(member).decode()
        except KeyError as error:
            raise WheelError(f"{self.path.name} has no {member}") from error

    @cached_property
    def schemas(self) -> dict[str, str]:
        """Operator name, with its overload after a dot where it has one -> signature, of all torch-npu's own operators.

        Raises WheelError if the file gives one operator two different signatures.
        """
        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        sections = yaml.load(self.read(SCHEMAS), Loader=loader)
        found: dict[str, str] = {}
        for section in ("custom", "quant", "autograd", "symint"):
            for entry in sections.get(section) or ():
                signature = entry["func"] if isinstance(entry, dict) else entry
                name, bracket, _ = signature.partition("(")
                if bracket and found.setdefault(name, signature) != signature:
                    raise WheelError(f"{SCHEMAS} has two signatures of {name}")
        return found

    @cached_property
    def documentation(self) -> dict[str, str]:
        """Function name -> its documentation. Of two texts for a function the later holds, as it does in torch-npu."""
        texts: dict[str, str] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # its strings hold stray backslashes
            warnings.simplefilter("ignore", DeprecationWarning)  # the same, before Python 3.12
            module = ast.parse(self.read(DOCUMENTATION))
        for node in module.body:
            match node:
                case ast.Expr(
                    value=ast.Call(
                        args=[ast.Constant(value=str(name)), ast.Constant(value=str(text))]
                    )
                ):
                    texts[name] = text
        return texts


def fetch(cache: Path) -> Wheel:
    """The wheel below `cache`, downloaded first where it is not there yet. Safe against other processes doing the same.

    Raises WheelError with pip's own words when the package index cannot be reached.
    """
    folder = cache / "torch-npu" / VERSION
    if wheels := sorted(folder.glob("*.whl")):
        return Wheel(wheels[0])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
        ]
        command += [
            "--no-deps",
            "--only-binary",
            ":all:",
            *(word for pair in BUILD for word in pair),
        ]
        command += ["--dest", scratch, f"torch-npu=={VERSION}"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise WheelError(
                f"torch-npu {VERSION} did not arrive in {FETCH_TIMEOUT_S} s"
            ) from error
        fetched = sorted(Path(scratch).glob("*.whl"))
        if done.returncode or not fetched:
            raise WheelError(
                f"cannot fetch the wheel of torch-npu {VERSION}, whose schemas the npu tests check against, into "
                f"{folder}: {done.stderr.strip() or done.stdout.strip()}"
            )
        final = folder / fetched[0].name
        os.replace(
            fetched[0], final
        )  # whole or not there; a second process replaces it with its equal
    return Wheel(final)
