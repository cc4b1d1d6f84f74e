"""Conversations as the text that a model was trained on, by its chat template."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from anymamba.errors import AnymambaError

Message = Mapping[str, Any]  # {"role": "system", "user" or "assistant", "content": text}, and what a template asks for


def render(template: str, messages: Sequence[Message], add_generation_prompt: bool, tokens: Mapping[str, str]) -> str:
    """The text of `messages` by a Jinja template, in a sandbox, for templates come from strangers.

    `tokens` are special tokens that it may name, such as eos_token. Raises AnymambaError for messages that are none,
    and for a template that is broken or refuses them.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    _check(messages)
    # what authors of templates rely on: the settings, filter and functions that Hugging Face's library gives them
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    try:
        return environment.from_string(template).render(
            **tokens, messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None, documents=None
        )
    except Exception as error:  # a template is a program: anything may go wrong in it
        where = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise AnymambaError(
            f"the chat template cannot be filled{where}: {error}; change the messages, put a right chat_template.jinja "
            "beside the tokenizer.json, or go without it (--no-chat)"
        ) from error


def _check(messages: Sequence[Message]) -> None:
    fine = not isinstance(messages, str | bytes | Mapping) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m for m in messages
    )
    if not fine:
        raise AnymambaError(f'chat: messages={messages!r}, but they are a list of {{"role": …, "content": …}}')


def _refuse(message: str):
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
