"""Chat templates: what models' programs may do, what they may not, and how they fail."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from shared.errors import InvalidRequest, Unavailable
from shared.text.template import ChatTemplate

CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message.content + '<|im_end|>\\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' -}}\n"
    "{% endif %}"
)
USER = [{"role": "user", "content": "hi"}]


def test_renders_a_conversation_with_and_without_the_answer_begun() -> None:
    """Blocks leave no white space behind; the generation prompt is optional."""
    template = ChatTemplate(CHATML)
    expected = "<|im_start|>user\nhi<|im_end|>\n"
    assert expected == template.render(USER, add_generation_prompt=False)
    assert expected + "<|im_start|>assistant\n" == template.render(USER)


def test_text_parts_become_one_text() -> None:
    """Content as parts of text is joined by newlines for templates that know only strings."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rendered = ChatTemplate("{{ messages[0].content }}").render(
        [{"role": "user", "content": parts}]
    )
    assert rendered == "a\nb"


@pytest.mark.parametrize(
    "content",
    [[{"type": "image_url"}], ["text"], [{"type": "text"}], [{"type": "text", "text": 1}], [None]],
)
def test_other_parts_are_refused(content: Any) -> None:
    """Anything but text in the parts is the caller's error, naming the messages."""
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(CHATML).render([{"role": "user", "content": content}])
    assert caught.value.param == "messages"


def test_what_published_templates_use() -> None:
    """Special tokens, variables of the caller, strftime_now, tojson without HTML, break, namespace, generation."""
    template = ChatTemplate(
        "{{ bos_token }}{{ strftime_now('%Y') }}{{ tools | tojson }}{{ flag }}"
        "{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% break %}{% endfor %}{{ ns.n }}"
        "{% generation %}answer{% endgeneration %}",
        {"bos_token": "<s>"},
        clock=lambda: datetime(2024, 5, 6),
    )
    rendered = template.render(USER * 3, tools=[{"name": "<\u00e9&'>"}], flag=True)
    assert rendered == "<s>2024" + '[{"name": "<\u00e9&\'>"}]' + "True1answer"


def test_options_of_the_request_are_variables() -> None:
    """What the request hands the template beside its messages is there by name."""
    template = ChatTemplate("{{ messages[0].content }}{{ x }}")
    assert template.render(USER, x="!") == "hi!"
    assert template.render(USER) == "hi"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].missing.deeper }}",
        "{{ 1 // 0 }}",
        "{% include 'file' %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '%s' | attr('format') | attr('__globals__') }}{{ ''.__class__.x }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ [0] * 1099511627776 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for i in range(99999) %}{{ 'aaaaaaaaaa' * 1000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_failing_or_hostile_template_is_an_invalid_request(source: str) -> None:
    """Whatever the program tries, the outcome is an error about the messages."""
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_messages_are_data() -> None:
    """Template syntax inside a message is not run."""
    rendered = ChatTemplate(CHATML).render([{"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}])
    assert "{{ 7 * 7 }}{% raw %}" in rendered


def test_a_template_that_does_not_compile() -> None:
    """A syntax error shows when the model is opened, naming the template."""
    with pytest.raises(Unavailable, match="does not compile"):
        ChatTemplate("{% for %}")


def test_a_model_without_template() -> None:
    """Chatting with it is refused with the remedy."""
    with pytest.raises(InvalidRequest, match="no chat template"):
        ChatTemplate(None).render(USER)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "own", "tokenizer_config.json": {"chat_template": "no"}}, "own"),
        ({"tokenizer_config.json": {"chat_template": "config"}}, "config"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "no"},
                        {"name": "default", "template": "named {{ eos_token }}"},
                    ],
                    "eos_token": {"content": "</s>"},
                }
            },
            "named </s>",
        ),
        (
            {
                "tokenizer_config.json": {"chat_template": "{{ bos_token }}"},
                "special_tokens_map.json": {"bos_token": "<s>"},
            },
            "<s>",
        ),
    ],
)
def test_where_the_template_is_found(tmp_path: Path, files: dict[str, Any], expected: str) -> None:
    """Its own file first, else tokenizer_config.json's, of several the default; tokens from either map."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
    assert expected == ChatTemplate.load(tmp_path).render([])
