"""OpenVINO GenAI: the continuous batching pipeline, stepped by hand.

Variants: `q4_1`, the published GGUF file as it reads it, and `int8`, its own weight compression (NNCF, per channel) of
the same values. Settings: the latency hint, which gives one stream all threads; prompts whole rather than in chunks of
256; everything else as it comes (8-bit KV cache, dynamic quantisation of activations).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, Final

import numpy as np
import openvino
import openvino_genai

_ENDLESS: Final = 1 << 20
_MAX_BATCHED_TOKENS: Final = 2048
_CACHE_BYTES_PER_TOKEN: Final = (
    24_000  # 8-bit cache of a model as small as ours, and half as much again
)
_MODEL: Final = "openvino_model.xml"


class Driver:
    """A pipeline per variant, made when it is first asked for."""

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
        self._model = Path(model)
        self._weights = weights
        self._scratch = Path(scratch)
        self._properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self._cache_gib = 1 + (num_tokens * _CACHE_BYTES_PER_TOKEN >> 30)
        self._max_num_seqs = max_num_seqs
        self._pipelines: dict[str, Any] = {}
        self._handles: dict[str, list[Any]] = {}
        self._numbers = count()

    def describe(self) -> dict[str, Any]:
        """Versions and settings."""
        packages = ("openvino-genai", "openvino", "nncf")
        return {
            "versions": {name: version(name) for name in packages},
            "settings": {
                **self._properties,
                "max_num_batched_tokens": _MAX_BATCHED_TOKENS,
                "cache_gib": self._cache_gib,
            },
        }

    def prefill(self, variant: str, prompt: list[int]) -> dict[str, float]:
        """Seconds to the first token of one prompt."""
        pipeline = self._pipeline(variant)
        started = time.perf_counter()
        self._run_to_end(pipeline, prompt)
        return {"seconds": time.perf_counter() - started}

    def open(self, variant: str, prompts: Sequence[list[int]]) -> None:
        """Fill the cache prompt by prompt, then start all of them together, so that all decode in step."""
        pipeline = self._pipeline(variant)
        for prompt in prompts:
            self._run_to_end(pipeline, prompt)
        handles = [self._submit(pipeline, prompt, _ENDLESS) for prompt in prompts]
        self._handles[variant] = handles
        begun = [0] * len(handles)
        while not all(begun):
            pipeline.step()
            begun = [num + _num_read(handle) for num, handle in zip(begun, handles, strict=True)]

    def decode(self, variant: str, num_tokens: int, limit_s: float) -> dict[str, float]:
        """Seconds for steps of all sequences until `num_tokens` tokens are out or `limit_s` is over."""
        pipeline, handles = self._pipelines[variant], self._handles[variant]
        done = 0
        started = time.perf_counter()
        while done < num_tokens and time.perf_counter() < started + limit_s:
            pipeline.step()
            done += sum(_num_read(handle) for handle in handles)
        return {"seconds": time.perf_counter() - started, "num_tokens": done}

    def close(self, variant: str) -> None:
        """Give up the session."""
        pipeline = self._pipelines[variant]
        for handle in self._handles.pop(variant, []):
            handle.cancel()
        while pipeline.has_non_finished_requests():
            pipeline.step()

    def _run_to_end(self, pipeline: Any, prompt: list[int]) -> None:
        handle = self._submit(pipeline, prompt, 1)  # without its handle a request is dropped
        while pipeline.has_non_finished_requests():
            pipeline.step()
        if _num_read(handle) != 1:
            raise RuntimeError("no first token came out")

    def _submit(self, pipeline: Any, prompt: list[int], max_new_tokens: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_new_tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        return pipeline.add_request(next(self._numbers), ids, config)

    def _pipeline(self, variant: str) -> Any:
        if variant not in self._pipelines:
            build: dict[str, Callable[[], Path]] = {
                "q4_1": lambda: Path(self._weights["q4_1"]),
                "int8": self._compressed,
            }
            # A folder has no tokenizer here, and needs none: prompts are ids.
            tokenizer = openvino_genai.Tokenizer(self._weights["q4_1"])
            self._pipelines[variant] = openvino_genai.ContinuousBatchingPipeline(
                build[variant](), tokenizer, self._scheduler_config(), "CPU", **self._properties
            )
            self._run_to_end(self._pipelines[variant], list(range(1000, 1064)))
        return self._pipelines[variant]

    def _scheduler_config(self) -> Any:
        config = openvino_genai.SchedulerConfig()
        config.cache_size = self._cache_gib
        config.max_num_seqs = self._max_num_seqs
        config.max_num_batched_tokens = _MAX_BATCHED_TOKENS
        config.enable_prefix_caching = True  # only so that sessions start in step
        return config

    def _compressed(self) -> Path:
        """The folder with the model compressed to int8 by NNCF, made once from the F16 file."""
        folder = self._scratch / "int8"
        if folder.exists():
            return folder
        import nncf

        making = self._scratch / "int8.making"
        shutil.rmtree(making, ignore_errors=True)
        source = making / "f16"
        source.mkdir(parents=True)
        # The pipeline is what reads GGUF, and leaves the model it builds beside the file.
        gguf = shutil.copy(self._weights["f16"], source)
        openvino_genai.ContinuousBatchingPipeline(
            gguf, self._scheduler_config(), "CPU", {"enable_save_ov_model": True}
        )
        model = openvino.Core().read_model(source / _MODEL)
        compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        openvino.save_model(compressed, making / _MODEL, compress_to_fp16=False)
        shutil.copy(self._model / "config.json", making)
        del model
        shutil.rmtree(source)
        os.replace(making, folder)
        return folder


def _num_read(handle: Any) -> int:
    """Tokens that came out of a request since the last call."""
    num = 0
    while handle.can_read():
        num += sum(len(output.generated_ids) for output in handle.read().values())
    return num
