"""Whole models on the NPU's own code, over torch-npu's operators, against the CPU.

Both compute in bfloat16, and round at different places: the CPU keeps fp32 between products. So logits, whose standard
deviation is about 3.3 in these models, are held within `TYPICAL` in the median row and `FAR` in all of a dense model's
rows, and a greedy token must be the CPU's own wherever the CPU's best logit leads by more than `FAR`. In a mixture of
experts a router's tie may fall either way, which changes a row as a whole: there the median counts.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from deepflow.bench.quality import PROSE
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.decoder import Floats
from services.worker.flowserve.device.cpu import CpuDevice
from services.worker.flowserve.device.npu import NpuDevice
from services.worker.flowserve.device.npu_attention import NUM_SPARE, check
from services.worker.flowserve.rank import Rank
from services.worker.flowserve.torch_decoder import TorchDecoder
from shared.errors import InvalidRequest
from tests.npu.host import HostRuntime
from tests.worker.bench import Bench, request
from tests.worker.drive import Driver, Sequence, random_ids
from tests.worker.tiny import FAMILIES, MOE_FAMILIES, make_tiny

pytestmark = pytest.mark.usefixtures("npu_operators")

PAGE = 128
TYPICAL = 0.4
FAR = 1.5
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "vocab_size": 515}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-heads-of-64": ("llama", {"head_dim": 64}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-window-over-pages": ("mistral", {"sliding_window": 130, "head_dim": 64}),
    "qwen2": ("qwen2", {}),
    "qwen2-some-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-heads-of-128": ("qwen3", {"head_dim": 128}),
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {}),
}


def model(folder: Path, case: str) -> Path:
    family, overrides = CASES[case]
    return make_tiny(folder / case, family, with_tokenizer=False, **overrides)


def on_npu(folder: Path, dtype: str = "bf16", *, graphs: bool = False) -> TorchDecoder:
    device = NpuDevice(HostRuntime())
    return TorchDecoder.load(
        folder, dtype=dtype, cache_dir=folder.parent, device=device, graphs=graphs
    )


def on_cpu(folder: Path, ids: list[int], dtype: str = "bf16") -> Floats:
    """Logits of all rows."""
    decoder = TorchDecoder.load(folder, dtype=dtype, cache_dir=folder.parent, device=CpuDevice())
    return Driver(decoder).run(Sequence(ids)).logits


def assert_close(logits: Floats, expected: Floats, case: str) -> None:
    """As the module's docstring says."""
    assert np.isfinite(logits).all()
    worst = np.abs(logits - expected).max(-1)
    assert np.median(worst) < TYPICAL
    assert CASES[case][0] in MOE_FAMILIES or worst.max() < FAR


def divergence(logits: Floats, exact: Floats) -> float:
    """Mean KL divergence of the next token's distribution from that of `exact`."""
    p, q = (torch.from_numpy(x).log_softmax(-1) for x in (exact, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_cpus(tmp_path: Path, case: str) -> None:
    """Prompts at once and in chunks, chunks of one row, and decoding, alone and beside others: all rows agree."""
    folder = model(tmp_path, case)
    driver = Driver(on_npu(folder), num_blocks=16, page=PAGE)
    first, second, third = (Sequence(random_ids(n, seed=n)) for n in (300, 260, 131))
    driver.step([(first, 280), (second, 1), (third, 128)])
    driver.step([(first, 1), (second, 200), (third, 1)])
    while len(third.ids) > third.computed:
        driver.step([(third, 1), (first, 4), (second, 1)])
    driver.run(first, chunk=3)
    driver.run(second)
    for sequence in (first, second, third):
        assert_close(sequence.logits, on_cpu(folder, sequence.ids), case)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "bf16") for case in CASES), ("qwen2", "w8a8"), ("qwen3_moe", "w8a8")],
)
def test_graphs_change_nothing(tmp_path: Path, case: str, dtype: str) -> None:
    """Decode steps replayed from graphs, with rows that come and go and cross pages, have the bits of steps computed
    call by call."""
    folder = model(tmp_path, case)
    runs = []
    for graphs in (False, True):
        decoder = on_npu(folder, dtype, graphs=graphs)
        driver = Driver(decoder, num_blocks=24, page=PAGE)
        sequences = [Sequence(random_ids(n + 12, seed=n)) for n in (250, 121, 3, 128, 40)]
        for sequence in sequences:
            driver.step([(sequence, len(sequence.ids) - 12)])
        for count in (5, 5, 3, 4, 5, 2, 5, 5):
            driver.step([(sequence, 1) for sequence in sequences[:count]])
        runs.append([sequence.logits for sequence in sequences])
        assert (decoder.num_graphs > 0) == graphs
    for without, replayed in zip(*runs, strict=True):
        assert np.array_equal(without, replayed)


@pytest.mark.parametrize(
    ("case", "limits"),
    [
        *((case, {}) for case in ("llama", "mistral-window", "qwen2-some-windows", "qwen3")),
        ("mistral-window", {"asynchronous": True}),
        ("qwen3", {"speculation": 4}),
    ],
    ids=str,
)
def test_the_engines_tokens_are_the_cpus(tmp_path: Path, case: str, limits: dict[str, Any]) -> None:
    """Requests that share a prefix, are cut into chunks and wait for blocks, through the whole engine: a greedy token
    is the CPU's own where its lead is clear."""
    folder = model(tmp_path, case)
    bench = Bench(
        on_npu(folder, graphs=True), num_blocks=8, page=PAGE, max_batched_tokens=96, **limits
    )
    shared = random_ids(270, seed=1)
    prompts = {f"r{n}": shared[: 270 - 5 * n] + random_ids(n, seed=n) for n in range(5)}
    for name, prompt in prompts.items():
        bench.submit(request(name, prompt, page=PAGE, temperature=0, max_tokens=20))
    bench.run()
    assert any(bench.cached.values())
    for name, prompt in prompts.items():
        tokens = bench.tokens(name)
        assert len(tokens) == 20
        logits = on_cpu(folder, prompt + tokens)[len(prompt) - 1 : -1]
        lags = logits.max(-1) - logits[np.arange(20), tokens]
        assert lags.max() < FAR


@pytest.mark.parametrize("family", FAMILIES)
def test_w8a8_stays_close(tmp_path: Path, family: str) -> None:
    """Weights quantised by output and activations by row: mean KL divergence to the CPU's fp32 below 0.03, with experts
    below 0.1; the NPU's own bf16 is closer."""
    folder = model(tmp_path, family)
    ids = random_ids(400)
    exact = on_cpu(folder, ids, "fp32")
    found = {
        dtype: divergence(
            Driver(on_npu(folder, dtype), num_blocks=8, page=PAGE).run(Sequence(ids), 150).logits,
            exact,
        )
        for dtype in ("bf16", "w8a8")
    }
    assert 0 < found["bf16"] < found["w8a8"] < (0.1 if family in MOE_FAMILIES else 0.03)


def test_a_vocabulary_wider_than_a_product(tmp_path: Path) -> None:
    """An output of more than 65,535 columns in w8a8 is computed in blocks."""
    folder = make_tiny(tmp_path / "wide", vocab=70_001, layers=1, with_tokenizer=False)
    ids = random_ids(20, vocab=70_001)
    exact = on_cpu(folder, ids, "fp32")
    logits = Driver(on_npu(folder, "w8a8"), num_blocks=2, page=PAGE).run(Sequence(ids)).logits
    assert logits.shape == exact.shape
    assert np.abs(logits - exact).max() < FAR


@pytest.mark.parametrize("graphs", [False, True])
def test_shared_pages_in_a_small_pool(tmp_path: Path, graphs: bool) -> None:
    """Sequences whose pages, each counted for itself, are more than the pool has go in several calls of attention."""
    folder = model(tmp_path, "llama")
    driver = Driver(on_npu(folder, graphs=graphs), num_blocks=12, page=PAGE)
    first = driver.run(Sequence(random_ids(300)))
    others = []
    for seed in range(6):
        ids = first.ids[:256] + random_ids(30, seed=seed)
        others.append(Sequence(ids, table=first.table[:2], computed=256))
        driver.step([(others[-1], 20)])
    for _ in range(10):
        driver.step([(sequence, 1) for sequence in others])
    for sequence in others:
        assert_close(sequence.logits, on_cpu(folder, sequence.ids)[256:], "llama")


def test_rows_that_fill_up_leave_the_cache_alone(tmp_path: Path) -> None:
    """Five rows are computed as eight; the other three write no cell of any block, the first one's neither."""
    driver = Driver(on_npu(model(tmp_path, "llama"), graphs=True), num_blocks=8, page=PAGE)
    kv = driver.decoder.kv  # type: ignore[attr-defined]
    driver.run(Sequence(random_ids(PAGE), table=[0]))
    before = kv.read_blocks([0, 6, 7]).copy()
    batch = [Sequence(random_ids(3, seed=n), table=[n]) for n in range(1, 6)]
    driver.step([(sequence, 2) for sequence in batch])
    driver.step([(sequence, 1) for sequence in batch])
    assert driver.decoder.num_graphs == 1  # type: ignore[attr-defined]
    assert np.array_equal(kv.read_blocks([0, 6, 7]), before)
    assert before[0].any()


@pytest.mark.parametrize("dtype", ["bf16", "w8a8"])
def test_blocks_move_between_devices(tmp_path: Path, dtype: str) -> None:
    """Blocks read on the host from one cache and written to other places of another hold the same context."""
    folder = model(tmp_path, "mistral")
    source, target = (
        Driver(on_npu(folder, dtype), num_blocks=6, page=PAGE, seed=seed) for seed in (0, 1)
    )
    first = source.run(Sequence(random_ids(270)))
    data = source.decoder.kv.read_blocks(first.table[:2])  # type: ignore[attr-defined]
    assert data.shape == (2, source.decoder.bytes_per_block(PAGE))
    target.decoder.kv.write_blocks([5, 2], data)  # type: ignore[attr-defined]
    moved = Sequence(first.ids, table=[5, 2, 0], computed=256)
    assert np.array_equal(target.run(moved).logits, first.logits[256:])


def test_what_the_npu_does_not_serve(tmp_path: Path) -> None:
    """fp32, a page that its attention cannot read, and heads that it does not take are refused with the reason."""
    with pytest.raises(ModelError, match="16-bit floats only"):
        on_npu(model(tmp_path, "llama"), "fp32")
    decoder = on_npu(model(tmp_path, "qwen3"))
    with pytest.raises(ModelError, match="page of 16"):
        decoder.allocate(8, 16)
    with pytest.raises(ModelError, match="KV blocks"):
        decoder.allocate(1 << 20, PAGE)
    odd = make_tiny(tmp_path / "odd", head_dim=24, with_tokenizer=False)
    with pytest.raises(ModelError, match="heads of 24"):
        on_npu(odd).allocate(8, PAGE)


def test_how_large_a_cache_may_be(tmp_path: Path) -> None:
    """Of the longest context that is documented, of as many elements, and of what memory is free; an error names what
    there may be."""
    config = ModelConfig.from_folder(model(tmp_path, "qwen3"))
    most = (2**31 - 1) // (PAGE * config.num_kv_heads * config.head_dim) - NUM_SPARE
    long = replace(config, context=1 << 20)
    check(long, 262_144 // PAGE, PAGE)
    with pytest.raises(ModelError, match="over 262144"):
        check(long, 262_144 // PAGE + 1, PAGE)
    check(config, most, PAGE)
    with pytest.raises(ModelError, match=f"{most + 1} KV blocks, more than {most}"):
        check(config, most + 1, PAGE)
    deep = make_tiny(tmp_path / "deep", layers=16, with_tokenizer=False)
    with pytest.raises(InvalidRequest, match=rf"takes \d+ bytes.*{24 << 30} free.*KV_BYTES"):
        on_npu(deep).allocate(250_000, PAGE)


def test_memory_and_name_are_the_cards() -> None:
    """What the runtime says."""
    device = NpuDevice(HostRuntime())
    assert (device.memory().free, device.memory().total) == (24 << 30, 64 << 30)
    assert "no NPU" in device.description


class Meeting:
    """A `Collective` of executors in threads of one process."""

    in_graphs = False

    def __init__(self, rank: Rank, barrier: Barrier, held: dict[int, torch.Tensor]) -> None:
        self._rank, self._barrier, self._held = rank, barrier, held

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all(x)).float().sum(0).to(x.dtype)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(x), -1)

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._held[self._rank.tp] = x
        self._barrier.wait()
        parts = [self._held[tp].clone() for tp in range(self._rank.tp_size)]
        self._barrier.wait()
        return parts

    def send(self, x: torch.Tensor) -> None:
        raise NotImplementedError

    recv: Any = send


@pytest.mark.parametrize("dtype", ["bf16", "w8a8"])
@pytest.mark.parametrize(
    "case", ["llama-biased", "llama-one-kv-head", "mistral-window", "qwen3_moe"]
)
def test_slices_of_a_model_are_the_model(tmp_path: Path, case: str, dtype: str) -> None:
    """Two executors with half of the heads, hidden values, experts' hidden values and tokens each give the logits of
    one, up to rounding."""
    folder = model(tmp_path, case)
    ids = random_ids(150)
    barrier, held = Barrier(2, timeout=60), dict[int, torch.Tensor]()

    def logits(rank: Rank) -> Floats:
        decoder = TorchDecoder.load(
            folder,
            dtype=dtype,
            cache_dir=tmp_path,
            device=NpuDevice(HostRuntime()),
            rank=rank,
            collective=Meeting(rank, barrier, held) if rank.tp_size > 1 else None,
            graphs=False,
        )
        return Driver(decoder, num_blocks=4, page=PAGE).run(Sequence(ids), 149).logits

    alone = logits(Rank())
    with ThreadPoolExecutor(2) as pool:
        slices = list(pool.map(logits, (Rank(tp, 2) for tp in range(2))))
    assert np.array_equal(slices[0], slices[1])
    worst = np.abs(slices[0] - alone).max(-1)
    assert np.median(worst) < (TYPICAL if dtype == "bf16" else 2 * TYPICAL)


@pytest.mark.smollm2
def test_smollm2_in_both_types(smollm2: Path) -> None:
    """Real weights, whose outliers random ones do not have, on prose: mean KL divergence to the CPU's fp32, below 0.003
    in bf16 and 0.015 in w8a8."""
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    ids = tokenizer.encode(PROSE.read_text(encoding="utf-8")[:2000]).ids[:256]
    exact = on_cpu(smollm2, ids, "fp32")
    for dtype, bound in (("bf16", 0.003), ("w8a8", 0.015)):
        driver = Driver(on_npu(smollm2, dtype), num_blocks=2, page=PAGE)
        assert 0 < divergence(driver.run(Sequence(ids)).logits, exact) < bound
