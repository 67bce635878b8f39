"""NPU-fork, both ends: a TE takes its weights from one that runs (the paper, section 6.4), and gives them to others.

Whoever has no weights on its host asks the TEs it was told of, in their order. One on the same host hands over a
descriptor, and its file is mapped where it is. From elsewhere the files are read over DistFlow into their places, and
read on by others while they come: a chain of TEs is a broadcast. A source that dies, stops or lies is left for the next
one, and if none is left the disk is the source. Nothing is computed with before its digest was found right. This
module must not know what is in the files, nor who chose the sources.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import mmap
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

from services.worker.flowserve.config import ModelError
from services.worker.weight_files import Held, Incoming, files_of
from shared.distflow.faults import Fault, LinkError, TransferError
from shared.distflow.region import Region
from shared.distflow.relay import Patience
from shared.errors import DeepFlowError, InvalidRequest, NotFound, Unavailable
from shared.rtc_messages import (
    LinkOffer,
    LinkRequest,
    WeightsFile,
    WeightsOffer,
    WeightsRequest,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence

    from services.worker.flowserve.backend import Backend
    from services.worker.flowserve.prepared import Prepared
    from services.worker.linking import Linking
    from services.worker.settings import TeSettings
    from shared.bus import Bus
    from shared.catalog import ModelFolder
    from shared.distflow.link import Link
    from shared.distflow.relay import Relayed

T = TypeVar("T")

_ASK_S: Final = 6.0  # for a source to say what it has: longer than it may take itself to be told
_DECIDE_S: Final = (
    5.0  # how long an answer is kept back while it is not known yet what there will be
)
_LINK_S: Final = 5.0
_PATIENCE: Final = Patience(
    stall_s=3.0
)  # starting TEs share few cores: silence for a second is none
_STALLED_S: Final = (
    10.0  # without a byte, though the sources say they live: they wait for each other
)
_SHARE: Final = 0.5  # of the time to load that may go by here: the disk is to have its turn
_NUM_ROUNDS: Final = 2  # through the sources: one that has nothing yet may have it soon
_AGAIN_S: Final = 0.1
_NUM_FILES: Final = 2  # that come at a time
_TICK_S: Final = 0.05
_TTL_MS: Final = 600_000

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Weights:
    """What `Forker.obtain` came to. `forked`: they came from another TE. `prepared`: mapped already; None where they
    are of another kind, or are to be made first."""

    forked: bool
    prepared: Prepared | None


class Forker:
    """One TE's weights, as they come from others and go to others. `recipe` is the model's digest: TEs of the same
    compute with the same files. `serve` before the first `obtain`."""

    def __init__(
        self,
        bus: Bus,
        linking: Linking,
        folder: ModelFolder,
        settings: TeSettings,
        backend: Backend,
        recipe: str,
    ) -> None:
        self._bus = bus
        self._flow = linking.flow
        self._linking = linking
        self._te = linking.te
        self._model = folder.name
        self._recipe = recipe
        self._enabled = settings.fork
        self._timeout_s = settings.load_timeout_s * _SHARE
        self._files = files_of(folder.path, settings.cache_dir, backend)
        self._decided = asyncio.Event()  # whether there will be anything to give
        self._registering = asyncio.Lock()
        self._offered: list[WeightsFile] = []
        self._chain: list[str] = []  # whom this TE reads from, and whom they do
        self._links: dict[str, Link] = {}
        self._linking_up = threading.Lock()
        self._loop = asyncio.get_running_loop()

    def serve(self) -> None:
        """Answer who wants the weights of this TE, also while they are still coming."""
        if self._enabled:
            self._linking.answer(WeightsRequest, self._offer)

    async def obtain(
        self, sources: Sequence[str], progress: Callable[[int], None] = lambda _: None
    ) -> Weights:
        """Have the weights here, from one of `sources` if this host lacks them; `progress` gets percents. It does not
        fail: what cannot be had is for the disk to give. Raises ModelError for a model that cannot be at all."""
        try:
            if self._files.find():
                return Weights(False, self._files.prepared)
            sources = [one for one in dict.fromkeys(sources) if one != self._te]
            if self._enabled and sources:
                began = time.monotonic()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._timeout_s):
                        forked = await self._fork(sources, progress)
                        took_s = round(time.monotonic() - began, 3)
                        _log.info("weights_sought", sources=sources, forked=forked, seconds=took_s)
                        return Weights(forked, self._files.prepared)
                _log.warning("weights_not_forked", sources=sources, why="it took too long")
            return Weights(False, None)
        finally:
            self._decided.set()
            self._chain = []
            if self._links:
                await asyncio.to_thread(self._close_links)

    # ------------------------------------------------------------------------------------------------ what others take

    async def _offer(self, asked: WeightsRequest) -> WeightsOffer:
        """Which files there are, and where. Raises InvalidRequest for others' weights, NotFound, Unavailable."""
        if (asked.model, asked.recipe) != (self._model, self._recipe):
            raise InvalidRequest("this TE computes with other weights", param="recipe")
        if asked.by in self._chain:
            raise Unavailable("this TE takes its own weights from you")
        try:
            await asyncio.wait_for(self._decided.wait(), _DECIDE_S)
        except TimeoutError:
            raise Unavailable("this TE does not know yet what it will have") from None
        async with self._registering:
            if not self._offered:
                held = await asyncio.to_thread(self._files.held)
                self._offered = [self._register(one) for one in held]
        if not self._offered:
            raise NotFound("this TE has no weights yet")
        return WeightsOffer(files=self._offered, ttl_ms=_TTL_MS, chain=self._chain)

    def _register(self, held: Held) -> WeightsFile:
        """The whole file, mapped once more: the region is there as long as this TE."""
        with held.path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            region = self._flow.register(memory, fd=file.fileno(), bulk=True)
        return _described(held.path.name, region, held.digest)

    # ------------------------------------------------------------------------------------------------ what comes here

    async def _fork(self, sources: Sequence[str], progress: Callable[[int], None]) -> bool:
        """Take the weights from one or several of these; False if nobody had them, or the host has them by now."""
        refused: set[str] = set()  # for good: what they gave was wrong
        for number in range(_NUM_ROUNDS):
            if number:
                await asyncio.sleep(_AGAIN_S)
            for source in sources:
                if source in refused or (offer := await self._ask(source)) is None:
                    continue
                if await self._map(source, offer):
                    return True
                try:
                    async with self._locked() as is_filled:
                        if is_filled:
                            return False
                        others = [one for one in sources if one != source and one not in refused]
                        await self._relay((source, offer), others, progress)
                        if self._files.find():
                            return True
                except (TransferError, ModelError, OSError) as error:
                    _log.warning("weights_not_forked", source=source, why=str(error))
                    if isinstance(error, ModelError):
                        refused.add(source)
        return False

    async def _ask(self, source: str) -> WeightsOffer | None:
        """What it has, if it has anything that can be taken."""
        asked = WeightsRequest(by=self._te, model=self._model, recipe=self._recipe)
        subject = self._bus.subjects.link(source)
        self._chain = [source]  # before it is asked: of two who ask each other, both are to know
        try:
            offer = await self._bus.request(subject, asked, WeightsOffer, timeout_s=_ASK_S)
            for file in offer.files:
                self._files.place(file.name)
        except (DeepFlowError, ModelError) as error:
            _log.info("no_weights_there", source=source, why=str(error))
            return None
        if self._te in offer.chain or not offer.files:
            return None
        self._chain = [source, *offer.chain]
        return offer

    async def _map(self, source: str, offer: WeightsOffer) -> bool:
        """Compute with the source's own file, if it is on this host."""
        if len(offer.files) != 1:
            return False
        (file,) = offer.files
        try:
            fd = await asyncio.to_thread(self._open_file, source, file)
        except (LinkError, TransferError, DeepFlowError) as error:
            _log.info("weights_not_mapped", source=source, why=str(error))
            return False
        if fd is None:
            return False
        try:
            if not self._files.map(fd, file.digest):
                return False
            memory = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
            self._offered = [
                _described(file.name, self._flow.register(memory, fd=fd, bulk=True), file.digest)
            ]
            return True
        except ModelError as error:
            _log.warning("weights_not_mapped", source=source, why=str(error))
            return False
        finally:
            os.close(fd)

    def _open_file(self, source: str, file: WeightsFile) -> int | None:
        """In a thread. Raises LinkError, TransferError, DeepFlowError."""
        link = self._link(source)
        if link.scheme != "unix":
            return None
        return self._flow.open_file(link, _region(file), timeout_s=self._timeout_s)

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[bool]:
        """While no other process of this host fills these places: by polls, so that who waits can be told not to.
        Whether they are filled by then. Raises OSError."""
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self._files.locked())
                    break
                except BlockingIOError:
                    await asyncio.sleep(_TICK_S)
            yield self._files.find()

    async def _relay(
        self,
        first: tuple[str, WeightsOffer],
        others: Sequence[str],
        progress: Callable[[int], None],
    ) -> None:
        """Fill the places, and let others read along. Raises TransferError, OSError; ModelError if what came is not
        what was said."""
        _, offer = first
        turns = threading.Semaphore(_NUM_FILES)
        incoming: list[Incoming] = []
        relays: list[Relayed] = []
        whole = False
        try:
            for file in offer.files:
                into = Incoming(self._files.place(file.name), file.num_bytes)
                incoming.append(into)
                relayed = self._flow.relay(
                    self._draw(file, into, first, others, turns),
                    into.view,
                    timeout_s=self._timeout_s,
                    fd=into.fd,
                    patience=_PATIENCE,
                )
                relayed.ticket.future.add_done_callback(lambda _: turns.release())
                relays.append(relayed)
            self._offered = [
                _described(file.name, relayed.region, file.digest)
                for file, relayed in zip(offer.files, relays, strict=True)
            ]
            self._decided.set()
            await self._wait(relays, progress)
            for file, into in zip(offer.files, incoming, strict=True):
                if await asyncio.to_thread(into.digest) != file.digest:
                    raise ModelError(f"{file.name} came with another digest than its source said")
                self._files.adopt(into, file.digest)
            whole = True
        finally:
            if not whole:  # who reads along is told, and goes elsewhere
                self._offered = []
                self._decided.clear()
                for relayed in relays:
                    relayed.ticket.cancel()
                    self._flow.unregister(relayed.region)
            for into in incoming:
                into.close()

    async def _wait(self, relays: Sequence[Relayed], progress: Callable[[int], None]) -> None:
        """Until all is here. Raises TransferError: also if for long nothing comes, though nobody is dead."""
        total, before, since = sum(one.region.num_bytes for one in relays), -1, 0.0
        futures = [asyncio.wrap_future(one.ticket.future) for one in relays]
        try:
            while True:
                done, left = await asyncio.wait(futures, timeout=_TICK_S)
                for future in done:
                    future.result()
                if not left:
                    return
                come, now = (
                    sum(self._flow.available(one.region) for one in relays),
                    time.monotonic(),
                )
                if come != before:
                    before, since = come, now
                    progress(100 * come // total)
                elif now - since > _STALLED_S:
                    raise TransferError(Fault.DEADLINE, "nothing comes any more")
        finally:
            for one in relays:
                one.ticket.cancel()  # nothing, once it is done
            for future in futures:
                future.add_done_callback(_observe)

    # ------------------------------------------------------------------------------------------------------ in threads

    def _draw(
        self,
        file: WeightsFile,
        into: Incoming,
        first: tuple[str, WeightsOffer],
        others: Sequence[str],
        turns: threading.Semaphore,
    ) -> Iterator[tuple[Link, Region]]:
        """The sources of one file, each asked when the one before it has failed: those that have the very same."""
        turns.acquire()
        into.reserve()  # not before others know that it comes: dozens may wait, one for another
        offers = ((source, self._in_loop(self._ask(source))) for source in others)
        for source, offer in itertools.chain([first], offers):
            same = [one for one in offer.files if _same(one, file)] if offer is not None else []
            if not same:
                continue
            try:
                link = self._link(source)
            except (LinkError, DeepFlowError) as error:
                _log.info("no_link", source=source, why=str(error))
                continue
            yield link, _region(same[0])

    def _link(self, source: str) -> Link:
        """The link by which all files of this source come. Raises LinkError, DeepFlowError."""
        with self._linking_up:
            link = self._links.get(source)
            if link is None or not link.alive:
                subject = self._bus.subjects.link(source)
                asked = LinkRequest(by=self._te)
                offer = self._in_loop(
                    self._bus.request(subject, asked, LinkOffer, timeout_s=_ASK_S)
                )
                link = self._links[source] = self._flow.link(offer, timeout_s=_LINK_S)
            return link

    def _close_links(self) -> None:
        with self._linking_up:
            links, self._links = self._links, {}
        for link in links.values():
            link.close()

    def _in_loop(self, ask: Coroutine[Any, Any, T]) -> T:
        """What a coroutine of the event loop comes to. Raises what it raises; Unavailable where the loop is no more."""
        try:
            future = asyncio.run_coroutine_threadsafe(ask, self._loop)
        except RuntimeError as error:
            ask.close()
            raise Unavailable("this TE is on its way out") from error
        try:
            return future.result(2 * _ASK_S)
        except TimeoutError as error:
            future.cancel()
            raise Unavailable("this TE is on its way out") from error


def _described(name: str, region: Region, digest: bytes) -> WeightsFile:
    return WeightsFile(
        name=name,
        num_bytes=region.num_bytes,
        region=region.id,
        generation=region.generation,
        digest=digest,
    )


def _region(file: WeightsFile) -> Region:
    return Region(file.region, file.generation, file.num_bytes)


def _same(one: WeightsFile, other: WeightsFile) -> bool:
    return (one.name, one.num_bytes, one.digest) == (other.name, other.num_bytes, other.digest)


def _observe(future: asyncio.Future[int]) -> None:
    """It was waited for already, or is not any more."""
    if not future.cancelled():
        future.exception()
