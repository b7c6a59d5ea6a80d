"""Conversations as text, by the chat template in the model's file."""

import datetime
import json

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pymla.errors import PymlaError

#: DeepSeek-V2's own format, for files without a template.
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}User: {{ message.content }}\n\n"
    "{% elif message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def render(template, messages, add_generation_prompt=True, bos="", eos="", **variables):
    """A conversation as the model was trained to see it.

    Parameters
    ----------
    template : str or None
        A Jinja template, as in ``tokenizer.chat_template``; None takes DeepSeek's.
    messages : list of dict
        With "role" and "content".
    add_generation_prompt : bool
        End with the beginning of the model's answer.
    bos, eos : str
        What the template's ``bos_token`` and ``eos_token`` stand for.

    Raises
    ------
    PymlaError
        The template is damaged, or refuses the messages.

    Notes
    -----
    The template comes with the model, so it runs in Jinja's sandbox. Control tokens spelt out in a message are tokens
    to the model, as in llama.cpp: take care with text that is not yours.
    """

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    variables |= {
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos,
        "eos_token": eos,
    }
    try:
        return environment.from_string(template or DEEPSEEK).render(**variables)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise PymlaError(f"the model's chat template cannot be used with these messages: {error}") from error


def encode(tokenizer, messages):
    """Token ids of a conversation up to the model's answer, with one BOS."""

    def name(token):
        return tokenizer.token_bytes(token).decode(errors="replace") if token is not None else ""

    bos = name(tokenizer.bos_id)
    text = render(tokenizer.chat_template, messages, bos=bos, eos=name(min(tokenizer.eos_ids, default=None)))
    if bos and text.startswith(bos):
        text = text[len(bos) :]
    return tokenizer.encode(text, add_bos=True, parse_special=True)
