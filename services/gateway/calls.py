"""One API call from a checked order to its answer: model, tokens, hashes, seed, and a stream per prompt.

Both front doors, HTTP and NATS, come through here, so both behave alike: bounded in number, each ended exactly once,
cancelled when its client leaves. This module must not know either of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Final

from prometheus_client import Histogram

from services.gateway.actions import Emit
from services.gateway.answer import Answer, Usage
from services.gateway.auth import TenantSecrets
from services.gateway.budget import BodyBudget
from services.gateway.catalogue import Catalogue, Model
from services.gateway.choices import ChoiceText
from services.gateway.contexts import Contexts
from services.gateway.counts import Counts, ModelCounts
from services.gateway.delivery import Limits
from services.gateway.openai.bodies import Header
from services.gateway.openai.caches import continued
from services.gateway.openai.chunks import waiting
from services.gateway.openai.orders import Order, check_model, max_tokens
from services.gateway.prompts import Prompt, Prompts
from services.gateway.settings import GatewaySettings
from services.gateway.streams import Stream, Streams
from services.gateway.tiers import band_of, tier_of
from shared.blockhash import extend, root
from shared.errors import DeadlineExceeded, Overloaded, TooLarge, Unavailable
from shared.log import Logger
from shared.messages import Band, ContextCache, Request, Sampling
from shared.text.tokenizer import Tokenizer

_SEED_MASK: Final = 2**64 - 1
_MAX_READING: Final = 8  # contexts at once
_CLOSE_S: Final = 1.0  # for writers to say why, once the grace is over


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls. `idempotency_key` is empty if none was sent; the ids are for logs. `band`: what it comes in, whatever
    service tier the order names."""

    tenant: str
    idempotency_key: str = ""
    request_id: str = ""
    traceparent: str = ""
    band: Band | None = None
    deadline_s: float | None = None  # other than the gateway's own


class Call:
    """A call in flight. Read `answer`; leave through `Calls.open`'s context, which cancels what still runs."""

    def __init__(
        self,
        order: Order,
        header: Header,
        model: Model,
        answer: Answer,
        context: ContextCache | None,
        band: Band,
    ) -> None:
        self.order = order
        self.context = context
        self.band = band
        self.header = header
        self.answer = answer
        self.tokenizer = model.tokenizer
        self.streams: list[Stream] = []

    @property
    def num_choices(self) -> int:
        """All choices of all prompts; choice i of prompt p is number p * n + i."""
        return len(self.answer.texts)

    def usage(self) -> Usage:
        """Token counts up to now, with how much of the prompts the engine found in its cache."""
        usage = self.answer.usage
        usage.cached = sum(stream.delivery.cached or 0 for stream in self.streams)
        return usage

    @property
    def logprobs_tokenizer(self) -> Tokenizer | None:
        """What names tokens in logprobs, if they are wanted."""
        return None if self.order.logprobs is None else self.tokenizer


class _PromptSink:
    """Where one prompt's tokens go: into its part of the answer, past the clocks."""

    def __init__(
        self,
        answer: Answer,
        offset: int,
        counts: ModelCounts,
        band_first_token: Histogram,
        start: float,
    ) -> None:
        self._answer = answer
        self._offset = offset
        self._counts = counts
        self._band_first_token = band_first_token
        self._start = start
        self._latest: dict[int, float] = {}

    def push(self, emit: Emit, now: float) -> int | None:
        """See Sink."""
        if emit.ids:
            before = self._latest.get(emit.choice)
            self._latest[emit.choice] = now
            if before is None:
                self._counts.time_to_first_token.observe(now - self._start)
                self._band_first_token.observe(now - self._start)
            else:
                self._counts.inter_token_latency.observe((now - before) / len(emit.ids))
        return self._answer.push(self._offset + emit.choice, emit, now)

    def tick(self, now: float, *, parked: bool) -> None:
        """See Sink."""
        self._answer.tick(now, parked=parked)

    def waits(self, stage: str, percent: int, now: float) -> None:
        """See Sink."""
        self._answer.notice(waiting(stage, percent), now)


class Calls:
    """All calls in flight, and what they need."""

    def __init__(
        self,
        settings: GatewaySettings,
        catalogue: Catalogue,
        prompts: Prompts,
        streams: Streams,
        tenant_secrets: TenantSecrets,
        contexts: Contexts,
        counts: Counts,
        log: Logger,
    ) -> None:
        self.draining = False
        self._contexts = contexts
        self._context_bytes = BodyBudget(settings.body_budget_bytes)
        self._reading = asyncio.Semaphore(_MAX_READING)  # what is read is in no budget yet
        self._settings = settings
        self._catalogue = catalogue
        self._prompts = prompts
        self._streams = streams
        self._secrets = tenant_secrets
        self._counts = counts
        self._log = log
        self._open: set[Call] = set()
        self._num = 0  # also those still being tokenized
        self._num_batch = 0  # of them, in band BATCH
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return self._num

    @asynccontextmanager
    async def open(self, order: Order, caller: Caller) -> AsyncIterator[Call]:
        """Put an order on its way. Raises what `Catalogue.find`, `Contexts.whole`, the tokenizer and the limits raise.

        On leaving, however that happens, whatever still runs is cancelled at its TE.
        """
        is_batch = caller.band is Band.BATCH
        self._admit(is_batch)
        self._num += 1
        self._num_batch += is_batch
        self._idle.clear()
        start = time.monotonic()
        deadline_s = caller.deadline_s
        if deadline_s is None:
            deadline_s = self._settings.deadline_s
        try:
            with contextlib.ExitStack() as held:
                async with _deadline(deadline_s):
                    model = await self._catalogue.find(order.model)
                    check_model(order, model.entry.vocab)
                    context = None
                    if order.cache is not None:
                        context = await self._context(order, order.cache, caller, held)
                        order = continued(order, context)
                    root_hash, prompts = await self._pages(order, model, caller)
                limits = [max_tokens(order, len(p.ids), model.entry.context) for p in prompts]
                band = caller.band
                if band is None:
                    tenants = self._settings.priority_tenants
                    band = band_of(order.service_tier, caller.tenant, tenants)
                call = self._make(order, model, context, band, len(prompts), start)
                self._open.add(call)
                try:
                    spent_s = time.monotonic() - start
                    budget = Limits(deadline_s=deadline_s - spent_s, park_s=self._settings.park_s)
                    self._send(call, model, prompts, limits, root_hash, caller, budget, start)
                    yield call
                finally:
                    self._close(call, model, caller, start)
        finally:
            self._num -= 1
            self._num_batch -= is_batch
            if not self._num:
                self._idle.set()

    def _admit(self, is_batch: bool) -> None:
        """Band BATCH has a bound of its own: it never makes another call be refused."""
        if self.draining:
            raise Unavailable("the gateway is stopping", retry_after_s=1.0)
        bound = self._settings.max_in_flight
        if self._num >= bound if is_batch else self._num - self._num_batch >= bound:
            raise Overloaded("too many requests are in flight", retry_after_s=1.0)

    async def _context(
        self, order: Order, cache: str, caller: Caller, held: contextlib.ExitStack
    ) -> ContextCache:
        """What an order goes on from, within the bounds that hold for what is sent: of one body, and of all in hand.

        Raises ContextNotFound, TooLarge, Overloaded.
        """
        async with self._reading:
            context = await self._contexts.whole(cache, caller.tenant, param="cache")
            size = len(order.prompts or "1") * (len(context.messages) + len(context.text))
            if size > self._settings.max_body_bytes:
                raise TooLarge(
                    f"with this cache before each prompt there are {size} characters; at most"
                    f" {self._settings.max_body_bytes} are taken",
                    param="cache",
                )
            held.enter_context(self._context_bytes.take(size))
            return context

    async def _pages(
        self, order: Order, model: Model, caller: Caller
    ) -> tuple[bytes, list[Prompt]]:
        """The root of the caller's hashes, and the prompts with theirs: shared ones where a prompt begins with what
        the operator shares, the tenant's own from there on."""
        publics, entry = self._contexts.publics, model.entry
        if order.public:
            root_hash = await publics.root(entry)
            return root_hash, await self._tokenize(order, model, root_hash)
        secret = await self._secrets.get(caller.tenant)
        root_hash = root(secret, entry.recipe_digest, str(entry.page))
        prompts = await self._tokenize(order, model, root_hash)
        for index, prompt in enumerate(prompts):
            shared = await publics.hashes(entry, prompt.ids)
            if shared:
                [own] = await self._prompts.texts(
                    model.folder, model.version, [prompt.ids[len(shared) * entry.page :]],
                    special=False, root=extend(shared[-1], secret), page=entry.page,
                )  # fmt: skip
                prompts[index] = replace(prompt, hashes=shared + own.hashes)
        return root_hash, prompts

    async def _tokenize(self, order: Order, model: Model, root_hash: bytes) -> list[Prompt]:
        page = model.entry.page
        if order.messages is not None:
            prompt = await self._prompts.chat(
                model.folder, model.version, order.messages, order.template_options,
                special=order.special, root=root_hash, page=page, chunks=order.chunk_texts,
            )  # fmt: skip
            return [prompt]
        return await self._prompts.texts(
            model.folder, model.version, order.prompts or [],
            special=order.special, root=root_hash, page=page,
        )  # fmt: skip

    def _make(
        self,
        order: Order,
        model: Model,
        context: ContextCache | None,
        band: Band,
        num_prompts: int,
        start: float,
    ) -> Call:
        texts = [
            ChoiceText(
                choice,
                model.tokenizer,
                stop=order.stop,
                min_tokens=order.min_tokens,
                skip_special=order.skip_special,
                include_stop=order.include_stop,
                logprobs=order.logprobs is not None,
                continues=not order.chat,
            )
            for choice in range(num_prompts * order.n)
        ]
        answer = Answer(
            texts,
            streaming=order.stream,
            keep_alive_s=self._settings.keep_alive_s,
            now=start,
        )
        header = Header(
            id=("chatcmpl-" if order.chat else "cmpl-") + uuid.uuid4().hex,
            chat=order.chat,
            model=model.name,
            created=int(time.time()),
            fingerprint=f"fp_{model.entry.recipe_digest[:10]}",
            service_tier=order.service_tier and tier_of(band),
        )
        return Call(order, header, model, answer, context, band)

    def _send(
        self,
        call: Call,
        model: Model,
        prompts: list[Prompt],
        max_tokens_each: list[int],
        root_hash: bytes,
        caller: Caller,
        budget: Limits,
        start: float,
    ) -> None:
        order = call.order
        seed = seed_of(order.seed, caller.tenant, caller.idempotency_key)
        counts, band = self._counts.of(model.name), call.band.name.lower()
        first_token = self._counts.band_first_token.labels(band)
        self._counts.band_requests.labels(band).inc(len(prompts))
        call.answer.usage.prompt = sum(len(prompt.ids) for prompt in prompts)
        for index, (prompt, limit) in enumerate(zip(prompts, max_tokens_each, strict=True)):
            request = Request(
                request=f"{call.header.id}-{index}",
                attempt=0,
                client=self._streams.client,
                model=model.name,
                tenant=caller.tenant,
                prompt=prompt.ids,
                root=root_hash,
                hashes=prompt.hashes,
                sampling=sampling(order, limit, seed_of_prompt(seed, index)),
                deadline_ms=0,
                park_ms=0,
                kind="cache" if order.keep else "chat" if order.chat else "completion",
                keep=order.keep,
                chunks=prompt.chunks or order.chunks,
                band=call.band,
            )
            sink = _PromptSink(call.answer, index * order.n, counts, first_token, start)
            call.streams.append(self._streams.open(request, sink, budget))
            counts.prompt_tokens.observe(len(prompt.ids))

    def _close(self, call: Call, model: Model, caller: Caller, start: float) -> None:
        answer = call.answer
        for stream in call.streams:
            self._streams.close(stream)
        self._open.discard(call)
        seconds = time.monotonic() - start
        counts = self._counts.of(model.name)
        if call.context is not None:
            most = call.context.num_tokens
            cached = sum(min(stream.delivery.cached or 0, most) for stream in call.streams)
            self._counts.context_requests.inc()
            self._counts.context_tokens.inc(cached)
            self._contexts.used(call.context.id, cached)
        if answer.error is not None:
            reason = answer.error.code
            counts.finished("error").inc()
        elif answer.num_live:
            reason = "abort"
            self._counts.disconnects.inc()
            counts.finished("abort").inc()
        else:
            reason = answer.texts[0].finish or ""
            for text in answer.texts:
                counts.finished(text.finish or "stop").inc()
            counts.latency.observe(seconds)
            counts.generation_tokens.observe(answer.usage.completion)
        self._log.info(
            "call_ended",
            id=call.header.id,
            request_id=caller.request_id,
            traceparent=caller.traceparent or None,
            tenant=caller.tenant,
            model=model.name,
            reason=reason,
            prompt_tokens=answer.usage.prompt,
            completion_tokens=sum(text.num_tokens for text in answer.texts),
            attempts=max((stream.delivery.attempt for stream in call.streams), default=0),
            seconds=round(seconds, 3),
        )

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, and let what is in flight finish within the grace; what remains is told why it ends."""
        self.draining = True
        await self._wait(grace_s)
        for call in list(self._open):
            call.answer.fail(Unavailable("the gateway is stopping", retry_after_s=1.0))
        await self._wait(_CLOSE_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self._streams.flush()

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()


@asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    """What comes before a stream has the request's deadline, too: the tokenizers may have a long queue."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded("the request took longer than its deadline") from error


def seed_of(seed: int | None, tenant: str, idempotency_key: str) -> int:
    """The call's seed as unsigned 64 bit: the given one, else the same for the same key of a tenant, else random."""
    if seed is not None:
        return seed & _SEED_MASK
    if idempotency_key:
        digest = blake2b(f"{tenant}\0{idempotency_key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")
    return secrets.randbits(64)


def seed_of_prompt(seed: int, index: int) -> int:
    """The seed of one of several prompts: equal prompts of one call must not give equal samples."""
    if index == 0:
        return seed
    digest = blake2b(seed.to_bytes(8, "little") + index.to_bytes(4, "little"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def sampling(order: Order, limit: int, seed: int) -> Sampling:
    """What the engine needs to know of an order."""
    return Sampling(
        max_tokens=limit,
        seed=seed,
        n=order.n,
        min_tokens=order.min_tokens,
        temperature=order.temperature,
        top_p=order.top_p,
        top_k=order.top_k,
        min_p=order.min_p,
        presence_penalty=order.presence_penalty,
        frequency_penalty=order.frequency_penalty,
        repetition_penalty=order.repetition_penalty,
        logit_bias=order.logit_bias,
        stop_token_ids=order.stop_token_ids,
        ignore_eos=order.ignore_eos,
        logprobs=order.logprobs,
    )
