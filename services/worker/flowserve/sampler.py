"""From logits to tokens. A row's token depends on its logits, its own history and its counter noise, on nothing else.

The order of operations is vLLM's: min_tokens mask, logit bias, penalties, temperature, min_p, top_k, top_p, draw;
log-probabilities are those of the model itself (vLLM's `raw_logprobs`), taken before any of that.

Work goes row by row in numpy on one thread: each call sees one row of the vocabulary's width, so its reductions run in
the same order whatever the batch (reductions over [rows, vocab] do not promise that; argmax has nothing to round and
takes all rows at once). Nothing sorts the vocabulary: the few candidates are cut out first. This module must not know
sequences, blocks or the end of a choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from services.worker.flowserve.decoder import Floats
from services.worker.flowserve.noise import uniform
from shared.errors import InvalidRequest
from shared.messages import Sampling, TokenLogprobs

Ids: TypeAlias = npt.NDArray[np.intp]

GREEDY_BELOW = 1e-5  # temperatures below are greedy, as in vLLM
HUGE = 1e6  # no honest sampling parameter is larger; products of such numbers stay finite
BOUNDS = {
    "temperature": (0.0, HUGE),
    "top_p": (0.0, HUGE),
    "min_p": (0.0, 1.0),  # above, no token is left
    "repetition_penalty": (1 / HUGE, HUGE),
    "presence_penalty": (-HUGE, HUGE),
    "frequency_penalty": (-HUGE, HUGE),
}
SEGMENT = 512  # ids per partial sum when drawing from a wide row
# Weights are relative to the likeliest token's. Almost always the candidates lie above the first floor or the second;
# the last one takes all that can be drawn.
FLOORS = (2.0**-6, 2.0**-12, 2.0**-24, 2.0**-149)


class Sampled(NamedTuple):
    """One row's result."""

    token: int
    logprobs: TokenLogprobs | None


class Row:
    """What one choice asks of the sampler, and its history as far as sampling needs it.

    Counts for penalties are arrays of the vocabulary's width, made only where a penalty is set, and kept up token by
    token. `stop_ids` are masked until `min_tokens` tokens are out.
    """

    def __init__(
        self,
        sampling: Sampling,
        choice: int,
        prompt: Sequence[int],
        output: Sequence[int],
        *,
        stop_ids: Iterable[int],
        vocab: int,
    ) -> None:
        self.sampling = sampling
        self.choice = choice
        self.num_output = 0
        self.is_greedy = sampling.temperature < GREEDY_BELOW
        self.stop_ids = np.array([i for i in stop_ids if 0 <= i < vocab], dtype=np.intp)
        self.bias_ids = np.array(list(sampling.logit_bias), dtype=np.intp)
        self.bias = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        self.counts: npt.NDArray[np.float32] | None = None  # [vocab], of output tokens
        self.seen: npt.NDArray[np.bool_] | None = None  # [vocab], in prompt or output
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = np.zeros(vocab, dtype=np.float32)
        if sampling.repetition_penalty != 1.0:
            self.seen = np.zeros(vocab, dtype=np.bool_)
            self.seen[np.asarray(prompt, dtype=np.intp)] = True
        # Whether the model's logits are used as they are, once `min_tokens` are out.
        self._is_bare = self.counts is None and self.seen is None and not self.bias.size
        self._min_tokens = sampling.min_tokens if self.stop_ids.size else 0
        for token in output:
            self.push(token)

    def push(self, token: int) -> None:
        """Take note of an output token."""
        self.num_output += 1
        if self.counts is not None:
            self.counts[token] += 1
        if self.seen is not None:
            self.seen[token] = True

    @property
    def is_plain(self) -> bool:
        """Whether the model's logits are used as they are."""
        return self._is_bare and self.num_output >= self._min_tokens


def validate(sampling: Sampling, vocab: int) -> None:
    """Raises InvalidRequest, naming the field, for what would spoil the step of everybody in the batch.

    Only that: what makes sense as a request is judged where it comes in.
    """
    if not 0 <= sampling.seed < 1 << 64:
        raise InvalidRequest("a seed is an unsigned 64 bit number", param="seed")
    if any(not 0 <= token < vocab for token in sampling.logit_bias):
        raise InvalidRequest(f"ids go from 0 to {vocab - 1}", param="logit_bias")
    for param, (low, high) in BOUNDS.items():
        if not low <= getattr(sampling, param) <= high:  # so is NaN refused
            raise InvalidRequest(f"not a number from {low:g} to {high:g}", param=param)
    if sampling.logprobs is not None and sampling.logprobs < 0:
        raise InvalidRequest("no number of alternatives", param="logprobs")
    if not all(abs(bias) <= HUGE for bias in sampling.logit_bias.values()):
        raise InvalidRequest("not a usable number", param="logit_bias")


def sample(logits: Floats, rows: Sequence[Row]) -> list[Sampled]:
    """One token for each row of `logits` [rows, vocab], which is left unchanged; each `Row` takes note of its."""
    plain = [row.is_greedy and row.is_plain for row in rows]
    # Of equal logits the lowest id.
    best = logits.argmax(axis=1).tolist() if any(plain) else []
    results = []
    for index, row in enumerate(rows):
        x = logits[index]
        if plain[index]:
            token = best[index]
        else:
            adjusted = x if row.is_plain else adjust(x, row)
            token = int(adjusted.argmax()) if row.is_greedy else draw_token(adjusted, row)
        wanted = row.sampling.logprobs
        results.append(Sampled(token, None if wanted is None else logprobs_of(x, token, wanted)))
        row.push(token)
    return results


def sample_drafts(
    logits: Floats, rows: Sequence[Row], drafts: Sequence[Sequence[int]]
) -> list[list[Sampled]]:
    """Several tokens for each of `rows`, where its draft is right.

    `logits` has 1 + len(draft) rows for each: after its known tokens, and after each guess. They are sampled in turn
    for as long as the guesses come true, so a row with a draft of k gets 1 to k + 1 tokens, the last one unguessed.
    """
    results = []
    first = 0
    for row, draft in zip(rows, drafts, strict=True):
        run: list[Sampled] = []
        for index in range(first, first + 1 + len(draft)):
            run += sample(logits[index : index + 1], [row])
            if index - first < len(draft) and run[-1].token != draft[index - first]:
                break
        results.append(run)
        first += 1 + len(draft)
    return results


def adjust(x: Floats, row: Row) -> Floats:
    """A copy of the logits [vocab] with the min_tokens mask, the bias and the penalties applied."""
    x = x.copy()
    sampling = row.sampling
    if row.num_output < sampling.min_tokens:
        x[row.stop_ids] = -np.inf
    x[row.bias_ids] += row.bias
    if row.seen is not None:
        penalty = np.float32(sampling.repetition_penalty)
        ids = np.flatnonzero(row.seen)
        x[ids] = np.where(x[ids] > 0, x[ids] / penalty, x[ids] * penalty)
    if row.counts is not None:
        x -= np.float32(sampling.frequency_penalty) * row.counts
        x -= np.float32(sampling.presence_penalty) * (row.counts > 0)
    return x


def draw_token(x: Floats, row: Row) -> int:
    """A token from the tempered and truncated distribution of logits `x` [vocab], by inversion of its CDF.

    `weights` are probabilities relative to the likeliest token, so min_p compares with them directly; the CDF runs in
    order of ids, so the draw needs no sort.
    """
    sampling = row.sampling
    noise = uniform(sampling.seed, row.choice, row.num_output)
    weights = x - x.max()
    if sampling.temperature != 1.0:
        weights /= np.float32(sampling.temperature)
    np.exp(weights, out=weights)
    ids: Ids | None = None  # of `weights`; None: all
    if sampling.min_p > 0:
        ids = np.flatnonzero(weights >= np.float32(sampling.min_p))
        weights = weights[ids]
    if 0 < sampling.top_k < len(weights):
        kept = largest(weights, sampling.top_k)
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    if sampling.top_p < 1:
        kept = nucleus(weights, sampling.top_p)
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    position = invert(weights, noise)
    return position if ids is None else int(ids[position])


def largest(weights: Floats, count: int) -> Ids:
    """Positions, ascending, of the `count` largest weights and of any that equal the last of them (as vLLM does).

    Fewer than `count` only where no more weights are above zero.
    """
    for floor in FLOORS:
        ids = np.flatnonzero(weights >= floor)
        if len(ids) >= count:
            break
    if len(ids) <= count:
        return ids
    cut = np.partition(weights[ids], len(ids) - count)[len(ids) - count]
    kept: Ids = ids[weights[ids] >= cut]
    return kept


def nucleus(weights: Floats, mass: float) -> Ids:
    """Positions, ascending, of the likeliest tokens whose predecessors hold less than `mass` of the total (top_p).

    Of equal weights the lower position counts as likelier.
    """
    wanted = mass * float(weights.sum(dtype=np.float64))
    for floor in FLOORS:
        ids = np.flatnonzero(weights >= floor)
        if weights[ids].sum(dtype=np.float64) >= wanted:
            break
    ids = ids[np.argsort(-weights[ids], kind="stable")]
    num_kept = int(np.searchsorted(np.cumsum(weights[ids], dtype=np.float64), wanted)) + 1
    return np.sort(ids[:num_kept])


def invert(weights: Floats, noise: float) -> int:
    """The first position at which the running sum of weights exceeds `noise` of the total; never a zero weight.

    Two levels, because a running sum over a whole vocabulary is slow: sums of segments, then inside one segment.
    """
    num_segments = len(weights) // SEGMENT
    whole = weights[: num_segments * SEGMENT].reshape(-1, SEGMENT)
    # The sums of segments in fp32: twice as fast as any other way, and each segment by itself.
    parts = np.empty(num_segments + 1, np.float64)
    parts[:-1] = np.einsum("ij->i", whole)
    parts[-1] = weights[num_segments * SEGMENT :].sum(dtype=np.float64)
    sums = np.cumsum(parts)
    target = noise * sums[-1]
    # The first sum above the target; rounding may leave none, then the last segment that adds anything.
    segment = min(int(np.searchsorted(sums, target, "right")), int(np.searchsorted(sums, sums[-1])))
    start = segment * SEGMENT
    rest = target - (sums[segment - 1] if segment else 0.0)
    inner = np.cumsum(weights[start : start + SEGMENT], dtype=np.float64)
    position = min(
        int(np.searchsorted(inner, rest, "right")), int(np.searchsorted(inner, inner[-1]))
    )
    return start + position


def logprobs_of(x: Floats, token: int, num_top: int) -> TokenLogprobs:
    """Natural-log probabilities under logits `x` [vocab]: of `token`, and of the `num_top` likeliest, best first."""
    top = x.max()
    weights = np.exp(x - top)
    log_total = float(top) + float(np.log(weights.sum(dtype=np.float64)))
    if num_top == 0:
        return TokenLogprobs(logprob=float(x[token]) - log_total)
    ids = largest(weights, num_top)
    if len(ids) < num_top:
        ids = np.arange(len(x))
    ids = ids[np.argsort(-x[ids], kind="stable")][:num_top]
    return TokenLogprobs(
        logprob=float(x[token]) - log_total,
        top_ids=ids.tolist(),
        top_logprobs=[float(value) - log_total for value in x[ids]],
    )
