"""From logits to tokens, against a naive reference over the sorted vocabulary."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.flowserve.decoder import Floats
from services.worker.flowserve.noise import uniform
from services.worker.flowserve.sampler import Row, draw_token, invert, sample, sample_drafts
from shared.messages import Sampling

VOCAB = 64
WIDE = 49_152


def row(
    prompt: tuple[int, ...] = (1, 2),
    output: tuple[int, ...] = (),
    *,
    choice: int = 0,
    vocab: int = VOCAB,
    stop_ids: tuple[int, ...] = (0,),
    **fields: Any,
) -> Row:
    sampling = Sampling(**{"max_tokens": 100, "seed": 1} | fields)
    return Row(sampling, choice, prompt, output, stop_ids=stop_ids, vocab=vocab)


def logits(num_rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3) -> Floats:
    return np.random.default_rng(seed).standard_normal((num_rows, vocab), np.float32) * np.float32(
        scale
    )


def softmax(x: Floats) -> Floats:
    """In double precision."""
    weights = np.exp(x.astype(np.float64) - x.max())
    return weights / weights.sum()


def reference(x: Floats, sampling: Sampling) -> Floats:
    """The distribution that vLLM's order of operations leaves: temperature, min_p, top_k, top_p."""
    x = x.astype(np.float64) / sampling.temperature
    probs = softmax(x)
    x[probs < sampling.min_p * probs.max()] = -np.inf
    if 0 < sampling.top_k < len(x):
        x[x < np.sort(x)[-sampling.top_k]] = -np.inf
    order = np.argsort(x, kind="stable")
    masked = softmax(x[order]).cumsum() <= 1 - sampling.top_p + 1e-12
    masked[-1] = False
    x[order[masked]] = -np.inf
    return softmax(x)


def test_greedy_takes_the_likeliest_and_the_lowest_of_equals() -> None:
    """Temperature 0 is argmax, with ties broken by id."""
    x = np.zeros((3, VOCAB), np.float32)
    x[1, 40] = x[1, 30] = 2
    x[2, 63] = 1
    rows = [row(temperature=0) for _ in range(3)]
    assert [result.token for result in sample(x, rows)] == [0, 30, 63]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.1, 12),
    temperature=st.floats(0.05, 2),
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
)
def test_a_draw_inverts_the_reference_distribution(
    seed: int, scale: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """The token drawn is where the reference's cumulative distribution, in order of ids, passes the noise."""
    x = logits(1, seed=seed, scale=scale)
    one = row(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probs = reference(x[0], one.sampling)
    cdf = probs.cumsum()
    token = draw_token(x[0], one)
    noise = uniform(seed, 0, 0)
    before = float(cdf[token] - probs[token])
    slack = 1e-5
    # Float rounding may move a token across the edge of top_p or min_p; then it has hardly any weight in the margin.
    assert before - slack <= noise <= float(cdf[token]) + slack or _is_at_an_edge(x[0], one, slack)


def _is_at_an_edge(x: Floats, one: Row, slack: float) -> bool:
    """Whether a hair's change of top_p or min_p changes the reference's support."""
    s = one.sampling
    supports = set()
    for sign in (-1, 0, 1):
        moved = Sampling(
            max_tokens=1,
            seed=s.seed,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=min(s.top_p * (1 + sign * slack), 1.0),
            min_p=s.min_p * (1 + sign * slack),
        )
        supports.add(tuple((reference(x, moved) > 0).tolist()))
    return len(supports) > 1


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.3, "top_k": 8},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_draws_follow_the_exact_distribution(fields: dict[str, Any]) -> None:
    """A chi-squared test of 4,000 positions against the exact softmax; what was cut off is never drawn."""
    x, num_draws = logits(1, seed=7, scale=1.5), 4000
    one = row(stop_ids=(), **fields)
    drawn = Counter(sample(x, [one])[0].token for _ in range(num_draws))
    probs = reference(x[0], one.sampling)
    assert all(probs[token] > 0 for token in drawn)
    # Cells expected fewer than five times are one cell together.
    expected, seen, rare = [], [], [0.0, 0.0]
    for token in range(VOCAB):
        if probs[token] * num_draws >= 5:
            expected.append(probs[token] * num_draws)
            seen.append(drawn[token])
        else:
            rare[0] += probs[token] * num_draws
            rare[1] += drawn[token]
    if rare[0] >= 5:
        expected.append(rare[0])
        seen.append(int(rare[1]))
    assert len(expected) >= 5
    statistic = sum((s - e) ** 2 / e for s, e in zip(seen, expected, strict=True))
    # Wilson and Hilferty's approximation of the 0.999 quantile; the noise is fixed, so this never wavers.
    freedom = len(expected) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < quantile


def test_top_k_keeps_what_equals_the_last_one() -> None:
    """Ties at the cut stay in, as in vLLM."""
    x = np.full((1, VOCAB), -5.0, np.float32)
    x[0, :4] = [3.0, 2.0, 2.0, 1.0]
    one = row(top_k=2, temperature=1.5)
    assert {sample(x, [one])[0].token for _ in range(300)} == {0, 1, 2}


def test_top_p_always_keeps_one() -> None:
    """However small, top_p leaves the likeliest token."""
    x = logits(1, scale=0.1)
    one = row(top_p=1e-6)
    assert {sample(x, [one])[0].token for _ in range(20)} == {int(x.argmax())}


def test_penalties_follow_the_definition() -> None:
    """Repetition over prompt and output, by sign; frequency and presence over output only."""
    x = np.zeros((1, VOCAB), np.float32)
    x[0, 1:6] = [6.0, -6.0, 5.0, 4.0, 3.5]
    one = row((1,), (3, 4), temperature=0, repetition_penalty=1.1)
    assert sample(x, [one])[0].token == 1  # 5.45 against 4.55, 3.64, 3.5
    one = row((1,), (3, 4), temperature=0, repetition_penalty=2.0)
    assert sample(x, [one])[0].token == 5  # 3, 2.5, 2, and 3.5 untouched
    one = row((1,), (1, 1, 3), temperature=0, frequency_penalty=0.6)
    assert sample(x, [one])[0].token == 1  # 4.8 against 4.4
    one = row((1,), (1, 1, 1, 3), temperature=0, frequency_penalty=0.6)
    assert sample(x, [one])[0].token == 3  # 4.2 against 4.4
    one = row((3,), (1, 1, 1), temperature=0, presence_penalty=1.5)
    assert sample(x, [one])[0].token == 3  # 4.5 against 5: the prompt does not count


def test_a_negative_logit_is_made_more_negative_by_repetition() -> None:
    """The penalty divides positive and multiplies negative logits."""
    x = np.full((1, 4), -2.0, np.float32)
    x[0, 1] = -1.9
    assert sample(x, [row((1,), (), vocab=4, temperature=0, repetition_penalty=1.5)])[0].token == 0


def test_history_kept_token_by_token_equals_history_given_at_once() -> None:
    """A resubmitted request's penalties are those of the uninterrupted one."""
    fields = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
    whole = row(**fields)
    tokens = [sample(logits(1, seed=i), [whole])[0].token for i in range(12)]
    for cut in (1, 5, 11):
        resumed = row(output=tuple(tokens[:cut]), **fields)
        rest = [sample(logits(1, seed=i), [resumed])[0].token for i in range(cut, 12)]
        assert rest == tokens[cut:]


def test_logit_bias_can_force_and_ban() -> None:
    """A bias is added before anything else; the log-probabilities stay the model's."""
    x = logits(1)
    forced = row(temperature=0, logit_bias={9: 100.0}, logprobs=1)
    result = sample(x, [forced])[0]
    assert result.token == 9
    assert result.logprobs is not None
    assert result.logprobs.top_ids == [int(x.argmax())]
    assert result.logprobs.logprob == pytest.approx(np.log(softmax(x[0])[9]), abs=1e-5)


def test_no_choice_ends_before_min_tokens() -> None:
    """Stop ids are masked until enough tokens are out, then allowed."""
    x = np.zeros((1, VOCAB), np.float32)
    x[0, 0] = 10
    x[0, 7] = 9
    one = row(temperature=0, min_tokens=2, stop_ids=(0, 7))
    assert [sample(x, [one])[0].token for _ in range(3)] == [1, 1, 0]


@pytest.mark.parametrize("num_top", [0, 1, 5, 20, VOCAB])
def test_logprobs_are_those_of_the_model(num_top: int) -> None:
    """Natural logs of the untempered distribution, best first, whatever the sampling."""
    x = logits(4, seed=3)
    results = sample(x, [row(logprobs=num_top, temperature=0.3, top_k=5) for _ in range(4)])
    for result, values in zip(results, x, strict=True):
        assert result.logprobs is not None
        wanted = np.log(softmax(values))
        top = np.argsort(-wanted, kind="stable")[:num_top]
        assert result.logprobs.top_ids == top.tolist()
        np.testing.assert_allclose(result.logprobs.top_logprobs, wanted[top], atol=1e-5)
        assert result.logprobs.logprob == pytest.approx(float(wanted[result.token]), abs=1e-5)


def test_logprobs_reach_beyond_what_can_be_drawn() -> None:
    """Tokens whose probability is below the smallest number are listed all the same, in order."""
    x = np.arange(VOCAB, dtype=np.float32)[None] * -40
    result = sample(x, [row(temperature=0.1, top_k=10, logprobs=9)])[0]
    assert result.token == 0
    assert result.logprobs is not None
    assert result.logprobs.top_ids == list(range(9))
    assert result.logprobs.top_logprobs == pytest.approx([-40.0 * i for i in range(9)])


@pytest.mark.parametrize("num_rows", [2, 7, 32])
def test_a_row_does_not_depend_on_its_batch_mates(num_rows: int) -> None:
    """Bit-equal tokens and log-probabilities alone and in a batch, at a real vocabulary's width."""
    x = logits(num_rows, WIDE)
    x[:, 11] = x[:, 4321] = x.max() + 1  # ties at the top

    def fresh() -> list[Row]:
        kinds: list[dict[str, Any]] = [
            {"temperature": 0},
            {"temperature": 1.0},
            {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
            {"temperature": 1.2, "min_p": 0.05, "repetition_penalty": 1.1},
            {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.2},
        ]
        return [
            row((4, 8), (15, 16), vocab=WIDE, choice=i, logprobs=3, **kinds[i % len(kinds)])
            for i in range(num_rows)
        ]

    together = sample(x, fresh())
    alone = [sample(x[i : i + 1].copy(), [one])[0] for i, one in enumerate(fresh())]
    assert together == alone


@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"temperature": 1.2, "frequency_penalty": 1.0, "logprobs": 1}]
)
def test_guesses_bring_the_tokens_that_come_without(fields: dict[str, Any]) -> None:
    """Right guesses bring one more token each, the first wrong one none of those behind it; penalties see each."""
    x = logits(5)
    one = row(**fields)
    truth = [sample(x[i : i + 1], [one])[0] for i in range(5)]
    right = [result.token for result in truth[:4]]
    for num_right in range(5):
        draft = right[:num_right] + [(token + 1) % VOCAB for token in right[num_right:]]
        one, other = row(**fields), row(temperature=0)
        run, beside = sample_drafts(np.concatenate((x, x[:1])), [one, other], [draft, ()])
        assert run == truth[: num_right + 1]
        assert one.num_output == num_right + 1
        assert [result.token for result in beside] == [int(x[0].argmax())]


def test_sampling_leaves_the_logits_as_they_were() -> None:
    """Penalties and bias work on a copy."""
    x = logits(1)
    before = x.copy()
    sample(x, [row(output=(3,), logit_bias={1: 5.0}, repetition_penalty=1.5, presence_penalty=1)])
    assert np.array_equal(x, before)


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=1500).filter(any),
    noise=st.floats(0, 1, exclude_max=True),
)
def test_inversion_never_draws_what_has_no_weight(weights: list[float], noise: float) -> None:
    """Also at the ends of the noise, and where whole segments are empty."""
    array = np.array(weights, dtype=np.float32)
    for value in (noise, 0.0, 1 - 2.0**-53):
        assert array[invert(array, value)] > 0
