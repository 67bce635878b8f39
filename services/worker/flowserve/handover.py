"""What outlives the sequence that computed it: pages leased for the TE that goes on, and pages kept under a name.

It must not know who goes on, nor where kept pages go from here.
"""

from __future__ import annotations

from typing import Final

from services.worker.flowserve.outcome import Handed, KeptPages
from services.worker.flowserve.rtc.master import RtcMaster
from services.worker.flowserve.sequence import HANDED, Sequence, SequenceGroup

LEASE_S: Final = 30.0  # how long the next TE may take to fetch what was computed here


class Bequests:
    """Of all requests of one engine; `handed` and `kept` are to be reported. Times are the engine's."""

    def __init__(self, rtc: RtcMaster, *, page: int) -> None:
        self.handed: list[Handed] = []
        self.kept: list[KeptPages] = []
        self._rtc = rtc
        self._page = page
        self._leases: dict[str, tuple[int, str]] = {}  # by request, with its attempt
        self._to_keep: dict[SequenceGroup, None] = {}

    def expect(self, group: SequenceGroup) -> None:
        """A request was taken in: it may want to be kept; and if this very engine handed it over, it finds its pages
        by itself from now on."""
        if group.request.keep is not None:
            self._to_keep[group] = None
        self.withdraw(group.request.request, group.request.attempt)

    def hand(self, sequence: Sequence, now: float) -> None:
        """A choice has just ended for another TE to go on."""
        assert sequence.finish == HANDED
        group = sequence.group
        request = group.request
        hashes = sequence.page_hashes(sequence.num_computed // self._page)
        lease = self._rtc.lease(hashes, request.request, now + LEASE_S)
        for other in [r for r, (_, held) in self._leases.items() if not self._rtc.holds(held)]:
            del self._leases[other]
        if lease is not None:
            self._leases[request.request] = request.attempt, lease.id
        handed = Handed(
            request=request.request,
            attempt=request.attempt,
            lease="" if lease is None else lease.id,
            num_pages=self._rtc.num_present(hashes),
            ids=sequence.tokens[sequence.num_prompt + sequence.num_given :],
            logprobs=sequence.logprobs or None,
            cached=group.num_cached or 0,
        )
        self.handed.append(handed)

    def withdraw(self, request: str, attempt: int) -> None:
        """Nobody is going to fetch what was handed over by an attempt up to this one."""
        handed, lease = self._leases.get(request, (attempt + 1, ""))
        if handed <= attempt:
            del self._leases[request]
            self._rtc.release(lease)

    def keep(self, now: float) -> None:
        """Keep the prompts that are computed by now. After each step."""
        for group in list(self._to_keep):
            sequences = group.sequences
            keep, num_prompt = group.request.keep, len(group.request.prompt)
            is_computed = any(sequence.num_computed >= num_prompt for sequence in sequences)
            if is_computed or group.has_ended:
                del self._to_keep[group]
            if is_computed and keep is not None:
                hashes = sequences[0].page_hashes(num_prompt // self._page)
                self._rtc.keep(keep.id, hashes, now + keep.ttl_ms / 1000)
                self.kept.append(KeptPages(keep=keep, hashes=hashes))
