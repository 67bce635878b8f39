"""`deepflow chat`: a conversation in the terminal, streamed over the gateway's HTTP API like any client's.

Uses the standard library's HTTP client, so that the first answer does not wait for imports. This module must not know
anything about the platform behind the URL.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deepflow.cli.home import Home
from deepflow.cli.screen import console, errors, fail, say


class ChatError(Exception):
    """The gateway's "no", or that there was no gateway; the text is for people."""


def chat(home: Home, model: str | None) -> None:
    """Talk until the end of input. Without a terminal each line of input is one turn."""
    instance = home.running()
    if instance is None:
        fail(f"Nothing runs in {home.path}: `deepflow up` starts it.")
    model = model or instance.models[0]
    if model not in instance.models:
        served = ", ".join(instance.models)
        fail(
            f"model {model!r} is not served here; {served} is. `deepflow up --model {model}` would"
        )
    client = Client(instance.url, api_key(os.environ))
    people = sys.stdin.isatty()
    if people:
        say(f"Chatting with {model}. /new starts over, Ctrl-C stops an answer, Ctrl-D leaves.")
    messages: list[dict[str, str]] = []
    while (line := _read(people)) is not None:
        if line.strip() == "/new":
            messages.clear()
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": _answer(client, model, messages)})
        except ChatError as error:
            if not people:
                fail(str(error))
            errors.print(str(error), markup=False, style="red")
            messages.pop()


def _read(people: bool) -> str | None:
    try:
        return input("\n> " if people else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        return "" if people else None


def _answer(client: Client, model: str, messages: list[dict[str, str]]) -> str:
    text = ""
    started = time.monotonic()
    usage: dict[str, Any] = {}
    try:
        for event in client.stream(model, messages):
            if not text:
                _notice(event.get("notice", ""))
            usage = event.get("usage") or usage
            for choice in event.get("choices", []):
                piece = choice["delta"].get("content") or ""
                text += piece
                console.out(piece, end="", highlight=False)
                console.file.flush()
    except KeyboardInterrupt:
        console.out(" ...", end="")
    console.out("")
    seconds = time.monotonic() - started
    if usage and console.is_terminal:
        num_tokens = usage["completion_tokens"]
        say_rate = f"{num_tokens} tokens, {num_tokens / seconds:.0f} tokens/s"
        console.print(say_rate, style="dim", markup=False)
    return text


def _notice(text: str) -> None:
    """What is shown until the answer begins: the model may be asleep, and is being woken."""
    if console.is_terminal:
        console.file.write(f"\r{text:<16}\r")  # the console itself would drop what moves the cursor
        console.file.flush()


class Client:
    """A streaming client of one gateway."""

    def __init__(self, url: str, key: str) -> None:
        self._address = urlsplit(url)
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def stream(self, model: str, messages: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """The chunks of one chat completion. Raises ChatError; leaving the iterator cancels the request."""
        body = {
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = http.client.HTTPConnection(
            self._address.hostname or "127.0.0.1", self._address.port, timeout=300
        )
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ChatError(_reason(response.read()))
            for line in response:
                if line.startswith(b": "):  # what the server waits for
                    yield {"notice": line[2:].decode(errors="replace").strip()}
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ChatError(_reason(data))
                yield event
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"the gateway at {self._address.geturl()} fails: {error!r}") from error
        finally:
            connection.close()


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:300]


def api_key(env: os._Environ[str] | dict[str, str]) -> str:
    """The key to talk to the gateway with: `DEEPFLOW_API_KEY`, else the first one that the gateway was given."""
    if key := env.get("DEEPFLOW_API_KEY", ""):
        return key
    keys = env.get("DEEPFLOW_API_KEYS", "")
    if not keys and (file := env.get("DEEPFLOW_API_KEYS_FILE", "")):
        try:
            keys = Path(file).read_text()
        except OSError:
            return ""
    first = keys.replace("\n", ",").split(",")[0].strip()
    return first.partition(":")[2]
