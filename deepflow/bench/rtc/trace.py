"""What a bounded cache makes of a trace: hit rates beside the ideal.

Requests are replayed one after another against the real RTC master (the device) and the real store of the host's arena
(with pages of a few bytes: what counts is which are there), at the granularity of the trace: a page is one of its
blocks. What is computed is written through, as in the platform.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

from deepflow.sim.trace import BLOCK, Call
from services.cache.arena import Arena
from services.worker.flowserve.rtc.master import RtcMaster
from shared.arena.segment import PageKind
from shared.arena.writer import Writer
from shared.rtc_messages import Commit

_KIND: Final = PageKind("trace", "trace", 16)
_SLOT_BYTES: Final = 4096 + 64  # of the smallest slot there is
_SEGMENT_BYTES: Final = 1 << 20
_TE: Final = "te"


@dataclass(frozen=True, slots=True)
class Tiers:
    """How many blocks of the trace each tier has room for; no host tier with 0."""

    device: int
    host: int


@dataclass(slots=True)
class Hits:
    """Full blocks of prompts, and where they were found. `ideal`: with room for everything."""

    asked: int = 0
    device: int = 0
    host: int = 0
    ideal: int = 0

    def metrics(self, label: str) -> dict[str, float]:
        """Shares of what was asked for."""
        asked = max(self.asked, 1)
        return {
            f"trace_hit_device_{label}": self.device / asked,
            f"trace_hit_host_{label}": self.host / asked,
            f"trace_hit_{label}": (self.device + self.host) / asked,
            "trace_hit_ideal": self.ideal / asked,
            f"trace_hit_vs_ideal_{label}": (self.device + self.host) / max(self.ideal, 1),
        }


def replay(calls: Iterable[Call], tiers: Tiers) -> Hits:
    """Every request in turn."""
    hits = Hits()
    seen: set[bytes] = set()
    with tempfile.TemporaryDirectory() as folder:
        replayer = _Replayer(Path(folder), tiers, hits)
        try:
            for number, call in enumerate(calls):
                hashes = [_name(one) for one in call.hash_ids[: call.input_length // BLOCK]]
                asked = hashes[: (call.input_length - 1) // BLOCK]  # its last token is computed
                hits.asked += len(asked)
                hits.ideal += next((n for n, h in enumerate(asked) if h not in seen), len(asked))
                seen.update(hashes)
                replayer.run(hashes, len(asked), float(number))
        finally:
            replayer.close()
    return hits


class _Replayer:
    """The two tiers."""

    def __init__(self, folder: Path, tiers: Tiers, hits: Hits) -> None:
        self._master = RtcMaster(tiers.device)
        self._hits = hits
        self._arena = self._writer = None
        if tiers.host:
            max_bytes = max(tiers.host * _SLOT_BYTES, 2 * _SEGMENT_BYTES)
            self._writer = Writer(folder)
            self._arena = Arena(folder, max_bytes=max_bytes, segment_bytes=_SEGMENT_BYTES, epoch=1)

    def run(self, hashes: Sequence[bytes], num_asked: int, now: float) -> None:
        """One request, from its arrival to its end."""
        blocks = self._master.match_by_prefix_token(hashes[:num_asked])
        self._hits.device += len(blocks)
        blocks += self._bring(hashes[len(blocks) : num_asked], hashes[: len(blocks)])
        more = self._master.alloc_blocks(len(hashes) - len(blocks))
        if more is not None:  # else the prompt is longer than the device
            before = hashes[len(blocks) - 1] if blocks else None
            new = hashes[len(blocks) :]
            for block, page_hash in zip(more, new, strict=True):
                self._master.store(block, page_hash, before)
                before = page_hash
            blocks += more
            self._write_through(new, now)
        self._master.free(blocks)
        self._master.drain_events()

    def close(self) -> None:
        """Let go of the files."""
        if self._writer is not None and self._arena is not None:
            self._writer.close()
            self._arena.close()

    def _bring(self, wanted: Sequence[bytes], held: Sequence[bytes]) -> list[int]:
        """What the host has of the pages that come next, onto the device."""
        if self._arena is None or not wanted:
            return []
        run = wanted[: len(self._arena.find(_KIND, wanted))]
        ticket = self._master.populate(run, held[-1] if held else None) if run else None
        if ticket is None:
            return []
        self._master.landed(ticket, len(ticket.own))
        found = self._master.match_by_prefix_token([*held, *run])
        self._master.close(ticket)
        brought = found[len(held) :]
        self._master.free(found[: len(held)])
        self._hits.host += len(brought)
        return brought

    def _write_through(self, hashes: Sequence[bytes], now: float) -> None:
        if self._arena is None or self._writer is None:
            return
        for start in range(0, len(hashes), 64):
            batch = hashes[start : start + 64]
            copied = self._arena.reserve(
                _TE, _KIND, batch, held=self._writer.held, keep=None, now=now
            )
            self._writer.lock(copied.granted)
            written = [
                slot
                for slot, page_hash in zip(copied.slots, batch, strict=True)
                if slot is not None and self._writer.write(slot, page_hash, page_hash)
            ]
            self._arena.commit(Commit(te=_TE, written=written), now)
            self._arena.drain_events()


def _name(one: int) -> bytes:
    return blake2b(one.to_bytes(8, "little"), digest_size=16).digest()
