"""The NATS front door: a prompt published on `prompt.<model>`, its answer streamed to the reply subject.

The body is that of HTTP, as JSON or msgpack (`messages` makes it a chat, `prompt` a completion; `model` may be left
out, the subject names it). With `stream` true, each chunk object of the SSE stream comes as a message of its own;
else the whole answer is one. The encoding is the request's. An error is a message `{"error": ...}`. An empty message
is always the last. A reply subject inside our own subject space, or one with wildcards, is ignored: an answer must
not become an order to a service.

The tenant is the producer's NATS account, which the server names (`RawMessage.account`); `local` where there is none:
on a server without accounts, where whoever may connect may do anything. NATS does not tell when a producer leaves, so
its work runs to the end or the deadline. This module must not know HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import orjson

from services.gateway.auth import LOCAL
from services.gateway.calls import Caller, Calls
from services.gateway.openai.bodies import error_body, whole
from services.gateway.openai.chunks import ChunkWriter, to_plain
from services.gateway.openai.orders import Order, read_chat, read_completion
from shared import wire
from shared.bus import Bus, RawMessage, Subscription
from shared.errors import DeepFlowError, Internal, InvalidRequest, Overloaded
from shared.log import Logger
from shared.subjects import QUEUE_GATEWAY, encode

Encode = Callable[[Any], bytes]
MAX_IN_FLIGHT: Final = 1024


class Producers:
    """Serves every model's prompt subject, together with the other gateways."""

    def __init__(self, bus: Bus, calls: Calls, log: Logger) -> None:
        self._bus = bus
        self._calls = calls
        self._log = log
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Take prompts from now on."""
        self._subscription = await self._bus.serve_raw(
            self._bus.subjects.prompt("*"),
            self._serve,
            queue=QUEUE_GATEWAY,
            limit=MAX_IN_FLIGHT,
            refuse=self._refuse,
        )

    async def stop(self) -> None:
        """Take nothing new."""
        if self._subscription is not None:
            await self._subscription.stop()

    async def _refuse(self, message: RawMessage) -> None:
        if self._may_reply(message):
            await self._error(
                message.reply,
                _encoding(message.data),
                Overloaded("too many prompts", retry_after_s=1.0),
            )

    def _may_reply(self, message: RawMessage) -> bool:
        if is_safe_reply(message.reply, self._bus.subjects.realm):
            return True
        self._log.warning(
            "prompt_ignored", subject=message.subject, reason="unusable reply subject"
        )
        return False

    async def _serve(self, message: RawMessage) -> None:
        if not self._may_reply(message):
            return
        encoder = _encoding(message.data)
        try:
            order = self._order(message)
            await self._answer(order, message.account or LOCAL, message.reply, encoder)
        except DeepFlowError as error:
            await self._error(message.reply, encoder, error)
        except Exception:
            self._log.exception("prompt_failed", subject=message.subject)
            await self._error(message.reply, encoder, Internal("something went wrong here"))
        else:
            await self._bus.publish_raw(message.reply, b"")

    def _order(self, message: RawMessage) -> Order:
        try:
            _, model = self._bus.subjects.parse(message.subject)
        except ValueError as error:
            raise InvalidRequest("the subject names no model") from error
        body = parse(message.data)
        if type(body) is not dict:
            raise InvalidRequest("the body must be an object")
        if body.setdefault("model", model) != model:
            raise InvalidRequest("'model' differs from the subject's", param="model")
        return read_chat(body) if body.get("messages") is not None else read_completion(body)

    async def _answer(self, order: Order, tenant: str, reply: str, encoder: Encode) -> None:
        async with self._calls.open(order, Caller(tenant=tenant)) as call:
            if not order.stream:
                pieces = await call.answer.whole()
                body = whole(
                    call.header, pieces, call.num_choices, call.usage(), call.logprobs_tokenizer
                )
                await self._bus.publish_raw(reply, encoder(body))
                return
            writer = ChunkWriter(
                call.header,
                call.num_choices,
                with_usage=order.include_usage,
                tokenizer=call.logprobs_tokenizer,
            )
            while True:
                pieces, notices = await call.answer.take()
                if not pieces and not notices:
                    break
                await self._chunks(reply, encoder, writer.chunks(pieces))
            await self._chunks(reply, encoder, writer.usage(call.usage()))

    async def _chunks(self, reply: str, encoder: Encode, chunks: list[bytes]) -> None:
        for chunk in chunks:
            await self._bus.publish_raw(
                reply, chunk if encoder is orjson.dumps else encoder(to_plain(chunk))
            )

    async def _error(self, reply: str, encoder: Encode, error: DeepFlowError) -> None:
        try:
            await self._bus.publish_raw(reply, encoder(error_body(error)))
            await self._bus.publish_raw(reply, b"")
        except DeepFlowError as lost:
            self._log.warning("answer_lost", error=lost.message)


def _encoding(data: bytes) -> Encode:
    """The encoding of a request, and so of its answer: JSON if it begins as an object of JSON does."""
    return orjson.dumps if data.lstrip()[:1] in (b"{", b"", b"[") else wire.pack


def parse(data: bytes) -> Any:
    """A body in either encoding. Raises InvalidRequest."""
    try:
        return orjson.loads(data) if _encoding(data) is orjson.dumps else wire.unpack(data)
    except (orjson.JSONDecodeError, wire.WireError) as error:
        raise InvalidRequest(f"the body is neither JSON nor msgpack: {error}") from error


def is_safe_reply(reply: str, realm: str) -> bool:
    """Whether an answer may go there: a plain subject, outside our own space and outside NATS's."""
    tokens = reply.split(".")
    if not reply or not all(tokens) or reply.startswith("$"):
        return False
    if any(character <= " " or character == "\x7f" for character in reply):
        return False
    if any(token in ("*", ">") for token in tokens):
        return False
    return tokens[0] != encode(realm)
