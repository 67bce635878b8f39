"""Block hashes: a chain depends on all that came before, on the tenant, and on nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.blockhash import DIGEST_BYTES, chain, extend, root

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=100)
ROOT = root(b"secret", "model", "16")


@given(ids=IDS, page=st.integers(1, 20))
def test_a_chain_has_one_hash_per_full_page(ids: list[int], page: int) -> None:
    """There are len // page hashes of fixed size, and a longer text keeps the hashes of its prefix."""
    hashes = chain(ROOT, ids, page)

    assert len(hashes) == len(ids) // page
    assert all(len(digest) == DIGEST_BYTES for digest in hashes)
    assert chain(ROOT, [*ids, 7], page)[: len(hashes)] == hashes


@given(ids=IDS, page=st.integers(1, 20), cut=st.integers(0, 5))
def test_a_chain_can_be_continued(ids: list[int], page: int, cut: int) -> None:
    """Hashing in two goes gives the hashes of one go."""
    hashes = chain(ROOT, ids, page)
    cut = min(cut, len(hashes))
    parent = hashes[cut - 1] if cut else ROOT

    assert hashes[:cut] + chain(parent, ids[cut * page :], page) == hashes


@given(ids=st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=40), at=st.integers(0, 39))
def test_a_changed_token_changes_every_later_hash(ids: list[int], at: int) -> None:
    """Hashes before the changed page stay, all from it on differ."""
    at %= len(ids)
    other = [*ids]
    other[at] ^= 1
    before, after = chain(ROOT, ids, 4), chain(ROOT, other, 4)

    assert before[: at // 4] == after[: at // 4]
    assert all(a != b for a, b in zip(before[at // 4 :], after[at // 4 :], strict=True))


def test_roots_differ_by_tenant_and_by_part_boundaries() -> None:
    """Another secret, another part, or the same letters cut elsewhere give another root."""
    roots = {root(b"a", "xy", "z"), root(b"b", "xy", "z"), root(b"a", "x", "yz"), root(b"a", "xyz")}

    assert len(roots) == 4


def test_the_chain_is_stable_across_versions() -> None:
    """The hash of a known page is this very value: every process and release must agree on it."""
    assert chain(bytes(16), range(16), 16)[0].hex() == "eedd4ec522e47583caadbe52d0e12ad4"


@given(ids=st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=40), page=st.integers(1, 4))
def test_what_follows_a_shared_prefix_is_each_tenants_own(ids: list[int], page: int) -> None:
    """The same tokens after the same shared page have other hashes for every tenant, and none that a chain without the
    keyed step, or from a root, would have."""
    shared = chain(ROOT, ids[:page], page)[-1]
    tails = [
        chain(start, ids, page)
        for start in (
            shared,
            extend(shared, b"alice"),
            extend(shared, b"bob"),
            extend(ROOT, b"alice"),
            root(b"alice", shared.hex()),
            root(b"alice"),
        )
    ]

    assert len({digest for tail in tails for digest in tail}) == sum(map(len, tails))


def test_the_extension_is_stable_across_versions() -> None:
    """The step into a tenant's chain is this very value: every gateway and release must agree on it."""
    assert extend(bytes(16), b"secret").hex() == "e16e2062271456f5227ddfcc4a9d9514"
