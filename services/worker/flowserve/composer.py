"""From a plan to a launch: the step as its decoder and the sampler want it. This module must not know who planned it,
or what becomes of it."""

from __future__ import annotations

from services.worker.flowserve.decoder import Span, Splice, StepInput
from services.worker.flowserve.plan import StepPlan
from services.worker.flowserve.sampler import Row
from services.worker.flowserve.sequence import Sequence
from services.worker.flowserve.stream import Launch


class Composer:
    """Of one engine. `eos_ids` end a choice, `vocab` is the number of tokens there are."""

    def __init__(self, eos_ids: frozenset[int], vocab: int) -> None:
        self._eos_ids = eos_ids
        self._vocab = vocab

    def compose(self, plan: StepPlan, before: Launch | None) -> Launch:
        """The launch of a plan, behind `before` whose tokens it may build on."""
        tokens: list[int] = []
        spans: list[Span] = []
        sample_rows: list[int] = []
        unknown: list[tuple[int, int]] = []
        rows: list[Row] = []
        splices: list[Splice] = []
        for sequence, start, length, samples, draft, taken in plan.chunks:
            known = sequence.tokens
            if start == len(known):  # its one row takes the token that the step before is to sample
                unknown.append((len(tokens), sequence.slot))
                tokens.append(0)
            else:
                tokens += known[start : start + length]
                tokens += draft
            spans.append(Span(start, length, sequence.table.copy()))
            splices += (one.splice(spans[-1].table) for one in taken)
            if samples:
                sequence.slot = len(rows)
                rows.append(sequence.row or self.row(sequence))
                sample_rows += range(len(tokens) - 1 - len(draft), len(tokens))
        return Launch(
            plan=plan,
            input=StepInput(tokens, spans, sample_rows, splices),
            rows=rows,
            drafts=[chunk.draft for chunk in plan.chunks if chunk.samples]
            if plan.has_drafts
            else None,
            unknown=unknown,
            before=before,
        )

    def row(self, sequence: Sequence) -> Row:
        """The sampler's view of a choice; made before its first token here is sampled, and kept up by the sampler."""
        sequence.row = Row(
            sequence.sampling,
            sequence.choice,
            sequence.group.request.prompt,
            sequence.tokens[sequence.num_prompt :],
            stop_ids=self._eos_ids.union(sequence.sampling.stop_token_ids),
            vocab=self._vocab,
        )
        return sequence.row
