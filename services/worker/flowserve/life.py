"""The life of a request: admission, attempts, cancellation, deadline, replay, and one terminal delta per choice.

It keeps the requests under way, and for some time those that are over, and collects what is to be reported. It must
not know how a step is computed, threads, the bus or text; times are handed in.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

from services.worker.flowserve import pic, sampler
from services.worker.flowserve.outcome import ClientDelta, Ended, delta_of
from services.worker.flowserve.pace import Pace
from services.worker.flowserve.scheduler import Scheduler
from services.worker.flowserve.sequence import HANDED, Sequence, SequenceGroup, Status
from shared import errors
from shared.messages import Band, Cancel, Delta, Failure, Handover, Replay, Request, Sampling

MAX_CHOICES = 128  # of one request
_NO_DEADLINE_MS = 365 * 86_400_000


def local_request(
    name: str,
    prompt: list[int],
    sampling: Sampling,
    *,
    root: bytes = bytes(32),
    chunks: list[list[int]] | None = None,
    tenant: str = "",
    band: Band = Band.DEFAULT,
) -> Request:
    """A request made where the engine is: no client, no deadline. `root` begins its pages' hashes."""
    return Request(
        request=name,
        attempt=0,
        client="",
        model="",
        tenant=tenant,
        prompt=prompt,
        root=root,
        hashes=[],
        sampling=sampling,
        deadline_ms=_NO_DEADLINE_MS,
        park_ms=0,
        chunks=chunks or [],
        band=band,
    )


def band_tokens(band: Band) -> str:
    """The counter of the tokens of a band's requests, prompt and output, once they have ended."""
    return f"tokens_{band.name.lower()}"


class Requests:
    """All requests of one engine. `context` is the longest a sequence gets; `deltas`, `ended`: still to be reported."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        context: int,
        vocab: int,
        page: int,
        eos_ids: frozenset[int],
        keep_finished_s: float,
        counters: Counter[str],
        pace: Pace,
    ) -> None:
        self.context = context
        self.vocab = vocab
        self.page = page
        self.eos_ids = eos_ids
        self.live: dict[str, SequenceGroup] = {}
        self.deltas: list[ClientDelta] = []
        self.ended: list[Ended] = []
        self.counters = counters
        self._scheduler = scheduler
        self._pace = pace
        self._keep_finished_s = keep_finished_s
        self._arrivals = 0
        # Over, but kept for replays and repeated submissions, with the time they may be forgotten.
        self._finished: OrderedDict[str, tuple[float, SequenceGroup]] = OrderedDict()
        # Highest attempt cancelled of requests not (yet) known: a cancel may overtake its request.
        self._cancelled: OrderedDict[str, tuple[float, int]] = OrderedDict()

    # ------------------------------------------------------------------------------------------------- what comes in

    def submit(
        self,
        request: Request,
        now: float,
        *,
        prefill_only: bool = False,
        handover: Handover | None = None,
        expected_output: int = 0,
    ) -> SequenceGroup | None:
        """As `Engine.submit`; None if it is here already."""
        self._forget(now)
        known = self._find(request.request)
        if known is not None and known.request.attempt == request.attempt:
            # Who handed it over may be the one who goes on with it.
            if handover is None or known.sequences[0].finish != HANDED:
                return None
            known = None
        if known is not None and known.request.attempt > request.attempt:
            raise errors.InvalidRequest("a later attempt of this request is here already")
        if self._cancelled.get(request.request, (0.0, -1))[1] >= request.attempt:
            raise errors.InvalidRequest("this request was cancelled before it came")
        self.validate(request)
        if (prefill_only or handover) and request.sampling.n != 1:
            raise errors.InvalidRequest(
                "a request of several choices is not handed over", param="n"
            )
        given = request.output[0] if request.output else []
        if handover and (not handover.ids or given[-len(handover.ids) :] != handover.ids):
            raise errors.InvalidRequest("handed over with other tokens", param="output")
        if known is not None:
            self.deltas += self._end_all(known, "cancelled")
            self.settle(known, now)
        self._arrivals += 1
        group = SequenceGroup(
            request,
            arrival=self._arrivals,
            deadline=now + request.deadline_ms / 1000,
            page=self.page,
            context=self.context,
            eos_ids=self.eos_ids,
            hands_over=prefill_only,
            handover=handover,
            expected_output=expected_output,
        )
        self._finished.pop(request.request, None)
        self.live[request.request] = group
        self._scheduler.add(group)
        for sequence in group.sequences:
            sequence.end_if_complete()  # a resubmission may have nothing left to generate
            if sequence.finish is not None:
                self.deltas.append(self._end(sequence, sequence.finish))
        self.settle(group, now)
        return group

    def cancel(self, cancel: Cancel, now: float) -> list[ClientDelta]:
        """As `Engine.cancel`."""
        group = self._find(cancel.request)
        is_to_come = (  # maybe from here, to be gone on with
            group is None
            or group.request.attempt < cancel.attempt
            or group.sequences[0].finish == HANDED
        )
        if cancel.choice is None and is_to_come:
            attempt = max(cancel.attempt, self._cancelled.get(cancel.request, (0.0, -1))[1])
            self._cancelled[cancel.request] = (now + self._keep_finished_s, attempt)
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
                self._scheduler.holdings.trim(sequence, cancel.keep)
        self.settle(group, now)
        return deltas

    def cancel_client(self, client: str, now: float) -> None:
        """As `Engine.cancel_client`."""
        for group in [g for g in self.live.values() if g.request.client == client]:
            self._end_all(group, "cancelled")
            self.settle(group, now)

    def refuse(self, request: Request, failure: Failure) -> list[ClientDelta]:
        """As `Engine.refuse`."""
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

    def replay(self, replay: Replay) -> list[Delta]:
        """As `Engine.replay`."""
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
        pic.validate(request.chunks, num_prompt)
        if len(request.hashes) > num_prompt // self.page:
            raise errors.InvalidRequest("more hashes than full pages in the prompt", param="hashes")

    # -------------------------------------------------------------------------------------------------- what time does

    def pass_time(self, now: float) -> None:
        """Forget what was kept long enough, and end requests past their deadline, or that would not get another token
        before it: nothing is computed for them."""
        self._forget(now)
        horizon = now + self._pace.least_prefill_s(self.context)
        for group in [g for g in self.live.values() if g.deadline <= horizon]:
            if group.deadline > now:
                if not self._is_late(group, group.deadline - now):
                    continue
                self._pace.doubt()
            failure = Failure(
                code=errors.DeadlineExceeded.code,
                message=f"not to be finished within {group.request.deadline_ms} ms",
            )
            self.deltas += self._end_all(group, "failed", failure)
            self.settle(group, now)

    def _is_late(self, group: SequenceGroup, left_s: float) -> bool:
        """Whether certainly no choice gets another token in the time that is left."""
        going = [sequence for sequence in group.live() if sequence.status is not Status.HELD]
        if group.chunks or not going:
            return False  # how much is left to compute is not known yet
        least_s = self._pace.least_prefill_s
        # Steps on their way may be done at any moment.
        return all(least_s(one.num_known - one.num_planned) > left_s for one in going) and all(
            least_s(self._num_uncached(one)) > left_s for one in going
        )

    def _num_uncached(self, sequence: Sequence) -> int:
        """Tokens to compute before its next one, at the least; 0 while some are computed for, or brought to, another or
        itself."""
        if sequence.status is Status.RUNNING:
            return sequence.num_known - sequence.num_planned
        scheduler = self._scheduler
        hashes = sequence.page_hashes((sequence.num_known - 1) // self.page)
        num_here = scheduler.pool.num_present(hashes)
        following = hashes[num_here : num_here + 1]
        others = (*scheduler.running, *scheduler.fetching)
        if following and any(one.hashes[num_here : num_here + 1] == following for one in others):
            return 0
        return sequence.num_known - num_here * self.page

    def _forget(self, now: float) -> None:
        for kept in (self._finished, self._cancelled):
            while kept and next(iter(kept.values()))[0] <= now:
                kept.popitem(last=False)

    # ----------------------------------------------------------------------------------------------- what steps bring

    def extend(self, sequence: Sequence, num_new: int, now: float) -> None:
        """Report the last `num_new` tokens of a choice, and its end if they brought it."""
        if sequence.group.first_token is None:
            sequence.group.first_token = now
        delta = delta_of(sequence, sequence.num_output - num_new)
        self.deltas.append(ClientDelta(sequence.group.request.client, delta))

    def fail(self, sequence: Sequence, failure: Failure, now: float) -> None:
        """End a live choice for a fault that is not its own."""
        self.deltas.append(self._end(sequence, "failed", failure=failure))
        self.settle(sequence.group, now)

    def settle(self, group: SequenceGroup, now: float) -> None:
        """Once all choices of a live group have ended: report it, and keep it for replays only."""
        request = group.request
        if not group.has_ended or self.live.get(request.request) is not group:
            return
        del self.live[request.request]
        self._finished[request.request] = (now + self._keep_finished_s, group)
        finishes = {sequence.finish for sequence in group.sequences}
        finish = next(
            (f for f in ("failed", "cancelled", "length", HANDED) if f in finishes), "stop"
        )
        num_output = sum(sequence.num_output for sequence in group.sequences)
        cached = group.num_cached or 0
        self._report_end(request, finish, cached, num_output, group.first_token)

    # ------------------------------------------------------------------------------------------------------ internals

    def _find(self, request: str) -> SequenceGroup | None:
        if request in self._finished:
            return self._finished[request][1]
        return self.live.get(request)

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

    def _report_end(
        self,
        request: Request,
        finish: str,
        cached: int,
        output: int,
        first_token: float | None = None,
    ) -> None:
        ended = Ended(
            request=request.request,
            attempt=request.attempt,
            client=request.client,
            finish=finish,
            prompt_tokens=len(request.prompt),
            cached_tokens=cached,
            output_tokens=output,
            first_token=first_token,
        )
        self.ended.append(ended)
        self.counters[f"requests_{finish}"] += 1
        self.counters["prompt_tokens"] += ended.prompt_tokens
        self.counters[band_tokens(request.band)] += ended.prompt_tokens + output
