"""What the books cost: hashing, the index of a TE full and under eviction, and the directory of a cache service.

Nothing here moves bytes.
"""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Final, TypeVar

from deepflow.bench.distribution import percentile
from deepflow.bench.rtc.plan import PROMPT_LEN, Plan
from services.cache.directory import Directory
from services.worker.flowserve.rtc.master import RtcMaster
from shared import blockhash
from shared.rtc_messages import BlockEvents

T = TypeVar("T")

_EVENT_PAGES: Final = 256
_MAX_CHAIN: Final = 1024  # pages


def hashing(page: int, rounds: int) -> dict[str, float]:
    """Chained hashes of 4,096 tokens."""
    ids = list(range(PROMPT_LEN))
    root = blockhash.root(b"tenant", "model")
    return {"hash_4096_ms": 1000 * _median_s(lambda: blockhash.chain(root, ids, page), rounds)}


def index(plan: Plan, seed: int) -> dict[str, float]:
    """Of a TE's RTC master with `num_blocks` blocks after `num_inserts` pages went in, so that most were evicted."""
    random = Random(seed)
    master = RtcMaster(plan.num_blocks)
    chains: deque[list[bytes]] = deque()
    num_kept = num_inserted = 0
    started = time.perf_counter()
    while num_inserted < plan.num_inserts:
        chain = [random.randbytes(16) for _ in range(random.randint(16, _MAX_CHAIN))]
        _insert(master, chain)
        num_inserted += len(chain)
        chains.append(chain)
        num_kept += len(chain)
        while num_kept - len(chains[0]) > plan.num_blocks // 2:
            num_kept -= len(chains.popleft())
    insert_s = time.perf_counter() - started
    found = {"insert_ops_s": num_inserted / insert_s}
    for num_tokens in plan.match_lens:
        num_pages = num_tokens // plan.page
        times_s: list[float] = []
        while len(times_s) < plan.num_matches:
            chain = random.choice(chains)
            if len(chain) < num_pages:
                chain = [random.randbytes(16) for _ in range(num_pages)]
                _insert(master, chain)
                chains.append(chain)
            asked = chain[:num_pages]
            began = time.perf_counter()
            blocks = master.match_by_prefix_token(asked)
            times_s.append(time.perf_counter() - began)
            assert len(blocks) == num_pages, "the newest half of what went in is there"
            master.free(blocks)
        found[f"match_{num_tokens}_ms"] = 1000 * statistics.median(times_s)
        found[f"match_{num_tokens}_p99_ms"] = 1000 * percentile(times_s, 99)
        found[f"match_{num_tokens}_ops_s"] = 1 / statistics.median(times_s)
    return found | _append(master, plan, random)


def _append(master: RtcMaster, plan: Plan, random: Random) -> dict[str, float]:
    """A sequence grows token by token in a full pool: each block evicts another. `append_indexed_us` also hashes each
    page and puts it into the index, which is what a decoding sequence does."""
    num_pages = PROMPT_LEN // plan.page
    num_pages = min(num_pages, plan.num_blocks // 4)
    hashes = [random.randbytes(16) for _ in range(num_pages)]
    ids = list(range(plan.page))
    plain_s, indexed_s = [], []
    for _ in range(max(3, plan.num_rounds)):
        table: list[int] = []
        began = time.perf_counter()
        for _page in range(num_pages):
            master.append_block(table)
        plain_s.append(time.perf_counter() - began)
        master.free(table)
        table, before = [], None
        began = time.perf_counter()
        for page_hash in hashes:
            master.append_block(table)
            blockhash.chain(page_hash, ids, plan.page)
            master.store(table[-1], page_hash, before)
            before = page_hash
        indexed_s.append(time.perf_counter() - began)
        master.free(table)
        for page_hash in reversed(hashes):
            master.forget(page_hash)
    num_tokens = num_pages * plan.page
    return {
        "append_us": 1e6 * statistics.median(plain_s) / num_tokens,
        "append_indexed_us": 1e6 * statistics.median(indexed_s) / num_tokens,
        "append_ops_s": num_pages / statistics.median(plain_s),
    }


def memory(plan: Plan, seed: int) -> dict[str, float]:
    """Bytes of the interpreter's heap per block of a full index, hashes included; and what the directory of a cache
    service takes of its budget when it is offered many more pages than that allows."""
    random = Random(seed)

    def fill_master() -> RtcMaster:
        master = RtcMaster(plan.num_blocks)
        left = plan.num_blocks
        while left:
            size = min(left, 256)
            _insert(master, [random.randbytes(16) for _ in range(size)])
            left -= size
        return master

    def fill_directory() -> Directory:
        directory = Directory(max_bytes=plan.directory_bytes)
        for number in range(plan.num_directory_pages // _EVENT_PAGES):
            stored = [random.randbytes(16) for _ in range(_EVENT_PAGES)]
            directory.apply(BlockEvents(te="te", model="model", seq=number + 1, stored=stored))
        return directory

    of_index, _ = _traced(fill_master)
    of_directory, directory = _traced(fill_directory)
    return {
        "index_bytes_per_block": of_index / plan.num_blocks,
        "index_mb": of_index / 1e6,
        "directory_bytes_per_page": of_directory / max(1, directory.num_pages),
        "directory_pages": directory.num_pages,
        "directory_vs_budget": of_directory / plan.directory_bytes,
    }


def _insert(master: RtcMaster, chain: list[bytes]) -> None:
    """As a sequence does that ends: its pages are indexed, then nobody's."""
    blocks = master.alloc_blocks(len(chain))
    assert blocks is not None, "nothing is held"
    before = None
    for block, page_hash in zip(blocks, chain, strict=True):
        master.store(block, page_hash, before)
        before = page_hash
    master.free(blocks)
    master.drain_events()


def _traced(make: Callable[[], T]) -> tuple[int, T]:
    """Bytes that what is made takes."""
    gc.collect()
    tracemalloc.start()
    try:
        made = make()
        gc.collect()
        return tracemalloc.get_traced_memory()[0], made
    finally:
        tracemalloc.stop()


def _median_s(call: Callable[[], object], rounds: int) -> float:
    """Of many calls."""
    times_s = []
    for _ in range(max(rounds, 5) * 4):
        began = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - began)
    return statistics.median(times_s)
