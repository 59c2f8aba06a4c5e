"""Turn the samples of a data source into token ids and targets.

Targets are already shifted: `targets[t]` is `input_ids[t + 1]` if that token is to be learned, and -100 otherwise. The loss at
position t therefore needs only logits[t] and targets[t], and no sample predicts the first token of the next one in its sequence.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from hecate.config import DataSource
from hecate.data.chat.conversations import Span
from hecate.data.chat.learned import learned_turns
from hecate.data.chat.plain_specials import tokens_of_pieces
from hecate.data.chat.sample_text import SampleText, text_to_tokenize
from hecate.data.chat.written import Shapes
from hecate.data.content import sample_digest
from hecate.data.files.formats import Fault, Sample, samples_of
from hecate.data.files.syntax import bad_sample_error
from hecate.data.files.user_features import UserFeatures
from hecate.data.quarantine import write_quarantine
from hecate.data.routed_experts import BadRoutingError, RoutingShape, require_length
from hecate.errors import UserError

logger = logging.getLogger(__name__)

IGNORED = -100  # the target of a position that adds nothing to the loss

BAD_SAMPLE_POLICIES = ("skip_long", "error", "skip", "truncate")

_NOTHING: tuple[Any, ...] = (None, "", [], {})  # values of keys that hold nothing

_NAMES, _LONGEST_NAME = 8, 40  # of keys, in a line about them

_SAMPLES_PER_CALL = 512  # samples per tokenizer call; the tokenizer spreads one call over its threads


@dataclass(frozen=True)
class Encoded:
    """One sample, or one piece of a long document, up to its last token that has a target."""

    input_ids: NDArray[np.int32]  # [n]
    targets: NDArray[np.int32]  # [n]
    line: int  # the sample's number in its source, from 1: the line of a JSONL file
    user: int = -1  # the row of the sample's user in the features; -1: none is known
    routed: NDArray[np.int16] | None = None  # [n, MoE layers, top_k], the experts that the sample names; None: nothing depends on them


@dataclass(frozen=True)
class EncodedSample:
    """What one sample is trained as."""

    pieces: list[Encoded]  # one, or the pieces of a long document
    truncated: bool  # whether it was shortened
    unread: tuple[str, ...]  # names of its keys of which no tokens are made
    digest: int  # of its content (`sample_digest`)


@dataclass(frozen=True)
class Counts:
    """How many samples of a source were kept, how many of those were truncated, and how many were skipped."""

    kept: int
    truncated: int
    skipped: int
    unread: Mapping[str, int] = field(default_factory=dict)
    """For each key of which no tokens are made, the number of kept samples that have it."""


class Samples(Sequence[Encoded]):
    """A sequence of samples that are cut out of larger arrays on access. Subclasses have `lines` and implement `sample`."""

    lines: NDArray[np.int64]  # [samples]

    def sample(self, index: int) -> Encoded:
        """Return the sample with this index, from 0."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        found = range(len(self))[index]
        return self.sample(found) if isinstance(found, int) else [self.sample(i) for i in found]


@dataclass(frozen=True, eq=False)
class EncodedSource(Samples):
    """All encoded samples of one source, in its order, stored end to end in flat arrays."""

    name: str
    path: str
    weight: float
    input_ids: NDArray[np.int32]  # [tokens]
    targets: NDArray[np.int32]  # [tokens]
    starts: NDArray[np.int64]  # [samples + 1]; sample i is input_ids[starts[i]:starts[i + 1]]
    lines: NDArray[np.int64]  # [samples], each sample's number in the source, from 1; the pieces of one document have the same one
    counts: Counts
    users: NDArray[np.int64] | None = None  # [samples], see `Encoded.user`; None: nothing depends on users
    features: str = ""  # the digest of the users' features
    routed: NDArray[np.int16] | None = None  # [tokens, MoE layers, top_k], see `Encoded.routed`; None: nothing depends on them
    content: str = ""  # what `digest` returns, where that is known already
    digests: NDArray[np.uint64] | None = None  # [samples], of the content of each; the pieces of one document have the same

    def sample(self, index: int) -> Encoded:
        part = slice(self.starts[index], self.starts[index + 1])
        user, routed = -1 if self.users is None else int(self.users[index]), None if self.routed is None else self.routed[part]
        return Encoded(self.input_ids[part], self.targets[part], int(self.lines[index]), user, routed)

    def digest(self) -> str:
        """Return the xxh3-64 hash of all tokens and targets, by which a resume detects that the data or the tokenizer changed."""
        if self.content:
            return self.content
        digest = xxhash.xxh3_64()
        for array in (self.input_ids, self.targets, self.starts):
            digest.update(np.ascontiguousarray(array).data.cast("B"))
        if self.users is not None:
            digest.update(self.users.tobytes() + self.features.encode())
        if self.routed is not None:
            digest.update(np.ascontiguousarray(self.routed).data.cast("B"))
        return digest.hexdigest()


class _BadSample(Exception):
    """One sample cannot be trained on; the text says why."""


class _LongSample(_BadSample):
    """One sample has more tokens than a sequence."""


@dataclass(frozen=True)
class Skipped:
    """The samples of a source that were left out."""

    count: int
    first: Fault | None
    """The first sample that was left out; None: there is none."""

    @staticmethod
    def of(faults: Sequence[Fault]) -> "Skipped":
        return Skipped(len(faults), faults[0] if faults else None)

    def report(self, path: str, kept: int, *, speaks: bool) -> None:
        """Log how many samples of a source were left out beside those that were kept. Raises UserError if none was kept."""
        if self.first is None:
            return
        first = f"the first is {self.first.place}: {self.first.reason}"
        if speaks:
            logger.warning("%s: %d of %d samples skipped; %s", path, self.count, self.count + kept, first)
        if not kept:
            raise UserError(f"{path} has no usable sample: all {self.count} are bad\n{first}")


@dataclass(frozen=True)
class BadSamples:
    """What is done with the samples of a source that cannot be trained on."""

    rule: str = "error"
    """The rule, one of `BAD_SAMPLE_POLICIES` (`encode_samples`)."""
    quarantine: str | Path | None = None
    """The JSONL file to which one rank writes the samples that are left out; None: they are not written."""
    speaks: bool = True
    """Whether to log how many samples were left out or shortened; False on all ranks but one."""


STOP_AT_BAD_SAMPLES = BadSamples()


def encode_source(
    source: DataSource,
    tokenizer: Any,
    *,
    seq_len: int,
    vocab_size: int,
    bad: BadSamples = STOP_AT_BAD_SAMPLES,
    users: UserFeatures | None = None,
    routing: RoutingShape | None = None,
) -> EncodedSource:
    """Read and encode one data source into memory, as `encode_samples` does.

    Raises:
        UserError: as `encode_samples`; or no sample is left.
    """
    pieces: list[Encoded] = []
    digests: list[int] = []
    faults: list[Fault] = []
    kept = truncated = 0
    unread: Counter[str] = Counter()
    rules: dict[str, Any] = {"seq_len": seq_len, "vocab_size": vocab_size, "on_bad_sample": bad.rule}
    for item in encode_samples(source, tokenizer, users=users, routing=routing, **rules):
        if isinstance(item, Fault):
            faults.append(item)
        else:
            pieces += item.pieces
            digests += [item.digest] * len(item.pieces)
            kept, truncated = kept + 1, truncated + item.truncated
            unread.update(item.unread)

    if faults and bad.quarantine is not None:
        write_quarantine(bad.quarantine, faults)
    counts = Counts(kept=kept, truncated=truncated, skipped=len(faults), unread=dict(unread))
    report_counts(source.path, counts, Skipped.of(faults), seq_len, speaks=bad.speaks)
    return EncodedSource(
        name=source.name,
        path=str(source.path),
        weight=source.weight,
        input_ids=np.concatenate([piece.input_ids for piece in pieces]),
        targets=np.concatenate([piece.targets for piece in pieces]),
        starts=np.cumsum([0] + [len(piece.input_ids) for piece in pieces], dtype=np.int64),
        lines=np.array([piece.line for piece in pieces], dtype=np.int64),
        counts=counts,
        users=None if users is None else np.array([piece.user for piece in pieces], dtype=np.int64),
        features="" if users is None else users.digest(),
        routed=None if routing is None else np.concatenate([piece.routed for piece in pieces if piece.routed is not None]),
        digests=np.array(digests, dtype=np.uint64),
    )


def report_counts(path: str, counts: Counts, skipped: Skipped, seq_len: int, *, speaks: bool) -> None:
    """Log how many samples were left out or shortened, and what of the others is not read. Raises UserError if none was kept."""
    skipped.report(path, counts.kept, speaks=speaks)
    if counts.truncated and speaks:
        logger.warning("%s: %d of %d samples truncated to %d tokens", path, counts.truncated, counts.kept, seq_len)
    if counts.unread and speaks:
        most = sorted(counts.unread.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{name[:_LONGEST_NAME]} ({count})" for name, count in most[:_NAMES])
        more = f", and {len(most) - _NAMES} more" if len(most) > _NAMES else ""
        logger.warning("%s: keys of which no tokens are made, and how many of %d samples have them: %s%s", path, counts.kept, shown, more)


def encode_samples(
    source: DataSource,
    tokenizer: Any,
    *,
    seq_len: int,
    vocab_size: int,
    on_bad_sample: str = "error",
    users: UserFeatures | None = None,
    routing: RoutingShape | None = None,
) -> Iterator[EncodedSample | Fault]:
    """Read the samples of a source and encode them, in order; one that is left out is a Fault.

    Conversations are rendered by the tokenizer's chat template, and the targets are the tokens of the turns that are learned
    (`hecate.data.chat.learned`). Documents get the tokenizer's special tokens and an end-of-sequence token, every token is a target, and
    they are cut into pieces of seq_len tokens, with `sample_by: length` without regard to where one ends. Rows of token ids are taken as
    they are. Tokens after the last target are dropped, because nothing is learned from them.

    Args:
        tokenizer: a fast transformers tokenizer.
        seq_len: the most tokens of a sample.
        vocab_size: the number of entries of the model's embedding.
        on_bad_sample: `error` stops at the first sample that is broken, empty, too long, beyond the vocabulary or without a token
            to learn. `skip` leaves such samples out; `skip_long` those that are too long, and stops at the other faults. `truncate`
            shortens samples that are too long and stops at the other faults.
        users: features that each sample's user must have; None: samples need no users.
        routing: what the routing that each sample must bring must fit; None: it is not read.

    Raises:
        UserError: a bad sample, as `on_bad_sample` says; an unusable file, tokenizer or template.
    """
    _refuse_unusable(source, tokenizer, on_bad_sample)
    items = _tokenized(source, tokenizer, users, routing)
    for item in _of_one_length(items, seq_len) if source.sample_by == "length" else items:
        try:
            yield _encoded(item, seq_len, vocab_size, may_cut=on_bad_sample == "truncate")
        except (_BadSample, BadRoutingError) as bad:
            fault = item if isinstance(item, Fault) else item.sample.fault(str(bad))
            if on_bad_sample != "skip" and not (on_bad_sample == "skip_long" and isinstance(bad, _LongSample)):
                raise bad_sample_error(fault) from bad
            yield fault


def _refuse_unusable(source: DataSource, tokenizer: Any, on_bad_sample: str) -> None:
    if on_bad_sample not in BAD_SAMPLE_POLICIES:
        raise UserError(f"data.on_bad_sample is {on_bad_sample!r}: it must be one of {', '.join(BAD_SAMPLE_POLICIES)}")
    if not (math.isfinite(source.weight) and source.weight > 0):
        raise UserError(f"data source {source.name!r} has weight {source.weight}: it must be a positive number")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("the model's tokenizer is a slow one: a fast one (tokenizer.json) is needed, because it returns character offsets")


def end_of_sequence(tokenizer: Any) -> int:
    """Return the token id that ends a document. Raises UserError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no end-of-sequence token, which documents need")
    return int(tokenizer.eos_token_id)


@dataclass(frozen=True)
class _Tokenized:
    input_ids: NDArray[np.int32]  # [n]
    targets: NDArray[np.int32]  # [n]
    sample: Sample
    user: int
    whole: int  # tokens of the sample, with those after its last target
    routed: NDArray[np.int16] | None  # [tokens, MoE layers, top_k]; not yet known to be as long as the sample
    unread: tuple[str, ...]


def _encoded(item: _Tokenized | Fault, seq_len: int, vocab_size: int, *, may_cut: bool) -> EncodedSample:
    """The pieces that one tokenized sample is trained on. Raises _BadSample if it cannot be used."""
    if isinstance(item, Fault):
        raise _BadSample(item.reason)
    largest = max(int(np.max(item.input_ids)), int(np.max(item.targets)))
    if largest >= vocab_size:
        raise _BadSample(f"token id {largest} is beyond the model's vocabulary of {vocab_size}")
    cut = not item.sample.is_document and len(item.input_ids) > seq_len
    if cut and not may_cut:
        raise _LongSample(f"{len(item.input_ids)} tokens are more than data.seq_len {seq_len}")
    pieces = [_first_tokens(item, seq_len)] if cut else _pieces(item, seq_len)
    if item.routed is not None:
        require_length(item.routed, sum(len(piece.input_ids) for piece in pieces), item.whole)
    return EncodedSample(pieces, cut, item.unread, sample_digest(item.sample))


def _tokenized(
    source: DataSource, tokenizer: Any, users: UserFeatures | None, routing: RoutingShape | None
) -> Iterator[_Tokenized | Fault]:
    """Yield each sample, tokenized up to its last target, or a Fault if it is broken or has no target."""
    samples = samples_of(source, users)
    rule = learned_turns(source, tokenizer)
    shapes: Shapes = {}
    splits = bool(getattr(tokenizer, "split_special_tokens", False))
    used = {name for name, needed in (("user", users), ("routed_experts", routing)) if needed is not None}
    while group := list(islice(samples, _SAMPLES_PER_CALL)):
        ready = [item if isinstance(item, Fault) else text_to_tokenize(item, tokenizer, shapes, rule, splits=splits) for item in group]
        tokens = _ids_and_learned([item for item in ready if not isinstance(item, Fault)], tokenizer, splits=splits)
        for item in ready:
            if isinstance(item, Fault):
                yield item
                continue
            sample, (ids, learned) = item.sample, next(tokens)
            targets = np.where(learned[1:], ids[1:], np.int32(IGNORED))
            end = _end_of_targets(targets)
            if end == 0:
                yield sample.fault("there is no token to learn")
                continue
            user = -1 if users is None else users.row(str(sample.extra["user"]))
            try:
                routed = None if routing is None else routing.routing(sample.extra)
            except BadRoutingError as bad:
                yield sample.fault(str(bad))
            else:
                read = used if sample.entry is None else used | {"task", "entry"}
                unread = (*(key for key, value in sample.extra.items() if value not in _NOTHING and key not in read), *item.lost)
                yield _Tokenized(ids[:end], targets[:end], sample, user, len(ids), routed, unread)


def _ids_and_learned(items: Sequence[SampleText], tokenizer: Any, *, splits: bool) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Yield the token ids, [n], of each of some samples of one source, and which of them are learned, bool [n]."""
    if not items:
        return
    if items[0].sample.tokens is not None:
        yield from ((item.sample.tokens.ids, item.sample.tokens.learned) for item in items if item.sample.tokens is not None)
        return
    is_chat = items[0].spans is not None
    stripping = [token_id for token_id, added in tokenizer.added_tokens_decoder.items() if added.rstrip]
    tokens = tokenizer(
        [item.text for item in items],
        add_special_tokens=not is_chat,  # a chat template writes its own
        return_offsets_mapping=is_chat,
        return_attention_mask=False,
        split_special_tokens=splits and not is_chat,  # of a conversation, the template writes some
        verbose=False,
    )
    for position, item in enumerate(items):
        ids = np.array(tokens["input_ids"][position], dtype=np.int32)
        if item.spans is None:
            ids = _ended(ids, tokenizer)
            yield ids, np.ones(len(ids), dtype=bool)
            continue
        offsets = np.array(tokens["offset_mapping"][position], dtype=np.int64).reshape(-1, 2)
        if item.cut:
            ids, offsets = tokens_of_pieces(tokenizer, item.text, item.cut)
        yield ids, _inside(item.spans, _without_stripped(offsets, item.text, np.isin(ids, stripping)))


def _of_one_length(items: Iterator[_Tokenized | Fault], seq_len: int) -> Iterator[_Tokenized | Fault]:
    """Lay documents end to end, and yield pieces of seq_len tokens and what is left. A piece is of the document in which it begins."""
    rest: NDArray[np.int32] = np.zeros(0, np.int32)  # tokens of `last`, of which the first has been a target already if there was a piece
    last: _Tokenized | None = None
    for item in items:
        if isinstance(item, Fault):
            yield item
            continue
        ids = np.concatenate([rest, item.input_ids, item.targets[-1:]])
        behind = (len(ids) - 1) // seq_len * seq_len
        for start in range(0, behind, seq_len):
            yield _piece_of_ids(item if last is None or start >= len(rest) else last, ids[start : start + seq_len + 1])
        last, rest = item if last is None or behind >= len(rest) else last, ids[behind:]
    if last is not None and len(rest) > 1:
        yield _piece_of_ids(last, rest)


def _piece_of_ids(item: _Tokenized, ids: NDArray[np.int32]) -> _Tokenized:
    return replace(item, input_ids=ids[:-1], targets=ids[1:])


def _ended(ids: NDArray[np.int32], tokenizer: Any) -> NDArray[np.int32]:
    end = end_of_sequence(tokenizer)
    return ids if len(ids) and ids[-1] == end else np.append(ids, np.int32(end))


def _without_stripped(offsets: NDArray[np.int64], text: str, strips: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the character ranges, [n, 2], without the white space that some tokens, bool [n], take away behind themselves.

    Otherwise such a token before an answer that begins with white space, as Phi-3's `<|assistant|>`, would count as a part of the answer.
    """
    ends = offsets[:, 1].copy()
    for place in np.flatnonzero(strips):
        start, end = offsets[place]
        ends[place] = start + len(text[start:end].rstrip())
    return np.stack([offsets[:, 0], ends], axis=1)


def _inside(spans: list[Span], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which tokens, bool [n], have a character in one of the spans. `offsets` are the tokens' character ranges, [n, 2]."""
    inside = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return inside


def _end_of_targets(targets: NDArray[np.int32]) -> int:
    learned = np.flatnonzero(targets != IGNORED)
    return int(learned[-1]) + 1 if len(learned) else 0


def _pieces(item: _Tokenized, seq_len: int) -> list[Encoded]:
    """Cut a sample into pieces of at most seq_len tokens. The last target of a piece is the first token of the next."""
    cuts = [slice(start, start + seq_len) for start in range(0, len(item.input_ids), seq_len)]
    return [_part(item, cut) for cut in cuts]


def _part(item: _Tokenized, cut: slice) -> Encoded:
    routed = None if item.routed is None else item.routed[: len(item.input_ids)][cut]
    return Encoded(item.input_ids[cut], item.targets[cut], item.sample.number, item.user, routed)


def _first_tokens(item: _Tokenized, seq_len: int) -> Encoded:
    end = _end_of_targets(item.targets[:seq_len])
    if end == 0:
        raise _BadSample(f"the first {seq_len} tokens (data.seq_len) have no token to learn, so it cannot be truncated")
    return _part(item, slice(end))
