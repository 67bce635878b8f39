"""Which torch is installed, read from its files without loading it. This module must not know drivers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """`version` in full ("2.13.0+cpu"); `cuda` is what it was built for ("13.0"), None for another build."""

    version: str
    cuda: str | None

    @property
    def release(self) -> str:
        """The version without the build: "2.13.0"."""
        return self.version.partition("+")[0]

    @property
    def kind(self) -> str:
        """The build in a word or two."""
        return f"CUDA {self.cuda}" if self.cuda else "no CUDA"

    @classmethod
    def installed(cls) -> TorchBuild | None:
        """This environment's torch, from the file in which it keeps its version; None if there is none."""
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        text = Path(spec.origin).with_name("version.py").read_text()
        found = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
        cuda = re.search(r"^cuda\b[^=]*= '([^']+)'", text, re.MULTILINE)
        return cls(found[1] if found else version("torch"), cuda[1] if cuda else None)
