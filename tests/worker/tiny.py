"""Tiny random-weight model folders in HF form, one family each, for every test that needs a real model.

`make_tiny` writes what `deepflow pull` would leave in the cache for a real model, small enough to load in
milliseconds. It must not import torch or transformers: gateway and cache tests use it too.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = range(3)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

WIDTH = 64
HEADS = 4
KV_HEADS = 2
HIDDEN = 160

_COMMON: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "dtype": "float32",
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "tie_word_embeddings": False,
        "head_dim": 32,
        "sliding_window": None,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 32,
        "tie_word_embeddings": False,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "tie_word_embeddings": False,
        "sliding_window": None,
        "intermediate_size": 144,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 160,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "tie_word_embeddings": False,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "moe_intermediate_size": 128,
    },
}
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
DENSE_FAMILIES = tuple(family for family in FAMILIES if family not in MOE_FAMILIES)


def make_tiny(
    folder: Path,
    family: str = "llama",
    *,
    vocab: int = 512,
    layers: int = 2,
    seed: int = 0,
    with_tokenizer: bool = True,
    context: int = 2048,
    name: str = "tiny",
    **overrides: Any,
) -> Path:
    """Write a random model of `family` (a key of FAMILIES) into `folder` and return the folder.

    To be found by `shared.catalog`, `folder` must be `<cache>/models/<encoded name>` and `name` that name.
    `overrides` are config.json keys. Ids 0 to 2 are the special tokens, 3 to 258 the bytes, the rest two-byte merges,
    so every id below `vocab` decodes to something.
    """
    config = (
        _COMMON
        | FAMILIES[family]
        | {
            "vocab_size": vocab,
            "num_hidden_layers": layers,
            "max_position_embeddings": context,
            "bos_token_id": IM_START,
            "eos_token_id": IM_END,
        }
        | overrides
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": IM_START, "eos_token_id": [END_OF_TEXT, IM_END]},
    )
    save_file(_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    if with_tokenizer:
        _write_tokenizer(folder, vocab, context)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    _write_json(
        folder / "manifest.json", {"name": name, "weights_digest": digest, "created": 1700000000}
    )
    return folder


def _weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random weights whose logits spread over several units, so that greedy choices are rarely near ties."""
    rng = np.random.default_rng(seed)
    family = config["model_type"]
    width = config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or width // heads
    qkv_bias = family in ("qwen2", "qwen2_moe") or config.get("attention_bias", False)
    out_bias = config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    tensors: dict[str, np.ndarray] = {}

    def draw(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        tensors[f"{name}.weight"] = draw(rows, columns, scale=1.5 / columns**0.5)
        if bias:
            tensors[f"{name}.bias"] = draw(rows, scale=0.2)

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"] = 1 + draw(size, scale=0.1)

    def mlp(name: str, hidden: int, bias: bool, parts: str = "gate_proj up_proj down_proj") -> None:
        gate, up, down = parts.split()
        linear(f"{name}.{gate}", hidden, width, bias)
        linear(f"{name}.{up}", hidden, width, bias)
        linear(f"{name}.{down}", width, hidden, bias)

    def mixture(layer: str) -> None:
        """The experts of a layer, under the names that the family's files have."""
        block, parts = f"{layer}.mlp", "gate_proj up_proj down_proj"
        num_experts = config.get("num_experts") or config["num_local_experts"]
        hidden = config.get("moe_intermediate_size") or config["intermediate_size"]
        if family == "mixtral":
            block, parts = f"{layer}.block_sparse_moe", "w1 w3 w2"
        linear(f"{block}.gate", num_experts, width, False)
        for expert in range(num_experts):
            mlp(f"{block}.experts.{expert}", hidden, False, parts)
        if family == "qwen2_moe":
            mlp(f"{block}.shared_expert", config["shared_expert_intermediate_size"], False)
            linear(f"{block}.shared_expert_gate", 1, width, False)

    tensors["model.embed_tokens.weight"] = draw(config["vocab_size"], width, scale=0.4)
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        linear(f"{prefix}.self_attn.q_proj", heads * head_dim, width, qkv_bias)
        linear(f"{prefix}.self_attn.k_proj", kv_heads * head_dim, width, qkv_bias)
        linear(f"{prefix}.self_attn.v_proj", kv_heads * head_dim, width, qkv_bias)
        linear(f"{prefix}.self_attn.o_proj", width, heads * head_dim, out_bias)
        is_sparse = (index + 1) % config.get("decoder_sparse_step", 1) == 0
        if family in MOE_FAMILIES and is_sparse and index not in config.get("mlp_only_layers", []):
            mixture(prefix)
        else:
            mlp(f"{prefix}.mlp", config["intermediate_size"], mlp_bias)
        norm(f"{prefix}.input_layernorm", width)
        norm(f"{prefix}.post_attention_layernorm", width)
        if family in ("qwen3", "qwen3_moe"):
            norm(f"{prefix}.self_attn.q_norm", head_dim)
            norm(f"{prefix}.self_attn.k_norm", head_dim)
    norm("model.norm", width)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = draw(config["vocab_size"], width, scale=0.4)
    return tensors


def _write_tokenizer(folder: Path, vocab: int, context: int) -> None:
    """A byte-level BPE tokenizer: special tokens, the 256 bytes, then merges of common letter pairs."""
    base = len(SPECIAL_TOKENS) + 256
    if vocab < base:
        raise ValueError(f"a tokenizer needs a vocabulary of at least {base}, not {vocab}")
    symbols = list(_byte_symbols().values())
    ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *symbols))}
    # "Ġ" stands for the space, as in GPT-2's byte table.
    letters = "Ġetaoinshrdlcumwfgypbvk"
    pairs = sorted(
        ((i + j, i, a, b) for i, a in enumerate(letters) for j, b in enumerate(letters)),
    )
    merges: list[list[str]] = []
    for _, _, left, right in pairs:
        if len(ids) == vocab:
            break
        if right != "Ġ":  # words begin with a space, never end with one
            ids[left + right] = len(ids)
            merges.append([left, right])
    for number in range(vocab - len(ids)):  # wider vocabularies: pairs of bytes no text merges into
        left, right = symbols[number // 256], symbols[number % 256]
        if left + right not in ids:
            ids[left + right] = len(ids)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = [
        {
            "id": index,
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for index, token in enumerate(SPECIAL_TOKENS)
    ]
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {**byte_level, "use_regex": True},
            "post_processor": None,
            "decoder": {**byte_level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": ids,
                "merges": merges,
            },
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")


def _byte_symbols() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return dict(sorted(table.items()))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
