"""Bodies of vLLM's tokenize and detokenize. This module must not know tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from services.gateway.openai.fields import Field, flag, integer, items, read, text, wrong_type
from services.gateway.openai.orders import CHAT, MAX_IDS, MAX_TEXT, UINT32
from shared.errors import InvalidRequest

_COMMON: Final = {"model": CHAT["model"], "return_token_strs": Field(flag, False)}
_TEXT: Final = {
    **_COMMON,
    "prompt": Field(text(MAX_TEXT)),
    "add_special_tokens": Field(flag, True),
}
_CHAT: Final = {
    **_COMMON,
    **{
        name: CHAT[name]
        for name in (
            "messages",
            "add_generation_prompt",
            "add_special_tokens",
            "chat_template_kwargs",
        )
    },
}
_DETOKENIZE: Final = {
    "model": CHAT["model"],
    "tokens": Field(items(integer(0, UINT32), 0, MAX_IDS)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeOrder:
    """What to tokenize: `messages`, or `prompt`. `strings`: also each token's text."""

    model: str | None
    messages: list[dict[str, Any]] | None
    prompt: str | None
    template_options: dict[str, Any]
    special: bool
    strings: bool


def read_tokenize(body: Any) -> TokenizeOrder:
    """A /tokenize body of either form. Raises InvalidRequest naming the field."""
    if type(body) is not dict:
        raise wrong_type("body", "an object", body)
    chat = body.get("messages") is not None
    values = read(body, _CHAT if chat else _TEXT)
    if not chat and values["prompt"] is None:
        raise InvalidRequest("you must provide 'prompt' or 'messages'", param="prompt")
    options = dict(values.get("chat_template_kwargs") or {})
    if chat:
        options["add_generation_prompt"] = values["add_generation_prompt"]
    return TokenizeOrder(
        model=values["model"],
        messages=values.get("messages"),
        prompt=values.get("prompt"),
        template_options=options,
        special=values["add_special_tokens"],
        strings=values["return_token_strs"],
    )


def read_detokenize(body: Any) -> tuple[str | None, list[int]]:
    """Model name and token ids of a /detokenize body. Raises InvalidRequest naming the field."""
    if type(body) is not dict:
        raise wrong_type("body", "an object", body)
    values = read(body, _DETOKENIZE)
    if values["tokens"] is None:
        raise InvalidRequest("you must provide 'tokens'", param="tokens")
    return values["model"], values["tokens"]
