"""FlowServe as a library: a model, an engine and a tokenizer in one object, text in, text out, no bus.

    from deepflow import LLM
    llm = LLM("smollm2-135m")
    print(llm.generate("The capital of France is", max_tokens=16)[0].text)

It does for one process what gateway and TE-shell do for the platform. It must not know how the engine schedules.
Calls belong to one thread; several streams may be open at once and share each step.
"""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, cast

from services.worker.flowserve.engine import Engine
from services.worker.flowserve.life import local_request
from shared import blockhash, catalog
from shared.config import Reader, Settings
from shared.errors import DeepFlowError, Internal, from_code
from shared.messages import Cancel, Delta, Sampling, TokenLogprobs
from shared.text.detokenizer import Detokenizer
from shared.text.stopper import StopStrings
from shared.text.template import ChatTemplate
from shared.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(slots=True, kw_only=True)
class Output:
    """One finished choice. `stop` is the stop string or stop id that ended it; `logprobs` are as many as `ids`."""

    choice: int
    num_prompt: int
    num_cached: int = 0
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: str = ""
    stop: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The next part of a stream: text that is certain by now, with the tokens since the last piece."""

    choice: int
    text: str
    ids: list[int]
    finish: str | None = None
    stop: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    num_cached: int | None = None


class FlowServe:
    """A loaded model. `model` is a name that `deepflow pull` knows, or a folder in Hugging Face form.

    The KV cache holds `kv_tokens` tokens, or as many as fit `kv_bytes`. `device`, `dtype`, and what is left out of
    `threads`, `cache_dir` and `kernels`, are as in `load_decoder`, `asynchronous` and `speculation` as in
    `EngineSettings`. `pp` stages of layers with `tp` devices each hold the model together, in a process each.
    Raises ModelNotFound for an unknown name; what is wrong with a folder otherwise.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        tp: int = 1,
        pp: int = 1,
        dtype: str = "auto",
        kv_tokens: int | None = None,
        kv_bytes: int = 1 << 30,
        max_num_seqs: int = 64,
        max_batched_tokens: int = 256,
        threads: int | None = None,
        cache_dir: Path | None = None,
        kernels: str | None = None,
        asynchronous: bool = False,
        speculation: int = 0,
    ) -> None:
        folder = _folder_of(model)
        self.tokenizer = Tokenizer.load(folder)
        self.template = ChatTemplate.load(folder)
        self.engine = Engine.from_folder(
            folder,
            device=device,
            tp=tp,
            pp=pp,
            dtype=dtype,
            kv_tokens=kv_tokens,
            kv_bytes=kv_bytes,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            threads=threads,
            cache_dir=cache_dir,
            kernels=kernels,
            asynchronous=asynchronous,
            speculation=speculation,
        )
        # The cache lives and dies with this object.
        self._root = blockhash.root(secrets.token_bytes(32))
        self._numbers = count()
        self._inbox: dict[str, deque[Delta]] = {}  # by request under way

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        stop: Sequence[str] = (),
        **fields: Any,
    ) -> list[Output]:
        """Continue one prompt or many, in the order given, `n` choices of a prompt next to each other.

        A prompt is text or token ids. `fields` are those of `Sampling`, for use without one; unless given,
        `max_tokens` is what the context allows and `seed` is random.
        Raises InvalidRequest for a prompt that is too long, Internal if the engine failed, TypeError for both a
        `Sampling` and `fields`.
        """
        sampling = self._chosen(sampling, fields)
        streams = [_Stream(self, self._ids(prompt), sampling, stop) for prompt in _many(prompts)]
        try:
            for stream in streams:
                stream.open()
            return [output for stream in streams for output in stream.collect()]
        finally:
            for stream in streams:
                stream.close()

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        stop: Sequence[str] = (),
        **fields: Any,
    ) -> Iterator[Piece]:
        """As `generate` for one prompt, piece by piece. Leaving the loop early cancels the rest."""
        stream = _Stream(self, self._ids(prompt), self._chosen(sampling, fields), stop)
        try:
            stream.open()
            yield from stream.pieces()
        finally:
            stream.close()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling | None = None,
        *,
        stop: Sequence[str] = (),
        **fields: Any,
    ) -> list[Output]:
        """The assistant's answer to a conversation, as OpenAI's messages; as many outputs as choices."""
        ids = self.tokenizer.encode(self.template.render(messages))
        return self.generate([ids], sampling, stop=stop, **fields)

    def sampling(self, **fields: Any) -> Sampling:
        """A `Sampling` whose `max_tokens` and `seed` may be left out."""
        defaults = {"max_tokens": self.engine.context, "seed": secrets.randbits(64)}
        return Sampling(**(defaults | fields))

    def _chosen(self, sampling: Sampling | None, fields: dict[str, Any]) -> Sampling:
        if sampling is not None and fields:
            raise TypeError(
                f"{', '.join(fields)}: give them in `sampling`, or leave `sampling` out"
            )
        return sampling or self.sampling(**fields)

    # ------------------------------------------------------------------------------------------------- for streams

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, special=True)
        return list(prompt)

    def _submit(self, prompt: list[int], sampling: Sampling) -> str:
        name = str(next(self._numbers))
        self.engine.submit(local_request(name, prompt, sampling, root=self._root))
        self._inbox[name] = deque()
        return name

    def _next(self, name: str) -> Delta:
        """The next delta of a request; steps the engine, for everybody, until there is one."""
        while not self._inbox[name]:
            output = self.engine.step()
            for _, delta in output.deltas:
                if delta.request in self._inbox:
                    self._inbox[delta.request].append(delta)
            if output.error is not None:
                raise Internal("the engine failed in a step") from output.error
        return self._inbox[name].popleft()

    def _cancel(self, name: str, choice: int | None = None, keep: int | None = None) -> None:
        self.engine.cancel(Cancel(request=name, attempt=0, choice=choice, keep=keep))

    def _leave(self, name: str) -> None:
        self._cancel(name)
        self._inbox.pop(name, None)


class _Stream:
    """One request of a `FlowServe` under way."""

    def __init__(
        self, llm: FlowServe, prompt: list[int], sampling: Sampling, stop: Sequence[str]
    ) -> None:
        self._llm = llm
        self._prompt = prompt
        self._sampling = sampling
        self._name: str | None = None
        self._choices = {
            choice: (Detokenizer(llm.tokenizer), StopStrings(stop)) for choice in range(sampling.n)
        }

    def open(self) -> None:
        self._name = self._llm._submit(self._prompt, self._sampling)

    def close(self) -> None:
        """Cancel what is left; twice is as good as once."""
        if self._name is not None:
            self._llm._leave(self._name)
            self._name = None

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every choice; a choice's last one has `finish`. Raises what failed the request."""
        num_output = dict.fromkeys(self._choices, 0)
        while self._choices:
            assert self._name is not None
            delta = self._llm._next(self._name)
            if delta.failure is not None:
                raise _error(delta)
            if delta.choice not in self._choices:
                continue  # the end of a choice that a stop string has ended already
            piece = self._piece(delta)
            num_output[delta.choice] += len(piece.ids)
            if piece.finish is not None:
                del self._choices[delta.choice]
                if piece.finish != delta.finish or len(piece.ids) < len(delta.ids):
                    self._llm._cancel(self._name, delta.choice, num_output[delta.choice])
            yield piece

    def collect(self) -> list[Output]:
        """All choices, finished."""
        outputs = [Output(choice=choice, num_prompt=len(self._prompt)) for choice in self._choices]
        for piece in self.pieces():
            output = outputs[piece.choice]
            output.text += piece.text
            output.ids += piece.ids
            output.num_cached = piece.num_cached or output.num_cached
            if piece.logprobs is not None:
                output.logprobs = (output.logprobs or []) + piece.logprobs
            if piece.finish is not None:
                output.finish, output.stop = piece.finish, piece.stop
        return outputs

    def _piece(self, delta: Delta) -> Piece:
        """The text of a delta, as far as it can be shown; a stop token is not part of it.

        A delta may bring several tokens: those past the one that completes a stop string do not count.
        """
        detokenizer, stopper = self._choices[delta.choice]
        text, hit, num_ids = "", None, len(delta.ids)
        shown = delta.ids if delta.stop_id is None else delta.ids[:-1]
        for index, token in enumerate(shown):
            more, hit = stopper.push(detokenizer.push(token))
            text += more
            if hit is not None:
                num_ids = index + 1
                break
        if hit is None and delta.finish is not None:
            last, hit = stopper.push(detokenizer.finish())
            text += last
            if hit is None:
                text += stopper.finish()
        return Piece(
            choice=delta.choice,
            text=text,
            ids=delta.ids[:num_ids],
            finish=delta.finish if hit is None else "stop",
            stop=delta.stop_id if hit is None else hit,
            logprobs=None if delta.logprobs is None else delta.logprobs[:num_ids],
            num_cached=delta.cached,
        )


def _many(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt as a list of one."""
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return cast("Sequence[Prompt]", [prompts] if is_one else prompts)


def _error(delta: Delta) -> DeepFlowError:
    assert delta.failure is not None
    return from_code(delta.failure.code, delta.failure.message)


def _folder_of(model: str | Path) -> Path:
    """A folder as it is; a name through the catalogue of `DEEPFLOW_CACHE`."""
    if isinstance(model, Path) or Path(model).is_dir():
        return Path(model)
    cache_dir: Path = Settings.read(Reader(os.environ))["cache_dir"]
    return catalog.open_model(cache_dir, model).path
