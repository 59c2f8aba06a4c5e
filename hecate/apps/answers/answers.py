"""Answers of what a run has trained: to prompts, one or many, and in a conversation that keeps its keys and values between turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from inspect import signature
from itertools import islice
from typing import Any

import torch

from hecate.apps.answers.opened import Opened
from hecate.data.chat.conversations import Message, TemplateRefusal, render_prompt, require_chat_template
from hecate.data.files.prompts import Prompt, asked
from hecate.engine.protocol import EvaluationPasses
from hecate.errors import UserError
from hecate.io.strict_json import json_line
from hecate.model.layers.attention import generating
from hecate.train.generation import Answer, Decoding, answer_of, arguments, generate

_BATCHES_AT_ONCE = 16
"""so many batches of prompts are sorted by length together"""


def answers_to(
    opened: Opened, prompts: Iterator[Prompt], decoding: Decoding, *, batch_size: int, count: int = 1
) -> Iterator[tuple[Prompt, list[Answer]]]:
    """Yield each prompt with its `count` answers, in order, soon after they are there.

    Raises:
        UserError: a prompt names no user, an unknown one, or one of a model that depends on none; the chat template refuses a
            conversation; or there is no template for a system message or several turns.
    """
    first, decoding = 0, replace(decoding, chat=opened.chats)
    with opened.moe.engine.evaluation() as evaluation:
        while some := list(islice(prompts, _BATCHES_AT_ONCE * batch_size)):
            ids = [one for prompt in some for one in [prompt_ids(opened, prompt)] * count]
            users = [prompt.user for prompt in some for _ in range(count)]
            keys = [f"{first + index}/{number}" for index in range(len(some)) for number in range(count)]
            begin = _beginning(opened, evaluation, users)
            found = generate(opened.base, ids, decoding, batch_size=batch_size, begin=begin, keys=keys)
            for index, prompt in enumerate(some):
                yield prompt, found[index * count : (index + 1) * count]
            first += len(some)


def as_record(prompt: Prompt, answers: Sequence[Answer]) -> str:
    """The prompt's line with its answers, as JSON."""
    more = {"answers": [answer.text for answer in answers], "finished": [answer.finished for answer in answers]}
    return json_line(prompt.record | more)


def prompt_ids(opened: Opened, prompt: Prompt) -> list[int]:
    """The tokens of a prompt. Raises UserError: as `answers_to`."""
    tokenizer = opened.base.tokenizer
    if opened.chats or len(prompt.messages) > 1:
        require_chat_template(tokenizer, str(opened.trained))
        found: list[int] = tokenizer(_rendered(opened, prompt.messages), add_special_tokens=False)["input_ids"]
    else:
        found = _begun(tokenizer, prompt.messages[-1]["content"])
    if not found:
        raise UserError(f"{opened.trained}: an empty prompt has no token, so that nothing can follow it")
    return found


class Conversation:
    """A conversation with a model. The keys and values of what was said are kept, as far as the chat template keeps the text.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(self, opened: Opened, decoding: Decoding, *, system: str | None = None, user: str | None = None) -> None:
        if not opened.base.tokenizer.chat_template:
            raise UserError(
                f"{opened.trained}: its tokenizer has no chat template, which a conversation needs\n"
                "  hecate generate goes on with plain text, without a template"
            )
        self._opened, self._decoding, self._system = opened, replace(decoding, chat=True), system
        self._tokens = opened.tokens([user])
        self._seen: list[int] = []
        """the tokens whose keys and values are kept"""
        self.reset()

    def reset(self) -> None:
        """Forget all that was said, but for the system message."""
        self._messages: list[Message] = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._turns = 0
        self._forget()

    @property
    def cached(self) -> int:
        """Number of tokens whose keys and values are kept."""
        return len(self._seen)

    def say(self, text: str, streamer: Any = None) -> Answer:
        """The model's answer to a further message. What fails or is interrupted was not said.

        Args:
            streamer: gets the answer's tokens one by one (`transformers.TextStreamer`).

        Raises:
            UserError: the chat template refuses the conversation.
        """
        base, messages = self._opened.base, [*self._messages, *asked(text, None).messages]
        ids = base.tokenizer(_rendered(self._opened, messages), add_special_tokens=False)["input_ids"]
        model: Any = base.model
        device = next(model.parameters()).device
        self._keep(_common(self._seen, ids[:-1]))
        try:
            with torch.no_grad(), generating(model), self._opened.moe.engine.evaluation() as evaluation, evaluation.forward(self._tokens):
                (out,) = model.generate(
                    input_ids=torch.tensor([ids], device=device),
                    attention_mask=torch.ones((1, len(ids)), dtype=torch.int64, device=device),
                    streamer=streamer,
                    **{_cache_argument(model): self._cache},
                    **arguments(base, self._decoding, len(ids), [f"turn {self._turns}"], device),
                )
        except BaseException:
            self._forget()
            raise
        self._seen = out[: self._cache.get_seq_length()].tolist()
        answer = answer_of(base, out[len(ids) :], self._decoding)
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._turns += 1
        return answer

    def _forget(self) -> None:
        from transformers import DynamicCache

        self._cache: Any = DynamicCache(config=self._opened.base.model.config)  # type: ignore[no-untyped-call,unused-ignore]
        self._seen = []

    def _keep(self, count: int) -> None:
        """Keep what belongs to the first `count` tokens."""
        if count == len(self._seen):
            return
        try:
            self._cache.crop(count - len(self._seen))
            self._seen = self._seen[:count]
        except (RuntimeError, ValueError, NotImplementedError, AttributeError):  # sliding windows and recurrent layers cannot go back
            self._forget()


def _begun(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a plain text that is to go on, with those that the tokenizer writes before a text, as in training."""
    whole: list[int] = tokenizer(text)["input_ids"]
    own: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    ended = whole[-1:] == [tokenizer.eos_token_id] and own[-1:] != whole[-1:]
    return whole[:-1] if ended else whole


def _rendered(opened: Opened, messages: Sequence[Message]) -> str:
    try:
        return render_prompt(opened.base.tokenizer, messages)
    except TemplateRefusal as refusal:
        raise UserError(f"{opened.trained}: the chat template refuses the conversation: {refusal}") from refusal


def _beginning(
    opened: Opened, evaluation: EvaluationPasses, users: Sequence[str | None]
) -> Callable[[Sequence[int]], AbstractContextManager[object]]:
    return lambda chosen: evaluation.forward(opened.tokens([users[i] for i in chosen]))


def _cache_argument(model: Any) -> str:
    """What transformers calls a cache: past_key_values, and since 5.20 or so cache."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of tokens with which both begin."""
    pairs = zip(left, right, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))
