"""The HTTP routes of `/v1/models`: what may be asked for, and how many replicas each model may have.

A model is listed, and takes requests, for as long as it is in the catalogue, whether or not a replica of it is up. This
module must not know how replicas are started.
"""

from __future__ import annotations

from typing import Any, Final

from aiohttp import web

from services.gateway.catalogue import Catalogue
from services.gateway.http import TENANT, json_response, read_json, require_operator
from services.gateway.openai.bodies import model_body, models_body
from services.gateway.openai.scaling import read_scaling, scaling_body
from services.gateway.settings import GatewaySettings
from shared.bus import Bus
from shared.errors import DeadlineExceeded, InvalidRequest, Unavailable
from shared.messages import ModelEntry
from shared.scaling_messages import ScalingEntry, SetScaling

_ASK_S: Final = 1.0
_CHANGE_S: Final = 5.0


class ModelRoutes:
    """The handlers of one gateway."""

    def __init__(self, settings: GatewaySettings, catalogue: Catalogue, bus: Bus) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._bus = bus

    def add_to(self, app: web.Application) -> None:
        """Register every route."""
        app.router.add_get("/v1/models", self.list)
        app.router.add_get("/v1/models/{name:.+}", self.get)
        app.router.add_patch("/v1/models/{name:.+}", self.change)

    async def list(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        return json_response(models_body([model.entry for model in self._catalogue.models()]))

    async def get(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}; ids may hold slashes. `scaling` is null while no scheduler says what was set."""
        model = (await self._catalogue.find(request.match_info["name"])).entry
        question = SetScaling(model=model.name, by=request[TENANT])
        try:
            entry = await self._scaling(question, _ASK_S)
        except (Unavailable, DeadlineExceeded):
            return json_response({**model_body(model), "scaling": None})
        return json_response(_body(model, entry))

    async def change(self, request: web.Request) -> web.Response:
        """PATCH /v1/models/{id}: the operator says how many replicas there may be."""
        require_operator(request, self._settings)
        body = await read_json(request, self._settings)
        model = (await self._catalogue.find(request.match_info["name"])).entry
        order = read_scaling(body, model=model.name, by=request[TENANT])
        return json_response(_body(model, await self._scaling(order, _CHANGE_S)))

    async def _scaling(self, order: SetScaling, timeout_s: float) -> ScalingEntry:
        subject = self._bus.subjects.scaling(order.model)
        try:
            return await self._bus.request(subject, order, ScalingEntry, timeout_s=timeout_s)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param=f"scaling.{error.param}") from error


def _body(model: ModelEntry, entry: ScalingEntry) -> dict[str, Any]:
    return {**model_body(model), "scaling": scaling_body(entry)}
