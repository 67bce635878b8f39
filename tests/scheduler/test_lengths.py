"""Predicted lengths: where they come from, what bounds them, and the table that answers."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.lengths import PRIOR, Features, Lengths, Quartiles
from services.scheduler.work import Length
from shared.errors import InvalidRequest
from shared.job_messages import PredictorEntry
from shared.length_table import (
    BUCKET_TOKENS,
    MAX_BUCKETS,
    NUM_FEATURES,
    ZERO,
    LengthTable,
    bucket_of,
)
from tests.scheduler.prompts import request


def table_for(features: Features, bucket: int, num_buckets: int = 4) -> LengthTable:
    """A table that answers `bucket` to these features, and 0 to others."""
    weights = bytearray([ZERO]) * (NUM_FEATURES * num_buckets)
    for number in features.numbers:
        weights[number * num_buckets + bucket] = ZERO + 1
    return LengthTable(num_buckets, bytes(weights))


def entry(table: LengthTable, created: int = 1) -> PredictorEntry:
    """The table's row."""
    return PredictorEntry(model="m", created=created, table=table.to_bytes())


def test_without_a_table_the_tenants_own_answers_decide_then_those_of_all() -> None:
    """A prior first; after a few answers the model's quartiles; after a few of its own the tenant's."""
    lengths = Lengths()
    assert lengths.predict(request()) == PRIOR
    for length in range(100, 900, 100):
        lengths.observe(Features.of(request(tenant="other")), length)
    assert lengths.predict(request()) == Length(low=300, mid=500)
    for length in range(10, 18):
        lengths.observe(Features.of(request()), length)
    assert lengths.predict(request()) == Length(low=12, mid=14)
    assert lengths.predict(request(kind="completion")) == PRIOR
    assert lengths.predict(request(model="n")) == PRIOR


def test_quartiles_forget_what_is_old() -> None:
    """After a window of short answers nothing is left of the long ones before."""
    quartiles = Quartiles()
    for length in [5000] * 100 + [10] * 64:
        quartiles.add(length)
    assert quartiles.length() == Length(low=10, mid=10)
    assert len(quartiles) == 64


def test_what_is_remembered_of_tenants_is_bounded() -> None:
    """A flood of tenants leaves the number of remembered ones bounded, and the model's quartiles in place."""
    lengths = Lengths()
    for number in range(6000):
        lengths.observe(Features.of(request(tenant=f"t{number}"), numbered=False), 40)
    assert len(lengths._seen) == 4096
    assert lengths.predict(request(tenant="new")).mid == 40


def test_a_table_answers_with_its_bucket() -> None:
    """The low end and the midpoint of the bucket whose weights the prompt's features add up to."""
    lengths = Lengths()
    known = request(prompt=list(range(500)))
    assert lengths.load(entry(table_for(Features.of(known), 2)))
    low = 2 * BUCKET_TOKENS
    assert lengths.predict(known) == Length(low=low + 1, mid=low + BUCKET_TOKENS // 2)
    assert lengths.created("m") == 1
    assert not lengths.load(entry(table_for(Features.of(known), 3)))  # the same creation: known
    lengths.keep_only([])
    assert lengths.predict(known) == PRIOR


def test_what_the_request_settles_is_not_predicted() -> None:
    """`ignore_eos` runs to `max_tokens`; what is beyond its prediction already goes on for half a bucket."""
    lengths = Lengths()
    assert lengths.predict(request(ignore_eos=True, max_tokens=99)) == Length(low=99, mid=99)
    resumed = request(ignore_eos=True, max_tokens=99, output=[[1] * 90])
    assert lengths.predict(resumed) == Length(low=9, mid=9)
    assert lengths.predict(request(output=[[1] * 600])) == Length(low=1, mid=64)
    assert lengths.predict(request(min_tokens=500)) == Length(low=500, mid=500)


@settings(max_examples=60)
@given(
    prompt=st.lists(st.integers(0, 2**31), max_size=400),
    max_tokens=st.integers(1, 10_000),
    min_tokens=st.integers(0, 10_000),
    delivered=st.integers(0, 10_000),
    bucket=st.none() | st.integers(0, 3),
    ignore_eos=st.booleans(),
)
def test_a_prediction_is_a_range_within_what_may_come(
    prompt: list[int],
    max_tokens: int,
    min_tokens: int,
    delivered: int,
    bucket: int | None,
    ignore_eos: bool,
) -> None:
    """1 <= low <= mid, and neither is more than the request still allows."""
    lengths = Lengths()
    one = request(
        prompt=prompt,
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens),
        output=[[0] * min(delivered, max_tokens)],
        ignore_eos=ignore_eos,
    )
    if bucket is not None:
        lengths.load(entry(table_for(Features.of(one), bucket)))
    found = lengths.predict(one)
    assert 1 <= found.low <= found.mid <= max(max_tokens - min(delivered, max_tokens), 1)


def test_features_are_few_and_the_same_in_every_process() -> None:
    """A prompt of any length has a bounded number of features, and JEs agree on them."""
    random = Random(1)
    long = Features.of(request(prompt=[random.randrange(50_000) for _ in range(100_000)]))
    assert len(long.numbers) <= 32 + 128 + 63 + 4
    assert len(set(long.numbers)) == len(long.numbers)
    assert max(long.numbers) < NUM_FEATURES
    assert Features.of(request(prompt=[5, 6])).numbers.tolist() == [
        0,
        738,
        1682,
        4599,
        4838,
        5116,
        5801,
    ]
    assert Features.of(request(prompt=[])).numbers[0] == 0
    assert Features.of(request(tenant="other")).numbers != Features.of(request()).numbers


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), num_buckets=st.integers(1, MAX_BUCKETS))
def test_the_table_adds_and_compares(seed: int, num_buckets: int) -> None:
    """The answer is the first bucket with the greatest sum of weights, and survives the trip through bytes."""
    random = Random(seed)
    table = LengthTable(num_buckets, random.randbytes(NUM_FEATURES * num_buckets))
    features = random.sample(range(NUM_FEATURES), random.randrange(0, 50))
    sums = [sum(table.weights[f * num_buckets + b] for f in features) for b in range(num_buckets)]
    assert table.bucket(features) == sums.index(max(sums))
    assert LengthTable.from_bytes(table.to_bytes()) == table


@settings(max_examples=50)
@given(data=st.binary(max_size=64), start=st.sampled_from([b"", b"DFLT1", b"DFLT1\x01"]))
def test_what_is_no_table_is_refused(data: bytes, start: bytes) -> None:
    """Bytes that are not a whole table raise InvalidRequest, and the table in use stays."""
    lengths = Lengths()
    lengths.load(entry(table_for(Features.of(request()), 3)))
    with pytest.raises(InvalidRequest):
        lengths.load(PredictorEntry(model="m", created=2, table=start + data))
    assert lengths.created("m") == 1


def test_buckets_are_of_128_tokens() -> None:
    """1 to 128 is the first bucket, and the last has no end."""
    assert [bucket_of(n, 3) for n in (0, 1, 128, 129, 256, 257, 10**6)] == [0, 0, 0, 1, 1, 2, 2]
