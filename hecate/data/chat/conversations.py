"""Render conversations with the tokenizer's chat template, and find which characters belong to the assistant's turns."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError

from hecate.errors import UserError
from hecate.io.foreign_errors import in_a_line

Message = dict[str, Any]
Span = tuple[int, int]

# A template that prints today's date (Llama 3.1, 3.2) would make another data set tomorrow. This is the date that those templates
# print by default, and all get it.
_DATE = "26 Jul 2024"


# Stands for an answer, to see what a template writes around it. It is of Unicode's private use, so that no template writes it.
_MARK = "\ue000"


@dataclass(frozen=True)
class RenderedAnswer:
    """The assistant's turn at the end of a conversation, as the chat template writes it."""

    prompt: str
    """The messages before the answer, and the generation prompt."""
    before: str
    """What the template writes between the generation prompt and the content, such as an empty block of thoughts."""
    content: str
    after: str
    """What the template writes behind the content, such as the mark that ends the turn."""


class TemplateRefusal(Exception):
    """The chat template refused a conversation, for example because its roles do not alternate, or it cannot be trained on in the form that
    the template gives it."""


def require_chat_template(tokenizer: Any, where: str) -> None:
    """Raise UserError, naming `where`, if the tokenizer cannot render conversations."""
    if not getattr(tokenizer, "chat_template", None):
        raise no_chat_template(where)


def no_chat_template(where: str) -> UserError:
    return UserError(
        f"{where} holds conversations, but the model's tokenizer has no chat template\n"
        "use an instruction-tuned model, give a template with data.chat_template, or data in the text format"
    )


def render(
    tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[Any] = (), turns: Collection[int] | None = None
) -> tuple[str, list[Span]]:
    """Return the conversation as one string, and the character span of each assistant turn: its content, its calls of tools, and its
    end-of-turn mark.

    A turn begins where the generation prompt of the messages before it ends. It ends with the last character of its own
    rendering that is not white space, because the line break that many templates put between turns is not part of the answer. What a
    template writes once, behind the last message, such as Phi-3's end of sequence, belongs to the last turn alone.

    Args:
        tools: what the assistant may call, as the template takes it.
        turns: the indices of the assistant's turns whose spans are wanted; None: of all.

    Raises:
        TemplateRefusal: the template refuses this conversation, or rewrites earlier turns once later ones follow.
    """
    whole = _apply(tokenizer, messages, tools)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or (turns is not None and turn not in turns):
            continue
        prompt = render_prompt(tokenizer, messages[:turn], tools)
        upto = whole if turn + 1 == len(messages) else _apply(tokenizer, messages[: turn + 1], tools)
        if not whole.startswith(upto):
            upto = upto.removesuffix(_closing(tokenizer, messages[:turn], tools, prompt))
        if not (whole.startswith(upto) and upto.startswith(prompt)):
            raise TemplateRefusal(
                f"it rewrites earlier turns, so that the assistant's tokens cannot be found: its rendering up to message {turn + 1} is not "
                "a prefix of the whole conversation's; give a template that only appends (data.chat_template), or conversations with one "
                "assistant turn"
            )
        spans.append((len(prompt), len(prompt) + len(upto[len(prompt) :].rstrip())))
    return whole, spans


def render_prompt(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
    """Return the messages followed by the template's generation prompt. Raises TemplateRefusal."""
    return _apply(tokenizer, messages, tools, add_generation_prompt=True)


def rendering(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
    """Return the conversation as one string. Raises TemplateRefusal."""
    return _apply(tokenizer, messages, tools)


def render_answer(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] = ()) -> RenderedAnswer:
    """Return the last message, which is the assistant's, as the template writes it after its generation prompt.

    Of a template that rewrites the content, all that it writes for the turn is the content.

    Raises:
        TemplateRefusal: the template refuses the conversation, or the rendering does not begin with the prompt.
    """
    *asked, answer = messages
    prompt = render_prompt(tokenizer, asked, tools)
    turn = _after(prompt, _apply(tokenizer, messages, tools))
    try:
        marked = _after(prompt, _apply(tokenizer, [*asked, answer | {"content": _MARK}], tools))
    except TemplateRefusal:  # it wants a content of a certain form
        marked = ""
    before, _, after = marked.partition(_MARK)
    for content in (answer["content"], answer["content"].strip()):
        if turn == before + content + after:
            return RenderedAnswer(prompt, before, content, after)
    return RenderedAnswer(prompt, "", turn, "")


def turn_mark(tokenizer: Any) -> str | None:
    """Return the mark that ends an answer, such as <|im_end|>: of the tokenizer's added tokens the first that the chat template writes
    behind an answer; None: it writes none. It may be another token than the one that ends a sequence.
    """
    try:
        answer = render_answer(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except TemplateRefusal:
        return None
    found = [(answer.after.find(token), -len(token), token) for token in tokenizer.get_added_vocab() if token and token in answer.after]
    return min(found)[2] if found else None


def turn_end(tokenizer: Any) -> int | None:
    """Return the id of `turn_mark`; None: there is none."""
    mark = turn_mark(tokenizer)
    return None if mark is None else int(tokenizer.get_added_vocab()[mark])


def _after(prompt: str, whole: str) -> str:
    if not whole.startswith(prompt):
        raise TemplateRefusal("it writes the messages before an answer in another way once the answer follows")
    return whole[len(prompt) :].rstrip()


def _closing(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], prompt: str) -> str:
    """Return what the template writes once, behind the last message, unless it asks for an answer: an added token, with white space behind
    it; empty: nothing.

    Args:
        prompt: the rendering of the messages that asks for an answer.
    """
    asked = _apply(tokenizer, messages, tools)
    if prompt.startswith(asked):
        return ""
    text = asked.rstrip()
    # Whole tokens alone: the generation prompt may begin with the same characters, such as <|.
    endings = [token + asked[len(text) :] for token in tokenizer.get_added_vocab() if text.endswith(token)]
    return max((end for end in endings if prompt.startswith(asked.removesuffix(end))), key=len, default="")


class _FixedDay(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return datetime.strptime(_DATE, "%d %b %Y").replace(tzinfo=tz)


@contextmanager
def _fixed_day() -> Iterator[None]:
    """Have templates that ask for today by `strftime_now` (Granite 3, SmolLM3) get that date, too. transformers takes no other clock."""
    from transformers.utils import chat_template_utils

    was, chat_template_utils.datetime = chat_template_utils.datetime, _FixedDay
    try:
        yield
    finally:
        chat_template_utils.datetime = was


def _apply(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] = (), add_generation_prompt: bool = False) -> str:
    options = {"tools": list(tools)} if tools else {}
    try:
        with _fixed_day():
            return tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, date_string=_DATE, **options
            )
    except TemplateError as error:
        raise TemplateRefusal(str(error)) from error
    except Exception as error:  # whatever Python raises where a template computes, as 1 / 0, or meets another type than it expects
        raise TemplateRefusal(in_a_line(error)) from error
