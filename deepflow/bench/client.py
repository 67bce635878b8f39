"""A streaming client of the OpenAI completions API, made to cost next to nothing while it measures.

One session, kept alive; per chunk a clock reading and an append, all parsing after the end (`sse.py`). It must not
know loads or statistics.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Any, TypeAlias

import aiohttp
import orjson

from deepflow.bench import sse
from deepflow.bench.sample import Sample

_READ_BYTES = 1 << 18
# A text, token ids, or the messages of a chat.
Prompt: TypeAlias = str | Sequence[int] | Sequence[dict[str, str]]


class Endpoint(StrEnum):
    """Where prompts are sent."""

    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"


class Client:
    """Requests to one model at `url`; make it with `open`."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, model: str, endpoint: Endpoint
    ) -> None:
        self.model = model
        self._session = session
        self._url = url.rstrip("/") + endpoint
        self._endpoint = endpoint

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        url: str,
        model: str,
        *,
        api_key: str = "",
        endpoint: Endpoint = Endpoint.COMPLETIONS,
        timeout_s: float = 600.0,
    ) -> AsyncIterator[Client]:
        """A client for as long as the block runs. `timeout_s` bounds each request."""
        headers = {"Content-Type": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            headers=headers,
            read_bufsize=_READ_BYTES,
        ) as session:
            yield cls(session, url, model, endpoint)

    def post(self, prompt: Prompt, output_len: int) -> Any:
        """The request as an aiohttp context manager: greedy, `output_len` tokens whatever the model says.

        Token ids are for completions alone; messages are for chats, text is for both.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._endpoint is Endpoint.CHAT:
            is_text = isinstance(prompt, str)
            body["messages"] = [{"role": "user", "content": prompt}] if is_text else prompt
        else:
            body["prompt"] = prompt
        return self._session.post(self._url, data=orjson.dumps(body))

    async def complete(
        self, prompt: Prompt, output_len: int, started: Callable[[], None] | None = None
    ) -> Sample:
        """Send a prompt and take the whole answer. What goes wrong is in the sample, never raised.

        `started` is called when the first bytes of the answer's body are there.
        """
        pieces: list[tuple[float, bytes]] = []
        clock = time.perf_counter
        status, error, retry_after = 0, "", ""
        sent_s = clock()
        try:
            async with self.post(prompt, output_len) as response:
                status = response.status
                retry_after = response.headers.get("Retry-After", "")
                take = response.content.readany
                while data := await take():
                    pieces.append((clock(), data))
                    if started is not None and len(pieces) == 1:
                        started()
        except TimeoutError:
            error = "timeout"
        except aiohttp.ClientError as fault:
            error = f"{type(fault).__name__}: {fault}"
        if status != 200:
            said = b"".join(data for _, data in pieces)[:300].decode(errors="replace")
            return Sample(
                sent_s=sent_s,
                status=status,
                error=error or said,
                retry_after_s=float(retry_after) if retry_after.isdigit() else -1.0,
            )
        answer = sse.read(pieces)
        if not answer.is_done and not error:
            error = answer.error or "the stream broke off"
        cached = (answer.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Sample(
            sent_s=sent_s,
            status=200,
            id=answer.id,
            times_s=answer.times_s,
            text=answer.text,
            finish=answer.finish if not (error or answer.error) else "",
            prompt_tokens=int(answer.usage.get("prompt_tokens", 0)),
            cached_tokens=int(cached),
            output_tokens=int(answer.usage.get("completion_tokens", len(answer.times_s))),
            error=error or answer.error,
        )
