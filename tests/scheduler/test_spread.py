"""What the rules make of whole traces, without time: blocks found, and how evenly the rest is spread."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepflow.bench.route.oracle import ideal, pooled
from deepflow.bench.route.spread import spread
from deepflow.sim.trace import BLOCK, CONVERSATION, TOOLAGENT, Call, conversations

CHAT = conversations(3000, 1, replace(CONVERSATION, rate=10.0))
AGENTS = conversations(3000, 2, replace(TOOLAGENT, rate=10.0))


@pytest.mark.parametrize("name", ["chat", "agents"])
def test_ours_finds_nearly_everything_and_spreads_the_rest(name: str) -> None:
    """With room for everything nearly all that any TE computed before is found where the prompt goes, although one
    block is in every prompt; and every minute's work is spread."""
    calls = CHAT if name == "chat" else AGENTS
    ours = spread(calls, "deepflow", num_tes=8)
    assert ours.found >= 0.97 * ideal(calls)
    assert ours.imbalance_p99 <= 1.4


def test_ours_is_worth_a_pooled_cache() -> None:
    """Eight small caches find nearly what one of their joint size would."""
    ours = spread(CHAT, "deepflow", num_tes=8, num_blocks=500)
    assert ours.found >= 0.95 * pooled(CHAT, 4000)


def test_the_longest_prefix_alone_collapses() -> None:
    """What all prompts share is on one TE first, and then everything: the reason for a rule of our own."""
    theirs = spread(CHAT[:1300], "strict-prefix", num_tes=8)
    assert theirs.imbalances == (8.0, 8.0)
    assert max(spread(CHAT[:1300], "deepflow", num_tes=8).imbalances) < 1.4


def test_few_prompts_without_anything_in_common_go_round() -> None:
    """A handful of unlike prompts in a minute is not piled on one TE."""
    calls = [Call(4000.0 * n, 10 * BLOCK, 1, tuple(range(10 * n, 10 * n + 10))) for n in range(31)]
    ours = spread(calls, "deepflow", num_tes=8)
    assert len(ours.imbalances) == 2
    assert max(ours.imbalances) <= 1.6
