"""Following growing log files."""

from __future__ import annotations

from pathlib import Path

from deepflow.cli.logs import Tail


def test_a_tail_gives_each_line_once_and_only_whole_ones(tmp_path: Path) -> None:
    """A line that is still being written waits for its end."""
    path = tmp_path / "it.log"
    tail = Tail(path)
    assert list(tail.lines()) == []
    path.write_text("one\ntwo\nthr")
    assert list(tail.lines()) == ["one", "two"]
    with path.open("a") as file:
        file.write("ee\n")
    assert list(tail.lines()) == ["three"]
    assert list(tail.lines()) == []
    tail.close()


def test_a_tail_starts_over_when_the_file_does(tmp_path: Path) -> None:
    """A log that was cut short or replaced is read from its beginning."""
    path = tmp_path / "it.log"
    tail = Tail(path)
    path.write_text("a long line\n")
    assert list(tail.lines()) == ["a long line"]
    path.write_text("new\n")
    assert list(tail.lines()) == ["new"]
    path.replace(tmp_path / "it.log.1")
    path.write_text("other\n")
    assert list(tail.lines()) == ["other"]
    tail.close()
