"""A sample as the tokenizer gets it: its text, and which characters of it are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hecate.data.chat.conversations import Span, TemplateRefusal, require_chat_template
from hecate.data.chat.learned import LearnedTurns, render_learned
from hecate.data.chat.plain_specials import cuts, marked
from hecate.data.chat.written import Shapes, require_learned, unwritten
from hecate.data.files.formats import Fault, Sample


@dataclass(frozen=True)
class SampleText:
    """A sample as the tokenizer gets it."""

    sample: Sample
    text: str
    spans: list[Span] | None  # of characters to learn; None: the whole text
    lost: list[str]  # names of what the chat template does not write
    cut: tuple[int, ...] = ()  # where the tokenizer gets the text in pieces


def text_to_tokenize(sample: Sample, tokenizer: Any, shapes: Shapes, rule: LearnedTurns, *, splits: bool = False) -> SampleText | Fault:
    """Return a sample as the tokenizer gets it, or why there is nothing to be learned of it.

    Args:
        tokenizer: only its chat template is used.
        shapes: see `hecate.data.chat.written.unwritten`.
        rule: which turns are learned.
        splits: take what reads like a special token in its texts for plain text.

    Raises:
        UserError: the sample is a conversation, and there is no chat template.
    """
    if sample.tokens is not None:
        return SampleText(sample, "", None, [])
    if sample.text is not None:
        return SampleText(sample, sample.text, None, []) if sample.text.strip() else sample.fault("the text is empty")
    assert sample.messages is not None
    require_chat_template(tokenizer, sample.file)
    turns = rule.of(sample.messages, sample.given, sample.marks)
    if not turns:
        roles = " or ".join(rule.roles) or "no role's"
        return sample.fault(f"there is no token to learn: the conversation has no {roles} turn that is learned")
    for message in (sample.messages[turn] for turn in turns):
        if not (message["content"].strip() or message.get("tool_calls")):
            article = "an" if message["role"] == "assistant" else "a"
            return sample.fault(f"{article} {message['role']} turn is empty")
    if sample.messages[0]["role"] == "assistant" and 0 in turns:
        return sample.fault("the conversation begins with an assistant turn, which answers nothing")
    messages = marked(sample.messages, tokenizer) if splits else sample.messages
    try:
        whole, regions, spans = render_learned(tokenizer, messages, sample.tools, turns, rule)
        lost = unwritten(tokenizer, messages, sample.tools, whole, regions, shapes)
        text, spans, cut = cuts(whole, spans) if splits else (whole, spans, ())
        return SampleText(sample, text, spans, require_learned(turns, lost), cut)
    except TemplateRefusal as refusal:
        return sample.fault(f"the chat template cannot be used for training on this conversation: {refusal}")
