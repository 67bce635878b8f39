"""Mixtures of experts: who is chosen, what each row gets, the shares of ranks, and checkpoints that lack an expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.device.cpu import CpuDevice
from services.worker.flowserve.mlp import DenseMlp, MoeMlp
from services.worker.flowserve.prepared import open_prepared
from services.worker.flowserve.rank import Rank
from services.worker.flowserve.torch_weights import Weights, from_checkpoint, from_prepared
from tests.worker.drive import load
from tests.worker.tiny import FAMILIES, MOE_FAMILIES, WIDTH, make_tiny

SEEDS = st.integers(0, 2**31)
HIDDEN = 48


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(1, 20), st.booleans(), st.data())
def test_the_most_probable_are_chosen(
    seed: int, num_rows: int, num_experts: int, renormalise: bool, data: st.DataObject
) -> None:
    """Weights are the largest probabilities, falling, of experts that differ; renormalised they sum to 1."""
    k = data.draw(st.integers(1, num_experts))
    logits = _random(num_rows, num_experts, seed=seed) * 3
    weights, chosen = CpuDevice().route(logits, k, renormalise=renormalise)
    probabilities = logits.double().softmax(-1)
    best = probabilities.topk(k).values
    torch.testing.assert_close(probabilities.gather(1, chosen), best)
    if renormalise:
        best = best / best.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.double(), best, rtol=1e-5, atol=1e-7)
    assert all(len(set(row)) == k for row in chosen.tolist())


def test_of_equally_probable_experts_the_first_are_chosen() -> None:
    """A router that is indifferent chooses the same in any batch."""
    _, chosen = CpuDevice().route(torch.zeros(40, 100), 3, renormalise=True)
    assert chosen.tolist() == [[0, 1, 2]] * 40


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 30), st.integers(1, 6), st.data())
def test_a_row_gets_the_experts_that_it_chose(
    seed: int, num_rows: int, num_experts: int, data: st.DataObject
) -> None:
    """The grouped experts give each row the weighed sum of its own, also where nobody chose some, or all chose one."""
    k = data.draw(st.integers(1, num_experts))
    order = st.permutations(range(num_experts))
    rows = data.draw(st.lists(order, min_size=num_rows, max_size=num_rows))
    chosen = torch.tensor([row[:k] for row in rows])
    x, weights = _random(num_rows, WIDTH, seed=seed), _random(num_rows, k, seed=seed + 1)
    gate_up = _random(num_experts, 2 * HIDDEN, WIDTH, seed=seed + 2) / WIDTH**0.5
    down = _random(num_experts, WIDTH, HIDDEN, seed=seed + 3) / HIDDEN**0.5
    experts = CpuDevice().experts(
        (each.numpy() for each in gate_up),
        (each.numpy() for each in down),
        (num_experts, WIDTH, HIDDEN),
        "fp32",
    )
    wanted = torch.zeros_like(x)
    for row in range(num_rows):
        for j, expert in enumerate(chosen[row]):
            gate, up = (gate_up[expert] @ x[row]).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            wanted[row] += weights[row, j] * (down[expert] @ hidden)
    torch.testing.assert_close(experts(x, weights, chosen), wanted, rtol=1e-4, atol=1e-4)


def _weights(folder: Path, dtype: str, rank: Rank) -> Weights:
    if dtype == "w8a8":
        return from_prepared(open_prepared(folder, folder.parent), CpuDevice(), rank)
    config = ModelConfig.from_folder(folder)
    return from_checkpoint(config, Checkpoint(folder), dtype, CpuDevice(), rank)


@pytest.mark.parametrize("dtype", ["fp32", "w8a8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shares_of_all_ranks_add_up(tmp_path: Path, family: str, dtype: str) -> None:
    """What two or four ranks compute of a layer's MLP sums to what one computes alone."""
    folder = make_tiny(tmp_path / "tiny", family, with_tokenizer=False)
    x = _random(20, WIDTH, seed=1)
    alone = _weights(folder, dtype, Rank())
    for tp_size in (2, 4):
        ranks = [_weights(folder, dtype, Rank(tp=tp, tp_size=tp_size)) for tp in range(tp_size)]
        for index, layer in enumerate(alone.layers):
            total = torch.stack([rank.layers[index].mlp(x) for rank in ranks]).sum(0)
            torch.testing.assert_close(total, layer.mlp(x), rtol=1e-4, atol=1e-4)


def test_layers_are_sparse_where_the_config_says_so(tmp_path: Path) -> None:
    """Stages of a pipeline take their layers with what those are made of."""
    folder = make_tiny(tmp_path / "tiny", "qwen2_moe", layers=3, mlp_only_layers=[0, 2])
    for dtype in ("fp32", "w8a8"):
        kinds = [
            type(layer.mlp)
            for pp in range(2)
            for layer in _weights(folder, dtype, Rank(pp=pp, pp_size=2)).layers
        ]
        assert kinds == [DenseMlp, MoeMlp, DenseMlp]
    config = ModelConfig.from_folder(folder)
    assert [Rank(pp=pp, pp_size=3).part(config).sparse for pp in range(3)] == [
        (False,),
        (True,),
        (False,),
    ]


def test_experts_too_small_to_share_are_refused(tmp_path: Path) -> None:
    """Four ranks cannot cut experts of three groups of hidden values."""
    folder = make_tiny(tmp_path / "tiny", "qwen3_moe", moe_intermediate_size=96)
    with pytest.raises(ModelError, match="96 hidden"):
        Rank(tp_size=4).part(ModelConfig.from_folder(folder))


@pytest.mark.parametrize("dtype", ["fp32", "w8a8"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_missing_expert_is_named(tmp_path: Path, family: str, dtype: str) -> None:
    """A checkpoint that lacks a matrix of one expert is refused with its name."""
    folder = make_tiny(tmp_path / "tiny", family, with_tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layers.1." in name and ".experts.3." in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        _weights(folder, dtype, Rank())


def test_native_kernels_say_that_they_know_no_experts(tmp_path: Path) -> None:
    """Asked for in vain, they say why; else torch computes."""
    folder = make_tiny(tmp_path / "tiny", "mixtral", with_tokenizer=False)
    with pytest.raises(ModelError, match="mixtures of experts"):
        load(folder, kernels="native")
    assert "torch" in load(folder).description
