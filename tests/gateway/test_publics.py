"""What tenants share: the pages of a public prefix but its last, and nothing else, whatever they go on with."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.publics import PublicPrefixes
from shared.blockhash import chain, extend, root
from shared.messages import ContextCache, ModelEntry

PAGE = 4
PUBLIC = b"public"
MODEL = ModelEntry(
    name="m",
    folder="m",
    context=1024,
    vocab=4,
    page=PAGE,
    eos_ids=[0],
    tokenizer_digest="",
    template_digest="",
    recipe_digest="r",
)
IDS = st.lists(st.integers(0, 1), max_size=30)  # two tokens: prefixes are often equal


async def secret() -> bytes:
    """What public pages are hashed with."""
    return PUBLIC


def context(number: int, ids: list[int]) -> ContextCache:
    """A public cache of these tokens."""
    return ContextCache(
        id=f"c{number}",
        tenant="operator",
        model=MODEL.name,
        name="",
        num_tokens=len(ids),
        created=0,
        expires=1,
        public=True,
        prefix=ids,
    )


async def all_hashes(
    publics: PublicPrefixes, tenant: bytes, prompt: list[int], new: list[int]
) -> list[bytes]:
    """Of a prompt's pages as the gateway names them, and of what an engine generates after it."""
    shared = await publics.hashes(MODEL, prompt)
    start = extend(shared[-1], tenant) if shared else root(tenant, MODEL.recipe_digest, str(PAGE))
    hashes = shared + chain(start, prompt[len(shared) * PAGE :], PAGE)
    parent = hashes[-1] if hashes else root(tenant, MODEL.recipe_digest, str(PAGE))
    return hashes + chain(parent, [*prompt, *new][len(hashes) * PAGE :], PAGE)


@given(
    prefixes=st.lists(st.lists(st.integers(0, 1), min_size=2 * PAGE, max_size=20), max_size=4),
    first=IDS,
    second=IDS,
    tail=IDS,
    new=IDS,
    begin=st.integers(0, 3),
)
async def test_tenants_share_public_pages_only(
    prefixes: list[list[int]],
    first: list[int],
    second: list[int],
    tail: list[int],
    new: list[int],
    begin: int,
) -> None:
    """Two tenants' pages, generated ones included, have a name in common exactly where they are equal from the start
    and lie in the shared pages of public prefixes that both prompts begin with."""
    publics = PublicPrefixes(secret)
    for number, ids in enumerate(prefixes):
        publics.add(context(number, ids))
    known = prefixes[begin % len(prefixes)] if prefixes else []
    prompts = [[*known, *first, *tail], [*known, *second, *tail]]

    alice = await all_hashes(publics, b"alice", prompts[0], new)
    bob = await all_hashes(publics, b"bob", prompts[1], new)

    equal = 0
    while equal < min(num_shared_of(prefixes, prompt) for prompt in prompts):
        end = (equal + 1) * PAGE
        if prompts[0][:end] != prompts[1][:end]:
            break
        equal += 1
    assert {*alice} & {*bob} == {*alice[:equal]}
    assert alice[:equal] == bob[:equal]


def num_shared_of(prefixes: list[list[int]], prompt: list[int]) -> int:
    """How many pages of a prompt are shared: those of the longest prefix it begins with, but the last."""
    lengths = [len(ids) for ids in prefixes if prompt[: len(ids)] == ids]
    return max(lengths, default=0) // PAGE - 1 if lengths else 0


@given(prefix=st.lists(st.integers(0, 1), min_size=2 * PAGE, max_size=20), turn=IDS, more=IDS)
async def test_a_tenant_finds_its_own_again(
    prefix: list[int], turn: list[int], more: list[int]
) -> None:
    """The next turn of a conversation after a public prefix begins with all page names of the turn before it, with
    those of what was generated."""
    publics = PublicPrefixes(secret)
    publics.add(context(0, prefix))
    before = await all_hashes(publics, b"alice", [*prefix, *turn], more)

    after = await all_hashes(publics, b"alice", [*prefix, *turn, *more, 1], [])

    assert after[: len(before)] == before


async def test_prefixes_come_and_go() -> None:
    """The longest prefix counts; one that is not kept is forgotten, and another recipe has other hashes."""
    publics = PublicPrefixes(secret)
    publics.add(context(0, [1] * 8))
    publics.add(context(1, [1] * 16))
    assert len(await publics.hashes(MODEL, [1] * 15)) == 1
    long = await publics.hashes(MODEL, [1] * 16)
    assert long == chain(root(PUBLIC, "r", str(PAGE)), [1] * 12, PAGE)
    publics.keep(["c0"])
    assert ("c0" in publics, "c1" in publics) == (True, False)
    assert await publics.hashes(MODEL, [1] * 16) == long[:1]
    assert await publics.hashes(MODEL, [0] * 16) == []
