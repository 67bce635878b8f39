"""Lines of batches, run here for the JEs as if their tenants had sent them, in the band that yields to all others.

A line is known by its key while it runs, and for a while afterwards: a JE that asks again, or takes over from another
one, gets what there is instead of a second run. A line that nobody asks for any more is dropped. This module must not
know batches.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import orjson

from services.gateway.budget import BodyBudget, Held
from services.gateway.calls import Caller, Calls
from services.gateway.openai.bodies import error_body, whole
from services.gateway.openai.orders import Order, read_chat, read_completion
from services.gateway.settings import GatewaySettings
from shared.bus import Bus, Subscription
from shared.errors import DeadlineExceeded, DeepFlowError, Internal, InvalidRequest, Overloaded
from shared.job_messages import Line, LineDone
from shared.log import Logger
from shared.messages import Band

ROUND_S: Final = 5.0  # an answer that takes longer is asked for again
FORGOTTEN_S: Final = 30.0  # without anybody asking: a JE's successor asks sooner
_KEPT_BYTES: Final = 64 * 1024 * 1024  # of answers that may be asked for once more
_ANSWER_BYTES: Final = 1024  # what keeping one costs beside its body
_READERS: Final = {"/v1/chat/completions": read_chat, "/v1/completions": read_completion}


@dataclass(slots=True)
class _Run:
    task: asyncio.Task[LineDone]
    lease: asyncio.Timeout | None = None

    def asked(self, for_s: float = FORGOTTEN_S) -> None:
        """Somebody still wants it, at least for so long."""
        if self.lease is not None and not self.lease.expired():
            self.lease.reschedule(asyncio.get_running_loop().time() + for_s)


class Lines:
    """All lines in hand. At most `max_lines` at once, with a quarter of the memory for bodies, so that they leave the
    gateway to those who wait."""

    def __init__(
        self,
        bus: Bus,
        calls: Calls,
        tasks: asyncio.TaskGroup,
        id_: str,
        settings: GatewaySettings,
        log: Logger,
    ) -> None:
        self._bus = bus
        self._calls = calls
        self._tasks = tasks
        self._id = id_
        self._limit = settings.max_lines
        self._budget = BodyBudget(settings.body_budget_bytes // 4)
        self._log = log
        self._runs: dict[str, _Run] = {}
        self._done: OrderedDict[str, LineDone] = OrderedDict()
        self._done_bytes = 0
        self._subscription: Subscription | None = None

    def __len__(self) -> int:
        return len(self._runs)

    async def start(self) -> None:
        """Take lines from now on."""
        self._subscription = await self._bus.serve(
            self._bus.subjects.line(self._id), (Line,), self._serve, limit=4 * self._limit
        )

    async def stop(self) -> None:
        """Take nothing new. What is not done within a round is dropped: it is asked for elsewhere."""
        if self._subscription is not None:
            await self._subscription.stop()
        for run in self._runs.values():
            run.asked(ROUND_S)

    async def _serve(self, line: Line) -> LineDone:
        """Raises DeadlineExceeded if it is not done at the end of the round, Overloaded."""
        with self._budget.take(len(line.body)):
            return await self._round(line)

    async def _round(self, line: Line) -> LineDone:
        done = self._done.get(line.key)
        if done is not None:
            return done
        run = self._runs.get(line.key)
        if run is None:
            if len(self._runs) >= self._limit:
                raise Overloaded("the gateway runs as many lines as it may", retry_after_s=1.0)
            task = self._tasks.create_task(self._run(line), name=f"line-{line.key}")
            run = self._runs[line.key] = _Run(task)
        run.asked()
        await asyncio.wait({run.task}, timeout=ROUND_S)
        if not run.task.done():
            raise DeadlineExceeded("the line is still running")
        return run.task.result()

    async def _run(self, line: Line) -> LineDone:
        """What came of it; it never fails."""
        lease = asyncio.timeout(FORGOTTEN_S)
        try:
            async with lease:
                self._runs[line.key].lease = lease
                with Held(
                    self._budget, len(line.body)
                ):  # checked at the door, where it is held, too
                    done = await self._answer(line)
        except DeepFlowError as error:
            done = _failed(error)
        except Exception as error:
            if isinstance(error, TimeoutError) and lease.expired():
                done = _failed(DeadlineExceeded("nobody asked for this line any more"))
            else:
                self._log.exception("line_failed", key=line.key)
                done = _failed(Internal("something went wrong here; see the server's log"))
        finally:
            del self._runs[line.key]
        if done.status < 500 and done.status != Overloaded.status:
            self._keep(line.key, done)
        return done

    async def _answer(self, line: Line) -> LineDone:
        caller = Caller(
            tenant=line.tenant,
            idempotency_key=line.key,
            request_id=line.key,
            band=Band.BATCH,
            deadline_s=line.deadline_ms / 1000,
        )
        async with self._calls.open(_order(line), caller) as call:
            pieces = await call.answer.whole()
            usage = call.usage()
            body = whole(call.header, pieces, call.num_choices, usage, call.logprobs_tokenizer)
            return LineDone(
                request_id=line.key,
                status=200,
                body=orjson.dumps(body).decode(),
                prompt_tokens=usage.prompt,
                output_tokens=usage.completion,
                cached_tokens=usage.cached,
            )

    def _keep(self, key: str, done: LineDone) -> None:
        self._done[key] = done
        self._done_bytes += len(done.body) + _ANSWER_BYTES
        while self._done_bytes > _KEPT_BYTES:
            _, oldest = self._done.popitem(last=False)
            self._done_bytes -= len(oldest.body) + _ANSWER_BYTES


def _order(line: Line) -> Order:
    """Raises InvalidRequest."""
    reader = _READERS.get(line.endpoint)
    if reader is None:
        raise InvalidRequest("there is nothing at this path")
    try:
        body: Any = orjson.loads(line.body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest("the body is not valid JSON") from error
    order = reader(body)
    if order.stream:
        raise InvalidRequest("a batch's answers are not streamed", param="stream")
    return order


def _failed(error: DeepFlowError) -> LineDone:
    return LineDone(
        request_id="", status=error.status, body=orjson.dumps(error_body(error)).decode()
    )
