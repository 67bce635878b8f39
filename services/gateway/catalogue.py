"""The models this gateway may serve: the table `models` on the bus, matched with its own copies of the text files.

An entry survives all replicas of its model, so a model without any replica still takes requests (they park). A model
whose tokenizer or template this gateway would read differently is refused, since its token ids would mean something
else to the engine. The table is read again every few seconds, on reconnect, and on a miss. This module must not know
HTTP or streams.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared import catalog
from shared.bus import Bus
from shared.errors import DeepFlowError, ModelNotFound, Unavailable
from shared.log import Logger
from shared.messages import ModelEntry
from shared.table import keep_read
from shared.text.tokenizer import Tokenizer

REFRESH_S: Final = 3.0
# A request for an unknown model reads the table again, at most this often.
MISS_REFRESH_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that can be served. `version` changes with its text files."""

    entry: ModelEntry
    folder: str
    version: str
    tokenizer: Tokenizer
    max_token_id: int

    @property
    def name(self) -> str:
        """The name clients use."""
        return self.entry.name


class Catalogue:
    """What `models` holds, as far as this gateway can serve it. `on_model` hears of each model made ready."""

    def __init__(
        self, bus: Bus, cache_dir: Path, log: Logger, on_model: Callable[[str, str], None]
    ) -> None:
        self._bus = bus
        self._cache_dir = cache_dir
        self._log = log
        self._on_model = on_model
        self._models: dict[str, Model] = {}
        self._refused: dict[str, tuple[ModelEntry, str]] = {}  # name -> entry, and why not
        self._began_at = float("-inf")  # the latest reading of the table
        self._reading = asyncio.Lock()
        self._again = asyncio.Event()

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Read once, then keep up with the table as long as the TaskGroup lives."""
        await self.refresh()
        self._bus.on_reconnect(self._again.set)
        tasks.create_task(keep_read(self.refresh, self._again, REFRESH_S), name="catalogue")

    def models(self) -> list[Model]:
        """Every model that can be served, by name."""
        return [self._models[name] for name in sorted(self._models)]

    def refused(self) -> dict[str, str]:
        """Models in the table that this gateway cannot serve, and why."""
        return {name: reason for name, (_, reason) in self._refused.items()}

    async def find(self, name: str) -> Model:
        """The model of that name. Raises ModelNotFound, or Unavailable if it is known but not servable here."""
        model = self._models.get(name)
        if model is None:
            # It may have come since the latest reading: nobody hears that it is unknown without a newer one.
            await asyncio.sleep(max(0.0, self._began_at + MISS_REFRESH_S - time.monotonic()))
            await self.refresh()
            model = self._models.get(name)
        if model is not None:
            return model
        if name in self._refused:
            raise Unavailable(
                f"model {name!r} cannot be served here: {self._refused[name][1]}", param="model"
            )
        shown = name if len(name) <= 100 else name[:100] + "..."
        raise ModelNotFound(f"The model {shown!r} does not exist", param="model")

    async def refresh(self) -> None:
        """Read the table. While it cannot be read, what was known stays.

        Callers share a reading that began after they came: many at once cost one or two, not a queue of them.
        """
        came_at = time.monotonic()
        async with self._reading:
            if self._began_at > came_at:
                return
            self._began_at = time.monotonic()
            try:
                table = await self._bus.table("models")
                entries = await table.all(ModelEntry)
            except DeepFlowError as error:
                self._log.warning("catalogue_unreachable", error=error.message)
                return
            found = {entry.name: entry for entry in entries.values()}
            for gone in [name for name in self._models if name not in found]:
                del self._models[gone]
            self._refused = {n: why for n, why in self._refused.items() if n in found}
            for entry in found.values():
                await self._take(entry)

    async def _take(self, entry: ModelEntry) -> None:
        name = entry.name
        known = self._models.get(name)
        if known is not None and known.entry == entry:
            return
        if known is None and name in self._refused and self._refused[name][0] == entry:
            # Its files may have come since; looking is cheap only while they are absent.
            if (catalog.models_dir(self._cache_dir) / entry.folder / catalog.MANIFEST).exists():
                await self._open(entry, quietly=True)
            return
        await self._open(entry, quietly=False)

    async def _open(self, entry: ModelEntry, *, quietly: bool) -> None:
        try:
            model = await asyncio.to_thread(open_text, self._cache_dir, entry)
        except DeepFlowError as error:
            self._models.pop(entry.name, None)
            self._refused[entry.name] = (entry, error.message)
            if not quietly:
                self._log.error("model_refused", model=entry.name, reason=error.message)
            return
        self._refused.pop(entry.name, None)
        self._models[entry.name] = model
        self._on_model(model.folder, model.version)
        self._log.info("model_ready", model=entry.name)


def open_text(cache_dir: Path, entry: ModelEntry) -> Model:
    """Our own copy of a model's tokenizer. Raises ModelNotFound, or Unavailable if it is not the engine's."""
    folder = catalog.open_model(cache_dir, entry.name)
    for what, ours, theirs in (
        ("tokenizer", folder.tokenizer_digest, entry.tokenizer_digest),
        ("chat template", folder.template_digest, entry.template_digest),
    ):
        if ours != theirs:
            raise Unavailable(f"the gateway's {what} of {entry.name!r} differs from the engine's")
    tokenizer = Tokenizer.load(folder.path)
    tokenizer.decode([0])  # the first use builds tables
    return Model(
        entry=entry,
        folder=str(folder.path),
        version=f"{folder.tokenizer_digest}-{folder.template_digest}",
        tokenizer=tokenizer,
        max_token_id=entry.vocab - 1,
    )
