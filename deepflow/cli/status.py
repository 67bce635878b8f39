"""`deepflow status`: the services, TEs and models of the running instance, for people or as JSON.

Asked over the bus: every service answers a status query with its process and a body of its own, TEs tell their load
five times a second, and pod hosts which TEs they have, those on their way included. This module must not know what a
service puts into its body beyond what it shows.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any, Final

from rich.table import Table

from deepflow.cli.home import Home, Instance
from deepflow.cli.scale import steps_table
from deepflow.cli.screen import console, fail, say, show_table
from shared.bus import Bus
from shared.errors import DeepFlowError
from shared.messages import StatusQuery, StatusReply, TeBeat
from shared.scaling_messages import PodBeat, Start

_WAIT_S: Final = 0.5  # more than two beats
_CONNECT_S: Final = 5.0
_STARTS_SHOWN: Final = 8


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
    pods: dict[str, PodBeat] = {}

    def on_beat(beat: TeBeat | PodBeat) -> None:
        if isinstance(beat, PodBeat):
            pods[beat.id] = beat
        else:
            beats[beat.id] = beat

    async with asyncio.timeout(_CONNECT_S):
        bus = await Bus.connect(instance.bus, name="status", inbox=instance.user)
    try:
        await bus.listen(bus.subjects.beat("te", "*"), (TeBeat,), on_beat)
        await bus.listen(bus.subjects.beat("pod", "*"), (PodBeat,), on_beat)
        replies = await bus.gather(
            bus.subjects.status("all", "all"), StatusQuery(), StatusReply, wait_s=_WAIT_S
        )
    finally:
        await bus.close()
    return describe(instance, replies, beats) | of_pods(pods)


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
    found = {"services": services, "tes": tes, "models": instance.models, "url": instance.url}
    return found | {
        "starts": [start for one in services for start in one.get("starts", ())],
        "fleets": [
            {"model": name, **fleet}
            for one in services
            if one.get("cluster", {}).get("leading")
            for name, fleet in one["cluster"]["models"].items()
        ],
    }


def of_pods(pods: dict[str, PodBeat]) -> dict[str, Any]:
    """What pod hosts have: `pods`, their budgets and the TEs that are on their way up or down."""
    return {
        "pods": [
            {
                "id": beat.id,
                "host": beat.host,
                "draining": beat.draining,
                "term": beat.term,
                "num_warm": beat.num_warm,
                "max_tes": beat.max_tes,
                "num_bytes": beat.num_bytes,
                "models": [asdict(model) for model in beat.models],
                "tes": [asdict(te) for te in beat.tes],
            }
            for beat in sorted(pods.values(), key=lambda beat: beat.id)
        ]
    }


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
    for pod in found["pods"]:  # those that do not beat yet
        for te in pod["tes"]:
            if te["state"] in ("starting", "waiting"):
                state = f"{te['state']} {te['progress']} %" if te["progress"] else te["state"]
                tes.add_row(te["te"] or "-", te["model"], te["role"], "", state, *[""] * 4)
    show_table(services)
    if tes.row_count:
        show_table(tes)
    else:
        say("No TE is up.")
    if found["fleets"]:
        show_table(_fleets(found["fleets"]))
    if found["starts"]:
        latest = found["starts"][-_STARTS_SHOWN:]
        show_table(steps_table([Start(**fields) for fields in latest]))


def _fleets(fleets: list[dict[str, Any]]) -> Table:
    table = Table("model", "wanted", "up", "starting", "min", "max", "because", box=None)
    for one in fleets:
        numbers = ("target", "ready", "starting", "min", "max")
        table.add_row(one["model"], *(str(one.get(n, "")) for n in numbers), one.get("reason", ""))
    return table
