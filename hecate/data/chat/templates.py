"""Which chat template conversations are written in: the one that the configuration names, the tokenizer's own, or one of ours in its place.

A template of ours is for models whose own writes an answer in another way once a further question follows, so that the tokens of earlier
answers cannot be learned. It is chosen by the text of the model's own, whose digest must be known: no other template is ever replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

from hecate.config.files.presets import chat_templates
from hecate.errors import UserError
from hecate.io.plain_files import read_plain

FILE = "chat_template.jinja"
"""The name under which transformers looks for a template beside a tokenizer; adapters have it, too."""
_MOST_BYTES = 1 << 20
_IN_PLACE_OF = {
    "0fab82ce8f4d5175c9e0155c80737cf2": "qwen3",
}
"""The names of our templates, by the xxh3-128 digests of the models' own."""


@dataclass(frozen=True)
class ChosenTemplate:
    """A template that is used in place of the tokenizer's own."""

    text: str
    why: str
    """The reason, in words for the user."""


def choose_template(own: Any, given: str | None) -> ChosenTemplate | None:
    """Return the template that takes the place of a tokenizer's own; None: its own is used.

    Args:
        own: as the tokenizer has it: text, several texts by their names, or nothing.
        given: `data.chat_template`.

    Raises:
        UserError: the file cannot be read.
    """
    if given is not None:
        return ChosenTemplate(read_template(given), f"conversations are written in the chat template {given}")
    name = _IN_PLACE_OF.get(xxhash.xxh3_128_hexdigest(own.encode())) if isinstance(own, str) else None
    if name is None:
        return None
    why = f"the chat template {name} of hecate's takes the place of the model's own, which rewrites earlier answers (docs/use/data.md)"
    return ChosenTemplate(read_template(name), why)


def read_template(given: str) -> str:
    """Return the text of the template that `data.chat_template` names. Raises UserError: the file cannot be read."""
    return _read(chat_templates().get(given, Path(given)))


def template_beside(folder: Path) -> str | None:
    """Return the template that lies in an adapter's folder; None: there is none. Raises UserError: it cannot be read."""
    path = folder / FILE
    return _read(path) if path.exists() else None


def check_template_file(given: str) -> None:
    """Check that `data.chat_template` can be compiled, and that it asks for an answer. It is run as transformers runs it, in a sandbox.

    Raises:
        UserError: it cannot be read, is no Jinja, reaches for what the sandbox forbids, or writes no generation prompt.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    text, where = read_template(given), f"data.chat_template: {chat_templates().get(given, given)}"
    question = [{"role": "user", "content": "a"}]

    def written(asks: bool) -> str:
        found, _ = render_jinja_template([question], chat_template=text, add_generation_prompt=asks, bos_token="", eos_token="")
        return str(found[0])

    try:
        silent = written(False) == written(True)
    except TemplateSyntaxError as error:
        raise UserError(
            f"{where}:{error.lineno}: is no Jinja template: {error.message}\n  correct the line, or give another file"
        ) from error
    except SecurityError as error:
        raise UserError(f"{where}: does what a chat template must not do: {error}\n  give a template that only writes text") from error
    except (TemplateError, TypeError):
        return  # It wants more than a question, and the data show whether it gets it.
    if silent:
        raise UserError(
            f"{where}: writes no generation prompt, so that nothing says where an answer begins\n"
            "  let it write one where add_generation_prompt is true, as {% if add_generation_prompt %}<|assistant|>{% endif %}"
        )


def _read(path: Path) -> str:
    try:
        return read_plain(path, _MOST_BYTES).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8: {error.reason}; is it a chat template?") from error
    except OSError as error:
        raise UserError(f"{path}: the chat template cannot be read: {error.strerror}") from error
