"""The explicit context caches of all tenants: the table `caches`, what each tenant may have, and their end.

The index (an entry per cache, short) is written first and removed last, so that nothing long outlives what leads to
it; the contents, which never change, are a part of the table of their own. Every gateway reads the index every few
seconds: it removes what has expired, learns the prefixes that the operator shares, and adds up how often caches were
used since. Those numbers are a service to people and not a bill: what a gateway counted in its last seconds dies with
it. What the table says holds, whatever gateway is asked. This module must not know HTTP, or how a cache is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from services.gateway.openai.caches import Conflict, ContextNotFound, QuotaExceeded
from services.gateway.publics import PublicPrefixes
from services.gateway.settings import GatewaySettings
from shared import wire
from shared.bus import Bus, Table
from shared.errors import DeepFlowError, InvalidRequest, TooLarge
from shared.log import Logger
from shared.messages import ContextCache
from shared.rtc_messages import Free
from shared.table import keep_read

REFRESH_S: Final = 3.0
MAX_BYTES: Final = 2 * 1024 * 1024  # of one entry; the bus carries no less than 4 MiB
MAX_PUBLIC: Final = 32  # every prompt is compared with each of its model's
_CONTENTS: Final = "contents"


class _Taken(Conflict):
    """The id is: what is kept under it belongs to another."""


class Contexts:
    """What one gateway knows of them. `clock` gives seconds since the epoch."""

    def __init__(
        self,
        bus: Bus,
        settings: GatewaySettings,
        publics: PublicPrefixes,
        log: Logger,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.publics = publics
        self._bus = bus
        self._settings = settings
        self._log = log
        self._clock = clock
        self._making: dict[str, ContextCache] = {}
        # id -> requests and tokens not yet in the table
        self._used: dict[str, tuple[int, int]] = {}
        self._given_up: dict[
            str, float
        ] = {}  # id -> when: maybe still being computed, to be freed again
        self._again = asyncio.Event()
        self._opened: Table | None = None

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Read once, then keep up with the table as long as the TaskGroup lives."""
        await self.refresh()
        self._bus.on_reconnect(self._again.set)
        tasks.create_task(keep_read(self.refresh, self._again, REFRESH_S), name="contexts")

    # -------------------------------------------------------------------------------------------------------- reading

    async def get(self, id_: str, tenant: str, *, param: str | None = None) -> ContextCache:
        """A tenant's cache, without its contents. Raises ContextNotFound, alike for what ended and what is foreign."""
        found = None
        with contextlib.suppress(ValueError):  # no key can be so long
            found = await (await self._table()).get(id_, ContextCache)
        if found is None or found.tenant != tenant or found.expires <= self._clock():
            raise ContextNotFound(id_, param=param)
        return self._counted(found)

    async def whole(self, id_: str, tenant: str, *, param: str | None = None) -> ContextCache:
        """A tenant's cache with its contents. Raises ContextNotFound."""
        entry = await self.get(id_, tenant, param=param)
        contents = await self._contents(id_)
        if contents is None:  # it is just being made, or removed
            raise ContextNotFound(id_, param=param)
        return replace(
            contents,
            expires=entry.expires,
            requests=entry.requests,
            cached_tokens=entry.cached_tokens,
        )

    async def of(self, tenant: str) -> list[ContextCache]:
        """A tenant's caches, without their contents."""
        entries = await (await self._table()).all(ContextCache)
        return [self._counted(entry) for entry in self._live(entries.values(), tenant)]

    def _live(self, entries: Iterable[ContextCache], tenant: str) -> list[ContextCache]:
        now = self._clock()
        return [one for one in entries if one.tenant == tenant and one.expires > now]

    def _counted(self, entry: ContextCache) -> ContextCache:
        """With what has not been added up yet."""
        requests, tokens = self._used.get(entry.id, (0, 0))
        return replace(
            entry, requests=entry.requests + requests, cached_tokens=entry.cached_tokens + tokens
        )

    async def _contents(self, id_: str) -> ContextCache | None:
        return await (await self._table()).part(_CONTENTS).get(id_, ContextCache)

    async def _table(self) -> Table:
        if self._opened is None:
            self._opened = await self._bus.table("caches")
        return self._opened

    # -------------------------------------------------------------------------------------------------------- writing

    @asynccontextmanager
    async def making(self, made: ContextCache) -> AsyncIterator[None]:
        """Room for a cache while it is computed; `add` it inside. Whatever fails, what was kept of it is freed.

        Raises QuotaExceeded, Conflict for a name that is taken, TooLarge for contents that the table cannot hold.
        """
        size = len(wire.to_json(made))
        if size > MAX_BYTES:
            raise TooLarge(
                f"a cache takes at most {MAX_BYTES} bytes with its token ids; this one takes {size}",
                param="text" if made.text else "messages",
            )
        entries = await (await self._table()).all(ContextCache)
        if made.id in self._making:
            raise _Taken("a cache with this Idempotency-Key is being made")
        self._check(made, [*self._making.values(), *entries.values()])
        self._making[made.id] = made
        try:
            yield
        except _Taken:
            raise
        except BaseException:
            await self._give_up(made.id)
            raise
        finally:
            del self._making[made.id]

    def _check(self, made: ContextCache, others: Iterable[ContextCache]) -> None:
        others = list(others)
        own = self._live(others, made.tenant)
        if made.name and any(one.name == made.name for one in own):
            raise Conflict(f"a cache named {made.name!r} exists; delete it first", param="name")
        if len(own) >= self._settings.num_contexts:
            raise QuotaExceeded(f"you may have {self._settings.num_contexts} caches at once")
        held, limit = sum(one.num_tokens for one in own), self._settings.context_tokens
        if held + made.num_tokens > limit:
            raise QuotaExceeded(
                f"your caches may hold {limit} tokens: {held} are taken, {made.num_tokens} more are"
                " asked for"
            )
        if made.public and sum(one.public for one in others) >= MAX_PUBLIC:
            raise QuotaExceeded(f"at most {MAX_PUBLIC} caches can be public", param="public")

    async def add(self, made: ContextCache) -> None:
        """A cache has been computed: from now on requests may name it. Raises as `making` does."""
        table = await self._table()
        entry = replace(made, messages="", text="", options="", prefix=[])
        if not await table.create(made.id, entry):
            raise _Taken("this cache is being made, or ends just now")
        try:
            # Another gateway may have made one meanwhile: who came first stays.
            earlier = []
            for id_, one in (await table.all(ContextCache)).items():
                if id_ == made.id:
                    break
                earlier.append(one)
            self._check(made, earlier)
            await table.part(_CONTENTS).put(made.id, made)
        except BaseException:
            with contextlib.suppress(DeepFlowError):
                await table.delete(made.id)
            raise
        if made.public:
            self.publics.add(made)
        self._log.info("context_made", id=made.id, tenant=made.tenant, tokens=made.num_tokens)

    @asynccontextmanager
    async def renewing(self, id_: str, tenant: str, expires: int) -> AsyncIterator[ContextCache]:
        """Another end for a cache while its pages are computed again inside; they are freed if it is removed meanwhile.

        The entry is changed first, so that it does not expire before that is done. Raises ContextNotFound.
        """
        table = await self._table()
        entry = await table.change(id_, ContextCache, lambda one: replace(one, expires=expires))
        if entry is None:
            raise ContextNotFound(id_, param=None)
        try:
            yield self._counted(entry)
        finally:
            try:
                await self.get(id_, tenant)
            except ContextNotFound:
                await self._give_up(id_)
                raise

    async def remove(self, id_: str, tenant: str) -> None:
        """End a cache. Raises ContextNotFound."""
        await self.get(id_, tenant)
        await self._remove(await self._table(), id_)

    async def _remove(self, table: Table, id_: str) -> None:
        await table.part(_CONTENTS).delete(id_)
        await table.delete(id_)
        await self._free(id_)
        self._used.pop(id_, None)
        self._log.info("context_ended", id=id_)

    async def _give_up(self, id_: str) -> None:
        """Frees what is kept of a cache that is none; once more later, for a TE may keep it until our cancel comes."""
        self._given_up[id_] = self._clock()
        with contextlib.suppress(DeepFlowError):
            await self._free(id_)

    async def _free(self, id_: str) -> None:
        """Whoever keeps pages for it need not any more."""
        await self._bus.publish(self._bus.subjects.rtc("free"), Free(keep=id_))

    # ----------------------------------------------------------------------------------------------------- keeping up

    def used(self, id_: str, cached: int) -> None:
        """A request continued from a cache, and found this many of its tokens computed."""
        requests, tokens = self._used.get(id_, (0, 0))
        self._used[id_] = (requests + 1, tokens + cached)

    async def refresh(self) -> None:
        """Do what is due. While the table cannot be reached, what was known stays."""
        try:
            table = await self._table()
            now = self._clock()
            live = []
            for entry in (await table.all(ContextCache)).values():
                if entry.expires > now:
                    live.append(entry)
                else:
                    await self._remove(table, entry.id)
            await self._free_again({entry.id for entry in live}, now)
            await self._share([entry for entry in live if entry.public])
            await self.flush()
        except DeepFlowError as error:
            self._opened = None  # it may have to be made again
            self._log.warning("contexts_unreachable", error=error.message)

    async def _free_again(self, live: set[str], now: float) -> None:
        for id_, since in list(self._given_up.items()):
            if now - since >= REFRESH_S and id_ not in self._making:
                if id_ not in live:  # else it was made at the next try
                    await self._free(id_)
                self._given_up.pop(id_, None)

    async def _share(self, entries: list[ContextCache]) -> None:
        self.publics.keep(entry.id for entry in entries)
        for entry in entries:
            if entry.id not in self.publics:
                contents = await self._contents(entry.id)
                if contents is not None and entry.id not in self.publics:
                    self.publics.add(contents)

    async def flush(self) -> None:
        """Add to the table what was counted: one write per cache that was used since. Raises Unavailable."""
        table = await self._table()
        for id_, (requests, tokens) in list(self._used.items()):

            def add(
                entry: ContextCache, requests: int = requests, tokens: int = tokens
            ) -> ContextCache:
                return replace(
                    entry,
                    requests=entry.requests + requests,
                    cached_tokens=entry.cached_tokens + tokens,
                )

            await table.change(id_, ContextCache, add)
            more_requests, more_tokens = self._used.pop(id_, (0, 0))
            if more_requests > requests:  # used again while it was written
                self._used[id_] = (more_requests - requests, more_tokens - tokens)


def check_size(num_tokens: int, num_common: int, page: int, *, public: bool, field: str) -> None:
    """Whether tokens are worth keeping: enough of them, and those that continuations begin with. Raises
    InvalidRequest."""
    if num_tokens - num_common > page:
        raise InvalidRequest(
            f"only the first {num_common} of {num_tokens} tokens would be those of a request that"
            f" continues: the model's template or tokenizer writes the rest of '{field}' otherwise"
            " once something follows",
            param=field,
        )
    least = 2 * page if public else page
    if num_common < least:
        raise InvalidRequest(
            f"a {'public ' if public else ''}cache holds at least {least} tokens, that is"
            f" {least // page} page{'s' * public} of this model; this one has {num_common}",
            param=field,
        )
