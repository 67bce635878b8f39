"""`bench peers` from start to end: environments, weights, then FlowServe against one peer after another.

Two processes are loaded at a time, FlowServe and the peer whose turn it is; one runs. Results are kept per peer, point
and round beside the environments, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeAlias

from rich.progress import Progress

import services.worker
from deepflow.bench import machine
from deepflow.bench.peers import environment, figures, weights
from deepflow.bench.peers.contestant import Contestant
from deepflow.bench.peers.duel import Duel
from deepflow.bench.peers.figures import PeersReport
from deepflow.bench.peers.plan import BARS, OURS, PEERS, Plan, Round
from deepflow.bench.peers.results import Results
from deepflow.bench.peers.roster import ROSTER, Peer, variants
from deepflow.bench.progress import PullLines, step
from services.worker.settings import compute_env, num_cores
from shared.catalog import ModelFolder
from shared.errors import InvalidRequest, Unavailable

Wanted: TypeAlias = dict[str, tuple[str, ...]]  # variants by point

_OURS_VARIANT: Final = "w8a8"
_METHOD: Final = (
    "Everybody gets the same random token ids, so lengths match by themselves; all choose greedily and ignore the end.",
    "prefill: tokens of one new prompt / time to its first token; decode: tokens of all sequences / time, no prefill.",
    "The rounds of a point continue the same sequences; their KV reaches its length at the end of the last round.",
    "In a round FlowServe and the peer run next to each other, the one whose turn it is not stopped.",
    "Of several variants of a peer all run in the first round, and the one that was fastest in the others.",
    "llama.cpp and transformers prefill one prompt and copy its cache for a batch; decoding costs the same.",
    "An engine that takes longer than its turn for a round is rated by the steps it made, so its KV stays shorter.",
)


async def set_up(model: ModelFolder, cache_dir: Path, peers: Sequence[str], bar: Progress) -> None:
    """Every environment and all weights, so that a later run only measures. Raises DeepFlowError."""
    root = cache_dir / "peers"
    with step(bar, "weights", 1):
        weights.prepare(model.name, root / "weights", PullLines(bar.console))
    for peer in _chosen(peers):
        with step(bar, f"{peer.name}: its environment (when new, {peer.minutes})", 1):
            await environment.ensure(peer, root, _log(root, f"{peer.name}-setup"))


async def bench_peers(
    model: ModelFolder,
    cache_dir: Path,
    plan: Plan,
    progress: Progress,
    *,
    peers: Sequence[str] = PEERS,
    threads: int = 0,
    seed: int = 0,
    fresh: bool = False,
) -> PeersReport:
    """Measure everything that is not measured yet, or everything if `fresh`; `threads` 0 is one per core.

    Of a peer that cannot be set up or fails, what there is by then is reported, and a note says why. Raises
    InvalidRequest for an unknown peer or a model that is not published as GGUF, Unavailable if there is nothing at all.
    """
    chosen = _chosen(peers)
    described = machine.describe("numpy")
    arena = _Arena(model, cache_dir, plan, threads or num_cores(), seed, progress)
    with step(progress, "weights", 1):
        arena.prepare()
    measured: dict[str, figures.Rounds] = {}
    notes, settings = list(_METHOD), {}
    for peer in chosen:
        wanted = {
            point.name: variants(peer.name, point, described["cpu_flags"]) for point in plan.points
        }
        results = arena.results(peer, wanted, fresh=fresh)
        told: dict[str, Any] = {}
        try:
            told = await arena.compare(peer, wanted, results)
        except Unavailable as error:
            notes.append(f"{peer.name} was not measured to the end: {error.message}")
        if any(results.rounds.values()):
            measured[peer.name] = results.rounds
            settings[peer.name] = told | {"variants": figures.fastest(plan.points, results.rounds)}
    if not measured:
        raise Unavailable("; ".join(notes[len(_METHOD) :]))
    return PeersReport(
        bench="peers",
        metrics=figures.metrics(plan.points, measured),
        machine=described,
        settings={
            "model": model.name,
            "seed": seed,
            "threads": arena.threads,
            OURS: _OURS_VARIANT,
            **asdict(plan),
            "peers": settings,
        },
        bars=tuple(bar for bar in BARS if bar.metric.split("_")[1] in measured),
        notes=notes,
        points=tuple(point.name for point in plan.points),
        engines=(OURS, *measured),
    )


class _Arena:
    """What all comparisons have in common."""

    def __init__(
        self,
        model: ModelFolder,
        cache_dir: Path,
        plan: Plan,
        threads: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self.threads = threads
        self._model = model
        self._cache_dir = cache_dir
        self._root = cache_dir / "peers"
        self._plan = plan
        self._seed = seed
        self._progress = progress
        self._weights: dict[str, Path] = {}

    def prepare(self) -> None:
        """The weights in the peers' forms."""
        folder = self._root / "weights"
        self._weights = weights.prepare(self._model.name, folder, PullLines(self._progress.console))

    def results(self, peer: Peer, wanted: Wanted, *, fresh: bool) -> Results:
        """What there is with one peer already."""
        kept = self._root / "results" / f"{peer.name}-{self._plan.name}.json"
        return Results.open(kept, self._key(peer, wanted), fresh=fresh)

    async def compare(self, peer: Peer, wanted: Wanted, results: Results) -> dict[str, Any]:
        """The rounds with one peer that are not in `results` yet; what it said of itself. Raises Unavailable."""
        plan, progress = self._plan, self._progress
        with step(progress, f"{peer.name}: its environment (when new, {peer.minutes})", 1):
            log = _log(self._root, f"{peer.name}-setup")
            folder = await environment.ensure(peer, self._root, log)
        missing = [
            point for point in plan.points if len(results.rounds[point.name]) < plan.num_rounds
        ]
        if not missing:
            return {"kept": "from an earlier run"}
        async with contextlib.AsyncExitStack() as open_:
            with step(progress, f"{peer.name}: loading", 2) as advance:
                ours = await open_.enter_async_context(self._ours())
                advance()
                used = list(dict.fromkeys(name for names in wanted.values() for name in names))
                theirs = await open_.enter_async_context(self._theirs(peer, folder, used))
                advance()
            duel = Duel(ours, theirs, plan, vocab=self._model.vocab, seed=self._seed)
            num_rounds = sum(plan.num_rounds - len(results.rounds[one.name]) for one in missing)
            with step(progress, f"{peer.name}: in turns", num_rounds) as advance:

                def keep(point: str, one: Round) -> None:
                    results.add(point, one)
                    advance()

                for point in missing:
                    done = results.rounds[point.name]
                    await duel.measure(point, tuple(done), wanted[point.name], keep)
            return theirs.described

    def _ours(self) -> contextlib.AbstractAsyncContextManager[Contestant]:
        here = str(Path(__file__).parents[3])
        env = environment.clean_env() | compute_env(self.threads)
        env |= {"PYTHONPATH": here, "DEEPFLOW_CACHE": str(self._cache_dir)}
        options = self._options(OURS, [_OURS_VARIANT])
        return Contestant.start(OURS, Path(sys.executable), env, options, _log(self._root, OURS))

    def _theirs(
        self, peer: Peer, folder: Path, used: Sequence[str]
    ) -> contextlib.AbstractAsyncContextManager[Contestant]:
        python = environment.python_of(folder)
        env = environment.clean_env()
        log = _log(self._root, peer.name)
        return Contestant.start(peer.name, python, env, self._options(peer.name, used), log)

    def _options(self, name: str, used: Sequence[str]) -> dict[str, Any]:
        scratch = self._root / "scratch" / name
        scratch.mkdir(parents=True, exist_ok=True)
        return {
            "model": str(self._model.path),
            "weights": {kind: str(path) for kind, path in self._weights.items()},
            "scratch": str(scratch),
            "variants": list(used),
            "threads": self.threads,
            "num_tokens": self._plan.num_tokens,
            "max_num_seqs": self._plan.max_num_seqs,
        }

    def _key(self, peer: Peer, wanted: Wanted) -> dict[str, Any]:
        """Whatever would make other figures."""
        return {
            "peer": asdict(peer) | {"minutes": None},
            "variants": wanted,
            "plan": asdict(self._plan),
            "model": self._model.weights_digest,
            "threads": self.threads,
            "seed": self._seed,
            "engine": _source_digest(),
            "drivers": _digest(Path(__file__).parent / "drivers"),
        }


def _chosen(peers: Sequence[str]) -> list[Peer]:
    for name in peers:
        if name not in ROSTER:
            raise InvalidRequest(f"unknown peer {name!r}; there are {', '.join(ROSTER)}")
    return [ROSTER[name] for name in dict.fromkeys(peers)]


def _source_digest() -> str:
    """Of our engine as it is: a figure of yesterday's is none of today's."""
    return _digest(Path(services.worker.__path__[0]) / "flowserve")


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _log(root: Path, name: str) -> Path:
    """Where the words of a process go."""
    folder = root / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.log"
