"""The TEs this JE knows: life and load from their beats, and what it has given them since.

A TE group is all TEs of one model in one role. A beat is the only proof of life; the registrations table is a hint
that says who should be here (`silent` names those who are not). A `Down` is final, because an instance name carries its
boot id.

Load is predicted, so that it is right between beats and degrades slowly when they stop coming: the last beat's work
less the time since, plus what was given and cannot be in that beat. Other JEs give as well, unseen until the next beat;
they are taken to give as much as this one does (`num_peers`), since requests spread evenly over a queue group. What
was given in the last minute is told as well, done or not: the share of late.

Pure: the clock is passed in; this module must not know the bus.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from statistics import median_low
from typing import Final

from services.scheduler.costs import Costs
from services.scheduler.policy.base import Candidate
from shared.liveness import Liveness
from shared.messages import Band, Registration, TeBeat

STALL_MS: Final = 1500  # a TE without progress for this long beyond its predicted step is hung
SETTLE_S: Final = 0.1  # a beat younger than this after a dispatch may have left the TE before it
LATE_S: Final = 60.0  # what was given in this time is a TE's share of late
PAGE: Final = 16  # tokens; of a TE whose registration has not been read yet
_TYPICAL_S: Final = 1.0  # what work costs in a group is found out anew so often
_SUSPECT_S: Final = 2.0
_MAX_DEAD: Final = 1024


@dataclass(slots=True, kw_only=True)
class Given:
    """A task as it was given to a TE: what it is predicted to cost there."""

    when: float
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_tokens: int = 0  # of KV at its end

    @property
    def work_s(self) -> float:
        return self.prefill_s + self.decode_s


class _Late:
    """The sum of the last `LATE_S` seconds, second by second."""

    __slots__ = ("_parts", "_sum")

    def __init__(self) -> None:
        self._parts: deque[tuple[float, int]] = deque()  # (until when they count, tokens), in order
        self._sum = 0

    def add(self, num_tokens: int, now: float) -> None:
        until = int(now) + LATE_S
        if self._parts and self._parts[-1][0] >= until:
            until, before = self._parts.pop()
            self._parts.append((until, before + num_tokens))
        else:
            self._parts.append((until, num_tokens))
        self._sum += num_tokens

    def sum(self, now: float) -> int:
        parts = self._parts
        if parts and parts[0][0] <= now:
            while parts and parts[0][0] <= now:
                parts.popleft()
            self._sum = sum(num_tokens for _, num_tokens in parts)
        # Below 0 where a refusal is still counted, and what it takes back no more.
        return self._sum if self._sum > 0 else 0


@dataclass(frozen=True, slots=True)
class _Load:
    """What a TE's last beat and what it was given since come to; computed anew only when one of them changes."""

    page: int
    outstanding_s: float
    batch_s: float  # the part of it that is band BATCH's
    given_s: float
    waiting_tokens: int
    given_tokens: int
    num_running: int
    pages_active: int
    token_s: float
    decode_token_s: float
    decode_row_s: float


@dataclass(frozen=True, slots=True)
class _Typical:
    """Seconds for a token of a prompt and of an answer, and as of when."""

    when: float
    least_s: float  # the first on the TE where it is least, the others on the one in the middle
    token_s: float
    decode_token_s: float


@dataclass(slots=True)
class _Te:
    beat: TeBeat
    beaten: float
    given: dict[str, Given] = field(default_factory=dict)  # by task, what no beat contains yet
    num_freed: int = 0  # tasks that the last beat contains and that have ended since
    late: _Late = field(default_factory=_Late)
    suspect_until: float = 0.0
    reachable: bool = True  # False from an unanswered subject until the next beat
    load: _Load | None = None  # None: to be computed

    @property
    def is_candidate(self) -> bool:
        return self.reachable and self.beat.state == "ready"

    def num_tasks(self, num_peers: int) -> int:
        """Those of its last beat that have not ended since, and what it was given."""
        known = self.beat.running + self.beat.waiting - self.num_freed
        return max(0, known) + len(self.given) * num_peers


class Registry:
    """Every TE that counts as alive. Bounded by the TEs that beat, and by what is given between two beats.

    `page` is that of TEs whose registration is not known.
    """

    def __init__(self, liveness: Liveness, *, costs: Costs | None = None, page: int = PAGE) -> None:
        self.num_peers = 1  # JEs that give tasks to these TEs, this one included
        self._liveness = liveness
        self._costs = costs or Costs()
        self._page = page
        self._tes: dict[str, _Te] = {}
        self._groups: dict[tuple[str, str], _Typical] = {}
        self._dead: dict[str, None] = {}  # the latest `Down`s: a late beat changes nothing
        self._pages: dict[str, int] = {}  # registered TE -> tokens of one of its KV pages

    # ------------------------------------------------------------------------------------------------ life and load

    def beat(self, beat: TeBeat, now: float) -> bool:
        """Takes in a beat; True if this made the TE a candidate (it was none before)."""
        if beat.id in self._dead:
            return False
        stalled = beat.progress_ms > STALL_MS + beat.step_ms
        if stalled and not self._liveness.alive(beat.id):
            return False  # hung and already lost: only progress brings it back
        self._liveness.beat(beat.id, now, stalled=stalled)
        te = self._tes.get(beat.id)
        was_candidate = te is not None and te.is_candidate
        if te is None:
            te = _Te(beat, now)
            te.late.add(self._least_late(beat, now), now)
            self._tes[beat.id] = te
        elif beat.step < te.beat.step:
            return False  # overtaken by a later one
        te.beat, te.beaten, te.reachable, te.load, te.num_freed = beat, now, True, None, 0
        for task, given in list(te.given.items()):
            if now - given.when > SETTLE_S:  # the beat's own prediction contains it by now
                del te.given[task]
        return beat.state == "ready" and not was_candidate

    def _least_late(self, new: TeBeat, now: float) -> int:
        """Where a new TE starts: level with the least loaded, or all that comes would be sent to it for a while."""
        group = [
            te.late.sum(now)
            for te in self._tes.values()
            if te.beat.model == new.model and te.beat.role == new.role
        ]
        return min(group, default=0)

    def down(self, te: str) -> bool:
        """Declared dead by its pod host. True if it counted as alive."""
        self._dead[te] = None
        if len(self._dead) > _MAX_DEAD:
            del self._dead[next(iter(self._dead))]
        self._liveness.down(te)
        return self._tes.pop(te, None) is not None

    def lost(self, now: float) -> list[str]:
        """TEs that fell silent or hung since the last call, each once. They are forgotten."""
        lost = self._liveness.lost(now)
        for te in lost:
            self._tes.pop(te, None)
        return lost

    def hold(self) -> None:
        """The bus is away: nobody is judged, and the last view stands."""
        self._liveness.hold()

    def resume(self, now: float) -> None:
        """The bus is back: every clock starts again."""
        self._liveness.resume(now)

    # --------------------------------------------------------------------------------------------- what dispatch saw

    def give(self, te: str, task: str, given: Given) -> None:
        """`te` is asked to take `task`, or has accepted it: counts until a beat contains it or the task ends."""
        known = self._tes.get(te)
        if known is not None:
            known.given[task] = given
            known.load = None

    def ended(self, te: str, task: str) -> None:
        """The TE is done with the task, or does not do it."""
        known = self._tes.get(te)
        if known is None:
            return
        if known.given.pop(task, None) is not None:
            known.load = None
        else:
            known.num_freed += 1

    def did(self, te: str, num_tokens: int, now: float) -> None:
        """So much prefill was given to `te` now; less than 0 where it was not, after all. In tokens: what they take is
        known better later."""
        known = self._tes.get(te)
        if known is not None:
            known.late.add(num_tokens, now)

    def unreachable(self, te: str) -> None:
        """Nobody listens on the TE's subject, or it takes no tasks: no candidate until it beats again."""
        if te in self._tes:
            self._tes[te].reachable = False

    def suspect(self, te: str, now: float) -> None:
        """The TE left a task without an answer: last choice for a while."""
        if te in self._tes:
            self._tes[te].suspect_until = now + _SUSPECT_S

    # ------------------------------------------------------------------------------------------------------- the view

    def roles(self, model: str, now: float, avoid: Container[str] = ()) -> set[str]:
        """The TE types that have a candidate for `model` that is not to be avoided."""
        return {
            te.beat.role
            for name, te in self._tes.items()
            if te.beat.model == model
            and te.is_candidate
            and name not in avoid
            and now >= te.suspect_until
        }

    def candidates(
        self, model: str, now: float, avoid: Container[str] = (), *, band: Band = Band.DEFAULT
    ) -> list[Candidate]:
        """The TEs that are ready for `model`; loading and draining ones are none. Work of band BATCH counts as load
        only for its own: it yields to everybody else."""
        peers = max(1, self.num_peers)
        found = []
        for name, te in self._tes.items():
            beat = te.beat
            if beat.model != model or not te.is_candidate:
                continue
            load = te.load or self._loaded(name, te, now)
            since = now - te.beaten
            outstanding_s = load.outstanding_s - since
            if band is not Band.BATCH:
                outstanding_s -= load.batch_s
            waiting_tokens = load.waiting_tokens - since / load.token_s
            found.append(
                Candidate(  # with names it takes three times as long, and there may be a thousand
                    name,
                    beat.role,
                    name in avoid or now < te.suspect_until,
                    load.page,
                    outstanding_s if outstanding_s > 0.0 else 0.0,
                    load.given_s * peers,  # dispatched_s
                    te.late.sum(now) * load.token_s,  # recent_s
                    (waiting_tokens if waiting_tokens > 0.0 else 0.0) + load.given_tokens * peers,
                    load.num_running,
                    load.pages_active,
                    beat.blocks_cached,
                    beat.blocks_total,
                    load.token_s,
                    load.decode_token_s,
                    load.decode_row_s,
                )
            )
        return found

    def _loaded(self, name: str, te: _Te, now: float) -> _Load:
        beat, given, page = te.beat, te.given.values(), self.page(name)
        token_s = self._costs.prefill_token_s(beat)
        decode_token_s = self._costs.decode_token_s(beat)
        group = self._typical(beat.model, beat.role, now)
        if not beat.prefill_us:  # it has just come up: taken for the best, it will soon be known
            token_s = group.least_s if math.isfinite(group.least_s) else token_s
        elif not (beat.running or beat.waiting or given):
            # What it measured in a bad hour, its first one perhaps, it will not measure again without work.
            token_s = min(token_s, group.token_s)
            decode_token_s = min(decode_token_s, group.decode_token_s)
        te.load = _Load(
            page=page,
            outstanding_s=beat.outstanding_s,
            batch_s=beat.outstanding_batch_s,
            given_s=sum(one.work_s for one in given),
            waiting_tokens=beat.waiting_tokens,
            given_tokens=sum(one.prefill_tokens for one in given),
            num_running=beat.running + beat.waiting + len(given),
            pages_active=beat.blocks_used
            + beat.blocks_reserved
            + sum(-(-one.num_tokens // page) for one in given),
            token_s=token_s,
            decode_token_s=decode_token_s,
            decode_row_s=self._costs.decode_row_s(beat),
        )
        return te.load

    def _typical(self, model: str, role: str, now: float) -> _Typical:
        """What work costs on the TEs of a group; infinitely much where none has measured."""
        known = self._groups.get((model, role))
        if known is None or now - known.when >= _TYPICAL_S:
            beats = [
                te.beat
                for te in self._tes.values()
                if te.beat.model == model and te.beat.role == role and te.beat.prefill_us
            ]
            known = _Typical(
                now,
                min(map(self._costs.prefill_token_s, beats), default=math.inf),
                median_low(map(self._costs.prefill_token_s, beats)) if beats else math.inf,
                median_low(map(self._costs.decode_token_s, beats)) if beats else math.inf,
            )
            if len(self._groups) >= _MAX_DEAD:
                self._groups.clear()
            self._groups[model, role] = known
        return known

    def ready(self, model: str) -> bool:
        """Whether `model` has a candidate."""
        return any(te.beat.model == model and te.is_candidate for te in self._tes.values())

    def full(self, model: str, share: int | None = None) -> list[str]:
        """The TEs that are ready for `model` and could not run one more task at once, or have their share of them, as
        far as is known here."""
        peers = max(1, self.num_peers)
        return [
            name
            for name, te in self._tes.items()
            if te.beat.model == model
            and te.is_candidate
            and (
                te.beat.free_slots + te.num_freed <= len(te.given) * peers
                or (share is not None and te.num_tasks(peers) >= share)
            )
        ]

    def has_room(self, model: str, share: int | None = None) -> bool:
        """Whether a TE that is ready for `model` is not full."""
        num_ready = sum(te.beat.model == model and te.is_candidate for te in self._tes.values())
        return num_ready > len(self.full(model, share))

    def num_tasks(self, model: str) -> int:
        """What all TEs of a model have to do, as far as is known here."""
        peers = max(1, self.num_peers)
        return sum(te.num_tasks(peers) for te in self._tes.values() if te.beat.model == model)

    def page(self, te: str) -> int:
        """Tokens of one KV page of a TE."""
        return self._pages.get(te) or self._page

    def last_beat(self, te: str) -> TeBeat | None:
        """The last beat of a live TE."""
        known = self._tes.get(te)
        return known.beat if known is not None else None

    def group(self, model: str) -> list[TeBeat]:
        """The last beats of all live TEs of `model`, loading and draining ones too."""
        return [te.beat for te in self._tes.values() if te.beat.model == model]

    def beats(self) -> list[TeBeat]:
        """The last beat of every live TE."""
        return [te.beat for te in self._tes.values()]

    def registrations(self, registrations: Iterable[Registration]) -> None:
        """The table as read just now."""
        self._pages = {r.id: r.page for r in registrations if r.kind == "te"}
        for te in self._tes.values():
            te.load = None

    def silent(self) -> list[str]:
        """Registered TEs that do not beat: gone without a farewell, or cut off from here."""
        return sorted(self._pages.keys() - self._tes.keys())
