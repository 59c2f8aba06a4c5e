"""Prepare held-out data: fixed batches for the evaluation loss, and prompts for generation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hecate.config import DataSource
from hecate.data.chat.conversations import render_answer, require_chat_template
from hecate.data.files.formats import Sample, samples_of
from hecate.data.files.indexed import IndexedSource
from hecate.data.files.syntax import no_answers
from hecate.data.pack import pack
from hecate.data.sequences import PackedSequence, build_sequence, empty_sequence, piece_of
from hecate.data.sources import SourcePart, TokenSource


@dataclass(frozen=True)
class GenerationItem:
    """A prompt for generation, the expected answer, and the line of the file they come from."""

    prompt_ids: list[int]
    answer_text: str
    file: str
    line: int
    user: int = -1
    """The row of the sample's user in the features; -1: no user is known."""
    task: str | None = None
    entry: Mapping[str, Any] | None = None
    """The record of the question in reasoning-gym, by which its verifier judges an answer; None: there is none."""
    before: str = ""
    """What the chat template writes before an answer, without special tokens: a model that was trained with it says it, too."""
    after: str = ""
    """What the chat template writes behind an answer, without special tokens."""

    def content_of(self, text: str) -> str:
        """What a model has said, without what the template writes around it."""
        return text.removeprefix(self.before).removesuffix(self.after).strip()


def eval_sequences(
    sources: Sequence[TokenSource], source: int, *, seq_len: int, packing: bool, max_samples: int | None = None
) -> list[PackedSequence]:
    """Pack the samples of `sources[source]`, or its first `max_samples`, into sequences numbered from 0. Every call returns the same."""
    count = len(sources[source])
    if max_samples is not None:
        count = min(count, max_samples)
    pieces = (piece_of(sources, source, sample) for sample in range(count))
    return [build_sequence(number, sequence, sources) for number, sequence in enumerate(pack(pieces, seq_len, packing))]


def share_of_rank(sequences: Sequence[PackedSequence], rank: int, world_size: int, sequences_per_batch: int) -> list[list[PackedSequence]]:
    """Return the batches of one rank: sequences rank, rank + world_size, ..., filled up with empty sequences.

    Every rank gets the same number of batches, each of exactly `sequences_per_batch` sequences, so that all ranks call the same
    collectives.
    """
    per_rank = -(-len(sequences) // world_size)
    batches = -(-per_rank // sequences_per_batch)
    mine = list(sequences[rank::world_size])
    mine += [empty_sequence()] * (batches * sequences_per_batch - len(mine))
    return [mine[start : start + sequences_per_batch] for start in range(0, len(mine), sequences_per_batch)]


def generation_items(source: TokenSource, named: DataSource, tokenizer: Any, max_items: int | None = None) -> list[GenerationItem]:
    """Return a prompt for each conversation that `read_source` kept, or for the first `max_items`, in file order.

    The prompt is everything before the last assistant turn, followed by the generation prompt; the answer is that turn's content, or all
    that the chat template makes of it if it rewrites it.
    The file is read again. A conversation whose last assistant turn calls tools has no text for an answer and gets no prompt.

    Args:
        named: the source as the configuration has it.

    Raises:
        UserError: the file holds documents.
    """
    if isinstance(source.whole if isinstance(source, SourcePart) else source, IndexedSource):
        raise no_answers(source.path)
    assert not isinstance(source, IndexedSource)
    lines: list[int] = source.lines.tolist()
    kept = dict.fromkeys(lines, -1) if source.users is None else dict(zip(lines, source.users.tolist(), strict=True))
    items: list[GenerationItem] = []
    for sample in samples_of(named):
        if max_items is not None and len(items) >= max_items:
            break
        if not isinstance(sample, Sample) or sample.number not in kept:
            continue
        if sample.messages is None:
            raise no_answers(source.path)
        require_chat_template(tokenizer, source.path)
        last = max(turn for turn, message in enumerate(sample.messages) if message["role"] == "assistant")
        if sample.messages[last].get("tool_calls"):
            continue
        answer = render_answer(tokenizer, sample.messages[: last + 1], sample.tools)
        items.append(
            GenerationItem(
                prompt_ids=tokenizer(answer.prompt, add_special_tokens=False)["input_ids"],
                answer_text=_shown(tokenizer, answer.content),
                before=_shown(tokenizer, answer.before),
                after=_shown(tokenizer, answer.after),
                file=sample.file,
                line=sample.line,
                user=kept[sample.number],
                task=sample.extra.get("task"),
                entry=sample.entry,
            )
        )
    return items


def _shown(tokenizer: Any, text: str) -> str:
    """A text as it would be shown if a model said it: without special tokens, and without white space at its ends."""
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)).strip() if text else ""
