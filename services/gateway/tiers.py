"""Service tiers, as callers name them (OpenAI's `service_tier`), and the bands their requests travel in.

`auto` is the default tier. `priority` is for tenants the operator names; others get the default tier, and the answer
says so, as with OpenAI. vLLM's `priority`, a number that any caller may set as it likes, has no place here: it is
refused like every field that is not served. This module must not know how a band is treated.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from shared.messages import Band

TIERS: Final = ("auto", "default", "flex", "priority")


def band_of(tier: str | None, tenant: str, priority_tenants: Container[str]) -> Band:
    """The band of a request for which its caller named a tier, or none."""
    if tier == "priority" and tenant in priority_tenants:
        return Band.PRIORITY
    return Band.FLEX if tier == "flex" else Band.DEFAULT


def tier_of(band: Band) -> str:
    """The tier that an answer names."""
    return {Band.PRIORITY: "priority", Band.FLEX: "flex"}.get(band, "default")
