"""Small models of every family with random weights, written as Hugging Face folders: numpy alone, no torch.

Their sizes are chosen for what devices treat apart: heads of 32, 64 and 128, windows and none, biases, norms of heads,
tied and untied embeddings, experts shared and routed. All weights are numbers of bfloat16, so that every device holds
the very same. This module must not know who loads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from shared.catalog import ModelFolder

Floats: TypeAlias = npt.NDArray[np.float32]
Config: TypeAlias = dict[str, Any]

CONTEXT: Final = 1024
_PARTS: Final = ("gate_proj", "up_proj", "down_proj")

_SMALL: Final[Config] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}

_EXPERTS: Final[Config] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

FAMILIES: Final[dict[str, Config]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 64},
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "head_dim": 32,
        "sliding_window": 50,
        "tie_word_embeddings": False,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "head_dim": 64,
        "sliding_window": None,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "qwen2_moe": {
        **_EXPERTS,
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 160,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {
        **_EXPERTS,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 64,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
}

# SmolLM2-135M's shape: what the bench runs where no model was pulled.
BENCH: Final[Config] = FAMILIES["llama"] | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}


def describe(family: str, **overrides: Any) -> Config:
    """The config.json of a family's small model."""
    return _SMALL | FAMILIES[family] | overrides


def write(folder: Path, config: Mapping[str, Any], seed: int = 0) -> Path:
    """The model that `config` describes, with weights of its own for each seed. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1) + "\n")
    save_file(_Weights(config, seed).tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def as_served(folder: Path, config: Mapping[str, Any]) -> ModelFolder:
    """The folder as the catalogue would show it; it has no tokenizer."""
    return ModelFolder(
        name=folder.name,
        path=folder,
        context=config["max_position_embeddings"],
        vocab=config["vocab_size"],
        eos_ids=[config["eos_token_id"]],
        tokenizer_digest="",
        template_digest="",
        weights_digest="",
        created=0,
    )


class _Weights:
    """The tensors of one model under the names of its family.

    Products keep the size of what goes in, and logits spread over several units, so that two of them are rarely alike.
    """

    def __init__(self, config: Mapping[str, Any], seed: int) -> None:
        self.tensors: dict[str, Floats] = {}
        self._config = config
        self._rng = np.random.default_rng(seed)
        width, vocab = config["hidden_size"], config["vocab_size"]
        self._draw("model.embed_tokens.weight", (vocab, width), 4 / width**0.5)
        for index in range(config["num_hidden_layers"]):
            self._layer(f"model.layers.{index}")
        self._norm("model.norm", width)
        if not config["tie_word_embeddings"]:
            self._draw("lm_head.weight", (vocab, width), 4 / width**0.5)

    def _layer(self, name: str) -> None:
        config, kind = self._config, self._config["model_type"]
        width, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or width // heads
        kv_width = config["num_key_value_heads"] * head_dim
        bias = kind.startswith("qwen2")
        for part, rows in (
            ("q_proj", heads * head_dim),
            ("k_proj", kv_width),
            ("v_proj", kv_width),
        ):
            self._linear(f"{name}.self_attn.{part}", rows, width, bias=bias)
        self._linear(f"{name}.self_attn.o_proj", width, heads * head_dim)
        self._norm(f"{name}.input_layernorm", width)
        self._norm(f"{name}.post_attention_layernorm", width)
        if kind.startswith("qwen3"):
            self._norm(f"{name}.self_attn.q_norm", head_dim)
            self._norm(f"{name}.self_attn.k_norm", head_dim)
        if kind == "mixtral":
            experts = f"{name}.block_sparse_moe"
            self._router(f"{experts}.gate", config["num_local_experts"])
            num, hidden = config["num_local_experts"], config["intermediate_size"]
            self._experts(f"{experts}.experts", num, hidden, ("w1", "w3", "w2"))
        elif kind.endswith("_moe"):
            self._router(f"{name}.mlp.gate", config["num_experts"])
            num, hidden = config["num_experts"], config["moe_intermediate_size"]
            self._experts(f"{name}.mlp.experts", num, hidden, _PARTS)
            if kind == "qwen2_moe":
                self._mlp(f"{name}.mlp.shared_expert", config["shared_expert_intermediate_size"])
                self._linear(f"{name}.mlp.shared_expert_gate", 1, width)
        else:
            self._mlp(f"{name}.mlp", config["intermediate_size"])

    def _mlp(self, name: str, hidden: int, parts: tuple[str, str, str] = _PARTS) -> None:
        gate, up, down = parts
        width = self._config["hidden_size"]
        self._linear(f"{name}.{gate}", hidden, width)
        self._linear(f"{name}.{up}", hidden, width)
        self._linear(f"{name}.{down}", width, hidden)

    def _experts(self, name: str, num: int, hidden: int, parts: tuple[str, str, str]) -> None:
        """Alike by half: rounding may swap two experts that a router finds equally good, and that must show less than
        a router that is wrong."""
        for index in range(num):
            self._mlp(f"{name}.{index}", hidden, parts)
            for part in parts:
                own = self.tensors[f"{name}.{index}.{part}.weight"]
                first = self.tensors[f"{name}.0.{part}.weight"]
                if index:
                    mixed = (own + first) * np.float32(0.5**0.5)
                    self.tensors[f"{name}.{index}.{part}.weight"] = _as_bfloat16(mixed)

    def _router(self, name: str, num_experts: int) -> None:
        width = self._config["hidden_size"]
        self._draw(f"{name}.weight", (num_experts, width), 3 / width**0.5)

    def _linear(self, name: str, rows: int, columns: int, *, bias: bool = False) -> None:
        self._draw(f"{name}.weight", (rows, columns), 1.2 / columns**0.5)
        if bias:
            self._draw(f"{name}.bias", (rows,), 0.2)

    def _norm(self, name: str, size: int) -> None:
        self._draw(f"{name}.weight", (size,), 0.1, mean=1.0)

    def _draw(self, name: str, shape: tuple[int, ...], scale: float, mean: float = 0.0) -> None:
        drawn = self._rng.standard_normal(shape, dtype=np.float32)
        self.tensors[name] = _as_bfloat16(drawn * np.float32(scale) + np.float32(mean))


def _as_bfloat16(values: Floats) -> Floats:
    """Cut off to numbers of bfloat16, which is the upper half of a float32."""
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
