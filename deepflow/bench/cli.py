"""`deepflow bench <what>`: the benches as commands. Heavy imports happen in the command that needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepflow.bench.autoscale.cli import autoscale
from deepflow.bench.client import Endpoint
from deepflow.bench.command import Json, Model, Picture, Seed, Threads, bars, open_model, run
from deepflow.bench.engine.plan import Compare, Device, Dtype, Kernels
from deepflow.bench.lengths.cli import lengths
from deepflow.bench.peers.plan import PEERS
from deepflow.bench.route.cli import route
from deepflow.bench.scale.cli import scale
from deepflow.bench.workload import Dataset
from deepflow.cli.screen import console, fail
from shared.errors import DeepFlowError

app = typer.Typer(
    help="Measure: every performance claim, re-runnable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(lengths)
app.command()(route)
app.command()(autoscale)
app.command()(scale)


@app.callback()
def main() -> None:
    """Measure: every performance claim, re-runnable."""


@app.command()
def serve(
    url: Annotated[str, typer.Option("--url", "--base-url")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="As the server names it.")] = "smollm2-135m",
    num: Annotated[
        int, typer.Option("--num", "--num-prompts", min=1, help="Requests in all.")
    ] = 100,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", "--max-concurrency", min=1, help="Requests at a time."),
    ] = None,
    request_rate: Annotated[
        float, typer.Option(min=0.0001, help="Arrivals per second; inf: at once.")
    ] = float("inf"),
    burstiness: Annotated[
        float, typer.Option(min=0.01, help="1 is Poisson; less bunches, more evens out.")
    ] = 1.0,
    prompt_len: Annotated[
        int,
        typer.Option("--prompt-len", "--input-len", "--random-input-len", min=1, help="Tokens."),
    ] = 128,
    output_len: Annotated[
        int, typer.Option("--output-len", "--random-output-len", min=1, help="Tokens.")
    ] = 128,
    dataset_name: Annotated[Dataset, typer.Option()] = Dataset.RANDOM,
    prefix_len: Annotated[
        int,
        typer.Option("--prefix-len", "--prefix-repetition-prefix-len", min=1, help="Tokens."),
    ] = 256,
    num_prefixes: Annotated[
        int, typer.Option("--num-prefixes", "--prefix-repetition-num-prefixes", min=1)
    ] = 10,
    endpoint: Annotated[Endpoint, typer.Option()] = Endpoint.COMPLETIONS,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="ttft:MS tpot:MS e2el:MS", help="What a good request keeps to."),
    ] = None,
    more_goodput: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    num_warmups: Annotated[int, typer.Option(min=0, help="Sent before, not counted.")] = 1,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Of one request.")] = 600.0,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY")] = "",
    seed: Seed = 0,
    json: Json = "",
) -> None:
    """Load any server of the OpenAI API; flags are named as those of `vllm bench serve`."""
    from deepflow.bench.sample import Goal
    from deepflow.bench.serve import Settings, bench_serve

    try:
        goals = tuple(Goal.parse(text) for text in [*(goodput or ()), *(more_goodput or ())])
    except ValueError as error:
        fail(f"--goodput: {error}", 2)
    settings = Settings(
        url=url,
        model=model,
        num=num,
        concurrency=concurrency,
        rate=request_rate,
        burstiness=burstiness,
        prompt_len=prompt_len,
        output_len=output_len,
        dataset=dataset_name,
        prefix_len=prefix_len,
        num_prefixes=num_prefixes,
        endpoint=endpoint,
        goals=goals,
        seed=seed,
        num_warmups=num_warmups,
        timeout_s=timeout_s,
        api_key=api_key,
    )
    with bars() as progress:
        report = run(bench_serve(settings, progress))
    report.write(json, console)
    if not report.metrics["num_completed"]:
        fail(f"no request was answered: {'; '.join(report.notes)}")


@app.command()
def bus(
    quick: Annotated[bool, typer.Option("--quick", help="Only to see that it works.")] = False,
    model: Model = "smollm2-135m",
    seed: Seed = 0,
    json: Json = "",
) -> None:
    """What HTTP and bus cost over the bare engine; starts all it needs in a temporary home. About five minutes."""
    from deepflow.bench.bus.bench import bench_bus
    from deepflow.bench.bus.plan import QUICK, Plan

    cache_dir, folder = open_model(model)
    with bars() as progress:
        plan = QUICK if quick else Plan()
        report = run(bench_bus(folder, cache_dir, plan, seed, progress))
    report.write(json, console)


@app.command()
def engine(
    model: Model = "smollm2-135m",
    batch: Annotated[
        str, typer.Option(metavar="N,N,...", help="Sequences that decode at once.")
    ] = "1,8,32",
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens.")] = 64,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.W8A8,
    device: Annotated[Device, typer.Option()] = Device.AUTO,
    tp: Annotated[int, typer.Option(min=1, help="Executors that share each layer.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Stages of layers.")] = 1,
    threads: Threads = 0,
    kernels: Annotated[Kernels, typer.Option(help="native: without torch.")] = Kernels.AUTO,
    asynchronous: Annotated[
        bool, typer.Option("--async/--sync", help="Plan a step while the last one runs.")
    ] = False,
    speculation: Annotated[
        int, typer.Option(min=0, max=64, help="Tokens guessed per step; 0: none.")
    ] = 0,
    repetitive: Annotated[
        bool, typer.Option("--repetitive", help="Prompts that repeat themselves.")
    ] = False,
    compare: Annotated[
        list[Compare] | None, typer.Option(help="Measure with this switch on and off, in turns.")
    ] = None,
    max_batched_tokens: Annotated[int, typer.Option(min=1, help="Rows of a step at most.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="The median counts.")] = 3,
    starts: Annotated[int, typer.Option(min=1, help="Of the engine; the median counts.")] = 3,
    seed: Seed = 0,
    json: Json = "",
) -> None:
    """How fast the engine is, where its time goes, and how near it comes to what the machine can do."""
    from deepflow.bench.engine.bench import bench_engine
    from deepflow.bench.engine.plan import Plan
    from deepflow.bench.engine.runner import RunnerSettings
    from deepflow.doctor.doctor import here, require
    from services.worker.settings import num_cores

    try:
        require(here(), device)
    except DeepFlowError as error:
        fail(error.message)
    plan = Plan(
        batches=_batches(batch),
        prompt_len=prompt_len,
        output_len=output_len,
        num_rounds=rounds,
        num_starts=starts,
        repetitive=repetitive,
        compare=tuple(dict.fromkeys(compare or ())),
    )
    settings = RunnerSettings(
        dtype=dtype,
        device=device,
        tp=tp,
        pp=pp,
        threads=threads or max(1, num_cores() // (tp * pp)),
        kernels=kernels,
        asynchronous=asynchronous,
        speculation=speculation,
        max_num_seqs=64,
        max_batched_tokens=max_batched_tokens,
        kv_tokens=0,
    )
    cache_dir, folder = open_model(model)
    with bars() as progress:
        report = run(bench_engine(folder, cache_dir, settings, plan, seed, progress))
    report.write(json, console)


@app.command()
def peers(
    names: Annotated[
        str, typer.Option("--peers", metavar="PEER,PEER,...", help="With whom.")
    ] = ",".join(PEERS),
    model: Model = "smollm2-135m",
    threads: Threads = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Only to see that it works.")] = False,
    setup_only: Annotated[
        bool, typer.Option("--setup-only", help="Make the peers' environments, measure later.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what an earlier run measured.")
    ] = False,
    picture: Picture = None,
    seed: Seed = 0,
    json: Json = "",
) -> None:
    """FlowServe against what a user would take instead, in turns, each in its own environment. Up to an hour."""
    from deepflow.bench.peers.bench import bench_peers, set_up
    from deepflow.bench.peers.picture import check, draw
    from deepflow.bench.peers.plan import QUICK, Plan

    try:
        if picture is not None:
            check()
    except DeepFlowError as error:
        fail(error.message, 2)
    cache_dir, folder = open_model(model)
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    with bars() as progress:
        if setup_only:
            run(set_up(folder, cache_dir, chosen, progress))
            return
        comparison = bench_peers(
            folder,
            cache_dir,
            QUICK if quick else Plan(),
            progress,
            peers=chosen,
            threads=threads,
            seed=seed,
            fresh=fresh,
        )
        report = run(comparison)
    if picture is not None:
        draw(report, picture)
    report.write(json, console)


@app.command()
def quality(
    model: Model = "smollm2-135m",
    dtype: Annotated[Dtype, typer.Option(help="What is judged.")] = Dtype.W8A8,
    reference: Annotated[Dtype, typer.Option(help="What it is held to.")] = Dtype.FP32,
    num_tokens: Annotated[int, typer.Option(min=2, help="Of prose.")] = 51_200,
    threads: Threads = 0,
    json: Json = "",
) -> None:
    """What a cheaper arithmetic does to the predictions: perplexity and agreement with full precision over prose."""
    from deepflow.bench.quality import bench_quality
    from services.worker.settings import num_cores

    cache_dir, folder = open_model(model)
    try:
        with bars() as progress:
            report = bench_quality(
                folder,
                cache_dir,
                dtype=dtype,
                reference=reference,
                num_tokens=num_tokens,
                threads=threads or num_cores(),
                progress=progress,
            )
    except DeepFlowError as error:
        fail(error.message)
    report.write(json, console)


@app.command()
def pic(
    model: Model = "smollm2-135m",
    num: Annotated[int, typer.Option(min=2, help="Prompts.")] = 6,
    passages: Annotated[int, typer.Option(min=1, help="Of 512 tokens, in each prompt.")] = 4,
    corpus: Annotated[int, typer.Option(min=1, help="Passages to choose from.")] = 6,
    threads: Threads = 0,
    seed: Seed = 0,
    json: Json = "",
) -> None:
    """Chunks of a prompt reused wherever they stand (EPIC): the time to the first token, and what the answers lose."""
    from deepflow.bench.pic import Settings as PicSettings
    from deepflow.bench.pic import bench_pic
    from services.worker.settings import num_cores

    settings = PicSettings(num=num, passages=passages, corpus=corpus, seed=seed)
    cache_dir, folder = open_model(model)
    try:
        with bars() as progress:
            report = bench_pic(
                folder, cache_dir, settings, threads=threads or num_cores(), progress=progress
            )
    except DeepFlowError as error:
        fail(error.message)
    report.write(json, console)


@app.command()
def pipeline(
    num: Annotated[int, typer.Option(min=2, help="Requests in all.")] = 400,
    rate: Annotated[float, typer.Option(min=0.0001, help="Arrivals per virtual second.")] = 8.0,
    long_every: Annotated[int, typer.Option(min=1, help="One prompt in so many is long.")] = 10,
    long_len: Annotated[int, typer.Option(min=1, max=100_000, help="Its tokens.")] = 8192,
    chat_len: Annotated[
        int, typer.Option(min=1, max=100_000, help="Tokens of the other prompts.")
    ] = 256,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens.")] = 128,
    max_batched_tokens: Annotated[int, typer.Option(min=64, help="Rows of a step at most.")] = 512,
    seed: Seed = 0,
    json: Json = "",
) -> None:
    """Chunks of a prompt spread over the micro-batches of a pipeline or kept in one: TTFT and TPOT in virtual time."""
    from deepflow.bench.pipeline import Load, bench_pipeline

    load = Load(
        num=num,
        rate=rate,
        long_every=long_every,
        long_len=long_len,
        chat_len=chat_len,
        output_len=output_len,
        max_batched_tokens=max_batched_tokens,
    )
    try:
        report = bench_pipeline(load, seed)
    except ValueError as error:
        fail(f"--num: {error}", 2)
    report.write(json, console)


@app.command()
def rtc(
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Replay a trace in Mooncake's format as well."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only to see that it works.")] = False,
    seed: Seed = 0,
    json: Json = "",
) -> None:
    """The KV cache's books against their bars, and its bytes against memcpy and bare sockets. About a minute."""
    from deepflow.bench.rtc.bench import bench_rtc
    from deepflow.bench.rtc.plan import QUICK, Plan

    try:
        with bars() as progress:
            report = bench_rtc(QUICK if quick else Plan(), seed, trace, progress)
    except DeepFlowError as error:
        fail(error.message, 2 if trace is not None else 1)
    report.write(json, console)


@app.command()
def conversation(
    model: Model = "smollm2-135m",
    num_tokens: Annotated[int, typer.Option(min=64, help="Of the conversation.")] = 6000,
    rounds: Annotated[int, typer.Option(min=1, help="Of each kind.")] = 3,
    json: Json = "",
) -> None:
    """A long conversation whose executor is killed: its next turn elsewhere, on one host and on another."""
    from deepflow.bench.conversation.bench import Plan, bench_conversation

    cache_dir, folder = open_model(model)
    plan = Plan(num_tokens=num_tokens, rounds=rounds)
    with bars() as progress:
        task = progress.add_task("conversation", total=2 * rounds)
        report = run(bench_conversation(folder, cache_dir, plan, lambda: progress.advance(task)))
    report.write(json, console)


def _batches(text: str) -> tuple[int, ...]:
    """Batch sizes, ascending."""
    try:
        sizes = {int(part) for part in text.split(",")}
    except ValueError:
        sizes = {0}
    if min(sizes) < 1:
        fail(f"--batch: {text!r} is no list of numbers above 0", 2)
    return tuple(sorted(sizes))
