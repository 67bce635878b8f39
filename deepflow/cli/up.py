"""`deepflow up` and `deepflow down`: one instance of the platform per home, in the foreground or behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Final

from deepflow.cli import models
from deepflow.cli.home import Home, Instance
from deepflow.cli.launcher import Launcher, Plan
from deepflow.cli.screen import console, errors, fail, say
from shared.arena.place import arena_dir
from shared.config import Reader
from shared.errors import DeepFlowError

DEFAULT_MODEL: Final = "smollm2-135m"
_POLL_S: Final = 0.05
_KILL_S: Final = 5.0


def up(home: Home, plan: Plan, *, detach: bool) -> int:
    """Start the platform. Returns the exit code: at its end, or with `detach` once it is ready."""
    if home.is_taken():
        fail(_already(home))
    try:
        names = [models.ensure(home, reference).name for reference in plan.models]
    except DeepFlowError as error:
        fail(error.message)
    plan = replace(plan, models=tuple(dict.fromkeys(names)))
    return _detached(home, plan) if detach else _foreground(home, plan)


def _foreground(home: Home, plan: Plan) -> int:
    if not home.take():
        fail(_already(home))
    started = time.monotonic()
    say(f"Starting {', '.join(plan.models)}; logs are in {home.logs}.")
    try:
        launcher = Launcher(plan, home, os.environ, say)
        return asyncio.run(launcher.run(lambda instance: _announce(instance, plan, started)))
    except DeepFlowError as error:
        fail(error.message)
    finally:
        _remove_arena(home)
        home.release()


def _remove_arena(home: Home) -> None:
    """The KV cache that this instance kept in memory, unless somebody said where: then others may share it."""
    if os.environ.get("DEEPFLOW_ARENA_DIR", "").strip():
        return
    folder = arena_dir(Reader({}), home.path)
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return  # there was none
    except OSError as error:
        say(f"{folder} is left behind: {error}")


def _announce(instance: Instance, plan: Plan, started: float) -> None:
    model = instance.models[0]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    seconds = time.monotonic() - started
    say(f"DeepFlow is ready at {instance.url} with {', '.join(instance.models)} ({seconds:.1f} s).")
    if plan.is_asleep:
        say("  No engine runs yet: the first request starts one.")
    say(
        f"  curl {instance.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    )
    say("  deepflow chat   talks to it here; deepflow status shows what it does")
    if instance.models == [DEFAULT_MODEL]:
        say(
            f"  {DEFAULT_MODEL} is a demo of 135M parameters and gives weak answers; a better model: "
            "deepflow up --model hf:Qwen/Qwen2.5-0.5B-Instruct"
        )
    console.file.flush()


def _detached(home: Home, plan: Plan) -> int:
    """Run the same command as a daemon, and wait until it is ready."""
    home.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = home.log("launcher")
    command = [sys.executable, "-m", "deepflow.cli.main", "up", "--host", plan.host]
    command += ["--port", str(plan.port), "--workers", plan.workers]
    command += ["--pd", plan.pd, "--device", plan.device]
    command += ["--tp", str(plan.tp), "--pp", str(plan.pp)]
    for model in plan.models:
        command += ["--model", model]
    with log.open("wb") as output:
        daemon = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
            env=os.environ | {"DEEPFLOW_HOME": str(home.path), "DEEPFLOW_CACHE": str(home.cache)},
        )
    try:
        while daemon.poll() is None:
            instance = home.running()
            if instance is not None and instance.ready and instance.pid == daemon.pid:
                say(log.read_text().rstrip())
                return 0
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        daemon.send_signal(signal.SIGINT)
        return daemon.wait()
    errors.print(log.read_text().rstrip(), markup=False)
    errors.print(f"It did not start; the logs are in {home.logs}.", markup=False)
    return daemon.returncode or 1


def down(home: Home, grace_s: float) -> None:
    """Stop the instance of this home and wait until it is gone; the second signal kills."""
    if not home.is_taken():
        say("Nothing runs in this home.")
        return
    instance = home.running()
    if instance is None:
        fail(f"an instance of {home.path} is starting or stopping: try again in a moment")
    for patience_s in (grace_s, _KILL_S):
        with contextlib.suppress(ProcessLookupError):  # gone meanwhile
            os.kill(instance.pid, signal.SIGTERM)
        give_up = time.monotonic() + patience_s
        while time.monotonic() < give_up:
            if not home.is_taken():
                say("DeepFlow stopped.")
                return
            time.sleep(_POLL_S)
    fail(f"process {instance.pid} does not stop")


def _already(home: Home) -> str:
    instance = home.running()
    where = f" at {instance.url} (process {instance.pid})" if instance is not None else ""
    return (
        f"DeepFlow already runs{where} in {home.path}: `deepflow down` stops it, "
        "and another DEEPFLOW_HOME holds another instance."
    )
