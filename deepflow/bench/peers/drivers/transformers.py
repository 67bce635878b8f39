"""transformers: the model's own forward pass with a static batch, its KV in a `DynamicCache`, SDPA attention.

`generate` adds work of its own to every step (logits processors, stopping criteria), so the loop here is the fastest
way to use it. A session of many sequences is one prompt prefilled once and its cache copied for each: what decoding
reads and writes is as large as with prompts of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, DynamicCache

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Driver:
    """A model per variant, loaded when it is first asked for."""

    def __init__(
        self,
        model: str,
        weights: Mapping[str, str],
        scratch: str,
        variants: Sequence[str],
        threads: int,
        num_tokens: int,
        max_num_seqs: int,
    ) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._folder = model
        self._threads = threads
        self._models: dict[str, Any] = {}
        self._sessions: dict[str, tuple[DynamicCache, torch.Tensor]] = {}

    def describe(self) -> dict[str, Any]:
        """Versions and settings."""
        packages = ("transformers", "torch")
        return {
            "versions": {name: version(name) for name in packages},
            "settings": {"threads": self._threads, "attention": "sdpa", "cache": "DynamicCache"},
        }

    def prefill(self, variant: str, prompt: list[int]) -> dict[str, float]:
        """Seconds to the first token of one prompt."""
        model = self._model(variant)
        started = time.perf_counter()
        _forward(model, torch.tensor([prompt]), DynamicCache())
        return {"seconds": time.perf_counter() - started}

    def open(self, variant: str, prompts: Sequence[list[int]]) -> None:
        """Prefill the first prompt, and copy its cache for each of them."""
        model, cache = self._model(variant), DynamicCache()
        token = _forward(model, torch.tensor([prompts[0]]), cache)
        if len(prompts) > 1:
            cache.batch_repeat_interleave(len(prompts))
        self._sessions[variant] = cache, token.repeat_interleave(len(prompts), 0)
        self.decode(variant, 2 * len(prompts), math.inf)

    def decode(self, variant: str, num_tokens: int, limit_s: float) -> dict[str, float]:
        """Seconds for steps of all sequences until `num_tokens` tokens are out or `limit_s` is over."""
        model, (cache, tokens) = self._models[variant], self._sessions[variant]
        done = 0
        started = time.perf_counter()
        while done < num_tokens and time.perf_counter() < started + limit_s:
            tokens = _forward(model, tokens, cache)
            done += len(tokens.tolist())
        seconds = time.perf_counter() - started
        self._sessions[variant] = cache, tokens
        return {"seconds": seconds, "num_tokens": done}

    def close(self, variant: str) -> None:
        """Give up the session."""
        self._sessions.pop(variant, None)

    def _model(self, variant: str) -> Any:
        if variant not in self._models:
            model = AutoModelForCausalLM.from_pretrained(
                self._folder, dtype=_DTYPES[variant], attn_implementation="sdpa"
            ).eval()
            self._models[variant] = model
            _forward(model, torch.arange(1000, 1064)[None], DynamicCache())
        return self._models[variant]


def _forward(model: Any, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """The greedy next token of each row, [rows, 1]."""
    output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token: torch.Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
    return token
