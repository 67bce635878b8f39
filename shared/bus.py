"""The bus: everything DeepFlow says to NATS, in a few verbs over typed messages. Imports nats, as `table` and `queue`.

Core NATS carries the interactive path, KV buckets the tables (`table`), a stream the jobs (`queue`). Subscriptions
use callbacks, because a nats-py callback costs a third of its iterator; callbacks of one subscription run one after
another, so a listener's handler is synchronous and hands off, and each served request gets a task of its own. Messages
are at most once: whoever needs more carries sequence numbers. This module must not know any message's meaning.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar, cast

import nats
import nats.errors
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from shared import errors, log, wire
from shared.config import BusSettings
from shared.messages import Failure
from shared.queue import LEASE_S, WorkQueue
from shared.subjects import Subjects
from shared.table import Table

__all__ = ["Bus", "BusSettings", "RawMessage", "Subscription", "Table", "WorkQueue"]

M = TypeVar("M")
MIN_PAYLOAD: Final = 4 * 1024 * 1024  # 128k token ids with their hashes, and room
MIN_VERSION: Final = (2, 11)
_PENDING_BYTES: Final = 64 * 1024 * 1024  # what publishes may pile up while the server is away
_CONNECT_S: Final = 30.0
_STORED_S: Final = 10.0
# JSON about who sent a message that crossed from one account to another.
_REQUEST_INFO: Final = "Nats-Request-Info"


@dataclass(frozen=True, slots=True)
class RawMessage:
    """A message of somebody who does not speak our codec. `reply` is empty if no answer is wanted.

    `account` names the NATS account it came from, "" if that is our own. The server itself writes it wherever a
    message crosses from one account to another, over whatever the sender put there; so it can be forged only from
    inside our own account, where `permissions` lets nobody publish what is served raw.
    """

    subject: str
    data: bytes
    reply: str
    account: str = ""


class Bus:
    """One connection. Make it with `connect`; it reconnects for ever, and `closed` is set when it cannot."""

    def __init__(self, settings: BusSettings, inbox: str) -> None:
        self.settings = settings
        self.subjects = Subjects(settings.realm)
        self.closed = asyncio.Event()
        self.num_dropped = 0  # messages lost to a full pending queue: each is a slow handler
        self.num_undecodable = 0
        self.num_refused = 0  # permission violations: a subject is missing in shared/permissions.py
        self._opened = False
        self._inbox = inbox
        self._client = Client()
        self._log = log.get(component="bus")
        self._handlers: set[asyncio.Task[None]] = set()
        self._disconnect_callbacks: list[Callable[[], None]] = []
        self._reconnect_callbacks: list[Callable[[], None]] = []
        self._waits: set[asyncio.Timeout] = set()  # for what the server will not do once it is lost

    # ------------------------------------------------------------------------------------------------- connection

    @classmethod
    async def connect(cls, settings: BusSettings, *, name: str, inbox: str = "") -> Bus:
        """Connect, waiting up to 30 s for a server. Raises Unavailable, naming what the server lacks."""
        bus = cls(settings, inbox or name)
        loop = asyncio.get_running_loop()
        give_up = loop.time() + _CONNECT_S
        while True:
            try:
                # Without a bound of our own connect() may try for minutes (nats.py issue 645).
                async with asyncio.timeout(5):
                    await bus._open(name)
                break
            except (OSError, TimeoutError, nats.errors.Error) as error:
                await bus._close_client()
                if "authorization" in str(error).lower():
                    raise errors.Unavailable(f"the bus refuses user {settings.user!r}") from error
                if loop.time() > give_up:
                    raise errors.Unavailable(f"no bus at {settings.url}: {error}") from error
                await asyncio.sleep(0.1)
        try:
            bus._check_server()
        except errors.Unavailable:
            await bus.close()
            raise
        return bus

    async def _open(self, name: str) -> None:
        async def on_error(error: Exception) -> None:
            if not self._opened:
                raise error  # else the library tries on by itself, with a wrong password too
            if isinstance(error, nats.errors.SlowConsumerError):
                self.num_dropped += 1
            if "permissions violation" in str(error).lower():
                self.num_refused += 1
                self._log.error("bus_permission_refused", error=str(error))
            else:
                self._log.warning("bus_error_seen", error=repr(error))

        async def on_disconnected() -> None:
            for wait in self._waits:
                wait.reschedule(0)
            if self._opened and not self._client.is_closed:
                self._tell("bus_lost", self._disconnect_callbacks)

        async def on_reconnected() -> None:
            self._tell("bus_regained", self._reconnect_callbacks)

        async def on_closed() -> None:
            if self._opened:
                self.closed.set()

        self._client = Client()
        await self._client.connect(
            self.settings.url,
            name=name,
            user=self.settings.user or None,
            password=self.settings.password or None,
            inbox_prefix=f"_INBOX.{self._inbox}".encode(),
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.2,  # type: ignore[arg-type]  # annotated int, used as seconds
            connect_timeout=2,
            ping_interval=5,
            max_outstanding_pings=2,
            pending_size=_PENDING_BYTES,
            error_cb=on_error,
            disconnected_cb=on_disconnected,
            reconnected_cb=on_reconnected,
            closed_cb=on_closed,
        )
        self._opened = True

    def _tell(self, event: str, callbacks: list[Callable[[], None]]) -> None:
        self._log.warning(event)
        for callback in callbacks:
            try:
                callback()
            except Exception:  # raised into the library it would end the reconnecting
                self._log.exception("bus_callback_failed", bus_event=event)

    def _check_server(self) -> None:
        version = self._client.connected_server_version
        if (version.major, version.minor) < MIN_VERSION:
            raise errors.Unavailable(f"nats-server {version} is too old: 2.11 or newer is needed")
        if self._client.max_payload < MIN_PAYLOAD:
            raise errors.Unavailable(
                f"nats-server's max_payload is {self._client.max_payload}: set it to 8MB"
            )
        if not self._client._server_info.get("jetstream", False):
            raise errors.Unavailable("nats-server runs without JetStream: set `jetstream` in it")

    @property
    def connected(self) -> bool:
        """Whether the server can be reached at this moment."""
        return self._client.is_connected

    @property
    def max_payload(self) -> int:
        """The largest message in bytes."""
        return self._client.max_payload

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call back whenever the server goes away."""
        self._disconnect_callbacks.append(callback)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call back whenever the server is back; subscriptions have been replayed by then."""
        self._reconnect_callbacks.append(callback)

    async def flush(self) -> None:
        """Wait until the server has all that was published. Raises Unavailable when it is away."""
        try:
            async with self.until_lost():
                for _ in range(2):  # the library's first PING overtakes what it has yet to write
                    await self._client.flush(timeout=5)
        except (nats.errors.Error, OSError) as error:
            raise errors.Unavailable(f"the bus cannot be flushed: {error!r}") from error

    @contextlib.asynccontextmanager
    async def until_lost(self) -> AsyncIterator[None]:
        """Wait for the server in the block, but no longer than it is there. Raises Unavailable, TimeoutError."""
        if not self.connected:
            raise errors.Unavailable("the bus is away")
        async with asyncio.timeout(None) as wait:
            self._waits.add(wait)
            try:
                yield
            finally:
                self._waits.discard(wait)

    async def close(self) -> None:
        """Answer what is being served, send what is buffered, and leave. Safe to call twice."""
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=self.settings.grace_s)
        for task in list(self._handlers):
            task.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        # Not the library's drain: with the server away it waits for it, and what it let in nobody would answer now.
        try:
            if self.connected:
                await self.flush()
        except errors.Unavailable as error:
            self._log.warning("bus_flush_failed", error=error.message)
        finally:
            await self._close_client()

    async def _close_client(self) -> None:
        if not self._client.is_closed:
            # It flushes, and there may be nobody at the other end: a RuntimeError under uvloop.
            with contextlib.suppress(nats.errors.Error, OSError, RuntimeError):
                await self._client.close()

    # ---------------------------------------------------------------------------------------------------- sending

    async def publish(self, subject: str, message: object, *, reply: str = "") -> None:
        """Send and forget. Raises TooLarge past max_payload, Unavailable when the buffer is full."""
        await self.publish_raw(subject, wire.encode(message), reply=reply)

    async def publish_raw(self, subject: str, data: bytes, *, reply: str = "") -> None:
        """Send bytes that are no message of ours. Raises as `publish` does."""
        data = self._fitting(data)
        try:
            await self._client.publish(subject, data, reply)
        except nats.errors.Error as error:
            raise errors.Unavailable(f"the bus cannot take a message: {error!r}") from error

    def _fitting(self, data: bytes) -> bytes:
        """`data`, if the server takes that much. Raises TooLarge."""
        if len(data) > self._client.max_payload:
            raise errors.TooLarge(
                f"a message of {len(data)} bytes passes the bus's limit of {self.max_payload}"
            )
        return data

    async def request(self, subject: str, message: object, *kinds: type[M], timeout_s: float) -> M:
        """Ask, and wait for an answer of one of `kinds`.

        A `Failure` is raised as its error. Raises Unavailable if nobody listens, DeadlineExceeded after `timeout_s`,
        Internal if the answer is not understood.
        """
        data = self._fitting(wire.encode(message))
        try:
            answer = await self._client.request(subject, data, timeout=timeout_s)
        except nats.errors.NoRespondersError as error:
            raise errors.Unavailable(f"nobody listens on {subject}") from error
        except nats.errors.TimeoutError as error:
            raise errors.DeadlineExceeded(f"no answer on {subject}") from error
        except nats.errors.Error as error:
            raise errors.Unavailable(f"the bus cannot take a request: {error!r}") from error
        return self._answer(answer.data, kinds)

    def _answer(self, data: bytes, kinds: tuple[type[M], ...]) -> M:
        try:
            message: Any = wire.decode(data, Failure, *kinds)
        except wire.WireError as error:
            raise errors.Internal(f"an answer was not understood: {error}") from error
        if isinstance(message, Failure) and Failure not in kinds:
            raise errors.from_code(
                message.code,
                message.message,
                param=message.param,
                retry_after_s=message.retry_after_s,
            )
        return cast("M", message)

    async def gather(
        self, subject: str, message: object, kind: type[M], *, wait_s: float
    ) -> list[M]:
        """Ask everybody, and take the answers that come within `wait_s`."""
        answers: list[M] = []

        async def take(msg: Msg) -> None:
            if msg.data:
                try:
                    answers.append(wire.decode(msg.data, kind))
                except wire.WireError:
                    self.num_undecodable += 1

        inbox = self._client.new_inbox()
        subscription = await self._client.subscribe(inbox, cb=take)
        try:
            await self.publish(subject, message, reply=inbox)
            await asyncio.sleep(wait_s)
        finally:
            await subscription.unsubscribe()
        return answers

    # -------------------------------------------------------------------------------------------------- receiving

    async def listen(
        self,
        subject: str,
        kinds: tuple[type[M], ...],
        handler: Callable[[M], None],
        *,
        queue: str = "",
    ) -> Subscription:
        """Call `handler` with each message, in order. It must not block; what it cannot decode is counted."""

        async def take(msg: Msg) -> None:
            try:
                message = wire.decode(msg.data, *kinds)
            except wire.WireError as error:
                self.num_undecodable += 1
                self._log.warning("message_refused", subject=msg.subject, error=str(error))
                return
            try:
                handler(message)
            except Exception:
                self._log.exception("listener_failed", subject=msg.subject)

        inner = await self._client.subscribe(subject, queue=queue, cb=take)
        return Subscription(self, inner, set())

    async def serve(
        self,
        subject: str,
        kinds: tuple[type[M], ...],
        handler: Callable[[M], Awaitable[object]],
        *,
        queue: str = "",
        limit: int = 1024,
    ) -> Subscription:
        """Answer each request with what `handler` returns, each in a task of its own.

        A DeepFlowError becomes its `Failure`, anything else is logged and becomes `Failure(internal)`; past `limit`
        requests in flight the answer is `Failure(overloaded)`.
        """

        async def answer(msg: Msg) -> None:
            try:
                try:
                    message = wire.decode(msg.data, *kinds)
                except wire.WireError as error:
                    self.num_undecodable += 1
                    raise errors.InvalidRequest(str(error)) from error
                reply = self._fitting(wire.encode(await handler(message)))
            except errors.DeepFlowError as error:
                reply = wire.encode(failure(error))
            except Exception:
                self._log.exception("handler_failed", subject=msg.subject)
                reply = wire.encode(
                    Failure(code="internal", message="the handler failed; see its log")
                )
            await self._reply(msg.reply, reply)

        async def refuse(msg: Msg) -> None:
            full = Failure(code="overloaded", message="too many at once", retry_after_s=1.0)
            await self._reply(msg.reply, wire.encode(full))

        return await self._serve(subject, answer, refuse, queue, limit)

    async def serve_raw(
        self,
        subject: str,
        handler: Callable[[RawMessage], Awaitable[None]],
        *,
        queue: str = "",
        limit: int = 1024,
        refuse: Callable[[RawMessage], Awaitable[None]],
    ) -> Subscription:
        """Hand each message, undecoded, to a task of its own; `refuse` gets those past `limit` in flight."""

        def raw(msg: Msg) -> RawMessage:
            return RawMessage(msg.subject, msg.data, msg.reply, _account(msg))

        async def run(call: Callable[[RawMessage], Awaitable[None]], msg: Msg) -> None:
            try:
                await call(raw(msg))
            except Exception:
                self._log.exception("handler_failed", subject=msg.subject)

        return await self._serve(subject, partial(run, handler), partial(run, refuse), queue, limit)

    async def _serve(
        self,
        subject: str,
        answer: Callable[[Msg], Coroutine[Any, Any, None]],
        refuse: Callable[[Msg], Coroutine[Any, Any, None]],
        queue: str,
        limit: int,
    ) -> Subscription:
        in_flight: set[asyncio.Task[None]] = set()

        async def take(msg: Msg) -> None:
            call = answer if len(in_flight) < limit else refuse
            task = asyncio.create_task(call(msg))
            for owner in (in_flight, self._handlers):
                owner.add(task)
                task.add_done_callback(owner.discard)

        inner = await self._client.subscribe(subject, queue=queue, cb=take)
        return Subscription(self, inner, in_flight)

    async def _reply(self, subject: str, data: bytes) -> None:
        if not subject:
            return
        try:
            await self.publish_raw(subject, data)
        except errors.DeepFlowError as error:
            self._log.warning("reply_lost", error=error.message)

    # ------------------------------------------------------------------------------------------ tables and the queue

    async def table(self, name: str) -> Table:
        """The table of that name, created when missing.

        Raises Unavailable if the bus is away, or JetStream does not come up.
        """
        bucket = self.subjects.table(name)
        return await self._stored(f"table {name}", lambda js: Table.open(js, bucket))

    async def work_queue(self, lease_s: float = LEASE_S) -> WorkQueue:
        """The queue of jobs that nobody waits on, created when missing. Raises as `table` does."""
        return await self._stored(
            "work queue", lambda js: WorkQueue.open(js, self.subjects, lease_s)
        )

    async def _stored(self, what: str, open_: Callable[[JetStreamContext], Awaitable[M]]) -> M:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + _STORED_S
        jetstream = self._client.jetstream(timeout=2)
        while True:
            if not self.connected:  # nobody shall wait for it while draining
                raise errors.Unavailable(f"{what}: the bus is away")
            try:
                return await open_(jetstream)
            except nats.errors.Error as error:
                # Two services may create it at once, and JetStream is ready some time after the port.
                if loop.time() > give_up:
                    raise errors.Unavailable(f"{what}: {error!r}") from error
                await asyncio.sleep(0.1)


def _account(message: Msg) -> str:
    try:
        told = orjson.loads((message.headers or {}).get(_REQUEST_INFO, b""))
    except orjson.JSONDecodeError:
        return ""
    account = told.get("acc") if isinstance(told, dict) else None
    return account if isinstance(account, str) else ""


def failure(error: errors.DeepFlowError) -> Failure:
    """The message that carries `error`."""
    return Failure(
        code=error.code,
        message=error.message,
        param=error.param,
        retry_after_s=error.retry_after_s,
    )


class Subscription:
    """A standing interest in a subject."""

    def __init__(self, bus: Bus, inner: Any, in_flight: set[asyncio.Task[None]]) -> None:
        self._bus = bus
        self._inner = inner
        self._in_flight = in_flight

    async def drain(self) -> None:
        """Take no new messages; those that came are handled within the grace, or cancelled."""
        try:
            async with self._bus.until_lost():
                await self._inner.drain()
        except (nats.errors.Error, OSError, errors.Unavailable):
            await self.stop()
        if self._in_flight:
            _, late = await asyncio.wait(self._in_flight, timeout=self._bus.settings.grace_s)
            for task in late:
                task.cancel()

    async def stop(self) -> None:
        """Take no new messages from now on."""
        # Closed or unknown: nothing more will come.
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._inner.unsubscribe()
