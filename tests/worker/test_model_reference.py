"""The decoder against `transformers` on the same weights, in fp32: the same greedy tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from services.worker.flowserve.backend import load_decoder
from tests.worker.drive import Driver, Sequence, load, random_ids
from tests.worker.tiny import FAMILIES, MOE_FAMILIES, make_tiny

GAP = 1e-3  # where the two best logits lie closer, either may win
LENGTHS = (1, 2, 16, 17, 64, 65, 200, 600)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied-biased": (
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-llama3-rope": ("llama", {"rope_scaling": LLAMA3}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 16}},
    ),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama-dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-new-rope-form": (
        "llama",
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-no-groups": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 48}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {}),
    "mixtral-window": ("mixtral", {"sliding_window": 48}),
    "qwen2-moe": ("qwen2_moe", {}),
    "qwen2-moe-window": (
        "qwen2_moe",
        {
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 40,
        },
    ),
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3-moe-window": (
        "qwen3_moe",
        {
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            "use_sliding_window": True,
            "sliding_window": 40,
        },
    ),
}


@cache
def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _reference(folder: Path) -> Any:
    _quiet()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _assert_greedy(reference: Any, prompt: list[int], tokens: list[int]) -> None:
    """`tokens` are the reference's own choices, or the first that is not lies within GAP of its choice."""
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    for step, token in zip(logits, tokens, strict=True):
        best = step.topk(2)
        if token != best.indices[0]:
            assert token == best.indices[1]
            assert best.values[0] - best.values[1] < GAP
            return  # from here on the two continue different texts


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_transformers(tmp_path: Path, case: str) -> None:
    """For prompts of 1 to 600 tokens, computed whole and in chunks, greedy tokens are those of transformers."""
    family, overrides = CASES[case]
    folder = make_tiny(tmp_path / "tiny", family, with_tokenizer=False, **overrides)
    reference, decoder = _reference(folder), load(folder, "fp32")
    for length in LENGTHS:
        prompt = random_ids(length, seed=length)
        for chunk in (None, 50):
            _assert_greedy(reference, prompt, Driver(decoder).greedy(prompt, 5, chunk))


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_stays_close(tmp_path: Path, family: str) -> None:
    """W8A8, by either kernels, and bf16 change the distribution of the next token by little: mean KL divergence to
    fp32; the median where there are experts, as a row that was close to a tie may have chosen others."""
    folder = make_tiny(tmp_path / "tiny", family, with_tokenizer=False)
    ids = random_ids(300)

    def distribution(dtype: str, kernels: str) -> torch.Tensor:
        logits = Driver(load(folder, dtype, kernels)).run(Sequence(ids)).logits
        return torch.from_numpy(logits).log_softmax(-1)

    exact = distribution("fp32", "torch")
    for dtype, kernels, bound in (
        ("w8a8", "torch", 0.03),
        ("w8a8", "auto", 0.03),
        ("bf16", "torch", 0.01),
    ):
        divergences = (exact.exp() * (exact - distribution(dtype, kernels))).sum(-1)
        of_all = divergences.median() if family in MOE_FAMILIES else divergences.mean()
        assert 0 < of_all < bound


@pytest.mark.smollm2
def test_smollm2_greedy_equals_transformers(smollm2: Path) -> None:
    """SmolLM2 itself: real weights, a short and a long prompt."""
    reference, decoder = _reference(smollm2), load_decoder(smollm2, dtype="fp32")
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    for prompt in (tokenizer.encode(question), random_ids(300, vocab=40000)):
        tokens = Driver(decoder).greedy(prompt, 8, 128)
        _assert_greedy(reference, prompt, tokens)


@pytest.mark.smollm2
def test_smollm2_answers_in_w8a8(smollm2: Path) -> None:
    """The default arithmetic still knows the capital of France."""
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    tokens = Driver(load_decoder(smollm2)).greedy(tokenizer.encode(question), 8)
    assert "Paris" in tokenizer.decode(tokens)
