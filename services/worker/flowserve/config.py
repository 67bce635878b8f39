"""What a decoder is made of: Hugging Face `config.json`, read strictly into one frozen value.

One definition covers Llama (and SmolLM2), Mistral, Qwen2 and Qwen3 dense. What a family leaves out of its file has the
family's default here, so the rest of the engine never asks which family it serves. This module must not know tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import InvalidRequest


class ModelError(InvalidRequest):
    """The model folder cannot be served: the message names the key, architecture or tensor at fault."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: `kind` is default, linear, dynamic, llama3 or yarn; `scaling` holds that kind's numbers."""

    kind: str
    theta: float
    scaling: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one dense decoder. `windows[i]` is the attention window of layer i, None if it sees all."""

    architecture: str
    vocab: int
    width: int
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads `config.json` in `folder`. Raises ModelError naming what is missing or unknown."""
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(f"{path} does not exist") from None
        except ValueError as error:
            raise ModelError(f"{path} is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ModelError(f"{path} does not hold an object")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """A config from the keys of `config.json`, in the form of transformers 4 or 5. Raises ModelError."""
        architecture = _architecture(raw)
        activation = raw.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelError(f"config.json: activation {activation!r} is not supported, only silu")
        width, num_heads = _integer(raw, "hidden_size"), _integer(raw, "num_attention_heads")
        num_kv_heads = _integer(raw, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ModelError(
                f"config.json: num_attention_heads ({num_heads}) is no multiple of"
                f" num_key_value_heads ({num_kv_heads})"
            )
        qwen2, qwen3 = architecture == "Qwen2ForCausalLM", architecture == "Qwen3ForCausalLM"
        head_dim = _integer(raw, "head_dim", 128 if qwen3 else width // num_heads)
        if head_dim % 2:
            raise ModelError(f"config.json: head_dim ({head_dim}) is odd, so it cannot be rotated")
        context = _integer(raw, "max_position_embeddings")
        attention_bias = bool(raw.get("attention_bias", False)) and not qwen2
        return cls(
            architecture=architecture,
            vocab=_integer(raw, "vocab_size"),
            width=width,
            hidden=_integer(raw, "intermediate_size"),
            num_layers=_integer(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            context=context,
            norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope=_rope(raw, context),
            windows=_windows(raw, architecture, _integer(raw, "num_hidden_layers")),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=qwen2 or attention_bias,
            out_bias=attention_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)) and architecture == "LlamaForCausalLM",
            qk_norm=qwen3,
        )


_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# The numbers without which a kind of rope scaling has no meaning.
_ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or []
    for name in names:
        if name in _ARCHITECTURES:
            return str(name)
    named = ", ".join(map(str, names)) or f"model_type {raw.get('model_type')!r}"
    raise ModelError(
        f"config.json: unknown architecture {named}; served are {', '.join(_ARCHITECTURES)}"
    )


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config.json: key {key!r} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)


def _rope(raw: Mapping[str, Any], context: int) -> RopeConfig:
    """`rope_parameters` (transformers 5), else `rope_theta` beside `rope_scaling` (before)."""
    values = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = str(values.pop("rope_type", None) or values.pop("type", None) or "default")
    if kind not in _ROPE_KINDS:
        known = ", ".join(_ROPE_KINDS)
        raise ModelError(f"config.json: unknown rope type {kind!r}; served are {known}")
    for key in _ROPE_KINDS[kind]:
        if not isinstance(values.get(key), int | float):
            raise ModelError(f"config.json: rope type {kind} needs the number {key!r}")
    theta = _number({**raw, **values}, "rope_theta", 10000.0)
    values.pop("rope_theta", None)
    partial = values.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ModelError(f"config.json: partial_rotary_factor {partial} is not supported, only 1.0")
    original = raw.get("original_max_position_embeddings")
    values["original_max_position_embeddings"] = (
        original or values.get("original_max_position_embeddings") or context
    )
    return RopeConfig(kind, theta, values)


def _windows(raw: Mapping[str, Any], architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer: Mistral has one for all, Qwen has one for the layers it names or counts."""
    if architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    # A file without the key means the family's default, a null means no window.
    window = (
        None if raw.get("sliding_window", 4096) is None else _integer(raw, "sliding_window", 4096)
    )
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    if window is None or not raw.get("use_sliding_window", False):
        return (None,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise ModelError(f"config.json: max_window_layers must be an integer, not {first!r}")
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    if len(kinds) != num_layers:
        raise ModelError(f"config.json: layer_types names {len(kinds)} of {num_layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(f"config.json: unknown layer type {kind!r}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
