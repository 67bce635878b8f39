"""Service tiers over real HTTP: what a caller asks for, what it gets, and what it is told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import openai
import pytest

from services.gateway.tiers import TIERS, band_of, tier_of
from shared.messages import Band
from tests.gateway.peers import MODEL, Peers
from tests.gateway.running import RunningGateway
from tests.gateway.tenants import QUESTION, Caller


def test_only_named_tenants_come_in_the_highest_band() -> None:
    """`priority` is for those that the operator names; for others it is the default tier, as is no tier, and `auto`."""
    named = frozenset({"alice"})
    assert [band_of(tier, "alice", named) for tier in (None, *TIERS)] == [
        Band.DEFAULT,
        Band.DEFAULT,
        Band.DEFAULT,
        Band.FLEX,
        Band.PRIORITY,
    ]
    assert band_of("priority", "bob", named) is Band.DEFAULT
    assert [tier_of(band) for band in Band] == ["priority", "default", "flex", "default"]


async def test_each_tenant_gets_its_tier_and_is_told(
    start: Callable[..., Awaitable[RunningGateway]], peers: Peers
) -> None:
    """The request carries the band, the answer names the tier; who may not ask for `priority` is told `default`."""
    gateway = await start(priority_tenants=frozenset({"alice"}))
    async with aiohttp.ClientSession() as http:
        for tenant, tier, band in (
            ("alice", "priority", Band.PRIORITY),
            ("bob", "priority", Band.DEFAULT),
            ("bob", "flex", Band.FLEX),
            ("bob", "auto", Band.DEFAULT),
        ):
            body = {"model": MODEL, "messages": QUESTION, "service_tier": tier}
            status, answer = await Caller(http, gateway, tenant).call(
                "POST", "/v1/chat/completions", body
            )
            assert status == 200
            assert peers.requests[-1].band is band
            assert answer["service_tier"] == tier_of(band)
        status, answer = await Caller(http, gateway, "bob").call(
            "POST", "/v1/chat/completions", {"model": MODEL, "messages": QUESTION, "priority": -5}
        )
        assert (status, answer["error"]["param"]) == (400, "priority")
        async with http.get(
            gateway.url + "/metrics", headers=Caller(http, gateway, "bob").headers
        ) as told:
            text = await told.text()
    assert 'deepflow_gateway_requests_total{band="default"} 2.0' in text
    assert 'deepflow_gateway_time_to_first_token_seconds_count{band="flex"} 1.0' in text


@pytest.mark.parametrize("stream", [False, True])
async def test_the_openai_client_reads_the_tier(
    gateway: RunningGateway, peers: Peers, stream: bool
) -> None:
    """On a keyless gateway whoever is on this machine may ask for any tier."""
    async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none") as client:
        answer: Any = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, service_tier="priority", stream=stream
        )
        answers = [chunk async for chunk in answer] if stream else [answer]
    assert {one.service_tier for one in answers} == {"priority"}
    assert peers.requests[0].band is Band.PRIORITY
