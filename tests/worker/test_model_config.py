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


MOE: dict[str, Any] = LLAMA | {
    "num_experts": 8,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 192,
}
MIXTRAL = {"architectures": ["MixtralForCausalLM"]}
QWEN2_MOE = {"architectures": ["Qwen2MoeForCausalLM"]}
QWEN3_MOE = {"architectures": ["Qwen3MoeForCausalLM"]}


def test_dense_models_have_no_experts() -> None:
    """A dense family ignores keys of experts."""
    config = ModelConfig.from_dict(MOE)
    assert (config.moe, config.sparse, config.mlp_sizes) == (None, (False,) * 4, [160])


def test_mixtral() -> None:
    """Every layer is sparse, experts have the size of the MLP, weights sum to 1, and defaults are Mixtral's own."""
    config = ModelConfig.from_dict(MOE | MIXTRAL)
    assert (config.sparse, config.mlp_sizes) == ((True,) * 4, [160])
    assert (config.norm_eps, config.rope.theta, config.windows) == (1e-5, 1e6, (None,) * 4)
    assert (config.qkv_bias, config.qk_norm) == (False, False)
    moe = config.moe
    assert moe is not None
    assert (moe.num_experts, moe.num_chosen, moe.hidden) == (6, 3, 160)
    assert (moe.renormalise, moe.shared_hidden) == (True, None)
    assert tuple(moe.names) == ("block_sparse_moe", "w1", "w3", "w2")
    assert ModelConfig.from_dict(MOE | MIXTRAL | {"sliding_window": 7}).windows == (7,) * 4


def test_qwen2_moe() -> None:
    """Biases on q, k and v unless switched off, a shared expert, weights left as they are unless said otherwise."""
    config = ModelConfig.from_dict(MOE | QWEN2_MOE | {"mlp_only_layers": [1]})
    assert (config.qkv_bias, config.out_bias, config.qk_norm) == (True, False, False)
    assert config.sparse == (True, False, True, True)
    assert sorted(config.mlp_sizes) == [96, 160, 192]
    moe = config.moe
    assert moe is not None
    assert (moe.num_experts, moe.hidden, moe.shared_hidden) == (8, 96, 192)
    assert not moe.renormalise
    other = ModelConfig.from_dict(MOE | QWEN2_MOE | {"qkv_bias": False, "norm_topk_prob": True})
    assert other.moe is not None
    assert (other.qkv_bias, other.moe.renormalise) == (False, True)


def test_qwen3_moe() -> None:
    """Norms on heads, no shared expert; the number of experts under either of its names."""
    config = ModelConfig.from_dict(MOE | QWEN3_MOE | {"decoder_sparse_step": 2})
    assert (config.qkv_bias, config.qk_norm, config.head_dim) == (False, True, 16)
    assert config.sparse == (False, True, False, True)
    moe = config.moe
    assert moe is not None
    assert (moe.num_experts, moe.shared_hidden) == (8, None)
    renamed = ModelConfig.from_dict(MOE | QWEN3_MOE | {"num_experts": None})
    assert renamed.moe is not None
    assert renamed.moe.num_experts == 6


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        (QWEN2_MOE | {"sliding_window": 0, "use_sliding_window": False}, (None,) * 4),
        (QWEN2_MOE | {"sliding_window": 9, "use_sliding_window": True}, (9, None, 9, None)),
        (
            QWEN2_MOE | {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
            (9, None, None, None),
        ),
        (QWEN3_MOE | {"sliding_window": 9, "use_sliding_window": True}, (9,) * 4),
        (QWEN3_MOE | {"sliding_window": 9}, (None,) * 4),
    ],
)
def test_windows_of_mixtures(keys: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    """Qwen2-MoE counts every other layer, Qwen3-MoE has one window for all; both have a switch."""
    assert ModelConfig.from_dict(MOE | keys).windows == windows


@pytest.mark.parametrize(
    ("family", "keys", "named"),
    [
        (MIXTRAL, {"num_local_experts": None}, "num_local_experts"),
        (MIXTRAL, {"num_experts_per_tok": 7}, r"num_experts_per_tok \(7\)"),
        (QWEN2_MOE, {"num_experts": None, "num_local_experts": None}, "num_experts"),
        (QWEN2_MOE, {"num_experts": 0}, "num_experts"),
        (QWEN2_MOE, {"num_experts_per_tok": None}, "num_experts_per_tok"),
        (QWEN2_MOE, {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size"),
        (QWEN3_MOE, {"moe_intermediate_size": "big"}, "moe_intermediate_size"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (QWEN3_MOE, {"mlp_only_layers": 3}, "mlp_only_layers"),
        (QWEN3_MOE, {"mlp_only_layers": [True]}, "mlp_only_layers"),
    ],
)
def test_errors_of_mixtures_name_the_fault(
    family: dict[str, Any], keys: dict[str, Any], named: str
) -> None:
    """What is wrong with experts is named too."""
    with pytest.raises(ModelError, match=named):
        ModelConfig.from_dict(MOE | family | keys)
