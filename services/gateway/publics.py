"""Prefixes that the operator shares with all tenants: whose prompt begins with one finds its pages computed.

Their pages are hashed with a secret of no tenant. A prompt that begins with all tokens of a prefix takes those hashes,
and goes on under its own tenant's secret (`blockhash.extend`). The last full page of a prefix is never among the
shared ones: so the hash that an engine chains on from is always the tenant's own, also while a prompt is hardly longer
than the prefix. Nothing else crosses tenants. This module must not know tables or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from shared.blockhash import chain, root
from shared.messages import ContextCache, ModelEntry


class PublicPrefix:
    """The tokens of one, and the hashes of its pages for the arithmetic they were last asked for."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.made_for: tuple[str, int] | None = None
        self.hashes: list[bytes] = []


class PublicPrefixes:
    """All of them, by model. `secret` gives what their pages are hashed with."""

    def __init__(self, secret: Callable[[], Awaitable[bytes]]) -> None:
        self._secret = secret
        self._known: dict[str, PublicPrefix] = {}  # by id
        self._by_model: dict[str, list[PublicPrefix]] = {}  # the longest first

    def __contains__(self, id_: str) -> bool:
        return id_ in self._known

    def keep(self, ids: Iterable[str]) -> None:
        """Forget all but these."""
        kept = set(ids)
        for gone in self._known.keys() - kept:
            prefix = self._known.pop(gone)
            for prefixes in self._by_model.values():
                if prefix in prefixes:
                    prefixes.remove(prefix)

    def add(self, context: ContextCache) -> None:
        """Share one from now on."""
        if context.id in self._known:
            return
        prefix = self._known[context.id] = PublicPrefix(context.prefix)
        prefixes = self._by_model.setdefault(context.model, [])
        prefixes.append(prefix)
        prefixes.sort(key=lambda one: -len(one.ids))

    async def root(self, model: ModelEntry) -> bytes:
        """What the chains of shared pages start from. Raises Unavailable."""
        return root(await self._secret(), model.recipe_digest, str(model.page))

    async def hashes(self, model: ModelEntry, ids: list[int]) -> list[bytes]:
        """Of the shared pages that a prompt begins with; empty if it begins with no shared prefix."""
        for prefix in self._by_model.get(model.name, ()):
            size = len(prefix.ids)
            if len(ids) >= size and ids[:size] == prefix.ids:
                made_for = (model.recipe_digest, model.page)
                if prefix.made_for != made_for:
                    shared = prefix.ids[: num_shared(size, model.page) * model.page]
                    start = await self.root(model)
                    prefix.hashes = await asyncio.to_thread(chain, start, shared, model.page)
                    prefix.made_for = made_for
                return prefix.hashes
        return []


def num_shared(num_tokens: int, page: int) -> int:
    """How many pages of a prefix of this length are shared."""
    return max(0, num_tokens // page - 1)
