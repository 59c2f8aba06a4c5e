"""Turn the records of data files into samples, by the formats `messages`, `prompt_completion`, `alpaca`, `sharegpt`, `text` and
`tokens`.

A record that cannot be used is returned as a `Fault`, so that the caller can stop at it or skip it. A file that cannot be used as a whole
raises UserError.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hecate.config import DataSource
from hecate.config.files.paths import file_form
from hecate.config.schema import FieldNames
from hecate.data.chat.turns import (
    BadRecord,
    marks_of,
    messages_of,
    require_key,
    system_message,
    take_history,
    take_tools,
    take_turns,
    text_of,
)
from hecate.data.files.format_hints import answers_of_preference, hint_for, in_words
from hecate.data.files.records import Record, place_of, read_records
from hecate.data.files.token_rows import TokenRow, take_token_row
from hecate.data.files.user_features import UserFeatures
from hecate.data.routed_experts import why_no_routing
from hecate.errors import UserError

FORMATS = ("auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "tokens")

_KEYS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "tokens": ("input_ids",),
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
}
"""The keys that a format needs, by which `auto` knows it, in the order in which it looks for them."""
_OPTIONAL = {
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
    "tokens": ("labels", "loss_mask"),
    "text": (),
    "prompt_completion": ("system", "tools"),
}
"""The keys that a format also reads, and that a record need not have."""
_MAY_LACK = frozenset(key for keys in _OPTIONAL.values() for key in keys)
_OF_ALL = ("user", "routed_experts")
"""The keys that all formats read."""


@dataclass(frozen=True)
class Sample:
    """One usable record, one of three: a conversation (`messages`, each at least {"role", "content"}), a document (`text`), or `tokens`."""

    file: str
    line: int  # as `Record.line`
    messages: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # the record's other keys, which are not trained on
    tools: tuple[Any, ...] = ()  # what the assistant may call, as the chat template takes it
    given: int = 0  # how many of the messages are a prompt, of which nothing is learned
    marks: tuple[bool | None, ...] = ()  # what the messages say themselves of whether they are learned; None, or behind the end: nothing
    tokens: TokenRow | None = field(default=None, compare=False)
    number: int = field(default=1, compare=False)  # as `Record.number`
    record: Record | None = field(default=None, compare=False, repr=False)

    @property
    def place(self) -> str:
        """Where it is, as errors say it."""
        return place_of(self.file, self.line)

    @property
    def is_document(self) -> bool:
        """Whether it may be cut into pieces, because all of it is learned."""
        return self.messages is None and not (self.tokens is not None and self.tokens.masked)

    @property
    def entry(self) -> dict[str, Any] | None:
        """reasoning-gym's entry, by which an evaluation judges answers; None: it has none."""
        entry = self.extra.get("entry")
        metadata = entry.get("metadata") if isinstance(entry, dict) else None
        return entry if isinstance(metadata, dict) and "source_dataset" in metadata else None

    def fault(self, reason: str) -> "Fault":
        """The sample as one that cannot be used after all."""
        return Fault(self.file, self.line, reason, self.number, self.record.raw if self.record else b"")


@dataclass(frozen=True)
class Fault:
    """One record that cannot be used, and the reason."""

    file: str
    line: int
    reason: str
    number: int = field(default=1, compare=False)
    raw: bytes = field(default=b"", compare=False)  # the record as text

    @property
    def place(self) -> str:
        """Where it is, as errors say it."""
        return place_of(self.file, self.line)


_LONGEST = 500
"""The most characters of a reason: a record may have keys of any length."""
_IMAGES = ("image", "images")
"""The keys of records with images, in the formats of LLaVA and of chats."""


_VERDICTS = ("label", "kto_tag")
"""The keys that say whether an answer is a good one, in TRL's and LLaMA-Factory's data for KTO."""
_ANSWERS = ("messages", "conversations", "completion", "output", "text")
"""The keys that hold what is learned."""
_MOST_HELD, _MOST_HELD_BYTES = 1000, 1 << 24
"""The most records of no known format, and the most bytes of them, that a file may begin with before it is refused."""


class _UnknownFormat(UserError):
    """A record has the keys of no known format. `reason` leaves out where it is, and how to mend it."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def read_samples(
    path: str | Path,
    format: str = "auto",
    users: UserFeatures | None = None,
    names: FieldNames | None = None,
    *,
    routed: bool = False,
    **reading: Any,
) -> Iterator[Sample | Fault]:
    """Yield every record of a data file, a folder or a pattern (`hecate.data.files.records`) in order, as a `Sample` or a `Fault`.

    With `auto` the first record of a known format decides the format, and a record of another format is a Fault. With `users` so is
    a record whose user has no features.

    Args:
        names: the names that the records have for the formats' keys. `auto` then takes only formats that read all of these keys.
        routed: a record that brings no routing (`hecate.data.routed_experts`) is a Fault, too. `reading` is as of `read_records`.

    Raises:
        UserError: `format` is unknown, or does not read a key of `names`; a file cannot be read or is empty; no record is of a
            known format; or, at the end, no record had a key of `names`.
    """
    if format not in FORMATS:
        raise UserError(f"data format {format!r} is unknown: it must be one of {', '.join(FORMATS)}")
    renamed = {name: theirs for name, theirs in asdict(names).items() if theirs is not None} if names else {}
    formats = _formats_with(renamed, format, str(path))
    parse = None if format == "auto" else _PARSERS[format]
    unseen, read, held_bytes = set(renamed), 0, 0
    held: list[Fault] = []
    unknown: _UnknownFormat | None = None
    for record in read_records(str(path), **reading):
        try:
            if record.reason:
                raise BadRecord(record.reason)
            _refuse_images(record.value)
            unseen -= {name for name in unseen if renamed[name] in record.value}
            value = _renamed(record.value, renamed)
            if parse is None:
                parse = _PARSERS[_detect(value, record, formats, renamed)]
                yield from held
            sample = parse(value)
            _refuse_unwanted(sample, record.value, renamed)
            _refuse_lone_surrogates(sample)
            problem = users.problem(sample["extra"]) if users is not None else ""
            if problem := problem or (why_no_routing(sample["extra"]) if routed else ""):
                raise BadRecord(problem)
        except _UnknownFormat as error:  # is bad if a later record is of a known one
            unknown, held_bytes = unknown or error, held_bytes + len(record.raw)
            if len(held) == _MOST_HELD or held_bytes > _MOST_HELD_BYTES:
                raise unknown from None
            held.append(Fault(record.file, record.line, error.reason[:_LONGEST], record.number, record.raw))
        except BadRecord as bad:
            yield Fault(record.file, record.line, str(bad)[:_LONGEST], record.number, record.raw)
        else:
            read += 1
            yield Sample(record.file, record.line, number=record.number, record=record, **sample)
    if unknown is not None and parse is None:
        raise unknown
    if unseen and read:
        raise _unseen_names(str(path), {name: renamed[name] for name in unseen})


def samples_of(source: DataSource, users: UserFeatures | None = None, *, routed: bool = False) -> Iterator[Sample | Fault]:
    """Yield every record of a source in order; `read_samples` says how."""
    return read_samples(source.path, source.format, users, source.fields, routed=routed, **how_read(source))


def how_read(source: DataSource) -> dict[str, Any]:
    """The arguments of `read_records` for a source."""
    return {"delimiter": source.delimiter, "by_paragraph": source.sample_by == "paragraph"}


def _unseen_names(path: str, unseen: Mapping[str, str]) -> UserError:
    """That no record has keys which the user has named."""
    names = sorted(unseen)
    return UserError(
        f"{path}: none of its records has the key {', '.join(repr(unseen[name]) for name in names)}, "
        f"which fields gives for {', '.join(names)}\n"
        "correct the name, or leave it out of fields"
    )


def _renamed(record: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A copy of the record in which the format's keys have the format's names. Optional keys may be missing."""
    lacking = {name: theirs for name, theirs in names.items() if theirs not in record}
    if lacks := [f"data.*.fields.{name} says {theirs!r}" for name, theirs in lacking.items() if name not in _MAY_LACK]:
        raise BadRecord(f"the record has no such key: {lacks[0]} (its keys: {', '.join(sorted(record)) or 'none'})")
    taken = {*names, *names.values()}
    found = {name: record[theirs] for name, theirs in names.items() if name not in lacking}
    return {key: value for key, value in record.items() if key not in taken} | found


def _formats_with(names: Iterable[str], format: str, path: str) -> list[str]:
    """The formats that read all of these keys, among all or the one that is given. Raises UserError: there is none."""
    reads = {known: (*needed, *_OPTIONAL[known]) for known, needed in _KEYS.items()}
    unread = {known: [name for name in names if name not in (*keys, *_OF_ALL)] for known, keys in reads.items()}
    fitting = [known for known in _KEYS if not unread[known]]
    if format == "auto" and not fitting:
        readers = "; ".join(f"{known}: {', '.join(keys)}" for known, keys in reads.items())
        raise UserError(
            f"{path}: fields names {', '.join(names)}, but no data format reads all of these keys\n"
            f"name the keys of one format only; the formats read {readers}"
        )
    if format != "auto" and format not in fitting:
        other = f", or give another format: {', '.join(fitting)}" if fitting else ""
        raise UserError(
            f"{path}: fields names {', '.join(unread[format])}, which the format {format} does not read\n"
            f"leave that out{other}; of {format}, fields may name {', '.join((*reads[format], *_OF_ALL))}"
        )
    return fitting if format == "auto" else [format]


def _detect(value: dict[str, Any], record: Record, formats: Sequence[str], names: Mapping[str, str]) -> str:
    for format in formats:
        if all(key in value for key in _KEYS[format]):
            return format
    place, known = place_of(record.file, record.line), {format: _KEYS[format] for format in formats}
    if "chosen" in value and "rejected" in value:
        answers = answers_of_preference(record.value)
        mend = "write records with a prompt and the chosen answer: " + '{"prompt": ..., "completion": ...}'
        if answers:
            mend = f"to train on the chosen answers, say so: {in_words(answers)}"
        raise UserError(f"{place}: preference data (chosen, rejected): hecate does not train on preferences\n{mend}")
    which = "the known ones" if len(formats) == len(_KEYS) else "those that read the keys that fields names"
    reason = f"no known data format has the keys {', '.join(sorted(map(str, value)))[:_LONGEST] or '(none)'}"
    forms = ", ".join(f"{format} {{{', '.join(keys)}}}" for format, keys in known.items())
    hint = hint_for(record.value, names, known)
    if len(value) == 1 and file_form(record.file) in ("csv", "tsv"):
        hint = f"if another sign parts its cells, say which: {{path: ..., delimiter: '^'}}\n{hint}"
    raise _UnknownFormat(reason, f"{place}: {reason}\n{which}: {forms}\n{hint}")


def _parse_messages(record: dict[str, Any]) -> dict[str, Any]:
    return _chat(record, take_turns(record, "messages"), "messages") | {"tools": take_tools(record), "extra": record}


def _chat(record: dict[str, Any], turns: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The messages of a record, and what they say of themselves."""
    system = system_message(record, turns)
    return {"messages": (*system, *messages_of(turns, key)), "marks": _marks(len(system), marks_of(turns, key))}


def _marks(before: int, marks: Sequence[bool | None]) -> tuple[bool | None, ...]:
    """Marks of all messages; none where no message has one."""
    return (*[None] * before, *marks) if any(mark is not None for mark in marks) else ()


def _parse_prompt_completion(record: dict[str, Any]) -> dict[str, Any]:
    """Each of the two is text, which becomes one turn, or a list of turns. Nothing of the prompt is learned."""
    for key in ("prompt", "completion"):
        require_key(record, key)
    prompt, completion = (_text_or_turns(record, key, role) for key, role in (("prompt", "user"), ("completion", "assistant")))
    given = (*system_message(record, [*prompt, *completion]), *messages_of(prompt, "prompt"))
    messages = (*given, *messages_of(completion, "completion"))
    marks = _marks(len(given) - len(prompt), (*marks_of(prompt, "prompt"), *marks_of(completion, "completion")))
    return {"messages": messages, "marks": marks, "given": len(given), "tools": take_tools(record), "extra": record}


def _text_or_turns(record: dict[str, Any], key: str, role: str) -> list[dict[str, Any]]:
    if isinstance(record.get(key), str):
        return [{"role": role, "content": record.pop(key)}]
    return take_turns(record, key)


def _parse_sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    """Tools may be given as bare descriptions of functions, as LLaMA-Factory has them; chat templates take them inside an object."""
    turns = take_turns(record, "conversations")
    tools = tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in take_tools(record))
    return _chat(record, turns, "conversations") | {"tools": tools, "extra": record}


def _parse_alpaca(record: dict[str, Any]) -> dict[str, Any]:
    """Turns of `history` come before the instruction, and their answers are learned, too, as LLaMA-Factory does it."""
    instruction, output = text_of(record, "instruction"), text_of(record, "output")
    further = "" if record.get("input") is None else text_of(record, "input")
    asked = {"role": "user", "content": f"{instruction}\n\n{further}" if further else instruction}
    messages = (*system_message(record), *take_history(record), asked, {"role": "assistant", "content": output})
    for key in ("instruction", "output", "input"):
        record.pop(key, None)
    return {"messages": messages, "extra": record}


def _parse_text(record: dict[str, Any]) -> dict[str, Any]:
    text = text_of(record, "text")
    del record["text"]
    return {"text": text, "extra": record}


def _parse_tokens(record: dict[str, Any]) -> dict[str, Any]:
    return {"tokens": take_token_row(record), "extra": record}


_PARSERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "messages": _parse_messages,
    "prompt_completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "sharegpt": _parse_sharegpt,
    "text": _parse_text,
    "tokens": _parse_tokens,
}


def _refuse_images(record: dict[str, Any]) -> None:
    """Refuse a record with images, whose text would be learned without them."""
    for key in _IMAGES:
        if record.get(key):
            raise BadRecord(f"the record has an image (key {key!r}), and hecate reads text only")


def _refuse_unwanted(sample: dict[str, Any], record: dict[str, Any], names: Mapping[str, str]) -> None:
    """Refuse an answer that is marked as a bad one, as KTO's data have it, and one of a pair of answers that `fields` does not name."""
    others = sample["extra"]
    for key in _VERDICTS:
        if "messages" in sample and str(others.get(key)).lower() == "false":
            raise BadRecord(f"{key} is false: the answer is marked as a bad one, as KTO's data have it, and would be learned as a good one")
    if others.get("rejected") and not names.keys() & set(_ANSWERS):
        mend = f"to train on its answer, name that: {in_words({key: key for key in _ANSWERS if key in record and key not in others})}"
        if others.get("chosen"):
            mend = "write records with a prompt and the chosen answer, and without the rejected one"
        raise BadRecord(f"the record has the key 'rejected': hecate does not train on preferences; {mend}")


def lone_surrogate(text: str) -> str | None:
    """Return the first half of a surrogate pair (`\\ud800`) that stands alone, which JSON can spell but no tokenizer accepts; or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


def _refuse_lone_surrogates(sample: dict[str, Any]) -> None:
    """Refuse a sample that has a lone surrogate in any text that the chat template or the tokenizer gets."""
    messages = sample.get("messages", ())
    texts = [message["content"] for message in messages] + [sample.get("text", "")]
    more = [message for message in messages if message.keys() > {"role", "content"}]
    others = [{name: value for name, value in message.items() if name != "content"} for message in more]
    if others or sample.get("tools"):
        texts.append(json.dumps([sample.get("tools"), others], ensure_ascii=False, default=str))
    for text in texts:
        if half := lone_surrogate(text):
            raise BadRecord(f"lone surrogate {half!r} in the text")
