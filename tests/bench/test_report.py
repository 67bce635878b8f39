"""The report of a bench."""

from __future__ import annotations

import io
from pathlib import Path

import orjson
from rich.console import Console

from deepflow.bench import machine
from deepflow.bench.report import Bar, Report

REPORT = Report(
    bench="bus",
    metrics={"ratio": 0.95, "added_ms": 3.00001, "tokens": 123456.0},
    machine=machine.describe("aiohttp", "no-such-package"),
    settings={"seed": 0},
    bars=(
        Bar("ratio", ">=", 0.97, "the ratio"),
        Bar("added_ms", "<=", 3.1, "what is added"),
        Bar("idle", "<", 3.0, "idle"),
    ),
    notes=["a note"],
)


def test_json_has_flat_numbers_machine_and_settings(tmp_path: Path) -> None:
    """The file holds flat metrics, the machine, the settings, and whether each bar was met."""
    REPORT.write(str(tmp_path / "report.json"), Console(file=io.StringIO()))
    body = orjson.loads((tmp_path / "report.json").read_bytes())
    assert body["metrics"] == {"ratio": 0.95, "added_ms": 3.0, "tokens": 123456.0}
    assert body["bars"]["ratio"] == {"relation": ">=", "limit": 0.97, "met": False}
    assert body["bars"]["added_ms"]["met"] is True
    assert "idle" not in body["bars"]  # not measured, so neither met nor missed
    assert body["machine"]["cores"] >= 1
    assert body["machine"]["no-such-package"] == ""
    assert body["settings"] == {"seed": 0}


def test_a_dash_is_json_alone_on_standard_output() -> None:
    """With `-` nothing but the JSON is printed."""
    screen = io.StringIO()
    REPORT.write("-", Console(file=screen))
    assert orjson.loads(screen.getvalue())["bench"] == "bus"


def test_people_see_the_bars_beside_the_figures() -> None:
    """The table shows each bar, what was found, and says honestly what was missed or not measured."""
    screen = io.StringIO()
    REPORT.write("", Console(file=screen, width=160))
    text = screen.getvalue()
    line = {part.strip().split("  ")[0]: part for part in text.splitlines() if part.strip()}
    assert "MISSED" in line["the ratio"]
    assert line["what is added"].rstrip().endswith("met")
    assert "not measured" in line["idle"]
    assert "a note" in text
