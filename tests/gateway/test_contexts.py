"""What is kept of a context is what continuations begin with: the tokenizing process finds out how much that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.gateway.contexts import check_size
from services.gateway.tokenizing import Models, unpacked, work
from shared import catalog, subjects
from shared.errors import InvalidRequest
from tests.gateway.peers import MODEL
from tests.worker.tiny import make_tiny

SYSTEM: Any = {"role": "system", "content": "Know this. " * 10}
USER: Any = {"role": "user", "content": "Read this. " * 10}
REPLY: Any = {"role": "assistant", "content": "<think>hm</think>Done."}
TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
# As Qwen3's: what the model thought is only shown after the last question.
FORGETS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ '<|im_start|>assistant\\n' + m['content'].split('</think>')[-1] + '<|im_end|>\\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}"
)
# As Mistral's: user and assistant take turns, and the system's words stand in the last question.
TAKES_TURNS = (
    "{% for m in messages %}{% if m['role'] == 'user' and loop.index0 and"
    " messages[loop.index0 - 1]['role'] == 'user' %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}" + TURN + "{% endfor %}"
)
FORBIDS = "{% if messages|length > 1 %}{{ raise_exception('too many') }}{% endif %}{{ messages[0].content }}"


def begun(folder: Path, **job: Any) -> tuple[list[int], int]:
    """The tokens of a context, and how many of them every continuation begins with."""
    answer = work(
        Models(), {"op": "context", "folder": str(folder), "version": "1", "options": {}, **job}
    )
    return unpacked(answer["ids"]), answer["num_common"]


def with_template(folder: Path, template: str) -> Path:
    """A tiny model with another chat template."""
    make_tiny(folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_stable_template_keeps_everything(cache: Path) -> None:
    """With a template that writes message after message, all tokens are those of a continuation."""
    folder = catalog.models_dir(cache) / subjects.encode(MODEL)
    for messages in ([SYSTEM], [SYSTEM, USER], [SYSTEM, USER, REPLY]):
        ids, num_common = begun(folder, messages=messages)
        assert num_common == len(ids)


def test_a_template_that_forgets_is_found_out(tmp_path: Path) -> None:
    """Where what follows changes how an earlier message is written, only what comes before counts."""
    folder = with_template(tmp_path / "m", FORGETS)
    ids, num_common = begun(folder, messages=[USER, REPLY])
    alone, _ = begun(folder, messages=[USER])
    assert len(alone) < num_common < len(ids)


def test_roles_that_take_turns(tmp_path: Path) -> None:
    """A context that ends with a question is continued by an answer where the template insists."""
    ids, num_common = begun(with_template(tmp_path / "m", TAKES_TURNS), messages=[SYSTEM, USER])
    assert num_common == len(ids)


def test_a_template_that_takes_nothing_more(tmp_path: Path) -> None:
    """Messages that nothing can follow are no context."""
    folder = with_template(tmp_path / "m", FORBIDS)
    with pytest.raises(InvalidRequest, match="takes nothing after") as caught:
        begun(folder, messages=[SYSTEM])
    assert caught.value.param == "messages"


def test_text_may_merge_at_its_end(cache: Path) -> None:
    """Of text, at most the last tokens depend on what follows."""
    folder = catalog.models_dir(cache) / subjects.encode(MODEL)
    for text in ("the quick brown fox", "t", "ab" * 50):
        ids, num_common = begun(folder, text=text)
        assert len(ids) - 2 <= num_common <= len(ids)


@pytest.mark.parametrize(
    ("num_tokens", "num_common", "public", "words"),
    [
        (15, 15, False, "at least 16 tokens"),
        (31, 31, True, "at least 32 tokens"),
        (100, 83, False, "only the first 83 of 100"),
    ],
)
def test_what_is_not_worth_keeping(
    num_tokens: int, num_common: int, public: bool, words: str
) -> None:
    """Too few tokens for a page, or many that no continuation begins with, are refused with the numbers."""
    with pytest.raises(InvalidRequest, match=words) as caught:
        check_size(num_tokens, num_common, 16, public=public, field="text")
    assert caught.value.param == "text"
    check_size(100, 84, 16, public=public, field="text")
