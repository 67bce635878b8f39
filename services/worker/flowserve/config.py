"""What a decoder is made of: Hugging Face `config.json`, read strictly into one frozen value.

One definition covers Llama (and SmolLM2), Mistral, Qwen2 and Qwen3, and the mixtures of experts among them. What a
family leaves out of its file has the family's default here, and what it names in its own way is named here, so the
rest of the engine never asks which family it serves. This module must not know tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shared.errors import InvalidRequest


class ModelError(InvalidRequest):
    """The model folder cannot be served: the message names the key, architecture or tensor at fault."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: `kind` is default, linear, dynamic, llama3 or yarn; `scaling` holds that kind's numbers."""

    kind: str
    theta: float
    scaling: Mapping[str, Any]


class MoeNames(NamedTuple):
    """What a family calls the parts of a sparse layer: its block, and the three matrices of an expert."""

    block: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """The mixture of experts in the sparse layers: a row goes through the `num_chosen` experts of the largest router
    probabilities, which are its weights, made to sum to 1 where `renormalise`; and always through the expert that all
    rows share, weighed by a gate of its own, where there is one (`shared_hidden` is not None)."""

    num_experts: int
    num_chosen: int
    renormalise: bool
    hidden: int
    shared_hidden: int | None
    names: MoeNames


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one decoder. `windows[i]` is the attention window of layer i, None if it sees all, and
    `sparse[i]` says that it has experts (then there is `moe`) instead of one MLP of `hidden` values."""

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
    sparse: tuple[bool, ...]
    moe: MoeConfig | None

    @property
    def mlp_sizes(self) -> list[int]:
        """The numbers of hidden values that occur: of MLPs, of experts, of shared ones."""
        sizes = [] if all(self.sparse) else [self.hidden]
        if self.moe is not None and any(self.sparse):
            sizes.append(self.moe.hidden)
            if self.moe.shared_hidden is not None:
                sizes.append(self.moe.shared_hidden)
        return sizes

    def kv_bytes(self, num_tokens: int, itemsize: int) -> int:
        """Of the keys and values of so many tokens over all layers, in a type of so many bytes."""
        return num_tokens * 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

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
        mixtral = architecture == "MixtralForCausalLM"
        qwen2 = architecture in ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM")
        qwen3 = architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
        default_head_dim = 128 if architecture == "Qwen3ForCausalLM" else width // num_heads
        head_dim = _integer(raw, "head_dim", default_head_dim)
        if head_dim % 2:
            raise ModelError(f"config.json: head_dim ({head_dim}) is odd, so it cannot be rotated")
        context = _integer(raw, "max_position_embeddings")
        num_layers = _integer(raw, "num_hidden_layers")
        attention_bias = bool(raw.get("attention_bias", False)) and not (qwen2 or mixtral)
        moe = _moe(raw, architecture)
        return cls(
            architecture=architecture,
            vocab=_integer(raw, "vocab_size"),
            width=width,
            hidden=_integer(raw, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            context=context,
            norm_eps=_number(raw, "rms_norm_eps", 1e-5 if mixtral else 1e-6),
            rope=_rope(raw, context, 1e6 if mixtral else 1e4),
            windows=_windows(raw, architecture, num_layers),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or (qwen2 and bool(raw.get("qkv_bias", True))),
            out_bias=attention_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)) and architecture == "LlamaForCausalLM",
            qk_norm=qwen3,
            sparse=_sparse(raw, num_layers) if moe else (False,) * num_layers,
            moe=moe,
        )


_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)

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


def _rope(raw: Mapping[str, Any], context: int, default_theta: float) -> RopeConfig:
    """`rope_parameters` (transformers 5), else `rope_theta` beside `rope_scaling` (before)."""
    values = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = str(values.pop("rope_type", None) or values.pop("type", None) or "default")
    if kind not in _ROPE_KINDS:
        known = ", ".join(_ROPE_KINDS)
        raise ModelError(f"config.json: unknown rope type {kind!r}; served are {known}")
    for key in _ROPE_KINDS[kind]:
        if not isinstance(values.get(key), int | float):
            raise ModelError(f"config.json: rope type {kind} needs the number {key!r}")
    theta = _number({**raw, **values}, "rope_theta", default_theta)
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
    """The window of each layer: Mistral, Mixtral and Qwen3-MoE have one for all, the other Qwens have one for the
    layers that they name or count."""
    has_switch = architecture.startswith("Qwen")
    if architecture == "LlamaForCausalLM" or (
        has_switch and not raw.get("use_sliding_window", False)
    ):
        return (None,) * num_layers  # what else is said of windows may be anything, 0 too
    # A file without the key means the family's default, a null means no window.
    default = None if architecture == "MixtralForCausalLM" else 4096
    window = raw.get("sliding_window", default)
    if window is None:
        return (None,) * num_layers
    window = _integer(raw, "sliding_window", default)
    if not has_switch or architecture == "Qwen3MoeForCausalLM":
        return (window,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise ModelError(f"config.json: max_window_layers must be an integer, not {first!r}")
        if architecture == "Qwen2MoeForCausalLM":
            slides = [i < first and i % 2 == 0 for i in range(num_layers)]
        else:
            slides = [i >= first for i in range(num_layers)]
        kinds = ["sliding_attention" if each else "full_attention" for each in slides]
    if len(kinds) != num_layers:
        raise ModelError(f"config.json: layer_types names {len(kinds)} of {num_layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(f"config.json: unknown layer type {kind!r}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _moe(raw: Mapping[str, Any], architecture: str) -> MoeConfig | None:
    """The experts, if the family has any."""
    if architecture == "MixtralForCausalLM":
        moe = MoeConfig(
            num_experts=_integer(raw, "num_local_experts"),
            num_chosen=_integer(raw, "num_experts_per_tok"),
            renormalise=True,
            hidden=_integer(raw, "intermediate_size"),
            shared_hidden=None,
            names=MoeNames("block_sparse_moe", "w1", "w3", "w2"),
        )
    elif architecture in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"):
        shares = architecture == "Qwen2MoeForCausalLM"
        moe = MoeConfig(
            num_experts=_integer(raw, "num_experts", raw.get("num_local_experts")),
            num_chosen=_integer(raw, "num_experts_per_tok"),
            renormalise=bool(raw.get("norm_topk_prob", False)),
            hidden=_integer(raw, "moe_intermediate_size"),
            shared_hidden=_integer(raw, "shared_expert_intermediate_size") if shares else None,
            names=MoeNames("mlp", "gate_proj", "up_proj", "down_proj"),
        )
    else:
        return None
    if moe.num_chosen > moe.num_experts:
        raise ModelError(
            f"config.json: num_experts_per_tok ({moe.num_chosen}) is more than there are experts"
            f" ({moe.num_experts})"
        )
    return moe


def _sparse(raw: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Which layers have experts: every `decoder_sparse_step`-th but those named; all of Mixtral's, which has no such
    keys."""
    step, dense = _integer(raw, "decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(index) is int for index in dense):
        raise ModelError(f"config.json: mlp_only_layers must be a list of layers, not {dense!r}")
    return tuple((i + 1) % step == 0 and i not in dense for i in range(num_layers))
