"""Chat templates."""

import pytest

from pymla.chat import render
from pymla.errors import PymlaError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def test_deepseeks_own_format():
    text = render(None, MESSAGES, bos="<b>", eos="<e>")
    assert text == "<b>Be brief.\n\nUser: Hi\n\nAssistant: Hello<e>User: Bye\n\nAssistant:"


def test_template_of_the_file():
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | tojson }}{% endfor %}"
    assert render(template, MESSAGES[1:2]) == '[user]"Hi"'


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_bad_templates_are_refused(template):
    with pytest.raises(PymlaError, match="chat template"):
        render(template, MESSAGES)
