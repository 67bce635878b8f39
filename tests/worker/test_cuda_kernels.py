"""Triton's kernels for attention over pages, as far as they can be tried without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("way", ["interpret", "compile"])
def test_kernels_without_a_gpu(way: str) -> None:
    """Interpreted, they give what plain torch gives, to a whole model too; and they compile for Ampere and Hopper."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.worker.kernels", way],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1" if way == "interpret" else "0"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
