"""Bodies of `PATCH /v1/models/{id}`: how many replicas a model may have. This module must not know who heeds it.

As in a JSON merge patch (RFC 7396), a field that is absent stays as it is, and null takes back what was set.
"""

from __future__ import annotations

from typing import Any, Final

from services.gateway.openai.fields import Check, integer, mapping, number, out_of_range
from shared.errors import InvalidRequest
from shared.scaling_messages import ScalingEntry, SetScaling

MAX_REPLICAS: Final = 4096
MAX_KEEP_ALIVE_S: Final = 7 * 24 * 3600.0
_TAKE_BACK: Final = -1
_FIELDS: Final[dict[str, Check]] = {
    "min": integer(0, MAX_REPLICAS),
    "max": integer(0, MAX_REPLICAS),
    "target": integer(0, MAX_REPLICAS),
    "keep_alive_s": number(0, MAX_KEEP_ALIVE_S),
}


def read_scaling(body: Any, *, model: str, by: str) -> SetScaling:
    """What is asked for in the name of `by`. Raises InvalidRequest naming the field."""
    for name in mapping(body, "body"):
        if name != "scaling":
            raise InvalidRequest(f"'{name}' cannot be changed", param=name)
    if "scaling" not in body:
        raise InvalidRequest("you must provide 'scaling'", param="scaling")
    given = body["scaling"]
    if given is None:
        given = dict.fromkeys(("min", "max", "keep_alive_s"))
    values: dict[str, Any] = {}
    for name, value in mapping(given, "scaling").items():
        field = f"scaling.{name}"
        if name not in _FIELDS:
            raise InvalidRequest(f"'{field}' is not known", param=field)
        values[name] = _TAKE_BACK if value is None else _FIELDS[name](value, field)
    if "target" in values:
        if clash := values.keys() & {"min", "max"}:
            field = f"scaling.{min(clash)}"
            raise InvalidRequest(f"'{field}' says what 'scaling.target' says", param=field)
        values["min"] = values["max"] = values["target"]
    low, high = values.get("min"), values.get("max")
    if low is not None and high is not None and 0 <= high < low:
        raise out_of_range("scaling.max", f"must not be below 'scaling.min', which is {low}")
    return SetScaling(
        model=model, by=by, min_tes=low, max_tes=high, keep_alive_s=values.get("keep_alive_s")
    )


def scaling_body(entry: ScalingEntry) -> dict[str, Any]:
    """What was set; null is what nobody set. `target`: there is nothing to choose between `min` and `max`."""
    return {
        "min": entry.min_tes,
        "max": entry.max_tes,
        "target": entry.min_tes if entry.min_tes == entry.max_tes else None,
        "keep_alive_s": entry.keep_alive_s,
    }
