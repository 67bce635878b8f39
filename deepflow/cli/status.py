"""`deepflow status`: the services, TEs and models of the running instance, for people or as JSON.

Asked over the bus: every service answers a status query with its process and a body of its own, and TEs tell their
load five times a second. This module must not know what a service puts into its body beyond what it shows.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final

from rich.table import Table

from deepflow.cli.home import Home, Instance
from deepflow.cli.screen import console, fail
from shared.bus import Bus
from shared.errors import DeepFlowError
from shared.messages import StatusQuery, StatusReply, TeBeat

_WAIT_S: Final = 0.5  # more than two beats
_CONNECT_S: Final = 5.0


def show(home: Home, *, as_json: bool) -> None:
    """Print the state of the instance of this home; exit code 1 if nothing runs there."""
    instance = home.running()
    if instance is None:
        fail(f"Nothing runs in {home.path}: `deepflow up` starts it.")
    try:
        found = asyncio.run(ask(instance))
    except (DeepFlowError, TimeoutError) as error:
        fail(f"the bus at {instance.nats_url} does not answer: {error}")
    if as_json:
        console.print(json.dumps(found, indent=2), markup=False)
    else:
        _tables(found)


async def ask(instance: Instance) -> dict[str, Any]:
    """What runs, as `describe` puts it. Raises DeepFlowError, TimeoutError."""
    beats: dict[str, TeBeat] = {}

    def on_beat(beat: TeBeat) -> None:
        beats[beat.id] = beat

    async with asyncio.timeout(_CONNECT_S):
        bus = await Bus.connect(instance.bus, name="status", inbox=instance.user)
    try:
        await bus.listen(bus.subjects.beat("te", "*"), (TeBeat,), on_beat)
        replies = await bus.gather(
            bus.subjects.status("all", "all"), StatusQuery(), StatusReply, wait_s=_WAIT_S
        )
    finally:
        await bus.close()
    return describe(instance, replies, beats)


def describe(
    instance: Instance, replies: list[StatusReply], beats: dict[str, TeBeat]
) -> dict[str, Any]:
    """The answer of `deepflow status --json`. A TE is shown once it has answered and beaten."""
    services: list[dict[str, Any]] = [
        {"name": "launcher", "id": "launcher", "pid": instance.pid, "ready": instance.ready},
        {"name": "nats", "id": "nats", "pid": instance.services.get("nats"), "ready": True},
    ]
    tes: list[dict[str, Any]] = []
    for reply in sorted(replies, key=lambda reply: (reply.kind, reply.id)):
        body = json.loads(reply.body)
        beat = beats.get(reply.id)
        if reply.kind != "te":
            name = "worker" if reply.kind == "pod" else reply.kind
            services.append({"name": name, "id": reply.id, "pid": reply.pid, **body})
        elif beat is not None:
            load = {
                "role": beat.role,
                "state": beat.state,
                "running": beat.running,
                "waiting": beat.waiting,
                "free_slots": beat.free_slots,
                "outstanding_s": beat.outstanding_s,
                "blocks_total": beat.blocks_total,
                "blocks_used": beat.blocks_used,
                "blocks_cached": beat.blocks_cached,
                "blocks_leased": beat.blocks_leased,
                "blocks_reserved": beat.blocks_reserved,
                "step": beat.step,
                "step_ms": beat.step_ms,
                "progress_ms": beat.progress_ms,
            }
            where = {"id": reply.id, "model": beat.model, "pid": reply.pid, "pod": beat.pod}
            tes.append({**body, **where, **load})
    return {"services": services, "tes": tes, "models": instance.models, "url": instance.url}


def _tables(found: dict[str, Any]) -> None:
    console.print(f"{found['url']}   models: {', '.join(found['models'])}", markup=False)
    services = Table("service", "id", "pid", "ready", "up", box=None)
    for one in found["services"]:
        up = f"{one['uptime_s']:.0f} s" if "uptime_s" in one else ""
        ready = "yes" if one.get("ready") else "no"
        services.add_row(one["name"], one["id"], str(one["pid"]), ready, up)
    columns = ("TE", "model", "role", "pid", "state", "running", "waiting", "KV used", "cached")
    tes = Table(*columns, box=None)
    for te in found["tes"]:
        total = max(1, te["blocks_total"])
        tes.add_row(
            *(te["id"], te["model"], te["role"], str(te["pid"]), te["state"]),
            *(str(te["running"]), str(te["waiting"])),
            *(f"{te['blocks_used'] / total:.0%}", f"{te['blocks_cached'] / total:.0%}"),
        )
    console.print(services)
    console.print(tes if found["tes"] else "No TE is up.", markup=False)
