"""What the client reads: error bodies, whole answers, logprobs, usage, the list of models. JSON values as plain dicts.

`chunks.py` writes the streamed forms with the same parts. This module must not know where an answer comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.gateway.answer import Usage
from services.gateway.choices import Piece, TokenEntry
from shared.errors import DeepFlowError
from shared.messages import ModelEntry
from shared.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What every object of one answer repeats. `created` is in seconds since the epoch. `service_tier`: what the answer
    was given in, if the caller asked for one."""

    id: str
    chat: bool
    model: str
    created: int
    fingerprint: str
    service_tier: str | None = None

    def fields(self, kind: str) -> dict[str, Any]:
        """What an object of this kind ("chat.completion", "text_completion", ...) begins with."""
        begin = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        return begin if self.service_tier is None else {**begin, "service_tier": self.service_tier}


def error_body(error: DeepFlowError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def usage_body(usage: Usage) -> dict[str, Any]:
    """Token counts; `cached_tokens` is how much of the prompt was found in the KV cache."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def chat_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat form: an entry per token, with its bytes, since one token may be half a character."""

    def token(id_: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(id_)
        return {
            "token": raw.decode("utf-8", "replace"),
            "logprob": _finite(logprob),
            "bytes": list(raw),
        }

    content = []
    for entry in entries:
        one = token(entry.id, entry.logprobs.logprob)
        one["top_logprobs"] = [
            token(id_, logprob)
            for id_, logprob in zip(
                entry.logprobs.top_ids, entry.logprobs.top_logprobs, strict=True
            )
        ]
        content.append(one)
    return {"content": content, "refusal": None}


def text_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer) -> dict[str, Any]:
    """The completions form: parallel arrays; `text_offset` counts characters of the choice's text."""
    return {
        "tokens": [tokenizer.id_to_text(entry.id) for entry in entries],
        "token_logprobs": [_finite(entry.logprobs.logprob) for entry in entries],
        "top_logprobs": [
            {
                tokenizer.id_to_text(id_): _finite(logprob)
                for id_, logprob in zip(
                    entry.logprobs.top_ids, entry.logprobs.top_logprobs, strict=True
                )
            }
            for entry in entries
        ],
        "text_offset": [entry.offset for entry in entries],
    }


def _finite(logprob: float) -> float:
    """A token that was impossible has a logprob of minus infinity, which JSON cannot write; OpenAI shows -9999."""
    return max(logprob, -9999.0) if logprob == logprob else -9999.0


def whole(
    header: Header,
    pieces: Sequence[Piece],
    num_choices: int,
    usage: Usage,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """The answer that is not streamed. `tokenizer` is given where logprobs are wanted."""
    texts: list[list[str]] = [[] for _ in range(num_choices)]
    entries: list[list[TokenEntry]] = [[] for _ in range(num_choices)]
    finish: list[str | None] = [None] * num_choices
    for piece in pieces:
        texts[piece.choice].append(piece.text)
        entries[piece.choice] += piece.entries
        if piece.finish is not None:
            finish[piece.choice] = piece.finish
    choices = []
    for index in range(num_choices):
        choice: dict[str, Any] = {"index": index}
        text = "".join(texts[index])
        if header.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        logprobs = chat_logprobs if header.chat else text_logprobs
        choice["logprobs"] = None if tokenizer is None else logprobs(entries[index], tokenizer)
        choice["finish_reason"] = finish[index]
        choices.append(choice)
    return {
        **header.fields("chat.completion" if header.chat else "text_completion"),
        "choices": choices,
        "usage": usage_body(usage),
    }


def model_body(entry: ModelEntry) -> dict[str, Any]:
    """One model; `max_model_len` is vLLM's name for the context."""
    return {
        "id": entry.name,
        "object": "model",
        "created": entry.created,
        "owned_by": "deepflow",
        "root": entry.name,
        "max_model_len": entry.context,
    }


def models_body(entries: Sequence[ModelEntry]) -> dict[str, Any]:
    """The list of models."""
    return {"object": "list", "data": [model_body(entry) for entry in entries]}
