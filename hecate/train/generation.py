"""Answers of a language model to prompts: greedy or sampled, in batches, until a stop.

transformers' `generate` keeps the keys and values, and the experts in the model's layers compute in its forward passes as in all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from hecate.data.chat.conversations import turn_end
from hecate.errors import UserError
from hecate.model.base import BaseModel
from hecate.model.layers.attention import generating


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and where an answer ends."""

    max_new_tokens: int
    temperature: float = 0.0
    """The temperature of sampling; 0: always the most likely token."""
    top_p: float = 1.0
    """Tokens are chosen among the most likely ones whose probabilities add up to this."""
    top_k: int = 0
    """Tokens are chosen among this many most likely ones; 0: among all."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts before the first of which an answer ends."""
    chat: bool = False
    """Whether prompts are conversations, so that an answer also ends where the chat template ends a turn."""

    @property
    def samples(self) -> bool:
        return self.temperature > 0


@dataclass(frozen=True)
class Answer:
    """What a model has said."""

    raw: str
    """The answer's text, without special tokens."""
    finished: bool
    """Whether the answer ended by itself or at a stop, and not at the largest number of tokens."""

    @property
    def text(self) -> str:
        """The answer without white space at its ends."""
        return self.raw.strip()


def generate(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch_size: int,
    begin: Callable[[Sequence[int]], AbstractContextManager[object]] = nullcontext,
    keys: Sequence[str] | None = None,
    in_lockstep: bool = False,
) -> list[Answer]:
    """The continuation of each prompt (token ids), in the prompts' order. It does not depend on the other prompts of a batch.

    Args:
        begin: begins the forward passes of a batch, whose rows are the prompts with these indices.
        keys: with the seed, of the random numbers of each prompt; None: the prompts' numbers.
        in_lockstep: all ranks call it, with as many prompts, and run each forward pass at the same time, until the longest answer is there.
    """
    model: Any = base.model
    device = next(model.parameters()).device
    ends = stop_tokens(base, chat=decoding.chat)
    # Prompts of like lengths together: the least padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), ends[0])
        mask = torch.zeros((len(chosen), width), dtype=torch.int64)
        for row, i in enumerate(chosen):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        names = [str(i) if keys is None else keys[i] for i in chosen]
        with torch.no_grad(), generating(model), begin(chosen):
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                synced_gpus=in_lockstep,
                **arguments(base, decoding, width, names, device),
            )
        for row, i in enumerate(chosen):
            answers[i] = answer_of(base, out[row, width:], decoding)
    return [answers[i] for i in range(len(prompts))]


def arguments(base: BaseModel, decoding: Decoding, width: int, keys: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Arguments of transformers' `generate` for a batch whose prompts are `width` tokens long, padding included; `keys`: of its rows."""
    ends = stop_tokens(base, chat=decoding.chat)
    given: dict[str, Any] = {
        "max_new_tokens": decoding.max_new_tokens,
        "do_sample": False,
        "eos_token_id": ends,
        "pad_token_id": ends[0],
        "logits_processor": [_require_numbers, *(_sampling(decoding, keys, device) if decoding.samples else [])],
    }
    if decoding.stop:
        given["stopping_criteria"] = [_StopTexts(base.tokenizer, decoding.stop, width)]
    return given


def answer_of(base: BaseModel, tokens: Tensor, decoding: Decoding) -> Answer:
    """The answer that tokens say, [n], with padding behind their end."""
    ends = stop_tokens(base, chat=decoding.chat)
    at = torch.isin(tokens.cpu(), torch.tensor(ends)).nonzero().flatten()
    ended = len(at) > 0
    if ended:
        tokens = tokens[: int(at[0])]
    text = base.tokenizer.decode(tokens, skip_special_tokens=True)
    places = [place for stop in decoding.stop if (place := text.find(stop)) >= 0]
    return Answer(text[: min(places)] if places else text, bool(ended or places))


def stop_tokens(base: BaseModel, *, chat: bool) -> list[int]:
    """The model's own end tokens, the tokenizer's and, with `chat`, the token with which the chat template ends a turn.

    A model may be trained to say that last token alone, as base models whose end of sequence is no part of their template.
    """
    model: Any = base.model
    configured = getattr(model.generation_config, "eos_token_id", None)
    tokens = configured if isinstance(configured, list) else [configured]
    ends = [*tokens, base.tokenizer.eos_token_id, turn_end(base.tokenizer) if chat else None]
    found = [token for token in ends if token is not None]
    return list(dict.fromkeys(found)) or [0]


def _sampling(decoding: Decoding, keys: Sequence[str], device: torch.device) -> list[Callable[[Tensor, Tensor], Tensor]]:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    steps: list[Callable[[Tensor, Tensor], Tensor]] = [TemperatureLogitsWarper(decoding.temperature)]
    if decoding.top_k > 0:
        steps.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        steps.append(TopPLogitsWarper(decoding.top_p))
    return [*steps, _KeyedNoise([f"{decoding.seed}/{key}" for key in keys], device)]


def _require_numbers(_ids: Tensor, logits_BV: Tensor) -> Tensor:
    if bool(logits_BV.isnan().any()):
        raise UserError(
            "the model's logits are not numbers (NaN), so that it answers nothing\n  its weights, or the adapter's, are damaged"
        )
    return logits_BV


class _KeyedNoise:
    """Logits [B, V] with noise by which the largest of a row is a sample of its softmax (Gumbel's trick).

    Each row has random numbers of its own, so that an answer does not depend on its batch. transformers draws one stream for all rows.
    """

    def __init__(self, keys: Sequence[str], device: torch.device) -> None:
        self._generators = [torch.Generator(device) for _ in keys]
        for generator, key in zip(self._generators, keys, strict=True):
            generator.manual_seed(xxhash.xxh3_64_intdigest(key.encode()) >> 1)

    def __call__(self, _ids: Tensor, logits_BV: Tensor) -> Tensor:
        waits = [
            torch.empty_like(row).exponential_(generator=generator) for row, generator in zip(logits_BV, self._generators, strict=True)
        ]
        return logits_BV - torch.stack(waits).log()


class _StopTexts:
    """Ends the rows whose answers hold one of some texts. transformers' own criterion also finds them in the prompt's end."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self._tokenizer, self._stop, self._width = tokenizer, stop, width

    def __call__(self, ids_BS: Tensor, _scores: object, **_: object) -> Tensor:
        texts = self._tokenizer.batch_decode(ids_BS[:, self._width :], skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self._stop) for text in texts], device=ids_BS.device)
