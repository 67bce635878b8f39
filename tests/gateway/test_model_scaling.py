"""`/v1/models/{id}`: how many replicas a model may have, as anybody sees it and as the operator sets it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest

from services.gateway.openai.scaling import read_scaling
from shared.bus import Bus
from shared.errors import InvalidRequest
from shared.scaling_messages import ScalingEntry, SetScaling
from tests.gateway.peers import MODEL
from tests.gateway.tenants import Caller

PATH = "/v1/models/" + quote(MODEL)


def asked(scaling: Any) -> tuple[int | None, int | None, float | None]:
    """The bounds and the keep-alive that a body asks for."""
    order = read_scaling({"scaling": scaling}, model="m", by="operator")
    assert (order.model, order.by) == ("m", "operator")
    return order.min_tes, order.max_tes, order.keep_alive_s


def test_what_is_absent_stays_and_null_takes_back() -> None:
    """As in a JSON merge patch; a target is both bounds at once."""
    assert asked({}) == (None, None, None)
    assert asked({"min": 0, "max": 8}) == (0, 8, None)
    assert asked({"max": 8, "keep_alive_s": 1.5}) == (None, 8, 1.5)
    assert asked({"min": None, "max": 8}) == (-1, 8, None)
    assert asked({"target": 3, "keep_alive_s": None}) == (3, 3, -1)
    assert asked({"target": None}) == (-1, -1, None)
    assert asked(None) == (-1, -1, -1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], "body"),
        ({}, "scaling"),
        ({"scaling": {}, "id": "x"}, "id"),
        ({"scaling": 3}, "scaling"),
        ({"scaling": {"min": -1}}, "scaling.min"),
        ({"scaling": {"min": True}}, "scaling.min"),
        ({"scaling": {"max": 1.5}}, "scaling.max"),
        ({"scaling": {"max": 10**9}}, "scaling.max"),
        ({"scaling": {"min": 3, "max": 2}}, "scaling.max"),
        ({"scaling": {"target": 3, "max": 3}}, "scaling.max"),
        ({"scaling": {"target": 3, "min": None}}, "scaling.min"),
        ({"scaling": {"keep_alive_s": "1 s"}}, "scaling.keep_alive_s"),
        ({"scaling": {"keep_alive_s": -0.1}}, "scaling.keep_alive_s"),
        ({"scaling": {"most": 3}}, "scaling.most"),
    ],
)
def test_what_makes_no_sense_is_named(body: Any, param: str) -> None:
    """Each mistake is an error that names the field."""
    with pytest.raises(InvalidRequest) as refused:
        read_scaling(body, model="m", by="operator")
    assert refused.value.param == param


@pytest.fixture
async def orders(bus: Bus, callers: tuple[Caller, Caller, Caller]) -> AsyncIterator[list[Any]]:
    """A scheduler that keeps what is set, and the orders it got."""
    got: list[SetScaling] = []
    entry = ScalingEntry(model=MODEL)

    async def answer(order: SetScaling) -> ScalingEntry:
        nonlocal entry
        got.append(order)
        if order.max_tes is not None and order.max_tes > 100:
            raise InvalidRequest("there is no room for so many", param="max")
        if order.max_tes is not None:
            entry = ScalingEntry(
                model=MODEL, min_tes=order.min_tes, max_tes=order.max_tes, keep_alive_s=2.0
            )
        return entry

    served = await bus.serve(bus.subjects.scaling("*"), (SetScaling,), answer)
    await bus.flush()
    yield got
    await served.stop()


async def test_the_operator_sets_what_everybody_sees(
    callers: tuple[Caller, Caller, Caller], orders: list[Any]
) -> None:
    """PATCH goes to a scheduler, and GET shows what is set; a refusal comes back with its field."""
    alice, _, operator = callers
    status, body = await alice.call("GET", PATH)
    assert (status, body["id"]) == (200, MODEL)
    assert body["scaling"] == {"min": None, "max": None, "target": None, "keep_alive_s": None}
    assert orders == [SetScaling(model=MODEL, by="alice")]
    status, body = await operator.call("PATCH", PATH, {"scaling": {"target": 4}})
    assert status == 200
    assert orders[-1] == SetScaling(model=MODEL, by="operator", min_tes=4, max_tes=4)
    _, shown = await alice.call("GET", PATH)
    assert shown == body
    assert shown["scaling"] == {"min": 4, "max": 4, "target": 4, "keep_alive_s": 2.0}
    status, body = await operator.call("PATCH", PATH, {"scaling": {"max": 101}})
    assert (status, body["error"]["param"]) == (400, "scaling.max")


async def test_nobody_else_may_set_it(
    callers: tuple[Caller, Caller, Caller], orders: list[Any]
) -> None:
    """Another tenant gets 403, an unknown model 404, a bad body 400, and no scheduler hears of it."""
    alice, _, operator = callers
    status, body = await alice.call("PATCH", PATH, {"scaling": {"target": 4}})
    assert (status, body["error"]["code"]) == (403, "forbidden")
    status, body = await operator.call("PATCH", "/v1/models/nobody", {"scaling": {"target": 4}})
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    status, body = await operator.call("PATCH", PATH, {"scaling": {"min": "all"}})
    assert (status, body["error"]["param"]) == (400, "scaling.min")
    assert orders == []


async def test_a_model_is_shown_when_no_scheduler_is_there(
    callers: tuple[Caller, Caller, Caller],
) -> None:
    """What nobody can tell is null; setting it is 503."""
    alice, _, operator = callers
    status, body = await alice.call("GET", PATH)
    assert (status, body["id"], body["scaling"]) == (200, MODEL, None)
    status, _ = await operator.call("PATCH", PATH, {"scaling": {"target": 4}})
    assert status == 503
