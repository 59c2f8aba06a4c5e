"""Try a model's chat template on the first conversations of data files before any rank is started.

The template is read without the tokenizer, and so without torch, whose import takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hecate.config import DataSource
from hecate.config.files.paths import indexed_prefix
from hecate.data.chat.conversations import no_chat_template
from hecate.data.chat.learned import LearnedTurns, learned_turns
from hecate.data.chat.sample_text import text_to_tokenize
from hecate.data.chat.templates import choose_template
from hecate.data.chat.written import Shapes
from hecate.data.files.formats import Fault, Sample, samples_of
from hecate.data.files.syntax import bad_sample_error
from hecate.io.plain_files import read_plain, read_plain_text

_RENDERED = 100
"""The number of a file's conversations that are rendered."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The names of the special tokens that transformers gives to templates."""


@dataclass(frozen=True)
class TemplateFile:
    """A chat template, which writes conversations as the model's tokenizer does."""

    chat_template: str
    special_tokens: dict[str, str]
    model: Path
    """The folder of the tokenizer."""

    def apply_chat_template(self, messages: Sequence[Any], *, tokenize: bool, add_generation_prompt: bool, **options: Any) -> str:
        """The conversation as one string, as the tokenizer's method of this name returns it; its errors are the same."""
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        (text,), _ = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens | options,
        )
        return str(text)

    def get_added_vocab(self) -> dict[str, int]:
        """Added token -> its id, as the tokenizer's method returns it; empty: the file is left to the tokenizer's own reader."""
        try:
            added = json.loads(read_plain(self.model / "tokenizer.json"))["added_tokens"]
            return {token["content"]: token["id"] for token in added}
        except (OSError, ValueError, RecursionError, LookupError, TypeError):
            return {}


def template_of(model: Path, given: str | None) -> TemplateFile | None:
    """The chat template of a model in a folder, or what takes its place.

    None: the folder has none, or several, or its files are left to the tokenizer's own reader.

    Args:
        given: `data.chat_template`.

    Raises:
        UserError: the file that is given cannot be read.
    """
    try:
        settings = json.loads(read_plain(model / "tokenizer_config.json"))
        named = model / "chat_template.jinja"
        own = read_plain_text(named) if named.is_file() else settings.get("chat_template")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    chosen = choose_template(own, given)
    template = own if chosen is None else chosen.text
    if not isinstance(template, str) or (chosen is None and (model / "additional_chat_templates").exists()):
        return None
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name in _SPECIAL if (value := settings.get(name))}
    return TemplateFile(template, {name: value for name, value in tokens.items() if isinstance(value, str)}, model)


def check_template(files: Iterable[DataSource], model: Path, given: str | None, on_bad_sample: str) -> None:
    """Check that the chat template in a model's folder, or the `given` one, can write the first conversations of each file.

    What is wrong with other records is left to `check_syntax`; if bad samples are to be skipped, only that there is a template is checked.

    Raises:
        UserError: there is none, or it cannot be used for one of these conversations.
    """
    if not model.is_dir():
        return
    has_template, template = given is not None or _has_template(model), template_of(model, given)
    for file in files:
        shapes: Shapes = {}
        rule: LearnedTurns | None = None
        samples = iter(()) if indexed_prefix(file.path) else samples_of(file)
        for item in islice(samples, _RENDERED):
            if not isinstance(item, Sample):
                continue
            if item.messages is None:
                break
            if not has_template:
                raise no_chat_template(file.path)
            if template is None or on_bad_sample == "skip":
                break
            rule = rule or learned_turns(file, template)
            text = text_to_tokenize(item, template, shapes, rule)
            if isinstance(text, Fault):
                raise bad_sample_error(text)


def _has_template(model: Path) -> bool:
    """Whether a folder has one in any of the files in which transformers looks for it."""
    if any((model / name).exists() for name in ("chat_template.jinja", "chat_template.json", "additional_chat_templates")):
        return True
    try:
        settings = json.loads(read_plain(model / "tokenizer_config.json"))
    except (OSError, ValueError, RecursionError):
        return True  # the tokenizer says itself what is wrong
    return not isinstance(settings, dict) or bool(settings.get("chat_template"))
