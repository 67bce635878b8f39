"""`bench scale --only relay`: weights that travel between real nodes, small ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepflow.bench.scale.node import Obtained
from deepflow.bench.scale.plan import BARS, RelayPlan
from deepflow.bench.scale.relay import check, relay
from shared.catalog import open_model
from shared.errors import Internal
from tests.worker.peers import MODEL, make_model

PLAN = RelayPlan(
    num_targets=2,
    num_rounds=1,
    num_forks=1,
    kv_tokens=512,
    prompt_len=16,
    num_prefills=1,
    batch=2,
    output_len=2,
    link_bytes_s=100e6,
)


async def test_weights_are_relayed_copied_and_mapped(tmp_path: Path) -> None:
    """Every figure of the part comes out of nodes that took the weights in the way that it is about, and nothing is
    left in a target's cache."""
    make_model(tmp_path)
    model = open_model(tmp_path, MODEL)
    steps: list[None] = []
    found = await relay(model, tmp_path, PLAN, 0, lambda: steps.append(None))
    assert len(steps) == PLAN.num_steps
    assert set(found) == {
        "relay_mb",
        "relay_link_mb_s",
        "relay_1_s",
        "relay_2_s",
        "relay_2_vs_1",
        "fork_copied_s",
        "fork_copied_gb_s",
        "fork_mapped_s",
        "fork_limit_mb_s",
        *(f"fork_slowdown_{name}" for name in ("prefill", "decode")),
        *(f"fork_slowdown_{name}_unlimited" for name in ("prefill", "decode")),
    }
    assert all(value > 0 for value in found.values())
    assert found["relay_2_vs_1"] == pytest.approx(found["relay_2_s"] / found["relay_1_s"])


def test_the_bar_is_about_the_plan() -> None:
    """What the bench is judged by is what it measures by default."""
    assert f"relay_{RelayPlan().num_targets}_vs_1" in {bar.metric for bar in BARS}


def test_weights_that_came_otherwise_do_not_count() -> None:
    """A target that found them where it is, or prepared them, would only look fast."""
    came = Obtained(began=0.0, ended=1.0, how="copied")
    check([came], "copied")
    for how in ("here", "mapped", "disk"):
        with pytest.raises(Internal, match=how):
            check([came, Obtained(began=0.0, ended=0.1, how=how)], "copied")
