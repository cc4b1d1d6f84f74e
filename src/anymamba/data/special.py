"""What models are published with beside a tokenizer.json: special tokens, what ends a text, a chat template."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anymamba.errors import AnymambaError

CONFIG, MAP, GENERATION, TEMPLATE = (
    "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"
)  # fmt: skip
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Special:
    """Special tokens by their part, as a chat template names them; ids that end a text; the chat template."""

    tokens: Mapping[str, str] = field(default_factory=dict)  # "eos_token" → "<|endoftext|>"
    eos_ids: tuple[int, ...] = ()  # besides the eos_token
    chat_template: str | None = None

    def config(self) -> dict[str, Any]:
        """All that a tokenizer_config.json can say of it."""
        return dict(self.tokens) | ({"chat_template": self.chat_template} if self.chat_template else {})


def read_special(folder: Path) -> Special:
    """What the files in a folder say; all of them may be missing. Raises AnymambaError for one that is damaged."""
    contents = {name: _json(folder / name) for name in (CONFIG, MAP, GENERATION)}
    template = folder / TEMPLATE
    if template.is_file():
        contents[CONFIG] = contents[CONFIG] | {"chat_template": template.read_text(encoding="utf-8")}
    return special(contents, str(folder))


def special(contents: Mapping[str, Mapping[str, Any]], where: str) -> Special:
    """The same from the files' contents; `where` is for messages."""
    config, generation = contents.get(CONFIG, {}), contents.get(GENERATION, {})
    found = {name: _text(value.get(name)) for value in (contents.get(MAP, {}), config) for name in NAMES
             if _text(value.get(name)) is not None}  # fmt: skip
    ids = generation.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise AnymambaError(
            f"{where}: eos_token_id={ids!r} in {GENERATION}, but it must be token ids; mend or remove it"
        )
    return Special(found, tuple(ids), _template(config.get("chat_template"), where))


def _text(token: Any) -> str | None:
    """A token is a text, or an object that has one."""
    return token.get("content") if isinstance(token, dict) else token


def _template(value: Any, where: str) -> str | None:
    """A model may have several templates by name."""
    if isinstance(value, list):
        value = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}.get("default")
    if value is not None and not isinstance(value, str):
        raise AnymambaError(f"{where}: chat_template is a {type(value).__name__}, but must be text; mend {CONFIG}")
    return value


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AnymambaError(f"{path} is not JSON ({error}); download it again, or remove it") from None
    if not isinstance(content, dict):
        raise AnymambaError(f"{path} holds a {type(content).__name__}, but must hold an object; download it again")
    return content
