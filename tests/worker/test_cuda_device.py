"""The CUDA device: whole tiny models on its code, on the CPU where that is all there is; graphs, pinned memory and
kernels where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.decoder import Floats
from services.worker.flowserve.device.cpu import CpuDevice
from services.worker.flowserve.device.cuda import CudaDevice, available
from services.worker.flowserve.device.cuda_linear import (
    CudaExperts,
    CudaInt8Linear,
    CudaLinear,
)
from services.worker.flowserve.device.device import Device, Linear, Rows
from services.worker.flowserve.device.paged import PagedKV
from services.worker.flowserve.torch_decoder import TorchDecoder
from shared.errors import InvalidRequest
from tests.worker.drive import PAGE, Driver, Sequence, random_ids
from tests.worker.recording import RecordingDevice
from tests.worker.tiny import FAMILIES, MOE_FAMILIES, make_tiny

LENGTHS = (1, 16, 17, 200)
_WHY_NOT = available()
needs_gpu = pytest.mark.skipif(_WHY_NOT is not None, reason=f"no GPU: {_WHY_NOT}")
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-3}  # of logits of up to 15, in fp32
PLACES = [
    "cpu",
    pytest.param("cuda", marks=needs_gpu),
]


def _device(place: str) -> CudaDevice:
    return CudaDevice.open() if place == "cuda" else CudaDevice(torch.device("cpu"))


def _load(
    folder: Path, device: Device, dtype: str = "fp32", *, graphs: bool = True
) -> TorchDecoder:
    return TorchDecoder.load(
        folder, dtype=dtype, cache_dir=folder.parent, device=device, graphs=graphs
    )


def _mean_divergence(exact: Floats, other: Floats) -> float:
    p, q = (torch.from_numpy(logits).log_softmax(-1) for logits in (exact, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_equals_the_cpu(tmp_path: Path, family: str, place: str) -> None:
    """In fp32 every logit of a text is the CPU's, computed whole, in chunks and token by token, and so are the greedy
    tokens that follow it."""
    folder = make_tiny(tmp_path / "tiny", family, with_tokenizer=False)
    reference, decoder = _load(folder, CpuDevice()), _load(folder, _device(place))
    ids = random_ids(100)
    expected = Driver(reference).run(Sequence(ids)).logits
    for chunk in (None, 33, 1):
        actual = Driver(decoder).run(Sequence(ids), chunk).logits
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE[place])
    for length in LENGTHS:
        prompt = random_ids(length, seed=length)
        assert Driver(decoder).greedy(prompt, 8, 50) == Driver(reference).greedy(prompt, 8)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "overrides",
    [
        {"sliding_window": 48},
        {"num_key_value_heads": 1, "num_attention_heads": 6, "head_dim": 24},
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ],
    ids=["window", "odd-heads", "biased"],
)
def test_shapes_equal_the_cpu(tmp_path: Path, overrides: dict[str, int], place: str) -> None:
    """So it is with a window, heads of odd size and number, and biases, for sequences that share their steps."""
    folder = make_tiny(tmp_path / "tiny", "mistral", with_tokenizer=False, **overrides)
    results = []
    for device in (CpuDevice(), _device(place)):
        driver = Driver(_load(folder, device))
        batch = [Sequence(random_ids(n, seed=n)) for n in (90, 5, 160)]
        driver.step([(batch[0], 60), (batch[1], 4)])
        driver.step([(batch[1], 1), (batch[0], 1), (batch[2], 100)])
        driver.step([(batch[2], 60), (batch[0], 29)])
        results.append(np.concatenate([sequence.logits for sequence in batch]))
    np.testing.assert_allclose(results[1], results[0], atol=TOLERANCE[place])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_and_w8a8_stay_close(tmp_path: Path, family: str, place: str) -> None:
    """bf16 and W8A8 change the distribution of the next token by little: mean KL divergence to fp32."""
    folder = make_tiny(tmp_path / "tiny", family, with_tokenizer=False)
    ids = random_ids(200)
    exact = Driver(_load(folder, CpuDevice())).run(Sequence(ids)).logits
    looser = (
        4 if family in MOE_FAMILIES else 1
    )  # where two experts are near a tie, either is chosen
    for dtype, bound in (("bf16", 0.02 * looser), ("w8a8", 0.05 * looser)):
        decoder = _load(folder, _device(place), dtype)
        logits = Driver(decoder).run(Sequence(ids), 70).logits
        assert 0 < _mean_divergence(exact, logits) < bound


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_blocks_move(tmp_path: Path, dtype: str, place: str) -> None:
    """Blocks read from one cache and written into others of another decoder go on as if computed there."""
    folder = make_tiny(tmp_path / "tiny", with_tokenizer=False)
    source, target = (_load(folder, _device(place), dtype) for _ in range(2))
    ids = random_ids(40)
    one = Sequence(ids[:39])
    Driver(source).run(one)
    driver = Driver(target, seed=9)
    blocks = source.kv.read_blocks(one.table)
    assert blocks.shape == (3, source.bytes_per_block(PAGE))
    blocks.flags.writeable = False  # as what comes from another process may be
    target.kv.write_blocks([7, 200, 13], blocks)
    assert np.array_equal(target.kv.read_blocks([7, 200, 13]), blocks)
    assert np.array_equal(target.kv.read_blocks([200]), blocks[1:2])
    moved = Sequence(ids, table=[7, 200, 13], computed=39)
    driver.run(moved)
    whole = Driver(source).run(Sequence(ids)).logits[-1:]
    atol = TOLERANCE[place] if dtype == "fp32" else 0.5
    np.testing.assert_allclose(moved.logits, whole, atol=atol)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("graphs", [False, True])
def test_what_others_left_in_the_cache_stays_theirs(
    tmp_path: Path, place: str, graphs: bool
) -> None:
    """Where every cell holds NaN, also those of nobody's block, logits are those over a clean cache, in steps with rows
    that only fill up a graph too."""
    folder = make_tiny(tmp_path / "tiny", "mistral", with_tokenizer=False, sliding_window=24)
    device = RecordingDevice() if place == "cpu" else _device(place)
    results = []
    for is_clean in (True, False):
        decoder = _load(folder, device, graphs=graphs)
        driver = Driver(decoder)
        for layer in () if is_clean else decoder.kv.layers:
            layer.fill_(torch.nan)
        batch = [Sequence(random_ids(n, seed=n)) for n in (40, 5, 21)]
        driver.step([(sequence, len(sequence.ids) - 4) for sequence in batch])
        for _ in range(4):
            driver.step([(sequence, 1) for sequence in batch])
        results.append(np.concatenate([sequence.logits for sequence in batch]))
        assert (decoder.num_graphs > 0) == graphs
    assert np.array_equal(*results)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("num_rows", "size"), [(1, (24, 40)), (17, (33, 50)), (100, (512, 576))])
def test_w8a8_products(num_rows: int, size: tuple[int, int], place: str) -> None:
    """The int8 product of any shape is the float product of the quantised factors, row by row the same in any batch."""
    device = _device(place).place
    source = np.random.default_rng(0)
    weight = source.standard_normal(size).astype(np.float32)
    bias = source.standard_normal(size[0]).astype(np.float32)
    half = size[0] // 2
    parts = [(weight[:half], bias[:half]), (weight[half:], None)]
    bias[half:] = 0
    x = torch.from_numpy(source.standard_normal((num_rows, size[1])).astype(np.float32))
    product = CudaInt8Linear(parts, size, device)
    actual = product(x.to(device)).cpu()

    def quantised(rows: torch.Tensor) -> torch.Tensor:
        scales = rows.abs().amax(1, keepdim=True) / 127
        return (rows / scales).round() * scales

    expected = quantised(x) @ quantised(torch.from_numpy(weight)).T + torch.from_numpy(bias)
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-3)
    assert torch.equal(product(x[-1:].to(device)).cpu(), actual[-1:])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hidden", [48, 44], ids=["grouped", "odd"])
def test_experts_equal_each_by_itself(hidden: int, place: str) -> None:
    """A row gets what its experts give one by one, also where an expert has no row: in one grouped product or, for
    sizes that it does not take and in fp32, in many."""
    device = _device(place)
    num_experts, width, num_rows = 5, 32, 9
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(num_experts, 2 * hidden, width, generator=generator) / 6
    down = torch.randn(num_experts, width, hidden, generator=generator) / 6
    x = torch.randn(num_rows, width, generator=generator)
    chosen = torch.tensor([[0, 2], [2, 0], [4, 2], [0, 4]] * 2 + [[4, 0]])  # neither 1 nor 3
    weights = torch.rand(num_rows, 2, generator=generator)
    size = (num_experts, width, hidden)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        experts = CudaExperts(gate_up.numpy(), down.numpy(), size, dtype, device.place)
        args = (x.to(device.place, dtype), weights.to(device.place), chosen.to(device.place))
        results.append(experts(*args).float().cpu())
    for row in range(num_rows):
        expected = torch.zeros(width)
        for weight, expert in zip(weights[row], chosen[row], strict=True):
            gate, up = (gate_up[expert] @ x[row]).chunk(2)
            expected += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(results[0][row], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(results[1][row], expected, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_experts_where_a_grouped_product_reads_back(
    monkeypatch: pytest.MonkeyPatch, is_recorded: bool
) -> None:
    """On a card without one of its own, every expert computes every row in what is recorded, and there alone."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_recorded)
    weights = np.random.default_rng(0).standard_normal((3, 16, 8)).astype(np.float32)
    experts = CudaExperts(weights, weights[:, :8], (3, 8, 8), torch.bfloat16, torch.device("cpu"))
    experts._is_native = False
    rows, chosen = torch.ones(2, 8, dtype=torch.bfloat16), torch.tensor([[0, 2], [2, 1]])
    with torch.profiler.profile() as profile:
        experts(rows, torch.ones(2, 2), chosen)
    assert any("grouped_mm" in event.key for event in profile.key_averages()) is not is_recorded


def test_float_products_have_biases_where_parts_have() -> None:
    """Parts lie one below the other; one without a bias has zeros."""
    eye = np.eye(2, dtype=np.float32)
    product = CudaLinear(
        [(eye, np.array([1, 2], np.float32)), (3 * eye, None)],
        (4, 2),
        torch.float32,
        torch.device("cpu"),
    )
    assert product(torch.tensor([[10.0, 20.0]])).tolist() == [[11.0, 22.0, 30.0, 60.0]]


def test_what_is_not_served_is_refused() -> None:
    """An unknown type is refused by name, and so is a GPU where there is none, with the reason."""
    with pytest.raises(ModelError, match="not 'int4'"):
        CudaDevice(torch.device("cpu")).activations("int4")
    with pytest.raises(ModelError, match="no CUDA device 99: "):
        CudaDevice.open(99)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    """Where the device's memory ends while weights are loaded, the error says so, and where."""

    class Full(CudaDevice):
        def linear(self, parts: Iterable[Rows], size: tuple[int, int], dtype: str) -> Linear:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    folder = make_tiny(tmp_path / "tiny", with_tokenizer=False)
    with pytest.raises(ModelError, match=r"no memory on cpu for the weights: .* 2\.00 GiB"):
        _load(folder, Full(torch.device("cpu")))


@needs_gpu
def test_a_cache_that_does_not_fit(tmp_path: Path) -> None:
    """It is refused before anything is taken, with both sizes and the setting."""
    decoder = _load(make_tiny(tmp_path / "tiny", with_tokenizer=False), _device("cuda"))
    with pytest.raises(InvalidRequest, match=r"takes \d+ bytes.*\d+ free.*DEEPFLOW_KV_BYTES"):
        decoder.allocate(1 << 30, PAGE)


@needs_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "w8a8"])
def test_graphs_on_the_gpu(tmp_path: Path, dtype: str) -> None:
    """Replayed steps choose the tokens of eager ones, in batches that grow and shrink."""
    folder = make_tiny(tmp_path / "tiny", "qwen3", with_tokenizer=False)
    device = _device("cuda")
    results = []
    for graphs in (False, True):
        decoder = _load(folder, device, dtype, graphs=graphs)
        driver = Driver(decoder)
        batch = [Sequence(random_ids(20 + n, seed=n)) for n in range(9)]
        for sequence in batch:
            driver.step([(sequence, 10)])
        for count in (1, 3, 9, 2, 5, 9, 1):
            driver.step([(sequence, 1) for sequence in batch[:count]])
        results.append(np.concatenate([sequence.logits for sequence in batch]))
        assert decoder.num_graphs == (5 if graphs else 0)
    assert _mean_divergence(*results) < (1e-6 if dtype == "fp32" else 0.02)


@needs_gpu
def test_kernels_on_the_gpu(tmp_path: Path) -> None:
    """Where Triton is installed its kernels pass their check for heads of all sizes and are what computes."""
    pytest.importorskip("triton")
    from services.worker.flowserve.device.paged_kernels import KernelKV

    device = _device("cuda")
    for index, head_dim in enumerate((24, 64, 128, 256)):
        folder = make_tiny(
            tmp_path / str(index),
            "mistral",
            with_tokenizer=False,
            head_dim=head_dim,
            sliding_window=48,
        )
        config = ModelConfig.from_folder(folder)
        for dtype in ("fp32", "bf16"):
            kv = device.allocate_kv(config, 4, 16, dtype)
            assert isinstance(kv, PagedKV)
            assert isinstance(kv, KernelKV)


@needs_gpu
def test_memory_of_the_gpu() -> None:
    """What is allocated is no longer free, and the device says what it is."""
    device = _device("cuda")
    before = device.memory()
    block = torch.zeros(1 << 28, device=device.place)
    assert before.free - device.memory().free > block.nbytes // 2
    assert before.total >= before.free
    assert torch.cuda.get_device_name() in device.description
