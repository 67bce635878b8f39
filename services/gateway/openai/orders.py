"""Bodies of chat/completions and completions, and of tokenize and detokenize, checked into plain values.

Table-driven: `CHAT` and `COMPLETION` name every field served with its type and bounds, `UNSERVED` every field we know
and do not serve, which is refused by name and never ignored. Unknown fields are ignored, as OpenAI and vLLM do. What
depends on the model (vocabulary, context) is checked by `check_model` and `max_tokens`. This module must not know the
bus or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from services.gateway.openai.fields import (
    Field,
    flag,
    integer,
    items,
    mapping,
    number,
    one_of,
    out_of_range,
    read,
    refuse_unserved,
    text,
    wrong_type,
)
from services.gateway.tiers import TIERS
from shared.errors import InvalidRequest
from shared.messages import Keep

MAX_TEXT: Final = 64 * 1024 * 1024  # the body limit is what really bounds text
MAX_PROMPTS: Final = 128
MAX_CHOICES: Final = 256  # prompts times n
MAX_CHUNKS: Final = 1024  # of a prompt
MAX_IDS: Final = 4 * 1024 * 1024
COMPLETION_TOKENS: Final = (
    16  # OpenAI's default for completions; a chat may use the rest of the context
)
UINT32: Final = 2**32 - 1
ROLES: Final = ("system", "developer", "user", "assistant")
# The template's own inputs may not be replaced through chat_template_kwargs.
RESERVED_OPTIONS: Final = frozenset({"messages", "add_generation_prompt", "tools", "documents"})


class ContextLengthExceeded(InvalidRequest):
    """Prompt and wanted output do not fit the model's context."""

    code: ClassVar[str] = "context_length_exceeded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a caller asks for, whichever API it came through. Exactly one of `messages` and `prompts` is set."""

    model: str
    messages: list[dict[str, Any]] | None = None
    prompts: list[str | list[int]] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    special: bool
    stream: bool
    include_usage: bool
    n: int
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float]
    seed: int | None
    stop: list[str]
    stop_token_ids: list[int]
    include_stop: bool
    ignore_eos: bool
    skip_special: bool
    logprobs: int | None  # alternatives beside each token; None: no logprobs
    service_tier: str | None = None
    cache: str | None = None  # the context cache whose messages or text go before
    # What the engine may take over from other prompts, an approximation: texts of a chat, or ranges of token ids.
    chunk_texts: list[str] = field(default_factory=list)
    chunks: list[list[int]] = field(default_factory=list)
    # Computes a context cache: what is kept of it, and whether it is for all tenants. No caller's words set these.
    keep: Keep | None = None
    public: bool = False

    @property
    def chat(self) -> bool:
        """Whether it came as a chat."""
        return self.messages is not None


def _stop(value: Any, name: str) -> list[str]:
    check = text(1024, empty=False)
    if type(value) is str:
        return [check(value, name)]
    if type(value) is not list:
        raise wrong_type(name, "a string or an array of strings", value)
    strings: list[str] = items(check, 0, 4)(value, name)
    return strings


def _logit_bias(value: Any, name: str) -> dict[int, float]:
    bias = {}
    check = number(-100, 100)
    if type(value) is dict and len(value) > 1024:
        raise out_of_range(name, "must have at most 1024 entries")
    for key, amount in mapping(value, name).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest(
                f"'{name}' has a key that is no token id: {key[:40]!r}", param=name
            )
        bias[int(key)] = check(amount, f"{name}.{key}")
    return bias


def _prompt(value: Any, name: str) -> list[str | list[int]]:
    """Text, token ids, or a list of either."""
    if type(value) is str:
        return [value]
    if type(value) is not list:
        raise wrong_type(name, "a string, an array of strings, or an array of token ids", value)
    if not value:
        raise out_of_range(name, "must not be empty")
    if type(value[0]) is int:
        return [_ids(value, name)]
    if len(value) > MAX_PROMPTS:
        raise out_of_range(name, f"must have at most {MAX_PROMPTS} prompts")
    prompts: list[str | list[int]] = []
    for index, one in enumerate(value):
        if type(one) is list:
            prompts.append(_ids(one, f"{name}[{index}]"))
        elif type(one) is str:
            prompts.append(one)
        else:
            raise wrong_type(f"{name}[{index}]", "a string or an array of token ids", one)
    return prompts


def _ids(value: Any, name: str) -> list[int]:
    if type(value) is not list:
        raise wrong_type(name, "an array of token ids", value)
    if not 0 < len(value) <= MAX_IDS:
        raise out_of_range(name, "must hold at least one token id, and not too many")
    if set(map(type, value)) != {int}:
        raise wrong_type(
            name, "an array of token ids", next(v for v in value if type(v) is not int)
        )
    if min(value) < 0 or max(value) > UINT32:
        raise out_of_range(name, "token ids are not negative and inside the vocabulary")
    return value


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if type(value) is not list:
        raise wrong_type(name, "an array of messages", value)
    if not value:
        raise out_of_range(name, "must hold at least one message")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def _message(value: Any, name: str) -> dict[str, Any]:
    message = mapping(value, name)
    role = message.get("role")
    if type(role) is not str:
        raise wrong_type(f"{name}.role", "a string", role)
    if role not in ROLES:
        raise out_of_range(f"{name}.role", f"must be one of {', '.join(ROLES)}")
    for unserved in ("tool_calls", "function_call", "audio"):
        if message.get(unserved):
            raise InvalidRequest(
                f"'{name}.{unserved}' is not supported by this server", param=f"{name}.{unserved}"
            )
    # OpenAI's "developer" is what every template calls "system".
    plain = {"role": "system" if role == "developer" else role}
    plain["content"] = _content(message.get("content"), f"{name}.content")
    if message.get("name") is not None:
        plain["name"] = text(256)(message["name"], f"{name}.name")
    return plain


def _content(value: Any, name: str) -> str:
    """Text, or parts of type "text", which are joined by newlines."""
    if type(value) is str:
        return value
    if type(value) is not list:
        raise wrong_type(name, "a string or an array of text parts", value)
    texts = []
    for index, part in enumerate(value):
        where = f"{name}[{index}]"
        kind = mapping(part, where).get("type")
        if kind != "text":
            shown = kind[:40] if type(kind) is str else type(kind).__name__
            raise InvalidRequest(
                f"'{where}' is of type {shown!r}; only 'text' is supported", param=f"{where}.type"
            )
        texts.append(text(MAX_TEXT)(part.get("text"), f"{where}.text"))
        if part.get("cache") is not None:
            flag(part["cache"], f"{where}.cache")
    return "\n".join(texts)


def _chunk_texts(messages: list[dict[str, Any]]) -> list[str]:
    """Of checked messages, the parts with "cache": true."""
    contents = (message["content"] for message in messages)
    parts = (part for content in contents if type(content) is list for part in content)
    return [part["text"] for part in parts if part.get("cache")]


def _chunks(value: Any, name: str) -> list[list[int]]:
    """Ranges [start, stop) of token ids, in order and apart."""
    chunks: list[list[int]] = items(items(integer(0, MAX_IDS), 2, 2), 0, MAX_CHUNKS)(value, name)
    ends = [end for chunk in chunks for end in chunk]
    if ends != sorted(ends) or any(start == stop for start, stop in chunks):
        raise out_of_range(name, "must be ranges [start, stop) in order, not empty, and apart")
    return chunks


def _stream_options(value: Any, name: str) -> dict[str, Any]:
    options = mapping(value, name)
    refuse_unserved(options, {"continuous_usage_stats": (False,)})
    return read(
        options,
        {"include_usage": Field(flag, False), "include_obfuscation": Field(flag, False)},
    )


def _top_k(value: Any, name: str) -> int:
    top_k: int = integer(-1, 2**31 - 1)(value, name)
    return max(0, top_k)  # vLLM writes -1 for off, too


def _template_options(value: Any, name: str) -> dict[str, Any]:
    options = mapping(value, name)
    if taken := RESERVED_OPTIONS & options.keys():
        raise out_of_range(name, f"may not set {min(taken)!r}")
    return options


SAMPLING: Final[dict[str, Field]] = {
    "model": Field(text(65536, empty=False)),
    "stream": Field(flag, False),
    "stream_options": Field(_stream_options),
    "n": Field(integer(1, 128), 1),
    "max_tokens": Field(integer(1, 2**31 - 1)),
    "min_tokens": Field(integer(0, 2**31 - 1), 0),
    "temperature": Field(number(0, 2), 1.0),
    "top_p": Field(number(0, 1, above=True), 1.0),
    "top_k": Field(_top_k, 0),
    "min_p": Field(number(0, 1), 0.0),
    "presence_penalty": Field(number(-2, 2), 0.0),
    "frequency_penalty": Field(number(-2, 2), 0.0),
    "repetition_penalty": Field(number(0, 10, above=True), 1.0),
    "logit_bias": Field(_logit_bias, {}),
    "seed": Field(integer(-(2**63), 2**64 - 1)),
    "stop": Field(_stop, []),
    "stop_token_ids": Field(items(integer(0, UINT32), 0, 128), []),
    "ignore_eos": Field(flag, False),
    "include_stop_str_in_output": Field(flag, False),
    "skip_special_tokens": Field(flag, True),
    "user": Field(text(4096)),
    "service_tier": Field(one_of(*TIERS)),
    "cache": Field(text(256, empty=False)),
}
CHAT: Final[dict[str, Field]] = {
    **SAMPLING,
    "messages": Field(_messages),
    "max_completion_tokens": Field(integer(1, 2**31 - 1)),
    "logprobs": Field(flag, False),
    "top_logprobs": Field(integer(0, 20)),
    "add_generation_prompt": Field(flag, True),
    "add_special_tokens": Field(flag, False),
    "chat_template_kwargs": Field(_template_options, {}),
    "metadata": Field(mapping),
}
COMPLETION: Final[dict[str, Field]] = {
    **SAMPLING,
    "prompt": Field(_prompt),
    "cache_chunks": Field(_chunks, []),
    "logprobs": Field(integer(0, 20)),
    "add_special_tokens": Field(flag, True),
}
# Fields of OpenAI and vLLM that would change the answer: per name, the values that ask for nothing.
UNSERVED: Final[dict[str, tuple[Any, ...]]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "store": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "prompt_logprobs": (),
    "logits_processors": ([],),
    "logit_processors": ([],),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "documents": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "priority": (0,),
    "cache_salt": (),
    "kv_transfer_params": (),
}


def read_chat(body: Any) -> Order:
    """A chat/completions body. Raises InvalidRequest naming the field."""
    body = _object(body)
    refuse_unserved(body, UNSERVED)
    values = read(body, CHAT)
    _require(values, "messages")
    if values["top_logprobs"] is not None and not values["logprobs"]:
        raise out_of_range("top_logprobs", "needs 'logprobs' to be true")
    if values["max_completion_tokens"] is not None:
        values["max_tokens"] = values["max_completion_tokens"]
    return _order(
        values,
        messages=values["messages"],
        chunk_texts=_chunk_texts(body["messages"]),
        template_options={
            **values["chat_template_kwargs"],
            "add_generation_prompt": values["add_generation_prompt"],
        },
        logprobs=(values["top_logprobs"] or 0) if values["logprobs"] else None,
    )


def read_completion(body: Any) -> Order:
    """A completions body. Raises InvalidRequest naming the field."""
    body = _object(body)
    refuse_unserved(body, UNSERVED)
    values = read(body, COMPLETION)
    _require(values, "prompt")
    if len(values["prompt"]) * values["n"] > MAX_CHOICES:
        raise out_of_range("n", f"prompts times n must be at most {MAX_CHOICES}")
    chunks, prompts = values["cache_chunks"], values["prompt"]
    if chunks and (len(prompts) > 1 or type(prompts[0]) is str or len(prompts[0]) < chunks[-1][1]):
        raise out_of_range("cache_chunks", "must be inside one 'prompt' of token ids")
    return _order(values, prompts=prompts, chunks=chunks, logprobs=values["logprobs"])


def _object(body: Any) -> dict[str, Any]:
    if type(body) is not dict:
        raise InvalidRequest("the body must be a JSON object")
    return body


def _require(values: dict[str, Any], *names: str) -> None:
    for name in ("model", *names):
        if values[name] is None:
            raise InvalidRequest(f"you must provide '{name}'", param=name)


def _order(values: dict[str, Any], **own: Any) -> Order:
    options = values["stream_options"]
    if options is not None and not values["stream"]:
        raise out_of_range("stream_options", "is only allowed when 'stream' is true")
    if values["max_tokens"] is not None and values["min_tokens"] > values["max_tokens"]:
        raise out_of_range("min_tokens", "must not be greater than max_tokens")
    same = (
        *("model", "stream", "n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k"),
        *("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
        *("seed", "stop", "stop_token_ids", "ignore_eos", "cache", "service_tier"),
    )
    return Order(
        **{name: values[name] for name in same},
        include_usage=options is not None and options["include_usage"],
        include_stop=values["include_stop_str_in_output"],
        skip_special=values["skip_special_tokens"],
        special=values["add_special_tokens"],
        **own,
    )


def check_model(order: Order, vocab: int) -> None:
    """What a model's vocabulary decides. Raises InvalidRequest naming the field."""
    for name, ids in (("logit_bias", order.logit_bias), ("stop_token_ids", order.stop_token_ids)):
        if any(token >= vocab for token in ids):
            raise out_of_range(name, f"token ids must be below {vocab}, the size of the vocabulary")
    for prompt in order.prompts or ():
        if type(prompt) is list and max(prompt) >= vocab:
            raise out_of_range(
                "prompt", f"token ids must be below {vocab}, the size of the vocabulary"
            )


def max_tokens(order: Order, num_prompt: int, context: int) -> int:
    """How many tokens a prompt of this length may be continued by. Raises InvalidRequest with both numbers."""
    name = "messages" if order.chat else "prompt"
    if num_prompt == 0:
        raise InvalidRequest(f"'{name}' is empty: there is nothing to continue", param=name)
    room = context - num_prompt
    asked = order.max_tokens
    if asked is None:
        asked = room if order.chat else min(max(COMPLETION_TOKENS, order.min_tokens), room)
    if room < 1 or asked > room or order.min_tokens > room:
        wanted = max(asked, order.min_tokens) if room >= 1 else order.max_tokens or 1
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. However, you requested"
            f" {num_prompt + wanted} tokens ({num_prompt} in the {name}, {wanted} in the completion)."
            f" Please reduce the length of the {name} or completion.",
            param=name,
        )
    return asked
