"""llama.cpp, built for this processor, through its C interface: batched decoding as in its own `llama-batched-bench`.

Variants: `q4_1`, the published file, and `q8_0`, the same values; with `-fa` flash attention is on, without it off.
A session of many sequences is one prompt prefilled once and its cache copied for each, into a KV stream of its own:
what decoding reads and writes is as large as with prompts of their own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import llama_cpp
import numpy as np

_BATCH: Final = 2048  # tokens of a call; the library splits it into its own micro-batches of 512
_CONTEXT_STEP: Final = 256  # of the cache of one sequence
_ROOM: Final = 512  # tokens a session may decode for each sequence


class Driver:
    """A model per variant, loaded when it is first asked for, and a context per use."""

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
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self._weights = weights
        self._threads = threads
        self._models: dict[str, Any] = {}
        self._sessions: dict[str, _Session] = {}

    def describe(self) -> dict[str, Any]:
        """Versions and settings."""
        return {
            "versions": {"llama-cpp-python": version("llama-cpp-python")},
            "settings": {
                "threads": self._threads,
                "n_batch": _BATCH,
                "n_ubatch": 512,
                "kv_unified": False,
                "build": llama_cpp.llama_print_system_info().decode(),
            },
        }

    def prefill(self, variant: str, prompt: list[int]) -> dict[str, float]:
        """Seconds to the first token of one prompt."""
        session = self._session(variant, 1, len(prompt))
        started = time.perf_counter()
        session.prefill(prompt)
        seconds = time.perf_counter() - started
        session.close()
        return {"seconds": seconds}

    def open(self, variant: str, prompts: Sequence[list[int]]) -> None:
        """Prefill the first prompt, and copy its cache for each of them."""
        session = self._session(variant, len(prompts), len(prompts[0]) + _ROOM)
        session.prefill(prompts[0])
        session.spread()
        session.step()
        session.step()
        self._sessions[variant] = session

    def decode(self, variant: str, num_tokens: int, limit_s: float) -> dict[str, float]:
        """Seconds for steps of all sequences until `num_tokens` tokens are out or `limit_s` is over."""
        session = self._sessions[variant]
        done = 0
        started = time.perf_counter()
        while done < num_tokens and time.perf_counter() < started + limit_s:
            done += session.step()
        return {"seconds": time.perf_counter() - started, "num_tokens": done}

    def close(self, variant: str) -> None:
        """Give up the session."""
        if variant in self._sessions:
            self._sessions.pop(variant).close()

    def _session(self, variant: str, num_seqs: int, num_tokens: int) -> _Session:
        kind, _, attention = variant.partition("-")
        if kind not in self._models:
            path = self._weights[kind].encode()
            self._models[kind] = llama_cpp.llama_model_load_from_file(
                path, llama_cpp.llama_model_default_params()
            )
            # The first use of a model touches its pages.
            warm = self._session(variant, 1, 64)
            warm.prefill(list(range(1000, 1064)))
            warm.close()
        return _Session(self._models[kind], num_seqs, num_tokens, self._threads, attention == "fa")


class _Session:
    """A context: sequences that decode together, each at the same position."""

    def __init__(
        self, model: Any, num_seqs: int, num_tokens: int, threads: int, flash_attention: bool
    ) -> None:
        params = llama_cpp.llama_context_default_params()
        per_sequence = -(-(num_tokens + 1) // _CONTEXT_STEP) * _CONTEXT_STEP
        params.n_ctx = num_seqs * per_sequence
        params.n_seq_max = num_seqs
        params.n_batch = _BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(flash_attention)
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._num_seqs = num_seqs
        self._position = 0
        self._tokens: list[int] = []

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def prefill(self, prompt: list[int]) -> None:
        """The prompt as sequence 0, up to its next token."""
        for start in range(0, len(prompt), _BATCH):
            part = prompt[start : start + _BATCH]
            for row, token in enumerate(part):
                last = start + row == len(prompt) - 1
                self._set_row(row, token, start + row, 0, last)
            self._decode(len(part))
        self._position = len(prompt)
        self._tokens = [self._greedy(-1)]

    def spread(self) -> None:
        """All sequences as copies of sequence 0."""
        memory = llama_cpp.llama_get_memory(self._context)
        for sequence in range(1, self._num_seqs):
            llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        self._tokens *= self._num_seqs

    def step(self) -> int:
        """A token more for every sequence; how many that were."""
        for sequence, token in enumerate(self._tokens):
            self._set_row(sequence, token, self._position, sequence, True)
        self._decode(self._num_seqs)
        self._position += 1
        self._tokens = [self._greedy(row) for row in range(self._num_seqs)]
        return self._num_seqs

    def _set_row(self, row: int, token: int, position: int, sequence: int, wanted: bool) -> None:
        batch = self._batch
        batch.token[row] = token
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = wanted

    def _decode(self, num_rows: int) -> None:
        self._batch.n_tokens = num_rows
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode failed with {code}")

    def _greedy(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())
