"""Reading config.json: every family's defaults, both forms of rope, and errors that name the fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.worker.flowserve.config import ModelConfig, ModelError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
    "vocab_size": 512,
}


def test_llama_defaults() -> None:
    """What a Llama file leaves out has Llama's defaults."""
    config = ModelConfig.from_dict(LLAMA)
    assert (config.head_dim, config.group, config.norm_eps) == (16, 2, 1e-6)
    assert (config.tied, config.qkv_bias, config.out_bias, config.mlp_bias, config.qk_norm) == (
        (False,) * 5
    )
    assert config.rope.kind == "default"
    assert config.rope.theta == 10000.0
    assert config.windows == (None,) * 4


def test_without_kv_heads_every_head_has_its_own() -> None:
    """A null num_key_value_heads means multi-head attention."""
    assert ModelConfig.from_dict(LLAMA | {"num_key_value_heads": None}).num_kv_heads == 4


def test_qwen_families() -> None:
    """Qwen2 has biases on q, k and v only; Qwen3 has none, a head of 128 and norms on heads."""
    qwen2 = ModelConfig.from_dict(LLAMA | {"architectures": ["Qwen2ForCausalLM"]})
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = ModelConfig.from_dict(LLAMA | {"architectures": ["Qwen3ForCausalLM"]})
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({"architectures": ["MistralForCausalLM"]}, (4096,) * 4),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None,) * 4),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32}, (None,) * 4),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 32,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            (None, None, None, 32),
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 32,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            (None, 32, None, 32),
        ),
    ],
)
def test_windows(keys: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    """Each layer's window follows from the family, the switch, and the layers named or counted."""
    assert ModelConfig.from_dict(LLAMA | keys).windows == windows


def test_both_forms_of_rope_mean_the_same() -> None:
    """`rope_theta` beside `rope_scaling` and the newer `rope_parameters` give equal configs."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
    new = LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "relu2"}, "relu2"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
    ],
)
def test_errors_name_the_fault(keys: dict[str, Any], named: str) -> None:
    """A config that cannot be served is refused with the architecture, key or value at fault."""
    with pytest.raises(ModelError, match=named):
        ModelConfig.from_dict(LLAMA | keys)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: str | None) -> None:
    """A missing or malformed config.json is a ModelError with its path."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_from_folder_reads_what_from_dict_reads(tmp_path: Path) -> None:
    """The file's keys arrive unchanged."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_dict(LLAMA)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", -1.0),
        ("rope_theta", "big"),
        ("rope_theta", True),
        ("rope_parameters", {"rope_type": "default", "rope_theta": [1]}),
        ("max_window_layers", "all"),
    ],
)
def test_a_value_that_is_no_number_is_named(key: str, value: Any) -> None:
    """A wrong value is a ModelError that names its key."""
    qwen = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 64}
    named = "rope_theta" if key == "rope_parameters" else key
    with pytest.raises(ModelError, match=named):
        ModelConfig.from_dict(LLAMA | qwen | {key: value})
