"""Render conversations with the tokenizer's chat template, and find which characters the assistant wrote."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from hecate.errors import UserError

Message = dict[str, str]
Span = tuple[int, int]

# A template that prints today's date (Llama 3.1, 3.2) would give another data set tomorrow; this is the date it prints
# where there is no clock.
_DATE = "26 Jul 2024"


class TemplateRefusal(Exception):
    """The template itself refuses a conversation (roles that do not alternate, say)."""


def require_chat_template(tokenizer: Any, where: str) -> None:
    """Raise UserError, naming `where`, if the tokenizer cannot render conversations."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where} holds conversations, but the model's tokenizer has no chat template\n"
            "use an instruction-tuned model, or data in the text format"
        )


def render(tokenizer: Any, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
    """The conversation as one string, and the span of each assistant turn in it: content and end-of-turn mark.

    A turn begins where the generation prompt of the messages before it ends, and ends with the last character of its
    own rendering that is not white space: the line break that many templates put between turns is not the assistant's.
    Raises UserError, naming `where`, for a template under which earlier turns look different once later ones follow;
    TemplateRefusal if it refuses this conversation.
    """
    whole = _apply(tokenizer, messages)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:turn])
        upto = whole if turn + 1 == len(messages) else _apply(tokenizer, messages[: turn + 1])
        if not (whole.startswith(upto) and upto.startswith(prompt)):
            raise UserError(
                f"{where}: the tokenizer's chat template cannot be used for training on this conversation\n"
                f"the rendering up to message {turn + 1} is no prefix of the whole conversation's: the template "
                "rewrites earlier turns, so the assistant's tokens cannot be found\n"
                "use a template that appends only, or conversations with one assistant turn"
            )
        spans.append((len(prompt), len(prompt) + len(upto[len(prompt) :].rstrip())))
    return whole, spans


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The messages followed by what makes the assistant speak. Raises TemplateRefusal."""
    return _apply(tokenizer, messages, add_generation_prompt=True)


def _apply(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, date_string=_DATE)
    except TemplateError as error:
        raise TemplateRefusal(str(error)) from error
