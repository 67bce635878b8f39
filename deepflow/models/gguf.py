"""A GGUF file turned into a model folder in Hugging Face form: config, tokenizer, chat template, safetensors.

Quantised tensors are dequantised to F32, which keeps every value exactly; F16 and BF16 stay as they are. Tensors are
written one after another, so memory holds one at a time. This module must not know where the file came from.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderTensor
from gguf.quants import dequantize

from deepflow.models import store, vocabulary
from deepflow.models.progress import Progress
from shared.errors import InvalidRequest

# GGUF's architecture -> (class of transformers, model_type). Mistral files say "llama".
_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_ROPE_FACTORS = "rope_freqs.weight"
_KEPT_TYPES = {
    GGMLQuantizationType.F32: "F32",
    GGMLQuantizationType.F16: "F16",
    GGMLQuantizationType.BF16: "BF16",
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A tensor to write: `heads` is set where its rows must be put back into the order of transformers."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: ReaderTensor
    heads: int | None

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * _WIDTHS[self.dtype]

    def values(self) -> np.ndarray[Any, Any]:
        """The little-endian values in `dtype`, BF16 as raw bytes. Raises InvalidRequest naming a type unknown."""
        data, kind = self.source.data, self.source.tensor_type
        if kind not in _KEPT_TYPES:
            try:
                data = dequantize(data, kind)
            except (NotImplementedError, ValueError) as error:
                raise InvalidRequest(
                    f"the GGUF tensor {self.source.name!r} of type {kind.name} cannot be read: {error}"
                ) from error
        if self.heads is not None:
            data = unpermute(data, self.heads)
        return np.ascontiguousarray(data)


def convert(path: Path, folder: Path, progress: Progress) -> None:
    """Writes the model in the GGUF file at `path` into `folder` (empty, existing).

    Raises InvalidRequest naming the architecture, tensor, tensor type or metadata that is not understood.
    """
    try:
        reader = GGUFReader(path)
        metadata = _metadata(reader)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise InvalidRequest(f"{path.name} is not a readable GGUF file: {error}") from error
    config = build_config(metadata, reader)
    plan = _plan(reader, config)
    config["dtype"] = _DTYPES[plan[0].dtype]
    _write_texts(
        folder, metadata, config
    )  # first: an unknown tokenizer is refused before the long part
    _write_safetensors(folder / "model.safetensors", plan, progress)


def build_config(metadata: Mapping[str, Any], reader: GGUFReader) -> dict[str, Any]:
    """config.json of transformers, from GGUF's metadata and the shapes of its tensors."""
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise InvalidRequest(
            f"the GGUF architecture {architecture!r} is not supported; known: {', '.join(_ARCHITECTURES)}"
        )
    if metadata.get(f"{architecture}.expert_count"):
        raise InvalidRequest(
            f"{architecture}.expert_count: mixtures of experts are not read from GGUF; pull the model's safetensors"
        )
    name, model_type = _ARCHITECTURES[architecture]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise InvalidRequest("the GGUF file has no tensor token_embd.weight")

    def need(key: str) -> Any:
        value = metadata.get(f"{architecture}.{key}")
        if value is None or isinstance(value, list):  # a list: one value per layer
            raise InvalidRequest(f"the GGUF file has no single value for {architecture}.{key}")
        return value

    hidden, heads = need("embedding_length"), need("attention.head_count")
    head_dim = metadata.get(f"{architecture}.attention.key_length", hidden // heads)
    rotated = metadata.get(f"{architecture}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise InvalidRequest(
            f"{architecture}.rope.dimension_count {rotated} differs from the head's {head_dim}: not supported"
        )
    ids = {key: metadata.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "eos_token_id")}
    theta = float(metadata.get(f"{architecture}.rope.freq_base", 10000.0))
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": model_type,
        **ids,
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": need("context_length"),
        # The file holds a float32; its shortest decimal form is what the model's authors wrote.
        "rms_norm_eps": float(str(np.float32(need("attention.layer_norm_rms_epsilon")))),
        "rope_theta": theta,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": model_type == "llama" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    scaling = _rope_scaling(metadata, architecture, config, tensors.get(_ROPE_FACTORS))
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(
    metadata: Mapping[str, Any],
    architecture: str,
    config: Mapping[str, Any],
    factors: ReaderTensor | None,
) -> dict[str, Any] | None:
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = metadata.get(
        f"{architecture}.rope.scaling.factor", metadata.get(f"{architecture}.rope.scale_linear")
    )
    if factors is not None:
        return _llama3_scaling(
            np.asarray(factors.data, dtype=np.float32).ravel(), config["rope_theta"]
        )
    if kind == "none" and factor in (None, 0.0, 1.0):
        return None
    if kind in ("linear", "none") and factor:
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor:
        original = metadata.get(f"{architecture}.rope.scaling.original_context_length")
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": float(factor)}
        return scaling | (
            {} if original is None else {"original_max_position_embeddings": int(original)}
        )
    raise InvalidRequest(f"the rope scaling {kind!r} (factor {factor}) is not supported")


def _llama3_scaling(factors: np.ndarray[Any, Any], theta: float) -> dict[str, Any]:
    """Llama 3.1's scaling from the divisors of its frequencies, which is all that GGUF keeps of it.

    The published models share every parameter but the factor, which is the largest divisor; computing the divisors
    again from them shows whether that holds here.
    """
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    frequencies = theta ** -(np.arange(len(factors), dtype=np.float64) / len(factors))
    turns = original * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not np.allclose(expected, factors, rtol=1e-3):
        raise InvalidRequest(f"the rope factors in {_ROPE_FACTORS} are not those of Llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _plan(reader: GGUFReader, config: Mapping[str, Any]) -> list[Planned]:
    """What to write, the embedding first."""
    planned = []
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FACTORS:  # became rope_scaling
            continue
        name, role = _hugging_face_name(tensor.name)
        heads = None
        if config["model_type"] == "llama" and role in ("attn_q", "attn_k"):
            key = "num_attention_heads" if role == "attn_q" else "num_key_value_heads"
            heads = int(config[key])
        planned.append(
            Planned(
                name=name,
                dtype=_KEPT_TYPES.get(tensor.tensor_type, "F32"),
                shape=tuple(int(size) for size in reversed(tensor.shape)),
                source=tensor,
                heads=heads,
            )
        )
    names = {tensor.name for tensor in planned}
    needed = {"model.norm.weight"} | {
        f"model.layers.{layer}.{role}.weight"
        for layer in range(int(config["num_hidden_layers"]))
        for key, role in _INNER.items()
        if not key.endswith(("q_norm", "k_norm"))
    }
    if needed - names:
        raise InvalidRequest(
            f"the GGUF file lacks {min(needed - names)}; a model split into several files is not supported"
        )
    planned.sort(key=lambda tensor: tensor.name != "model.embed_tokens.weight")
    return planned


def _hugging_face_name(name: str) -> tuple[str, str]:
    """transformers' name of a GGUF tensor, and the role in it. Raises InvalidRequest for an unknown one."""
    stem, _, suffix = name.rpartition(".")
    if suffix in ("weight", "bias"):
        if stem in _OUTER:
            return f"{_OUTER[stem]}.{suffix}", stem
        match = _BLOCK.fullmatch(stem)
        if match is not None and match[2] in _INNER:
            return f"model.layers.{match[1]}.{_INNER[match[2]]}.{suffix}", match[2]
    raise InvalidRequest(f"the GGUF tensor {name!r} is not supported")


def _write_safetensors(path: Path, plan: list[Planned], progress: Progress) -> None:
    """Streams the tensors in safetensors' format: length of the header, header (JSON, padded to 8), data."""
    total = sum(tensor.num_bytes for tensor in plan)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in plan:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    progress.step("converting weights", total)
    with store.durable(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in plan:
            values = tensor.values()
            if values.nbytes != tensor.num_bytes:
                raise InvalidRequest(f"the GGUF tensor {tensor.source.name!r} is cut short")
            file.write(values.data)
            progress.advance(values.nbytes)


def unpermute(data: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a Q or K projection back in transformers' order.

    llama.cpp rotates neighbouring pairs (0,1), (2,3), ... where transformers rotates halves (0, d/2), (1, d/2+1), ...;
    its converter therefore interleaves each head's halves, for the llama architecture only.
    """
    rows = data.shape[0]
    if rows % (2 * heads):
        raise InvalidRequest(f"{rows} rows of a projection do not divide among {heads} heads")
    interleaved = data.reshape(heads, rows // heads // 2, 2, *data.shape[1:])
    return interleaved.swapaxes(1, 2).reshape(data.shape)


def _write_texts(folder: Path, metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    template = metadata.get("tokenizer.chat_template")
    store.write_json(folder / "tokenizer.json", vocabulary.tokenizer_json(metadata))
    store.write_json(folder / "config.json", config)
    store.write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            **vocabulary.special_tokens(metadata),
        },
    )
    eos = vocabulary.eos_ids(metadata)
    if eos:
        store.write_json(
            folder / "generation_config.json",
            {"bos_token_id": config["bos_token_id"], "eos_token_id": eos},
        )
    if isinstance(template, str) and template:
        store.write_text(folder / "chat_template.jinja", template)


def _metadata(reader: GGUFReader) -> dict[str, Any]:
    """All metadata as Python values. Strings of arrays that are no UTF-8 would raise: they get U+FFFD instead."""
    values: dict[str, Any] = {}
    for key, field in reader.fields.items():
        if field.types[:2] == [GGUFValueType.ARRAY, GGUFValueType.STRING]:
            values[key] = [bytes(field.parts[i]).decode("utf-8", "replace") for i in field.data]
        elif field.types:
            values[key] = field.contents()
    return values
