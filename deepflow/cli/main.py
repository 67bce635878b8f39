"""The `deepflow` command: arguments in, one function call out. Every command imports what it needs when it runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Final

import typer

from deepflow.cli.home import Home
from deepflow.cli.screen import fail
from shared.config import EXIT_CODE, ConfigError
from shared.errors import DeepFlowError

app = typer.Typer(
    name="deepflow",
    help="Serve large language models: OpenAI API in front, FlowServe engines behind.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Device(StrEnum):
    """Where the engines compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    NPU = "npu"


def _home() -> Home:
    try:
        return Home.from_env(os.environ)
    except ConfigError as error:
        fail(str(error), EXIT_CODE)


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """A deliberate error is one line, not a traceback."""
    try:
        yield
    except DeepFlowError as error:
        fail(error.message)


@app.callback()
def before() -> None:
    """Runs before each command, but not before `--help`, which need not wait for a log."""
    from shared import log

    log.configure("error")  # a warning of the bus is no news for the person at the terminal


@app.command()
def up(
    model: Annotated[
        list[str] | None, typer.Option(help="A model to serve; may be given several times.")
    ] = None,
    workers: Annotated[
        str,
        typer.Option(
            envvar="DEEPFLOW_WORKERS",
            metavar="N|MIN..MAX",
            help="Engines (TEs) of each model: 1, with --pd beside it 0; 0..8: as many as are asked for.",
        ),
    ] = "",
    pd: Annotated[
        str,
        typer.Option(
            envvar="DEEPFLOW_PD", metavar="1p1d", help="Prefill and decode TEs of each model."
        ),
    ] = "",
    device: Annotated[Device, typer.Option(help="Where the engines compute.")] = Device.AUTO,
    tp: Annotated[
        int, typer.Option(envvar="DEEPFLOW_TP", min=1, max=64, help="Devices that share a layer.")
    ] = 1,
    pp: Annotated[
        int, typer.Option(envvar="DEEPFLOW_PP", min=1, max=64, help="Stages of layers, of tp each.")
    ] = 1,
    host: Annotated[
        str, typer.Option(help="Beyond loopback the gateway needs keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="A free one where taken.")] = 8000,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is ready.")] = False,
) -> None:
    """Start the platform: bus, gateway, scheduler, worker and cache. Ctrl-C stops it."""
    from deepflow.cli import up as command
    from deepflow.cli.launcher import Plan
    from services.worker.settings import read_pd, read_range

    workers = workers or ("0" if pd else "1")
    try:
        read_pd(pd)
        least, most = read_range(workers)
    except ConfigError as error:
        fail(str(error), EXIT_CODE)
    if not most and not pd:
        fail(
            "--workers 0 leaves nobody to serve: 0..1 starts an engine once it is asked for, "
            "--pd says how to split the roles"
        )
    if device in (Device.CUDA, Device.NPU):
        from deepflow.doctor.doctor import here, require

        with _answering():
            require(here(), device.value)
    plan = Plan(
        models=tuple(model or [command.DEFAULT_MODEL]),
        workers=workers,
        is_asleep=not least and not pd,
        pd=pd,
        host=host,
        port=port,
        device=device.value,
        tp=tp,
        pp=pp,
    )
    with _answering():
        raise typer.Exit(command.up(_home(), plan, detach=detach))


@app.command()
def down() -> None:
    """Stop the platform; requests in flight are finished first."""
    from deepflow.cli import up as command
    from deepflow.cli.launcher import DRAIN_ORDER, MARGIN_S
    from shared.config import Settings

    # The launcher gives every child its grace, one after the other.
    home = _home()
    command.down(home, len(DRAIN_ORDER) * (Settings.load(os.environ).grace_s + MARGIN_S))


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="smollm2-135m, hf:org/name, a folder, a .gguf file")],
    name: Annotated[str | None, typer.Option(help="Serve it under this name.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the checksums.")] = False,
) -> None:
    """Fetch a model onto this machine."""
    from deepflow.cli import models

    with _answering():
        models.pull(_home(), model, name, verify=verify)


@app.command("models")
def list_models() -> None:
    """List the models of this machine."""
    from deepflow.cli import models

    models.show(_home())


@app.command()
def chat(model: Annotated[str | None, typer.Argument(help="One that is served.")] = None) -> None:
    """Talk to a model in the terminal."""
    from deepflow.cli import chat as command

    command.chat(_home(), model)


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show services, engines, models, load and KV use."""
    from deepflow.cli import status as command

    command.show(_home(), as_json=as_json)


@app.command()
def scale(
    model: Annotated[str, typer.Argument(help="One that is served.")],
    to: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="So many engines (TEs), always.")
    ] = None,
    least: Annotated[int | None, typer.Option("--min", min=0, help="At least so many.")] = None,
    most: Annotated[int | None, typer.Option("--max", min=0, help="At most so many.")] = None,
    keep_alive: Annotated[
        float | None, typer.Option(min=0.0, metavar="S", help="Seconds that the last one idles.")
    ] = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="Take back all that was set, then set the rest.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to wait until they run.")] = 600,
) -> None:
    """Set how many engines (TEs) of a model there are, and wait until they run; without options: show it."""
    from deepflow.cli import scale as command

    if to is not None and (least is not None or most is not None):
        fail("--to N is --min N --max N: give one or the other", EXIT_CODE)
    if least is not None and most is not None and most < least:
        fail("--max must not be below --min", EXIT_CODE)
    wish = command.Wish(
        least=least if to is None else to,
        most=most if to is None else to,
        keep_alive_s=keep_alive,
        is_reset=auto,
    )
    with _answering(), contextlib.suppress(KeyboardInterrupt):
        command.scale(_home(), model, wish, timeout)


@app.command()
def logs(
    service: Annotated[str | None, typer.Argument(help="gateway, worker, nats, ...")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as they grow.")] = False,
) -> None:
    """Show the services' logs."""
    from deepflow.cli import logs as command

    with contextlib.suppress(KeyboardInterrupt):
        command.show(_home(), service, follow=follow)


@app.command()
def doctor(
    device: Annotated[Device, typer.Option(help="What is to compute.")] = Device.AUTO,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what this machine can run, what is amiss, and how to mend it."""
    from deepflow.cli import doctor as command

    command.show(_home(), device.value, as_json=as_json)


@app.command()
def verify(
    device: Annotated[Device, typer.Option(help="What is put to the test.")] = Device.AUTO,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two families, and a short bench.")
    ] = False,
    json: Annotated[
        str, typer.Option("--json", metavar="FILE", help="Write JSON there; - is standard output.")
    ] = "",
) -> None:
    """Show that a device computes what the CPU computes: models, graphs, KV copies, collectives; and how fast."""
    from deepflow.cli import verify as command

    command.run(_home(), device.value, quick=quick, target=json)


# Commands with options of their own, which they explain themselves.
_PASSED_ON: Final = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


@app.command(context_settings=_PASSED_ON)
def replay(context: typer.Context) -> None:
    """Replay a trace of requests: against a server, or in the simulator."""
    from deepflow.replay.cli import app as command

    command(args=context.args, prog_name="deepflow replay")


@app.command(context_settings=_PASSED_ON)
def heatmap(context: typer.Context) -> None:
    """Measure which requests gain by prefill and decode on two executors."""
    from deepflow.heatmap.cli import app as command

    command(args=context.args, prog_name="deepflow heatmap")


@app.command(context_settings=_PASSED_ON)
def bench(context: typer.Context) -> None:
    """Measure: every performance claim, re-runnable."""
    from deepflow.bench.cli import app as benches

    benches(args=context.args, prog_name="deepflow bench")


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
