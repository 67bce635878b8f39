"""The TEs this JE knows: life and load from their beats, and what it has given them since.

A TE group is all TEs of one model in one role. A beat is the only proof of life; the registrations table is a hint
that says who should be here (`silent` names those who are not). A `Down` is final, because an instance name carries its
boot id. Pure: the clock is passed in; this module must not know the bus.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from services.scheduler.policy import Candidate
from shared.liveness import Liveness
from shared.messages import Registration, TeBeat

STALL_MS: Final = 1500  # a TE without progress for this long beyond its predicted step is hung
SETTLE_S: Final = 0.1  # a beat younger than this after a dispatch may have left the TE before it
_SUSPECT_S: Final = 2.0
_MAX_DEAD: Final = 1024
_PAGE: Final = 16  # tokens; of a TE whose registration has not been read yet


@dataclass(slots=True)
class _Te:
    beat: TeBeat
    # task -> (when it was asked or accepted, its predicted work in seconds, the tokens of KV it will need)
    dispatched: dict[str, tuple[float, float, int]] = field(default_factory=dict)
    suspect_until: float = 0.0
    reachable: bool = True  # False from an unanswered subject until the next beat


class Registry:
    """Every TE that counts as alive. Bounded by the TEs that beat; a TE's `dispatched` by what fits between beats."""

    def __init__(self, liveness: Liveness) -> None:
        self._liveness = liveness
        self._tes: dict[str, _Te] = {}
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
        was_candidate = te is not None and te.reachable and te.beat.state == "ready"
        if te is None:
            te = self._tes[beat.id] = _Te(beat)
        te.beat, te.reachable = beat, True
        for task, (when, _, _) in list(te.dispatched.items()):
            if now - when > SETTLE_S:  # the beat's own prediction contains it by now
                del te.dispatched[task]
        return beat.state == "ready" and not was_candidate

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

    def dispatched(
        self, te: str, task: str, work_s: float, now: float, num_tokens: int = 0
    ) -> None:
        """`te` is asked to take `task`, or has accepted it: counts until a beat contains it or the task ends."""
        if te in self._tes:
            self._tes[te].dispatched[task] = (now, work_s, num_tokens)

    def ended(self, te: str, task: str) -> None:
        """The TE is done with the task."""
        if te in self._tes:
            self._tes[te].dispatched.pop(task, None)

    def unreachable(self, te: str) -> None:
        """Nobody listens on the TE's subject, or it takes no tasks: no candidate until it beats again."""
        if te in self._tes:
            self._tes[te].reachable = False

    def suspect(self, te: str, now: float) -> None:
        """The TE left a task without an answer: last choice for a while."""
        if te in self._tes:
            self._tes[te].suspect_until = now + _SUSPECT_S

    # ------------------------------------------------------------------------------------------------------- the view

    def candidates(self, model: str, now: float, avoid: Iterable[str] = ()) -> list[Candidate]:
        """The TEs that are ready for `model`; loading and draining ones are none."""
        avoided = frozenset(avoid)
        return [
            Candidate(
                te=name,
                outstanding_s=te.beat.outstanding_s,
                dispatched_s=sum(work_s for _, work_s, _ in te.dispatched.values()),
                avoid=name in avoided or now < te.suspect_until,
                role=te.beat.role,
                kv_use=self._kv_use(te),
            )
            for name, te in self._tes.items()
            if te.beat.model == model and te.beat.state == "ready" and te.reachable
        ]

    def ready(self, model: str) -> bool:
        """Whether `model` has a candidate."""
        return bool(self.candidates(model, 0.0))

    def _kv_use(self, te: _Te) -> float:
        page = self._pages.get(te.beat.id) or _PAGE
        given = sum(-(-tokens // page) for _, _, tokens in te.dispatched.values())
        blocks = te.beat.blocks_used + te.beat.blocks_reserved + given
        return blocks / max(1, te.beat.blocks_total)

    def group(self, model: str) -> list[TeBeat]:
        """The last beats of all live TEs of `model`, loading and draining ones too."""
        return [te.beat for te in self._tes.values() if te.beat.model == model]

    def beats(self) -> list[TeBeat]:
        """The last beat of every live TE."""
        return [te.beat for te in self._tes.values()]

    def registrations(self, registrations: Iterable[Registration]) -> None:
        """The table as read just now."""
        self._pages = {r.id: r.page for r in registrations if r.kind == "te"}

    def silent(self) -> list[str]:
        """Registered TEs that do not beat: gone without a farewell, or cut off from here."""
        return sorted(self._pages.keys() - self._tes.keys())
