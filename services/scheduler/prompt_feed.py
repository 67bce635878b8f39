"""Keeps the prompt trees in step with the TEs: hears block events, and asks for whole indexes where some were lost.

The rim around `prompt_tree.py`. This module must not know what the trees are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from services.scheduler.prompt_tree import PromptTrees
from services.scheduler.settings import SchedulerSettings
from shared.dumps import Dumps, request_dump
from shared.messages import TeBeat
from shared.rtc_messages import BlockEvents, BlocksDump
from shared.service import Service
from shared.subjects import is_token


class PromptFeed:
    """Feeds `trees` from the bus. `alive` says whether a TE is known to live: only of such is anything kept."""

    def __init__(
        self,
        service: Service[SchedulerSettings],
        trees: PromptTrees,
        *,
        alive: Callable[[str], bool],
    ) -> None:
        self._service = service
        self._trees = trees
        self._alive = alive
        metrics = service.metrics
        self._dumps = Dumps(
            trees.feeds,
            ask=self._ask,
            load=trees.load,
            alive=alive,
            tasks=service.tasks,
            log=service.log,
            outcomes=metrics.counter(
                "deepflow_scheduler_dumps_total", "Whole indexes asked for.", ["outcome"]
            ),
        )
        for name, text, value in (
            ("tree_pages", "Pages in all prompt trees.", lambda: trees.num_pages),
            ("tree_bytes", "What they cost.", lambda: trees.num_bytes),
            ("tree_evicted", "Pages given up for the budget.", lambda: trees.num_evicted),
            ("tree_gaps", "Gaps in the numbers of events so far.", lambda: trees.feeds.num_gaps),
            ("tree_unsynced", "TEs that are to be asked.", lambda: trees.feeds.num_unsynced),
        ):
            metrics.gauge(f"deepflow_scheduler_{name}", text).set_function(value)

    async def start(self) -> None:
        """Begins to listen; what was said before is asked for."""
        bus = self._service.bus
        await bus.listen(bus.subjects.blocks("*", "*"), (BlockEvents,), self._trees.apply)

    def seen(self, beat: TeBeat) -> None:
        """A TE beats. Call it after those who judge its life."""
        # While it loads it has nothing and answers nobody; and nobody can ask one whose name is no part of a subject.
        if beat.state != "loading" and self._alive(beat.id) and is_token(beat.id):
            self._trees.seen(beat.id, beat.model, beat.role)

    def gone(self, te: str) -> None:
        """A TE is dead: what it had is not to be had any more."""
        self._dumps.gone(te)
        self._trees.gone(te)

    def doubt(self) -> None:
        """The bus was away: what was said meanwhile is lost."""
        self._trees.doubt()

    def tick(self) -> None:
        """Asks those whose events are missing. Call it a few times a second."""
        self._dumps.catch_up()

    def status(self) -> dict[str, Any]:
        """For people: the trees, and who is out of step with them."""
        feeds = self._trees.feeds
        return {
            "trees": self._trees.status(),
            "gaps": feeds.num_gaps,
            "unsynced": sorted(te for te, _ in feeds.unsynced()),
        }

    async def _ask(self, te: str, model: str) -> BlocksDump:
        service = self._service
        return await request_dump(
            service.bus, te, model, by=service.id, timeout_s=service.settings.dump_timeout_s
        )
