"""What goes on around one request's state machine: a bus that loses, repeats and reorders, TEs and JEs that die, and
requests that are prefilled on one TE and decoded on another."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from services.gateway.actions import Action, Ask, Emit, Submit
from services.gateway.delivery import MAX_LOSSES, Delivery, Limits
from shared.errors import DeadlineExceeded, DeepFlowError, NotFound, Overloaded, Unavailable
from shared.messages import Accepted, Delta, Failure, Progress

LIMITS = Limits(deadline_s=600.0, park_s=60.0)
NOBODY = Failure(code="unavailable", message="nobody goes on", retry_after_s=0.0)


def delta(index: int, ids: list[int], attempt: int = 1, choice: int = 0, **more: object) -> Delta:
    """A delta of request "r"."""
    return Delta(request="r", attempt=attempt, choice=choice, index=index, ids=ids, **more)  # type: ignore[arg-type]


@dataclass
class Engine:
    """A TE as the machine sees it: it runs an attempt, forgets what is dropped, and answers replays.

    A prefill TE makes one token and then holds its pages; a decode TE goes on from there, and can replay all of it.
    """

    name: str
    truth: list[list[int]]
    attempt: int
    made: list[int]
    prefills: bool = False
    handed: bool = False
    told: bool = False

    @property
    def busy(self) -> bool:
        """Whether it still makes tokens."""
        done = all(made == len(truth) for made, truth in zip(self.made, self.truth, strict=True))
        return not self.handed and not done

    def deltas(self, choice: int, start: int, end: int) -> list[Delta]:
        truth = self.truth[choice]
        out = []
        for index in range(start, end):
            last = index == len(truth) - 1
            out.append(
                delta(
                    index, truth[index : index + 1], self.attempt, choice,
                    finish="stop" if last else None, moves=self.prefills and not last,
                )
            )  # fmt: skip
        return out

    def step(self, choice: int) -> list[Delta]:
        if self.handed:
            return []
        before = self.made[choice]
        self.made[choice] = min(before + 1, len(self.truth[choice]))
        made = self.deltas(choice, before, self.made[choice])
        self.handed = any(one.moves for one in made)
        return made

    def replay(self, have: list[int]) -> list[Delta]:
        return [
            one
            for choice, start in enumerate(have)
            for one in self.deltas(choice, start, self.made[choice])
        ]


@dataclass
class Event:
    """`Prefilled`, on its way to a JE."""

    je: str
    attempt: int
    prefill: Engine


class World:
    """One request in it. `split`: JEs give it to pairs of TEs, as a rule."""

    def __init__(self, random: Random, truth: list[list[int]], *, split: bool = False) -> None:
        self.random = random
        self.truth = truth
        self.split = split
        self.now = 0.0
        self.got: list[list[int]] = [[] for _ in truth]
        self.finished: list[str | None] = [None for _ in truth]
        self.engines: dict[str, Engine] = {}
        self.flying: list[tuple[str, Accepted | Delta | Progress]] = []
        self.events: list[Event] = []
        self.jes: dict[str, int] = {}  # JE -> the attempt it took
        self.submits: list[Submit] = []
        self.asks: list[Ask] = []
        self.num_engines = 0
        self.num_moves = 0
        self.left = False
        self.delivery = Delivery(len(truth), LIMITS, 0.0, random.random)
        self.do(self.delivery.start(0.0))

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Emit):
                assert not self.left, "a token for nobody"
                assert self.finished[action.choice] is None, "a token after the end"
                self.got[action.choice] += action.ids
                want = self.truth[action.choice][: len(self.got[action.choice])]
                assert self.got[action.choice] == want, "a wrong, repeated or missing token"
                self.finished[action.choice] = action.finish
            elif isinstance(action, Submit):
                self.submits.append(action)
            elif isinstance(action, Ask):
                self.asks.append(action)
            else:
                engine = self.engines.get(action.to)
                if engine is not None and engine.attempt <= action.attempt:
                    del self.engines[action.to]
                if self.jes.get(action.to, action.attempt + 1) <= action.attempt:
                    del self.jes[action.to]

    # ------------------------------------------------------------------------------------------------------------ JEs

    def submitted(self, chaos: bool) -> None:
        if not self.submits:
            return
        submit = self.submits.pop(0)
        outcome = self.random.randrange(6) if chaos else 0
        if outcome == 1:
            error: DeepFlowError = Unavailable("nobody", retry_after_s=0.0)
            self.do(self.delivery.refused(submit.attempt, error, self.now))
            return
        if outcome == 2 and self.delivery.started:
            self.do(self.delivery.refused(submit.attempt, Overloaded("full"), self.now))
            return
        if submit.attempt != self.delivery.attempt or self.delivery.over:
            return
        je = f"je-{submit.attempt}"
        self.jes[je] = submit.attempt
        prefills = self.split and self.random.randrange(5) > 0
        engine = self.engine(submit.attempt, self.delivery.have, prefills=prefills)
        if outcome == 3:  # the answer is lost, the work is not
            error = DeadlineExceeded("silence")
            self.do(self.delivery.refused(submit.attempt, error, self.now))
        elif outcome == 4:
            self.do(self.delivery.accepted(submit.attempt, je, None, self.now))
            self.say(je, "dispatched", submit.attempt, engine.name)
        elif outcome == 5:  # the answer takes its time
            accepted = Accepted(request="r", attempt=submit.attempt, by=je, te=engine.name)
            self.flying.append((je, accepted))
        else:
            self.do(self.delivery.accepted(submit.attempt, je, engine.name, self.now))

    def engine(self, attempt: int, made: list[int], *, prefills: bool = False) -> Engine:
        self.num_engines += 1
        engine = Engine(f"te-{self.num_engines}", self.truth, attempt, list(made), prefills)
        self.engines[engine.name] = engine
        return engine

    def say(self, je: str, state: str, attempt: int, te: str) -> None:
        progress = Progress(source=je, request="r", attempt=attempt, state=state, te=te)
        self.flying.append((je, progress))

    def hand_over(self, chaos: bool) -> None:
        """A JE hears of a prefill, and finds a TE that decodes: another, the same, or none."""
        if not self.events:
            return
        event = self.events.pop(self.random.randrange(len(self.events)))
        if self.jes.get(event.je) != event.attempt:
            self.engines.pop(event.prefill.name, None)  # nobody wants it: the JE drops it
            return
        fate = self.random.randrange(6) if chaos else 0
        if fate == 1:  # lost
            return
        self.num_moves += 1
        made = event.prefill.made
        home = self.engines.get(event.prefill.name)
        if fate == 2 and home is event.prefill:
            home.prefills = home.handed = False
            self.say(event.je, "moved", event.attempt, home.name)
        elif fate == 3:
            failed = delta(made[0], [], event.attempt, finish="failed", failure=NOBODY)
            self.flying.append((event.je, failed))
        else:
            decode = self.engine(event.attempt, made)
            self.say(event.je, "moved", event.attempt, decode.name)

    # ------------------------------------------------------------------------------------------------------------ bus

    def generate(self) -> None:
        for name, engine in list(self.engines.items()):
            choice = self.random.randrange(len(self.truth))
            self.flying += [(name, one) for one in engine.step(choice)]
            if engine.handed and not engine.told:
                engine.told = True
                self.events.append(Event(f"je-{engine.attempt}", engine.attempt, engine))

    def deliver(self, chaos: bool) -> None:
        if not self.flying:
            return
        place = self.random.randrange(min(4, len(self.flying))) if chaos else 0
        source, one = self.flying[place]
        fate = self.random.randrange(5) if chaos else 0
        if isinstance(one, Accepted):  # one way or the other, an answer comes once
            del self.flying[place]
            if fate == 2:
                error = DeadlineExceeded("silence")
                self.do(self.delivery.refused(one.attempt, error, self.now))
            else:
                self.do(self.delivery.accepted(one.attempt, one.by, one.te, self.now))
            return
        if fate != 1:  # 1: repeated later
            del self.flying[place]
        if fate == 2:  # lost
            return
        if isinstance(one, Delta):
            self.do(self.delivery.tokens(source, one, self.now))
        else:
            self.do(self.delivery.progress(source, one.attempt, one.state, one.te, self.now))

    def shuffle(self, chaos: bool) -> None:
        """Deliver one of the next frames."""
        place = self.random.randrange(min(3, len(self.flying))) if self.flying else 0
        self.flying = [*self.flying[place:][:1], *self.flying[:place], *self.flying[place + 1 :]]
        self.deliver(chaos)

    def answer(self, chaos: bool) -> None:
        if not self.asks:
            return
        ask = self.asks.pop(0)
        engine = self.engines.get(ask.te)
        if chaos and self.random.randrange(4) == 0:
            error: DeepFlowError = DeadlineExceeded("silence")
            self.do(self.delivery.replay_failed(ask.te, ask.attempt, error, self.now))
        elif engine is None or engine.attempt != ask.attempt:
            unknown = NotFound("unknown")
            self.do(self.delivery.replay_failed(ask.te, ask.attempt, unknown, self.now))
        else:
            deltas = engine.replay(ask.have)
            self.do(self.delivery.replayed(ask.te, ask.attempt, deltas, self.now))

    # ---------------------------------------------------------------------------------------------------------- deaths

    def die(self) -> None:
        if self.engines:
            name = self.random.choice(sorted(self.engines))
            del self.engines[name]
            self.do(self.delivery.te_lost(name, self.now))

    def die_je(self) -> None:
        """Of a JE: noticed by its silence, or not at all."""
        if self.jes:
            name = self.random.choice(sorted(self.jes))
            del self.jes[name]
            if self.random.randrange(2):
                self.do(self.delivery.je_lost(name, self.now))

    def leave(self) -> None:
        """The client hangs up."""
        self.left = True
        self.do(self.delivery.cancel())

    def wait(self) -> None:
        self.now += self.random.choice((0.1, 0.5, 1.5))
        self.do(self.delivery.tick(self.now, connected=True))

    # ------------------------------------------------------------------------------------------------------- all of it

    def suffer(self, num_steps: int) -> None:
        """So many steps of all that can happen."""
        for _ in range(num_steps):
            self.random.choice(
                (
                    lambda: self.submitted(chaos=True),
                    self.generate,
                    self.generate,
                    lambda: self.hand_over(chaos=True),
                    lambda: self.deliver(chaos=True),
                    lambda: self.deliver(chaos=True),
                    lambda: self.answer(chaos=True),
                    self.die,
                    self.die_je,
                    self.wait,
                    lambda: self.do(self.delivery.reconnected(self.now)),
                    lambda: self.do(self.delivery.gap(self.delivery.te or "")),
                )
            )()

    def settle(self) -> None:
        """From now on all goes well, until nothing happens any more."""
        for _ in range(400):
            busy = any(engine.busy for engine in self.engines.values())
            if self.delivery.over and not busy and not self.flying and not self.events:
                break
            self.submitted(chaos=False)
            self.generate()
            self.hand_over(chaos=False)
            for _ in range(len(self.flying)):
                self.deliver(chaos=False)
            self.answer(chaos=False)
            self.wait()

    def check(self) -> None:
        """The law: the true tokens and one end each, unless it was lost again and again."""
        assert self.delivery.over
        if "failed" in self.finished:
            assert self.delivery.num_resubmissions > MAX_LOSSES
            return
        assert self.got == self.truth
        assert self.finished == ["stop"] * len(self.truth)
