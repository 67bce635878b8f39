"""Watching a download that does not report itself."""

from __future__ import annotations

import shutil
from pathlib import Path

from deepflow.models.progress import watching


class _Sum:
    """A Progress that adds up."""

    num_bytes = 0

    def step(self, name: str, total_bytes: int) -> None:
        """Ignored."""

    def advance(self, num_bytes: int) -> None:
        """Counts."""
        self.num_bytes += num_bytes


def test_folders_may_vanish_while_they_are_counted(tmp_path: Path) -> None:
    """Downloaders remove folders of their own at any time; what stays is counted in the end."""
    found = _Sum()
    with watching(tmp_path, found, period_s=0.0005):
        for number in range(300):
            folder = tmp_path / "scratch" / str(number % 3)
            folder.mkdir(parents=True)
            (folder / "part").write_bytes(b"x")
            shutil.rmtree(tmp_path / "scratch")
        (tmp_path / "whole").write_bytes(b"x" * 1000)
    assert found.num_bytes == 1000
