"""The pure parts of pod host and TE: admission, clients, pulse, restarts, tally, recipe and settings."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.admission import REMEMBERED_S, Admission, Owed
from services.worker.clients import GRACE_S, SILENCE_S, Clients
from services.worker.flowserve.backend import Backend
from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.engine import Engine
from services.worker.pulse import FORGIVEN_S, Pulse
from services.worker.recipe import model_entry, pick_backend, recipe_digest, served_context
from services.worker.settings import TeSettings, WorkerSettings, default_threads, for_te
from services.worker.tally import Tally
from services.worker.te import assigned
from services.worker.tie import Assignment
from shared.catalog import open_model
from shared.config import ConfigError
from shared.errors import InvalidRequest, Overloaded, Unavailable
from shared.messages import Band, Request, Sampling, Task, TaskKind
from shared.restarts import LIMIT, LONGEST_S, WINDOW_S, Restarts
from tests.worker.peers import MODEL, make_model


def task(name: str, *, attempt: int = 0, n: int = 1, **fields: Any) -> Task:
    request = Request(
        request=name,
        attempt=attempt,
        client="gateway-1",
        model=fields.pop("model", MODEL),
        tenant="t",
        prompt=[1, 2, 3],
        root=b"",
        hashes=[],
        sampling=Sampling(max_tokens=4, seed=0, n=n),
        deadline_ms=1000,
        park_ms=0,
        ended=fields.pop("ended", []),
    )
    request = replace(request, band=fields.pop("band", Band.DEFAULT))
    kind = fields.pop("kind", TaskKind.GENERATE)
    return Task(task=f"{name}.{attempt}", job=name, je="je-1", kind=kind, request=request)


def books(
    max_choices: int = 4,
    validate: Callable[[Request], None] = lambda _: None,
    max_batch_choices: int | None = None,
) -> Admission:
    return Admission(
        model=MODEL,
        max_choices=max_choices,
        max_batch_choices=max_batch_choices,
        validate=validate,
        retry_after_s=lambda band: 7.0 if band is Band.DEFAULT else 70.0,
    )


# ------------------------------------------------------------------------------------------------------- admission


def test_a_repeated_task_is_taken_once_and_remembered_past_its_end() -> None:
    """A task sent again is answered yes without being run again, for some time even after its end."""
    admission = books()
    assert admission.admit(task("a"), 0.0)
    assert not admission.admit(task("a"), 1.0)
    ended = admission.ended("a", 0, 2.0)
    assert ended is not None
    assert ended.task.task == "a.0"
    assert not admission.admit(task("a"), 2.0 + REMEMBERED_S)
    assert admission.admit(task("a"), 2.1 + REMEMBERED_S)
    assert admission.num_choices == 1


def test_a_newer_attempt_takes_the_place_of_the_older_one() -> None:
    """A newer attempt fits where the older one was, an older one is refused, and each is owed its own end."""
    admission = books(max_choices=1)
    admission.admit(task("a"), 0.0)
    assert admission.admit(task("a", attempt=2), 0.0)
    with pytest.raises(InvalidRequest):
        admission.admit(task("a", attempt=1), 0.0)
    ends = [admission.ended("a", attempt, 0.0) for attempt in (0, 1, 2)]
    assert [end and end.task.task for end in ends] == ["a.0", None, "a.2"]
    assert admission.num_choices == 0


def test_refusals_leave_the_books_as_they_were() -> None:
    """Another model, a kind that is not served, a bad request and a draining TE are refused, and nothing is owed."""

    def validate(request: Request) -> None:
        if request.request == "bad":
            raise InvalidRequest("no")

    admission = books(validate=validate)
    for refused in (task("a", model="other"), task("a", kind=TaskKind.TRAIN), task("bad")):
        with pytest.raises(InvalidRequest):
            admission.admit(refused, 0.0)
    admission.admit(task("mine"), 0.0)
    admission.draining = True
    with pytest.raises(Unavailable):
        admission.admit(task("a"), 0.0)
    assert not admission.admit(task("mine"), 0.0)
    assert [owed.task for owed in admission.tasks()] == ["mine.0"]
    assert admission.num_choices == 1


def test_the_te_that_prefilled_may_decode_the_same_attempt() -> None:
    """A decode task follows the prefill task of its attempt, each once; while that runs it is refused."""
    admission = books()
    prefill, decode = task("a", kind=TaskKind.PREFILL), task("a", kind=TaskKind.DECODE)
    assert admission.admit(prefill, 0.0)
    assert not admission.admit(prefill, 0.0)
    with pytest.raises(InvalidRequest):
        admission.admit(decode, 0.0)
    assert admission.ended("a", 0, 1.0) == Owed(prefill, 0.0)
    assert not admission.admit(prefill, 1.0)
    assert admission.admit(decode, 1.0)
    assert not admission.admit(decode, 1.0)
    assert not admission.admit(prefill, 1.0)
    assert admission.num_choices == 1
    assert admission.ended("a", 0, 2.0) == Owed(decode, 1.0)
    assert not admission.admit(decode, 2.0)
    assert not admission.admit(prefill, 2.0)
    assert admission.num_choices == 0


def test_the_bound_counts_choices_and_says_when_to_come_again() -> None:
    """Past the bound a task is refused with the wait it was given; ended choices of a resubmission do not count."""
    admission = books(max_choices=4)
    admission.admit(task("a", n=3, ended=[0]), 0.0)
    admission.admit(task("b", n=2), 0.0)
    with pytest.raises(Overloaded) as refused:
        admission.admit(task("c"), 0.0)
    assert refused.value.retry_after_s == 7.0
    admission.ended("a", 0, 0.0)
    assert admission.admit(task("c"), 0.0)


def test_band_batch_never_makes_a_te_refuse_anything_else() -> None:
    """Its bound is its own, and counts what is more urgent; the others' bounds do not count it."""
    admission = books(max_choices=4, max_batch_choices=2)
    admission.admit(task("b1", band=Band.BATCH), 0.0)
    admission.admit(task("b2", band=Band.BATCH), 0.0)
    with pytest.raises(Overloaded) as refused:
        admission.admit(task("b3", band=Band.BATCH), 0.0)
    assert refused.value.retry_after_s == 70.0  # not what others would be told
    assert admission.counters["refused_batch"] == 1
    for name in ("d1", "d2", "d3", "d4"):
        assert admission.admit(task(name), 0.0)
    with pytest.raises(Overloaded):
        admission.admit(task("d5"), 0.0)
    assert admission.admit(task("p", band=Band.PRIORITY), 0.0)
    with pytest.raises(Overloaded):
        admission.admit(task("f", band=Band.FLEX), 0.0)
    for name in ("b1", "b2"):
        admission.ended(name, 0, 1.0)
    with pytest.raises(Overloaded):  # nothing is idle here
        admission.admit(task("b4", band=Band.BATCH), 1.0)
    assert admission.num_choices == 5


def test_a_request_wider_than_the_bound_runs_alone() -> None:
    """Someone who asks for more choices than the bound is not refused for ever."""
    admission = books(max_choices=2)
    assert admission.admit(task("wide", n=5), 0.0)
    with pytest.raises(Overloaded):
        admission.admit(task("a"), 0.0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(0, 3),
            st.integers(1, 3),
            st.booleans(),
            st.sampled_from(list(Band)),
        )
    )
)
def test_the_count_of_choices_is_the_sum_over_owed_tasks(
    moves: list[tuple[str, int, int, bool, Band]],
) -> None:
    """Whatever comes and ends, in whichever band, the count equals what is owed."""
    admission = books(max_choices=4)
    for now, (name, attempt, n, ends, band) in enumerate(moves):
        if ends:
            admission.ended(name, attempt, float(now))
        else:
            with contextlib.suppress(InvalidRequest, Overloaded):
                admission.admit(task(name, attempt=attempt, n=n, band=band), float(now))
        owed = [one.request for one in admission.tasks()]
        assert admission.num_choices == sum(request.sampling.n for request in owed)


# --------------------------------------------------------------------------------------------------------- clients


def watch(clients: Clients, start: float, end: float) -> dict[str, float]:
    """When each client was found lost, looking four times a second."""
    found: dict[str, float] = {}
    for tick in itertools.count():
        now = start + tick / 4
        if now > end:
            return found
        for client in clients.lost(now):
            found[client] = now
    raise AssertionError


def test_a_silent_client_is_lost_after_three_seconds_and_a_newcomer_after_five() -> None:
    """A client that beat has three seconds of silence; one that only sent work has five until its first beat."""
    clients = Clients()
    clients.beat("old", 0.0)
    clients.began("new", 0.0)
    clients.began("new", 1.0)
    found = watch(clients, 0.0, 10.0)
    assert SILENCE_S < found["old"] <= SILENCE_S + 0.5
    assert GRACE_S < found["new"] <= GRACE_S + 0.5
    assert not clients.alive("old")


def test_nobody_is_lost_while_the_bus_is_away() -> None:
    """While the bus is away nobody is judged, and the clocks start again when it is back."""
    clients = Clients()
    clients.beat("a", 0.0)
    clients.hold()
    assert watch(clients, 0.0, 60.0) == {}
    clients.resume(60.0)
    assert watch(clients, 60.0, 60.0 + SILENCE_S) == {}
    assert "a" in watch(clients, 60.25 + SILENCE_S, 61.0 + SILENCE_S)


def test_frames_are_numbered_per_client() -> None:
    """Each client's frames count from 1, and start again for one that died in between."""
    clients = Clients()
    clients.beat("a", 0.0)
    assert [clients.next_frame("a"), clients.next_frame("b"), clients.next_frame("a")] == [1, 1, 2]
    assert clients.down("a")
    assert not clients.down("a")
    assert clients.next_frame("a") == 1


# ----------------------------------------------------------------------------------------------------------- pulse


def test_progress_ages_while_there_is_work_only() -> None:
    """The age grows from the last step on, is zero without work, and starts again with the next step."""
    pulse = Pulse()
    assert pulse.age_s(0.0) == 0.0
    pulse.busy(0.1)
    assert pulse.age_s(0.3) == pytest.approx(0.2)
    assert pulse.age_s(0.9) == pytest.approx(0.8)
    pulse.busy(1.0)
    assert pulse.age_s(1.1) == pytest.approx(0.1)
    pulse.idle()
    assert pulse.age_s(1.3) == 0.0


def test_a_stop_of_the_whole_process_is_forgiven() -> None:
    """After the shell itself stood still, the engine gets its time anew; a hung engine beside a live shell does not."""
    pulse = Pulse()
    pulse.busy(0.0)
    pulse.age_s(0.2)
    assert pulse.age_s(0.4 + FORGIVEN_S) == 0.0
    ages = [pulse.age_s(1.4 + tick / 5) for tick in range(1, 11)]
    assert ages[-1] == pytest.approx(2.0)


def test_forgiving_does_not_write_over_the_engine() -> None:
    """What the engine's thread says while the shell forgives a stop holds: an engine that fell idle has no age."""

    class FallsIdle(Pulse):
        """The engine falls idle at the worst moment: just after the shell has looked."""

        looked = False

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "_progress" and super().__getattribute__("looked"):
                self.looked = False
                self.idle()
            return value

    pulse = FallsIdle()
    pulse.busy(0.0)
    pulse.age_s(0.2)
    pulse.looked = True
    pulse.age_s(0.4 + FORGIVEN_S)
    assert pulse.age_s(0.8 + FORGIVEN_S) == 0.0


# -------------------------------------------------------------------------------------------------------- restarts


def test_the_wait_doubles_and_the_fifth_death_in_a_minute_is_the_last() -> None:
    """0.2 s, doubled from death to death; five within a minute mean giving up."""
    restarts = Restarts()
    waits = [restarts.died(float(second)) for second in range(LIMIT)]
    assert waits == pytest.approx([0.2, 0.4, 0.8, 1.6, None])


def test_slow_deaths_wait_ten_seconds_at_most_and_a_long_life_clears_the_record() -> None:
    """Deaths that come too slowly to give up wait ever longer up to the limit; after a long life it starts over."""
    restarts = Restarts()
    waits = [restarts.died(20.0 * number) for number in range(12)]
    assert max(wait for wait in waits if wait is not None) == LONGEST_S
    assert None not in waits
    assert restarts.died(20.0 * 11 + WINDOW_S + 1) == 0.2


# ----------------------------------------------------------------------------------------------------------- tally


@given(
    st.lists(
        st.tuples(st.sampled_from(["te-1", "te-2"]), st.integers(0, 5), st.booleans()), max_size=30
    )
)
def test_totals_over_restarts_add_up(steps: list[tuple[str, int, bool]]) -> None:
    """The growth handed out sums to everything that was ever counted, over restarts and lost reports."""
    tally, totals, counted, expected = Tally(), {"te-1": 0, "te-2": 0}, 0.0, 0
    unreported = {"te-1": 0, "te-2": 0}
    for generation, (te, more, dies) in enumerate(steps):
        totals[te] += more
        unreported[te] += more
        if generation % 3:  # every third report is lost
            counted += sum(tally.grown(te, {"x": float(totals[te])}).values())
            expected += unreported[te]
            unreported[te] = 0
        if dies:
            tally.forget(te)
            totals[te] = unreported[te] = 0
        assert counted == expected


# ---------------------------------------------------------------------------------------------- recipe and settings


def test_the_recipe_covers_weights_arithmetic_and_page(tmp_path: Path) -> None:
    """Other weights, another arithmetic or another page size give another digest, the same give the same."""
    make_model(tmp_path)
    folder = open_model(tmp_path, MODEL)
    config = ModelConfig.from_folder(folder.path)
    backend = Backend.pick(config, device="cpu", kernels="torch")
    entry = model_entry(folder, backend, context=4096)
    assert entry.recipe_digest == recipe_digest(folder, backend)
    assert (entry.name, entry.context, entry.vocab, entry.page) == (MODEL, 4096, 512, 16)
    others = {
        recipe_digest(folder, replace(backend, dtype="fp32")),
        recipe_digest(folder, replace(backend, device="npu")),  # pages of 128 tokens
        recipe_digest(folder, replace(backend, tp=2)),
        recipe_digest(replace(folder, weights_digest="tiny-1"), backend),
    }
    assert len(others | {entry.recipe_digest}) == 5


@pytest.mark.parametrize("dtype", ["auto", "w8a8", "fp32", "bf16"])
@pytest.mark.parametrize("room", [{"KV_TOKENS": "1000"}, {"KV_BYTES": str(1 << 20)}, {}])
def test_the_catalogue_tells_the_context_that_the_engine_has(
    tmp_path: Path, dtype: str, room: dict[str, str]
) -> None:
    """The pod host, which has no engine, announces exactly the context of the engine its TE makes."""
    make_model(tmp_path)
    folder = open_model(tmp_path, MODEL)
    env = {f"DEEPFLOW_{name}": value for name, value in room.items()}
    settings = WorkerSettings.load(env | {"DEEPFLOW_DTYPE": dtype})
    engine = Engine.from_folder(
        folder.path,
        dtype=dtype,
        kv_tokens=settings.kv_tokens or None,
        kv_bytes=settings.kv_bytes,
        cache_dir=tmp_path,
    )
    assert served_context(pick_backend(folder, settings), settings) == engine.context
    assert (engine.context == folder.context) == (not room)


def test_a_model_that_cannot_be_served_is_refused_before_a_te_is_started(tmp_path: Path) -> None:
    """An unknown architecture is named by the pod host, and not by five TEs that die of it."""
    make_model(tmp_path)
    folder = open_model(tmp_path, MODEL)
    (folder.path / "config.json").write_text('{"architectures": ["NobodyKnows"]}')
    with pytest.raises(InvalidRequest, match="NobodyKnows"):
        pick_backend(folder, WorkerSettings.load({}))


def test_a_te_reads_back_what_its_pod_host_gave_it() -> None:
    """A TE has its pod's settings, one thread until it is told how many, and no model until it is assigned one."""
    env = {"DEEPFLOW_MODELS": "a, b,a", "DEEPFLOW_KV_TOKENS": "300", "DEEPFLOW_INSTANCE": "pod"}
    pod = WorkerSettings.load(env)
    assert pod.models == ("a", "b")
    given_env = for_te(env, pod="pod-1")
    assert given_env["OMP_NUM_THREADS"] == "1"
    assert given_env["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    te = TeSettings.load(given_env)
    assert (te.model, te.pod, te.instance, te.kv_tokens) == ("", "pod-1", "", 300)
    te = assigned(te, Assignment(model="b", role="decode", threads=3))
    assert (te.model, te.role, te.threads, te.kv_tokens) == ("b", "decode", 3, 300)


def test_prefill_and_decode_tes_stand_beside_colocated_ones_or_alone() -> None:
    """There is one colocated TE if nobody says else, none beside a pair of the other roles; it may be a range."""
    for env, numbers in (
        ({}, (1, 1, 0, 0)),
        ({"DEEPFLOW_PD": "1p2d"}, (0, 0, 1, 2)),
        ({"DEEPFLOW_PD": "2p1d", "DEEPFLOW_WORKERS": "3"}, (3, 3, 2, 1)),
        ({"DEEPFLOW_PD": "1p1d", "DEEPFLOW_WORKERS": "0"}, (0, 0, 1, 1)),
        ({"DEEPFLOW_PD": "1p1d", "DEEPFLOW_WORKERS": "0..4"}, (0, 4, 1, 1)),
        ({"DEEPFLOW_WORKERS": "0..8"}, (0, 8, 0, 0)),
        ({"DEEPFLOW_WORKERS": "2..3"}, (2, 3, 0, 0)),
    ):
        settings = WorkerSettings.load(env)
        bounds = (settings.min_tes, settings.max_tes)
        assert (*bounds, settings.num_prefill, settings.num_decode) == numbers
        assert settings.threads == 0  # a share of the cores, of as many TEs as there are to be


def test_compute_threads_are_a_share_of_the_cores() -> None:
    """Native kernels share all cores, torch's all but one; each TE has a thread at least."""
    assert [default_threads(8, number, native=True) for number in (1, 3, 64)] == [8, 2, 1]
    assert [default_threads(8, number, native=False) for number in (1, 3, 64)] == [7, 2, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DEEPFLOW_MODELS", " , "),
        ("DEEPFLOW_WORKERS", "0"),
        ("DEEPFLOW_WORKERS", "3..2"),
        ("DEEPFLOW_WORKERS", "-1"),
        ("DEEPFLOW_WORKERS", "0..9999"),
        ("DEEPFLOW_PD", "1p"),
        ("DEEPFLOW_PD", "0p1d"),
        ("DEEPFLOW_DTYPE", "int4"),
        ("DEEPFLOW_DEVICE", "tpu"),
        ("DEEPFLOW_TP", "0"),
        ("DEEPFLOW_PP", "two"),
        ("DEEPFLOW_MAX_BATCHED_TOKENS", "8"),
        ("DEEPFLOW_KV_BYTES", "1G"),
    ],
)
def test_a_bad_variable_is_named(name: str, value: str) -> None:
    """A setting that cannot be is refused with its name."""
    with pytest.raises(ConfigError, match=name):
        WorkerSettings.load({name: value})
