"""Many mixed requests through one engine with real weights: no block is lost, and memory stays where it was.

Short by default; `make soak` sends two thousand.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.worker.flowserve.backend import load_decoder
from shared.messages import Cancel
from tests.conftest import test_cache
from tests.worker.bench import Bench, request
from tests.worker.drive import random_ids

LONG = bool(os.environ.get("DEEPFLOW_SOAK"))
NUM_REQUESTS = 2000 if LONG else 60
TOGETHER = 20  # requests that are sent at once; fewer than all of them run
GROWTH_BYTES = 16 * 2**20  # over all but the first quarter
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.1},
    {"temperature": 0.7, "frequency_penalty": 0.4, "n": 3},
]

pytestmark = [pytest.mark.soak, pytest.mark.smollm2, pytest.mark.timeout(7200 if LONG else 120)]


def anonymous(process: psutil.Process) -> int:
    """Resident bytes that are the process's own. The mapped weights are not: random tokens go on touching new rows."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


@pytest.mark.parametrize(
    "mode", [{}, {"asynchronous": True, "speculation": 4}], ids=["plain", "async-guessing"]
)
def test_mixed_requests_leave_nothing_behind(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any]
) -> None:
    """Prompts short and long, some with a prefix in common, some cancelled, in a pool too small for all of them."""
    monkeypatch.setattr(Bench, "mode", mode)
    decoder = load_decoder(smollm2, threads=2, cache_dir=test_cache())
    bench = Bench(decoder, num_blocks=160, max_num_seqs=16)
    source = random.Random(7)
    prefixes = [random_ids(100, seed=seed, vocab=40_000) for seed in range(3)]
    process, before = psutil.Process(), 0
    for wave in range(NUM_REQUESTS // TOGETHER):
        names = [f"{wave}-{i}" for i in range(TOGETHER)]
        for name in names:
            prompt = random_ids(source.randrange(1, 160), seed=source.randrange(1 << 30))
            if source.random() < 0.5:
                prompt = source.choice(prefixes) + prompt[:40]
            fields = source.choice(KINDS) | {"max_tokens": source.randrange(1, 40)}
            bench.submit(request(name, prompt, seed=source.randrange(1 << 30), **fields))
        for _ in range(source.randrange(1, 12)):
            bench.step()
        for name in source.sample(names, 4):
            for _, delta in bench.engine.cancel(Cancel(request=name, attempt=0)):
                bench.take(delta)
        bench.run()  # to the end of all; checks the ledger at each step
        assert set(bench.finishes) == set(names)
        for kept in (bench.ids, bench.logprobs, bench.ends, bench.cached, bench.finishes):
            kept.clear()  # the test's own memory
        bench.now += bench.engine.settings.keep_finished_s + 1
        if wave == NUM_REQUESTS // TOGETHER // 4:
            before = anonymous(process)
    assert anonymous(process) - before < GROWTH_BYTES
    bench.engine.close()
