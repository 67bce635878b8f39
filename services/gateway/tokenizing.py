"""The process that renders chat templates, tokenizes, and hashes pages: `python -m services.gateway.tokenizing`.

It serves its parent over stdin and stdout, one job at a time, each way a four byte little-endian length and that much
msgpack. It ends when stdin does, so it cannot outlive its gateway. Templates are programs that came with a model: here
they can be slow or crash without anybody else noticing. This module must not know HTTP, the bus, or asyncio.

A job is a map: `folder` and `version` (a changed one is loaded anew) name the model, `op` is one of
- `load`: nothing but loading;
- `chat`: `messages`, `options` for the template, `chunks`: texts in them -> `ids`, `chunks`: ranges of ids;
- `text`: `prompts` (text, or token ids as they are), `special` -> `ids`;
- `context`: `messages` and `options`, or `text`, that others are going to continue -> `ids`, and `num_common`: with
  how many of them a continuation begins (templates and tokenizers may tie the end to what follows it);
- `decode`: `ids` -> `text`.
With `root` and `page` the answer also holds `hashes`. Ids travel as packed unsigned 32 bit integers, hashes joined.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, Final

from shared import wire
from shared.blockhash import chain
from shared.errors import DeepFlowError, InvalidRequest
from shared.text.template import ChatTemplate
from shared.text.tokenizer import Tokenizer

MAX_MODELS: Final = 8
LENGTH_BYTES: Final = 4
_CONTINUATIONS: Final = (
    "a",
    " a",
    "\n",
    "1",
)  # of text: each may merge with its end in another way


class Loaded:
    """The text side of one model."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.load(folder)
        self.template = ChatTemplate.load(folder)


class Models:
    """The latest models used, loaded once."""

    def __init__(self) -> None:
        self._loaded: OrderedDict[tuple[str, str], Loaded] = OrderedDict()

    def get(self, folder: str, version: str) -> Loaded:
        """The model in `folder`."""
        key = (folder, version)
        loaded = self._loaded.get(key)
        if loaded is None:
            loaded = self._loaded[key] = Loaded(Path(folder))
            if len(self._loaded) > MAX_MODELS:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(key)
        return loaded


def work(models: Models, job: dict[str, Any]) -> dict[str, Any]:
    """The answer to one job. Raises what tokenizer and template raise."""
    model = models.get(job["folder"], job["version"])
    op = job["op"]
    if op == "load":
        # The first use of a tokenizer builds tables; let it not be a client's.
        model.tokenizer.encode("a")
        return {}
    if op == "decode":
        return {"text": model.tokenizer.decode(unpacked(job["ids"]))}
    if op == "context":
        ids, others = (_text if "text" in job else _messages)(model, job)
        num_common = min(_num_common(ids, other) for other in others)
        return {"ids": packed(ids), "num_common": num_common}
    if op == "chat":
        text = model.template.render(job["messages"], **job["options"])
        ids, chunks = in_parts(model.tokenizer, text, job.get("chunks", []), special=job["special"])
        prompts = [ids]
    else:
        prompts = [
            model.tokenizer.encode(prompt, special=job["special"])
            if isinstance(prompt, str)
            else unpacked(prompt)
            for prompt in job["prompts"]
        ]
    answer: dict[str, Any] = {"ids": [packed(ids) for ids in prompts]}
    if op == "chat":
        answer["chunks"] = chunks
    if job["page"]:
        answer["hashes"] = [b"".join(chain(job["root"], ids, job["page"])) for ids in prompts]
    return answer


def in_parts(
    tokenizer: Tokenizer, text: str, chunks: list[str], *, special: bool
) -> tuple[list[int], list[list[int]]]:
    """Tokens of a text, and the ranges of those `chunks` that are found in it, in this order.

    A chunk is tokenized by itself, so that its tokens are the same wherever it stands. Where the tokenizer marks how a
    text begins or ends that cannot be, and there are no ranges.
    """
    ids: list[int] = []
    ranges: list[list[int]] = []
    done = 0
    for chunk in () if special or tokenizer.strips_blank else map(str.strip, chunks):
        start = text.find(chunk, done) if chunk else -1
        if start >= 0:
            ids += tokenizer.encode(text[done:start])
            done = start + len(chunk)
            own = tokenizer.encode(chunk)
            ranges.append([len(ids), len(ids) + len(own)])
            ids += own
    return ids + tokenizer.encode(text[done:], special=special), ranges


def _messages(model: Loaded, job: dict[str, Any]) -> tuple[list[int], list[list[int]]]:
    """Tokens of a chat's beginning, and of chats that go on from it. Raises InvalidRequest if none can."""

    def ids(messages: list[dict[str, Any]], **options: bool) -> list[int]:
        return model.tokenizer.encode(
            model.template.render(messages, **(job["options"] | options)), special=False
        )

    begun = job["messages"]
    user, assistant = ({"role": role, "content": "And?"} for role in ("user", "assistant"))
    others = []
    for more in ([user], [assistant, user]) if begun[-1]["role"] == "user" else ([user],):
        try:
            others.append(ids([*begun, *more], add_generation_prompt=True))
        except InvalidRequest:  # many templates want user and assistant to take turns
            continue
    if not others:
        raise InvalidRequest(
            "the model's chat template takes nothing after these messages", param="messages"
        )
    return ids(begun, add_generation_prompt=False), others


def _text(model: Loaded, job: dict[str, Any]) -> tuple[list[int], list[list[int]]]:
    """Tokens of a text, and of texts that go on from it."""
    first, *others = (
        model.tokenizer.encode(job["text"] + more, special=True) for more in ("", *_CONTINUATIONS)
    )
    return first, others


def _num_common(one: list[int], other: list[int]) -> int:
    """The length of the longest common prefix."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def packed(ids: list[int]) -> bytes:
    """Token ids as bytes of this machine's order: both ends are on one."""
    return array("I", ids).tobytes()


def unpacked(raw: bytes) -> list[int]:
    """The token ids in `raw`."""
    ids = array("I")
    ids.frombytes(raw)
    return ids.tolist()


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer jobs until the parent is gone."""
    models = Models()
    while len(head := source.read(LENGTH_BYTES)) == LENGTH_BYTES:
        job = wire.unpack(source.read(int.from_bytes(head, "little")))
        try:
            answer = work(models, job)
        except DeepFlowError as error:
            answer = {"error": [error.code, error.message, error.param]}
        except Exception as error:  # the answer carries it; the process serves on
            answer = {"error": ["internal", f"tokenizing failed: {type(error).__name__}", None]}
        data = wire.pack(answer)
        sink.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
        sink.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
