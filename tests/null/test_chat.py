"""Chat templates: the filters, globals and tags that templates of the hub rely on."""

from __future__ import annotations

import pickle
from datetime import datetime

import pytest

from memfit.errors import UserError
from memfit.inputs.chat import ChatTemplate, around_answer, content_style, moves_pictures

ASK = [{"role": "user", "content": "1 < 2 & é"}]


def render(text: str, **extra: object) -> str:
    return ChatTemplate(text, {"bos_token": "<s>"}).render(ASK, **extra)


def test_special_tokens_and_generation() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    assert render(template) == "<s>1 < 2 & é"
    assert ChatTemplate(template, {"bos_token": "<s>"}).render(ASK, True) == "<s>1 < 2 & é!"


def test_tojson_leaves_html_and_letters_alone() -> None:
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "1 < 2 & é"}'
    assert render("{{ [1, 2] | tojson(indent=1) }}") == "[\n 1,\n 2\n]"


def test_blocks_take_their_line_with_them() -> None:
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_loop_controls_namespace_and_generation_tag() -> None:
    text = (
        "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}"
        "{% set ns.n = ns.n + i %}{% endfor %}{% generation %}{{ ns.n }}{% endgeneration %}"
    )
    assert render(text) == "3"


def test_strftime_now_is_today() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)


def test_what_the_template_refuses_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="refuses"):
        render("{{ messages[0].content + 3 }}")


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace(__x=1) %}",
        "{{ dict.__subclasses__() }}",
    ],
)
def test_the_sandbox_holds(text: str) -> None:
    with pytest.raises(ValueError, match="refuses"):
        render(text)


def test_a_template_that_cannot_be_parsed_is_a_user_error() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        ChatTemplate("{% for m in messages %}", {})


def test_templates_can_be_pickled() -> None:
    template = pickle.loads(pickle.dumps(ChatTemplate("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "#"})))
    assert template.render(ASK) == "#1 < 2 & é"


WORDS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{% if p.type == 'image' %}<img>{% else %}{{ p.text }}{% endif %}{% endfor %}</s>{% endfor %}"
)


def test_styles() -> None:
    assert content_style(ChatTemplate(WORDS, {}), None) == "text"
    assert content_style(ChatTemplate(PARTS, {}), None) == "parts"
    assert content_style(ChatTemplate(PARTS, {}), "<img>") == "parts"
    # Plain words only: a list would be printed as Python writes it.
    assert content_style(ChatTemplate(WORDS, {}), "<img>") == "text"
    with pytest.raises(UserError, match=r"<pad> 0 times"):
        content_style(ChatTemplate(PARTS, {}), "<pad>")
    with pytest.raises(UserError, match="neither"):
        content_style(ChatTemplate("nothing", {}), "<img>")


def test_around_an_answer() -> None:
    assert around_answer(ChatTemplate(WORDS, {}), "text", "#") == (" ", "</s>")
    assert around_answer(ChatTemplate(PARTS, {}), "parts", "#") == ("[assistant]", "</s>")


def test_moved_pictures() -> None:
    first = "{% for m in messages %}<img>{% for p in m.content if p.text %}{{ p.text }}{% endfor %}{% endfor %}"
    assert moves_pictures(ChatTemplate(first, {}), "<img>")
    assert not moves_pictures(ChatTemplate(PARTS, {}), "<img>")
    assert not moves_pictures(ChatTemplate(PARTS, {}), None)
