"""W8A8 is batch-invariant: a row's logits are the same bits alone, batched, chunked, and after a prefix hit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.worker.flowserve import native_decoder
from services.worker.flowserve.decoder import Decoder, Floats, Span, StepInput
from services.worker.flowserve.device.cpu import rms_norm, rotate, route, swiglu
from services.worker.flowserve.device.cpu_linear import RowLinear
from tests.worker.drive import PAGE, Driver, Sequence, load, random_ids
from tests.worker.tiny import MOE_FAMILIES, make_tiny

LENGTH = 150  # more than two KV tiles
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    # The very head shape of SmolLM2: nine heads, three of keys, 64 wide.
    "nine-heads": (
        "llama",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "hidden_size": 576},
    ),
    "no-groups": ("llama", {"num_key_value_heads": 4}),
    "one-kv-head": ("mistral", {"num_key_value_heads": 1, "sliding_window": 70}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen2-moe": ("qwen2_moe", {}),
    "qwen3-moe": ("qwen3_moe", {}),
}


@pytest.fixture(scope="module", params=["native", "torch"])
def decoders(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """A decoder of each variant, and the logits of its test sequence computed alone, in one step."""
    if request.param == "native" and (why_not := native_decoder.available()):
        pytest.skip(why_not)
    root: Path = tmp_path_factory.mktemp("variants")

    @cache
    def get(variant: str) -> tuple[Decoder, Floats]:
        family, overrides = VARIANTS[variant]
        if request.param == "native" and family in MOE_FAMILIES:
            pytest.skip("the native kernels know no experts")
        folder = make_tiny(root / variant, family, **overrides)
        decoder = load(folder, kernels=request.param)
        return decoder, Driver(decoder).run(Sequence(random_ids(LENGTH))).logits

    return get


@st.composite
def _chunks(draw: st.DrawFn, length: int) -> list[int]:
    """A way to cut `length` tokens: a few chunks of any size, some single tokens (decode), then all that is left."""
    sizes: list[int] = []
    for size in draw(st.lists(st.sampled_from([1, 2, 7, 16, 31, 32, 33, 64, 100]), max_size=5)):
        sizes += [size] * (3 if size == 1 else 1)
    cut: list[int] = []
    for size in [*sizes, length]:
        if left := length - sum(cut):
            cut.append(min(size, left))
    return cut


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_chunks_and_mates_change_no_bit(decoders: Any, variant: str, data: st.DataObject) -> None:
    """However the sequence is chunked and whoever shares its steps, every logit is bit for bit the one computed
    alone in one step."""
    decoder, expected = decoders(variant)
    length = data.draw(st.integers(1, LENGTH))
    target = Sequence(random_ids(LENGTH)[:length])
    lengths = data.draw(st.lists(st.integers(1, 200), max_size=4))
    mates = [Sequence(random_ids(n, seed=n)) for n in lengths]
    plans = [data.draw(_chunks(len(one.ids))) for one in (target, *mates)]
    driver = Driver(decoder, seed=length)
    first = data.draw(st.booleans())
    while any(plans):
        parts = [
            (one, plan.pop(0)) for one, plan in zip((target, *mates), plans, strict=True) if plan
        ]
        driver.step(parts if first else parts[::-1])
    assert np.array_equal(target.logits, expected[:length])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prefix_hit_changes_no_bit(decoders: Any, variant: str) -> None:
    """Rows computed on top of blocks that another sequence filled, three tokens a step, equal those computed alone."""
    decoder, expected = decoders(variant)
    driver = Driver(decoder)
    ids = random_ids(LENGTH)
    donor = driver.run(Sequence(ids[:130]), chunk=3)
    for hit in (PAGE, 64, 128):
        heir = Sequence(ids, table=donor.table[: hit // PAGE], computed=hit)
        assert np.array_equal(driver.run(heir, chunk=40).logits, expected[hit:])


def test_sixty_four_decode_together(decoders: Any) -> None:
    """Sixty-four sequences of different lengths, decoded in one step, each equal themselves alone."""
    decoder, _ = decoders("qwen3")
    crowd = Driver(decoder, num_blocks=600)
    sequences = [Sequence(random_ids(2 + 2 * i, seed=i)) for i in range(64)]
    crowd.step([(one, len(one.ids) - 1) for one in sequences])
    crowd.step([(one, 1) for one in sequences])
    lonely = Driver(decoder, num_blocks=600)
    for one in sequences:
        alone = lonely.run(Sequence(one.ids))
        assert np.array_equal(alone.logits, one.logits)


def test_a_step_may_sample_nothing(decoders: Any) -> None:
    """A step of prompt chunks alone returns no logits."""
    decoder, _ = decoders("llama")
    driver = Driver(decoder)
    logits = driver.decoder.forward(StepInput([5, 6], [Span(0, 2, [3])], []))
    assert logits.shape == (0, 512)


@pytest.mark.parametrize("count", [1, 2, 60, 109, 151])
def test_work_between_products_is_row_by_row(count: int) -> None:
    """Norm, rotation, SwiGLU and routing give a row the same bits in any batch, also with an odd width that leaves
    tails behind whole vectors and with enough rows for torch to cut them up among threads."""
    x = torch.randn(151, 602, generator=torch.Generator().manual_seed(1))
    heads = x[:, :600].reshape(151, 6, 100).contiguous()
    cos, sin = heads[:, :1].cos(), heads[:, :1].sin()
    start = (151 - count) // 2
    rows = slice(start, start + count)
    weight = x[0].clone()
    assert torch.equal(rms_norm(x[rows], weight, 1e-5), rms_norm(x, weight, 1e-5)[rows])
    assert torch.equal(swiglu(x[rows]), swiglu(x)[rows])
    router = RowLinear(torch.randn(37, 602, generator=torch.Generator().manual_seed(2)).numpy())
    logits = router(x)
    assert torch.equal(router(x[rows]), logits[rows])
    for renormalise in (False, True):
        parts = route(logits[rows], 5, renormalise=renormalise)
        wholes = route(logits, 5, renormalise=renormalise)
        for part, whole in zip(parts, wholes, strict=True):
            assert torch.equal(part, whole[rows])
    assert torch.equal(rotate(heads[rows], cos[rows], sin[rows]), rotate(heads, cos, sin)[rows])
