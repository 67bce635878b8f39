"""Makefile, `.ci/run` and the set-up script: what they promise without installing anything."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup() -> ModuleType:
    """The set-up script as a module."""
    spec = importlib.util.spec_from_file_location("deepflow_setup", ROOT / ".ci/setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(*arguments: str) -> str:
    """What make prints."""
    result = subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_names_every_target() -> None:
    """The targets of the README are there."""
    shown = make("help")
    for target in ("setup", "run", "test", "check", "bench", "soak", "clean"):
        assert f"make {target} " in shown


def test_targets_run_what_they_say() -> None:
    """`run` becomes the command, so that Ctrl-C reaches it; `test` runs every ring wholly, and stops at a failure."""
    assert "exec .venv/bin/deepflow up --workers 2" in make("-n", "run", "ARGS=--workers 2")
    tests = [line for line in make("-n", "test").splitlines() if "pytest" in line]
    selected = [shlex.split(line)[shlex.split(line).index("-m") + 1] for line in tests]
    assert selected == ["core or service", "system and apart", "system and not apart"]
    assert not any("||" in line or "; true" in line for line in tests)
    checks = make("-n", "check")
    order = ["ruff format", "ruff check", "mypy", "lint-imports", "-m core"]
    assert sorted(order, key=checks.index) == order


def test_continuous_integration_runs_the_same() -> None:
    """`.ci/run` is `make test`."""
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().rstrip().endswith("exec make test")


def test_an_unchanged_project_is_not_installed_again(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stamp is the project file's; another project file, or none that succeeded, installs."""
    calls: list[list[str]] = []
    for name, value in (("VENV", tmp_path), ("STAMP", tmp_path / "stamp"), ("ROOT", tmp_path)):
        monkeypatch.setattr(setup, name, value)
    monkeypatch.setattr(setup, "torch_options", lambda torch: [torch])
    monkeypatch.setattr(setup, "install", lambda arguments: calls.append(arguments) or True)
    monkeypatch.setattr(setup, "build_kernels", lambda: 0)  # other tests use them now
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    project = tmp_path / "pyproject.toml"
    text = (ROOT / "pyproject.toml").read_text()
    project.write_text(text)
    assert [setup.main(), setup.main(), len(calls)] == [0, 0, 1]
    project.write_text(text + "\n# changed\n")
    assert [setup.main(), len(calls)] == [0, 2]
    assert calls[0][0].startswith("torch==")
    assert calls[0][-1].endswith("[all,dev]")


@pytest.mark.parametrize(
    ("needs", "answers", "expected"),
    [
        (["numpy"], True, []),
        (["nvidia-cublas; platform_system == 'Linux'"], True, ["torch==1.0+cpu", "--extra-index-url"]),
        (["nvidia-cublas; platform_system == 'Linux'"], False, []),
    ],
)  # fmt: skip
def test_the_small_build_of_torch_is_taken_where_there_is_one(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    needs: list[str],
    answers: bool,
    expected: list[str],
) -> None:
    """Plain pip if it finds a CPU build, else PyTorch's index if that answers, else plain pip."""
    monkeypatch.setattr(setup, "ACCELERATORS", ())
    monkeypatch.setattr(setup, "resolve", lambda torch: {"requires_dist": needs})
    monkeypatch.setattr(setup, "answers", lambda url: answers)
    monkeypatch.setattr(setup.sys, "platform", "linux")
    assert setup.torch_options("torch==1.0")[:2] == expected
