"""Log-likelihoods of texts under a model, and how often the right one of several is the likeliest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hecate.apps.answers.opened import Opened
from hecate.data.chat.conversations import TemplateRefusal, render_answer
from hecate.data.files.choices import ChoiceItem
from hecate.engine.protocol import EvaluationPasses
from hecate.errors import UserError
from hecate.experts.forward_pass import PassTokens
from hecate.model.base import BaseModel
from hecate.model.causal_head import LanguageModelHead

Pair = tuple[list[int], list[int]]
"""the tokens of a context, at least one, and those that follow it"""

Passes = Callable[[int], int]
"""from the number of forward passes that this rank needs to the number that it makes; `int`, which changes nothing, on one rank"""


@dataclass(frozen=True)
class Likelihood:
    """Of the tokens that follow a context."""

    log: float
    """sum of the logarithms of their probabilities"""
    greedy: bool
    """whether each is the likeliest token at its place"""


def log_likelihoods(
    base: BaseModel, evaluation: EvaluationPasses, pairs: Sequence[Pair], *, batch_size: int, passes: Passes = int
) -> list[Likelihood]:
    """Of each pair, in their order. A pair's figures do not depend on its batch.

    Args:
        passes: from the number of this rank's forward passes to that of all ranks, which go forward together; what is more than this
            rank's is of no token.

    Raises:
        UserError: the model gives no logits to one process, or a pair is longer than the model's positions.
    """
    head = base.head
    if not isinstance(head, LanguageModelHead):
        raise UserError("the logits of a Megatron model under training are not at hand\n  evaluate what its run has left: hecate export")
    assert all(context and more for context, more in pairs), "nothing precedes the text, or there is none"
    # The last token predicts nothing that is asked for.
    longest = max((len(context) + len(more) - 1 for context, more in pairs), default=0)
    if (room := known_positions(base)) is not None and longest > room:
        raise UserError(f"a text of {longest} tokens is longer than the {room} positions that the model knows")
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    device, multiple = next(base.model.parameters()).device, head.row_multiple(longest)
    found: dict[int, Likelihood] = {}
    with torch.no_grad():
        for number_of_pass in range(passes(-(-len(order) // batch_size))):
            chosen = order[number_of_pass * batch_size : (number_of_pass + 1) * batch_size]
            rows = [(pairs[i][0] + pairs[i][1])[:-1] for i in chosen] or [[]]
            width = -(-max(1, *map(len, rows)) // multiple) * multiple
            ids, valid = torch.zeros((len(rows), width), dtype=torch.int64), torch.zeros((len(rows), width), dtype=torch.bool)
            for number, row in enumerate(rows):
                ids[number, : len(row)], valid[number, : len(row)] = torch.tensor(row), True
            tokens = PassTokens(valid=valid.flatten().nonzero().flatten().to(device))
            with evaluation.forward(tokens):
                hidden_BSD = head.hidden(ids.to(device), None, torch.arange(width, device=device).expand(len(rows), -1))
            for number, i in enumerate(chosen):
                more = torch.tensor(pairs[i][1], device=device)
                logits = head.logits(hidden_BSD[number, len(rows[number]) - len(more) : len(rows[number])]).float()
                log = logits.log_softmax(-1).gather(1, more[:, None]).double().sum()
                found[i] = Likelihood(float(log), bool((logits.argmax(-1) == more).all()))
    return [found[i] for i in range(len(pairs))]


def accuracies(
    opened: Opened, evaluation: EvaluationPasses, items: Sequence[ChoiceItem], *, batch_size: int, passes: Passes = int
) -> tuple[list[bool], list[bool]]:
    """Of each question, whether the likeliest choice is the right one: by its log-likelihood, and by that over its number of characters.

    As acc and acc_norm of EleutherAI's lm-evaluation-harness.

    Args:
        passes: see `log_likelihoods`.

    Raises:
        UserError: a choice has no tokens, or as `log_likelihoods`.
    """
    pairs = [_pair(opened, item, choice) for item in items for choice in item.choices]
    logs = iter(log_likelihoods(opened.base, evaluation, pairs, batch_size=batch_size, passes=passes))
    plain, normed = [], []
    for item in items:
        log = [next(logs).log for _ in item.choices]
        per_character = [one / len(choice) for one, choice in zip(log, item.choices, strict=True)]
        plain.append(log.index(max(log)) == item.answer)
        normed.append(per_character.index(max(per_character)) == item.answer)
    return plain, normed


def split_tokens(tokenizer: Any, context: str, more: str, **options: bool) -> Pair:
    """The tokens of a text, and those of what follows it where both are read together. Spaces at the context's end go with what follows."""
    kept = context.rstrip()
    if kept:
        context, more = kept, context[len(kept) :] + more
    whole, begun = tokenizer(context + more, **options)["input_ids"], tokenizer(context, **options)["input_ids"]
    return whole[: len(begun)], whole[len(begun) :]


def known_positions(base: BaseModel) -> int | None:
    """The longest text that a model knows positions of, in tokens; None: it does not say."""
    return getattr(base.model.config, "max_position_embeddings", None)


def _pair(opened: Opened, item: ChoiceItem, choice: str) -> Pair:
    tokenizer = opened.base.tokenizer
    if item.is_chat and tokenizer.chat_template:
        try:
            rendered = render_answer(tokenizer, [{"role": "user", "content": item.text}, {"role": "assistant", "content": choice}])
        except TemplateRefusal as refusal:
            raise UserError(f"{item.place}: the chat template refuses the question: {refusal}") from refusal
        context = rendered.prompt + rendered.before
        whole, begun = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context + rendered.content, context))
        pair = whole[: len(begun)], whole[len(begun) :]
    else:
        space = "" if item.text[-1].isspace() or choice[0].isspace() else " "
        pair = split_tokens(tokenizer, item.text, space + choice)
    if not pair[0] or not pair[1]:
        raise UserError(f"{item.place}: the choice {choice[:40]!r} has no token of its own after the question")
    return pair
