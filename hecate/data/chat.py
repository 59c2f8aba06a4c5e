"""Render conversations with the tokenizer's chat template, and find which characters belong to the assistant's turns."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from hecate.errors import UserError

Message = dict[str, str]
Span = tuple[int, int]

# A template that prints today's date (Llama 3.1, 3.2) would make another data set tomorrow. This is the date that those templates
# print by default.
_DATE = "26 Jul 2024"


class TemplateRefusal(Exception):
    """The chat template refused a conversation, for example because its roles do not alternate."""


def require_chat_template(tokenizer: Any, where: str) -> None:
    """Raise UserError, naming `where`, if the tokenizer cannot render conversations."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where} holds conversations, but the model's tokenizer has no chat template\n"
            "use an instruction-tuned model, or data in the text format"
        )


def render(tokenizer: Any, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
    """Return the conversation as one string, and the character span of each assistant turn: its content and end-of-turn mark.

    A turn begins where the generation prompt of the messages before it ends. It ends with the last character of its own
    rendering that is not white space, because the line break that many templates put between turns is not part of the answer.

    Raises:
        UserError: the template rewrites earlier turns once later ones follow; the text names `where`.
        TemplateRefusal: the template refuses this conversation.
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
                f"the rendering up to message {turn + 1} is not a prefix of the whole conversation's: the template "
                "rewrites earlier turns, so the assistant's tokens cannot be found\n"
                "use a template that only appends, or conversations with one assistant turn"
            )
        spans.append((len(prompt), len(prompt) + len(upto[len(prompt) :].rstrip())))
    return whole, spans


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Return the messages followed by the template's generation prompt. Raises TemplateRefusal."""
    return _apply(tokenizer, messages, add_generation_prompt=True)


def _apply(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, date_string=_DATE)
    except TemplateError as error:
        raise TemplateRefusal(str(error)) from error
