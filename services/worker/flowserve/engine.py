"""The FlowServe engine: requests in, one step at a time, token deltas out.

It joins scheduler, decoder and sampler, and owns the life of a request: admission, deadline, cancellation, replay, one
terminal delta per choice. It must not know threads, the bus, or text; its clock is handed in. All calls belong to one
thread, except `load`.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from services.worker.flowserve import sampler
from services.worker.flowserve.blocks import BlockPool
from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.kv import KVCache, bytes_per_block
from services.worker.flowserve.model import Decoder, Span, StepInput
from services.worker.flowserve.outcome import (
    ClientDelta,
    Ended,
    EngineLoad,
    StepOutput,
    delta_of,
)
from services.worker.flowserve.pace import Pace
from services.worker.flowserve.sampler import Row, Sampled
from services.worker.flowserve.scheduler import Scheduler, StepPlan
from services.worker.flowserve.sequence import Sequence, SequenceGroup, Status
from shared import catalog, errors
from shared.messages import Cancel, Delta, Failure, Replay, Request

MAX_CHOICES = 128  # of one request
COUNTERS = (
    "steps",
    "prompt_tokens",
    "generation_tokens",
    "prefix_queries",
    "prefix_hits",
    "preemptions",
    "requests_stop",
    "requests_length",
    "requests_cancelled",
    "requests_failed",
)


class Forward(Protocol):
    """What the engine asks of a decoder: logits, fp32 [len(step.sample_rows), vocab]."""

    config: ModelConfig

    def forward(self, step: StepInput, kv: KVCache) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Limits. A step computes at most `max_batched_tokens` rows; `max_num_seqs` choices run.

    How many may wait is not bounded here: who submits keeps the books (`admission.py`), and knows before it asks.
    """

    num_blocks: int
    page: int = 16
    max_num_seqs: int = 64
    max_batched_tokens: int = 256
    keep_finished_s: float = 10.0


class Engine:
    """Continuous batching over one decoder and one paged cache.

    `context` is the longest a sequence gets here: the model's context, or the whole pool where that is smaller.
    `counters` only grow.
    """

    def __init__(
        self,
        decoder: Forward,
        kv: KVCache,
        settings: EngineSettings,
        *,
        eos_ids: Iterable[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.context = min(decoder.config.context, settings.num_blocks * settings.page)
        self.vocab = decoder.config.vocab
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._decoder = decoder
        self._kv = kv
        self._eos_ids = frozenset(eos_ids)
        self._clock = clock
        self._pool = BlockPool(settings.num_blocks)
        self._scheduler = Scheduler(
            self._pool,
            page=settings.page,
            max_num_seqs=settings.max_num_seqs,
            max_batched_tokens=settings.max_batched_tokens,
        )
        self._pace = Pace()
        # Predicted, of the step under way; kept past its end, for until that is noticed the step counts as under way.
        self._step_s = 0.0
        self._arrivals = 0
        self._live: dict[str, SequenceGroup] = {}
        # Over, but kept for replays and repeated submissions, with the time they may be forgotten.
        self._finished: OrderedDict[str, tuple[float, SequenceGroup]] = OrderedDict()
        # Highest attempt cancelled of requests not (yet) known: a cancel may overtake its request.
        self._cancelled: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._deltas: list[ClientDelta] = []  # for the next step's output
        self._ended: list[Ended] = []

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        dtype: str = "w8a8",
        kv_tokens: int | None = None,
        kv_bytes: int = 1 << 30,
        page: int = 16,
        max_num_seqs: int = 64,
        max_batched_tokens: int = 256,
    ) -> Engine:
        """An engine over the model in a folder, with room for `kv_tokens` tokens or, without, in `kv_bytes` bytes.

        Raises ModelError for what is wrong with the model, InvalidRequest if the room is less than one block.
        """
        decoder = Decoder.load(folder, dtype=dtype)
        num_blocks = kv_bytes // bytes_per_block(decoder.config, page, decoder.kv_dtype)
        if kv_tokens:
            num_blocks = -(-kv_tokens // page)
        if num_blocks < 1:
            raise errors.InvalidRequest(f"{kv_bytes} bytes hold not one block of {page} tokens")
        settings = EngineSettings(
            num_blocks=num_blocks,
            page=page,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
        )
        kv = KVCache.allocate(
            decoder.config, num_blocks=num_blocks, page=page, dtype=decoder.kv_dtype
        )
        return cls(decoder, kv, settings, eos_ids=catalog.read_eos_ids(folder))

    # --------------------------------------------------------------------------------------------------- requests

    def submit(self, request: Request) -> None:
        """Take responsibility for a request: each of its live choices will end in exactly one terminal delta.

        Idempotent by (request, attempt); a newer attempt replaces an older one, which ends as cancelled. Tokens in
        `request.output` are known: computed again like a prompt, not sent again.
        Raises InvalidRequest if the request can never run here or comes too late.
        """
        now = self._clock()
        self._forget(now)
        known = self._find(request.request)
        if known is not None and known.request.attempt == request.attempt:
            return
        if known is not None and known.request.attempt > request.attempt:
            raise errors.InvalidRequest("a later attempt of this request is here already")
        if self._cancelled.get(request.request, (0.0, -1))[1] >= request.attempt:
            raise errors.InvalidRequest("this request was cancelled before it came")
        self.validate(request)
        if known is not None:
            self._deltas += self._end_all(known, "cancelled")
            self._settle(known, now)
        self._arrivals += 1
        group = SequenceGroup(
            request,
            arrival=self._arrivals,
            deadline=now + request.deadline_ms / 1000,
            page=self.settings.page,
            context=self.context,
            eos_ids=self._eos_ids,
        )
        self._finished.pop(request.request, None)
        self._live[request.request] = group
        self._scheduler.add(group)
        for sequence in group.sequences:
            sequence.end_if_complete()  # a resubmission may have nothing left to generate
            if sequence.finish is not None:
                self._deltas.append(self._end(sequence, sequence.finish))
        self._settle(group, now)

    def cancel(self, cancel: Cancel) -> list[ClientDelta]:
        """Drop (request, attempts up to `attempt`), or one choice; the terminal deltas of what was still alive.

        Idempotent. What is past `keep` output tokens leaves the prefix index, also of a choice that has just ended.
        """
        now = self._clock()
        group = self._find(cancel.request)
        if cancel.choice is None and (group is None or group.request.attempt < cancel.attempt):
            attempt = max(cancel.attempt, self._cancelled.get(cancel.request, (0.0, -1))[1])
            self._cancelled[cancel.request] = (now + self.settings.keep_finished_s, attempt)
            self._cancelled.move_to_end(cancel.request)
        if group is None or group.request.attempt > cancel.attempt:
            return []
        deltas = []
        for sequence in group.sequences:
            if cancel.choice not in (None, sequence.choice):
                continue
            if sequence.status is not Status.ENDED:
                deltas.append(self._end(sequence, "cancelled", keep=cancel.keep))
            elif cancel.keep is not None:
                self._scheduler.trim(sequence, cancel.keep)
        self._settle(group, now)
        return deltas

    def refuse(self, request: Request, failure: Failure) -> list[ClientDelta]:
        """The ends of a request that was accepted on the engine's behalf but that `submit` would not take."""
        deltas = []
        for choice in range(request.sampling.n):
            if choice not in request.ended:
                given = request.output[choice] if choice < len(request.output) else []
                delta = Delta(
                    request=request.request,
                    attempt=request.attempt,
                    choice=choice,
                    index=len(given),
                    ids=[],
                    finish="failed",
                    failure=failure,
                )
                deltas.append(ClientDelta(request.client, delta))
        self._report_end(request, "failed", 0, sum(map(len, request.output)))
        return deltas

    def cancel_client(self, client: str) -> None:
        """Drop all requests of a client that fell silent; nobody is left to hear of it."""
        now = self._clock()
        for group in [g for g in self._live.values() if g.request.client == client]:
            self._end_all(group, "cancelled")
            self._settle(group, now)

    def replay(self, replay: Replay) -> list[Delta]:
        """Everything from the asked positions on, one delta per choice that has any. Raises NotFound if unknown."""
        group = self._find(replay.request)
        if group is None or group.request.attempt != replay.attempt:
            raise errors.NotFound("this request is not known here (any more)")
        deltas = []
        for sequence in group.sequences:
            asked = replay.have[sequence.choice] if sequence.choice < len(replay.have) else 0
            start = max(asked, sequence.num_given)
            if start < sequence.num_output or sequence.status is Status.ENDED:
                deltas.append(delta_of(sequence, start))
        return deltas

    # ------------------------------------------------------------------------------------------------------- step

    def has_work(self) -> bool:
        """Whether `step` has something to compute or to report."""
        return bool(self._live or self._deltas or self._ended)

    def step(self) -> StepOutput:
        """One step of the batch. Never raises for a fault in it: that ends the step's sequences and is reported."""
        started = self._clock()
        self._forget(started)
        self._expire(started)
        plan = self._scheduler.schedule()
        error = None
        if plan.chunks:
            self._step_s = self._pace.step_s(plan.num_decodes, plan.num_prefill_tokens)
            try:
                results = self._compute(plan)
            except Exception as fault:
                error = fault
                self._fail(plan)
            else:
                self._apply(plan, results)
                self._pace.observe(
                    self._clock() - started,
                    num_decodes=plan.num_decodes,
                    num_prefill_tokens=plan.num_prefill_tokens,
                )
        return self._report(plan, error)

    def _compute(self, plan: StepPlan) -> list[Sampled]:
        """Run the decoder over the plan's rows and sample a token for each sequence that is due one."""
        tokens: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        sample_rows: list[int] = []
        for chunk in plan.chunks:
            sequence, stop = chunk.sequence, chunk.start + chunk.length
            tokens += sequence.tokens[chunk.start : stop]
            positions += range(chunk.start, stop)
            spans.append(Span(chunk.start, chunk.length, sequence.table))
            if chunk.samples:
                sample_rows.append(len(tokens) - 1)
        logits = self._decoder.forward(StepInput(tokens, positions, spans, sample_rows), self._kv)
        return sampler.sample(logits, [self._row(sequence) for sequence in plan.sampled])

    def _row(self, sequence: Sequence) -> Row:
        if sequence.row is None:
            sequence.row = Row(
                sequence.sampling,
                sequence.choice,
                sequence.group.request.prompt,
                sequence.tokens[sequence.num_prompt :],
                stop_ids=self._eos_ids.union(sequence.sampling.stop_token_ids),
                vocab=self.vocab,
            )
        return sequence.row

    def _apply(self, plan: StepPlan, results: list[Sampled]) -> None:
        self._scheduler.update(plan, [result.token for result in results])
        now = self._clock()
        for sequence, result in zip(plan.sampled, results, strict=True):
            if result.logprobs is not None:
                sequence.logprobs.append(result.logprobs)
            delta = delta_of(sequence, sequence.num_output - 1)
            self._deltas.append(ClientDelta(sequence.group.request.client, delta))
            if sequence.finish is not None:
                self._pace.observe_output(sequence.num_output)
                self._settle(sequence.group, now)

    def _fail(self, plan: StepPlan) -> None:
        """End the sequences of a step that raised; the rest of the engine is as before the step."""
        failure = Failure(code=errors.Internal.code, message="the engine failed in this step")
        for chunk in plan.chunks:
            self._deltas.append(self._end(chunk.sequence, "failed", failure=failure))
            self._settle(chunk.sequence.group, self._clock())

    def _expire(self, now: float) -> None:
        """End requests past their deadline."""
        for group in [g for g in self._live.values() if g.deadline <= now]:
            failure = Failure(
                code=errors.DeadlineExceeded.code,
                message=f"not finished within {group.request.deadline_ms} ms",
            )
            self._deltas += self._end_all(group, "failed", failure)
            self._settle(group, now)

    def _report(self, plan: StepPlan, error: Exception | None) -> StepOutput:
        stored, removed = self._pool.drain_events()
        output = StepOutput(
            deltas=self._deltas,
            ended=self._ended,
            stored=stored,
            removed=removed,
            num_computed=0 if error else sum(chunk.length for chunk in plan.chunks),
            error=error,
        )
        self._deltas, self._ended = [], []
        self.counters["steps"] += bool(plan.chunks)
        self.counters["generation_tokens"] += 0 if error else len(plan.sampled)
        self.counters["preemptions"] = self._scheduler.num_preemptions
        self.counters["prefix_queries"] = self._scheduler.num_queried_tokens
        self.counters["prefix_hits"] = self._scheduler.num_hit_tokens
        return output

    # ------------------------------------------------------------------------------------------------ life and end

    def _find(self, request: str) -> SequenceGroup | None:
        if request in self._finished:
            return self._finished[request][1]
        return self._live.get(request)

    def _end(
        self,
        sequence: Sequence,
        finish: str,
        *,
        keep: int | None = None,
        failure: Failure | None = None,
    ) -> ClientDelta:
        """End a live choice outside a step; its terminal delta, without tokens."""
        self._scheduler.end(sequence, finish, keep=keep, failure=failure)
        return ClientDelta(sequence.group.request.client, delta_of(sequence, sequence.num_output))

    def _end_all(
        self, group: SequenceGroup, finish: str, failure: Failure | None = None
    ) -> list[ClientDelta]:
        return [self._end(sequence, finish, failure=failure) for sequence in list(group.live())]

    def _settle(self, group: SequenceGroup, now: float) -> None:
        """Once all choices of a live group have ended: report it, and keep it for replays only."""
        request = group.request
        if not group.has_ended or self._live.get(request.request) is not group:
            return
        del self._live[request.request]
        self._finished[request.request] = (now + self.settings.keep_finished_s, group)
        finishes = {sequence.finish for sequence in group.sequences}
        finish = next((f for f in ("failed", "cancelled", "length") if f in finishes), "stop")
        num_output = sum(sequence.num_output for sequence in group.sequences)
        self._report_end(request, finish, group.num_cached or 0, num_output)

    def _report_end(self, request: Request, finish: str, cached: int, output: int) -> None:
        ended = Ended(
            request=request.request,
            attempt=request.attempt,
            client=request.client,
            finish=finish,
            prompt_tokens=len(request.prompt),
            cached_tokens=cached,
            output_tokens=output,
        )
        self._ended.append(ended)
        self.counters[f"requests_{finish}"] += 1
        self.counters["prompt_tokens"] += ended.prompt_tokens

    def _forget(self, now: float) -> None:
        """Drop what was kept long enough."""
        for kept in (self._finished, self._cancelled):
            while kept and next(iter(kept.values()))[0] <= now:
                kept.popitem(last=False)

    def validate(self, request: Request) -> None:
        """Raises InvalidRequest, naming the field, for what would harm the batch or never end."""
        num_prompt, vocab = len(request.prompt), self.vocab
        if not request.prompt:
            raise errors.InvalidRequest("the prompt is empty", param="prompt")
        if num_prompt >= self.context:
            raise errors.InvalidRequest(
                f"the prompt has {num_prompt} tokens, the context here is {self.context}",
                param="prompt",
            )
        for ids in (request.prompt, *request.output):
            if ids and not 0 <= min(ids) <= max(ids) < vocab:
                raise errors.InvalidRequest(f"token ids go from 0 to {vocab - 1}", param="prompt")
        sampling = request.sampling
        if not max(1, len(request.output)) <= sampling.n <= MAX_CHOICES:
            raise errors.InvalidRequest(
                f"1 to {MAX_CHOICES} choices, no fewer than outputs", param="n"
            )
        ended = set(request.ended)
        if len(ended) < len(request.ended) or not ended < set(range(sampling.n)):
            raise errors.InvalidRequest("some of the choices, each once", param="ended")
        if sampling.max_tokens < 1:
            raise errors.InvalidRequest("at least one token", param="max_tokens")
        sampler.validate(sampling, vocab)
        if len(request.hashes) > num_prompt // self.settings.page:
            raise errors.InvalidRequest("more hashes than full pages in the prompt", param="hashes")

    # ------------------------------------------------------------------------------------------------ introspection

    def load(self) -> EngineLoad:
        """How busy the engine is. May be called from another thread: it reads copies and single values."""
        scheduler = self._scheduler
        running, waiting = scheduler.running.copy(), scheduler.waiting.copy()
        held = [sequence for group in list(scheduler.held.values()) for sequence in group]
        num_seqs = len(running) + len(waiting) + len(held)
        batch = min(num_seqs, self.settings.max_num_seqs)
        # Held choices will find their prompt in the cache: only their decoding counts.
        num_known = sum(sequence.num_remaining for sequence in running + waiting)
        num_to_come = sum(
            self._pace.output_left(s.num_output, s.max_known - s.num_prompt)
            for s in running + waiting + held
        )
        blocks = self._pool.ledger()
        return EngineLoad(
            running=len(running),
            waiting=len(waiting) + len(held),
            free_slots=max(self.settings.max_num_seqs - num_seqs, 0),
            outstanding_s=self._pace.outstanding_s(num_known, num_to_come, batch),
            blocks_total=blocks["total"],
            blocks_used=blocks["live"],
            blocks_cached=blocks["cached"],
            step_ms=round(self._step_s * 1000) if num_seqs else 0,
        )

    def ledger(self) -> dict[str, int | dict[str, int]]:
        """Blocks by state, and live block references by owner "request#attempt/choice"."""
        owners = {
            f"{g.request.request}#{g.request.attempt}/{sequence.choice}": len(sequence.table)
            for g in self._live.values()
            for sequence in g.live()
            if sequence.table
        }
        return {**self._pool.ledger(), "owners": owners}

    def check(self) -> None:
        """Prove that the ledger balances. Raises AssertionError otherwise; costs O(pool)."""
        self._pool.check(s.table for g in self._live.values() for s in g.live())

    def index_snapshot(self) -> list[bytes]:
        """The hashes of all indexed pages."""
        return self._pool.index_snapshot()
