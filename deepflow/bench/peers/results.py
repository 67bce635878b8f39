"""What has been measured already, on disk: a run that was interrupted goes on where it was.

A file per peer. It counts only for the same key: versions, settings, sizes, machine. This module must not know what the
key is made of.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import orjson

from deepflow.bench.peers.plan import Round


class Results:
    """Rounds by point, each written to `path` as soon as it is there."""

    def __init__(self, path: Path, key: Any) -> None:
        self._path = path
        # As it will read when it comes back.
        self._key = orjson.loads(orjson.dumps(key))
        self.rounds: dict[str, list[Round]] = defaultdict(list)

    @classmethod
    def open(cls, path: Path, key: Any, *, fresh: bool) -> Results:
        """Those of an earlier run with the same key, unless `fresh`; none if the file is damaged."""
        results = cls(path, key)
        try:
            stored = orjson.loads(path.read_bytes())
            if not fresh and stored["key"] == results._key:
                for point, rounds in stored["rounds"].items():
                    results.rounds[point] = [Round(**one) for one in rounds]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError):
            results.rounds.clear()
        return results

    def add(self, point: str, one: Round) -> None:
        """Keep a round, on disk too."""
        self.rounds[point].append(one)
        body = {"key": self._key, "rounds": self.rounds}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        written = self._path.with_suffix(".new")
        written.write_bytes(orjson.dumps(body, option=orjson.OPT_INDENT_2))
        os.replace(written, self._path)
