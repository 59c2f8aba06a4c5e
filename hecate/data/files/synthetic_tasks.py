"""Write small tasks with exact answers as `messages` files with short prompts; the tasks come from reasoning-gym's generators.

A system message of a word or two names the task, and the prompt keeps only the part of the generator's wording that varies. A
sample then has some 30 tokens, most of which carry information.
"""

import importlib.util
import json
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hecate.errors import UserError, install_hint
from hecate.io.durable import replace_file

# A generator that repeats known prompts this many times in a row counts as exhausted.
_PATIENCE = 2000

Meta = Mapping[str, Any]  # an entry's metadata


@dataclass(frozen=True)
class Task:
    """How the samples of one task are made from a reasoning-gym generator."""

    generator: str
    system: str
    prompt: Callable[[Meta], str]
    answer: Callable[[Meta], str] | None = None  # None: the generator's own answer, unchanged
    settings: Mapping[str, Any] = field(default_factory=dict)
    theirs: Callable[[str], str] = str
    """Turns an answer in this task's form into that of the generator, whose verifier judges it."""
    truth: Callable[[Meta], Meta] = dict
    """Returns the metadata that the verifier gets, where this task asks for something else than the generator."""


@dataclass(frozen=True)
class WrittenTask:
    """The two files that were written for one task. No prompt occurs twice in them."""

    task: str
    train_path: Path
    eval_path: Path
    train_samples: int
    eval_samples: int
    exhausted: bool
    """Whether the task has no more different prompts than these, although more were requested."""


def write_tasks(folder: str | Path, tasks: Sequence[str], train_size: int, eval_size: int, seed: int) -> list[WrittenTask]:
    """Write `{task}.train.jsonl` and `{task}.eval.jsonl` of each task into `folder`. The same seed writes the same files.

    No prompt occurs twice in a task, neither in one file nor in both. If a task has fewer prompts than requested, at most a
    quarter of them go to the evaluation file and the rest to the training file, and `WrittenTask.exhausted` is set.
    Raises UserError for an unknown task and if reasoning-gym is not installed.
    """
    assert train_size > 0, train_size
    assert eval_size > 0, eval_size
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"task {task!r} is unknown: it must be one of {', '.join(TASKS)}")
    return [_write_task(Path(folder), task, train_size, eval_size, seed) for task in tasks]


def _write_task(folder: Path, task: str, train_size: int, eval_size: int, seed: int) -> WrittenTask:
    prompts: dict[str, tuple[str, Meta]] = {}  # prompt: answer, entry
    idle = 0
    for prompt, answer, entry in _draw(TASKS[task], seed):
        idle = idle + 1 if prompt in prompts else 0
        prompts.setdefault(prompt, (answer, entry))
        if len(prompts) == train_size + eval_size or idle == _PATIENCE:
            break
    records = [{"messages": _messages(TASKS[task].system, prompt, answer)} for prompt, (answer, _) in prompts.items()]
    held_out = eval_size
    if len(records) < train_size + eval_size:
        held_out = min(eval_size, len(records) // 4)
    written = WrittenTask(
        task=task,
        train_path=folder / f"{task}.train.jsonl",
        eval_path=folder / f"{task}.eval.jsonl",
        train_samples=min(train_size, len(records) - held_out),
        eval_samples=held_out,
        exhausted=len(records) < train_size + eval_size,
    )
    folder.mkdir(parents=True, exist_ok=True)
    # The first prompts are the held-out ones, so that a larger training set does not change the evaluation file.
    # They carry what `verdict` judges any answer by.
    entries = [entry for _, entry in prompts.values()][:held_out]
    _write(written.eval_path, [record | {"task": task, "entry": entry} for record, entry in zip(records, entries, strict=False)])
    _write(written.train_path, records[held_out : held_out + written.train_samples])
    return written


def has_verifiers() -> bool:
    """Return whether reasoning-gym is installed."""
    return importlib.util.find_spec("reasoning_gym") is not None


def verdict(entry: Mapping[str, Any], answer: str, *, task: str | None, place: str) -> float:
    """Return what reasoning-gym's own verifier says of an answer: 1 if it is right, less where a part of it is.

    Args:
        entry: reasoning-gym's record of the question, with {"answer", "metadata"}; of the metadata `source_dataset` names the generator.
        task: one of `TASKS`, whose answers have a form of their own; another, or None: the answer is in the generator's form.
        place: of the sample, for errors.

    Raises:
        UserError: reasoning-gym is not installed, or has no such generator.
    """
    name = entry["metadata"]["source_dataset"]
    try:
        score = _verifier(name)
    except ValueError as error:
        raise UserError(f"{place}: entry.metadata.source_dataset: reasoning-gym has no generator {str(name)[:80]!r}") from error
    own = TASKS.get(task or "")
    return float(score(own.theirs(answer) if own and own.generator == name else answer, dict(entry)))


@cache
def _verifier(generator: str) -> Callable[[str, dict[str, Any]], float]:
    score: Callable[[str, dict[str, Any]], float] = _reasoning_gym().get_score_answer_fn(generator)
    return score


def _reasoning_gym() -> Any:
    try:
        import pycosat  # noqa: F401
    except ImportError:
        # Only the zebra puzzles solve with it, and it has no wheel; reasoning-gym imports it for all tasks.
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    try:
        with warnings.catch_warnings():
            # Python compiles a package at its first import, and one that reasoning-gym needs compares strings by `is`.
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym
    except ImportError as error:
        raise UserError(
            f"the synthetic tasks need reasoning-gym, which cannot be imported: {error}\n  {install_hint('quickstart')}"
        ) from error
    return reasoning_gym


def _draw(task: Task, seed: int) -> Iterator[tuple[str, str, Meta]]:
    """Yield endless (prompt, answer, entry) tuples, with repetitions."""
    reasoning_gym = _reasoning_gym()
    dataset = reasoning_gym.create_dataset(task.generator, seed=seed, size=2**31, **task.settings)
    for index in range(len(dataset)):
        entry = dataset[index]
        meta = entry["metadata"]
        # The generator's own wording of the question is left out: no verifier of these tasks asks for it.
        record = {"answer": entry["answer"], "metadata": task.truth(meta)}
        yield task.prompt(meta), str(entry["answer"]) if task.answer is None else task.answer(meta), record


def _messages(system: str, prompt: str, answer: str) -> list[dict[str, str]]:
    # Without a system message of its own, SmolLM2's chat template adds one of 20 tokens.
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    replace_file(path, [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records])


def _listed(items: Sequence[object]) -> str:
    return " ".join(str(item).removesuffix(".0") for item in items)


def _ordered(meta: Meta, items: Sequence[object]) -> str:
    return f"{'up' if meta['direction'] == 'ascending' else 'down'}: {_listed(items)}"


def _lowered(meta: Meta) -> list[str]:
    return [word.lower() for word in meta["original_words"]]


def _sorted_words(meta: Meta) -> list[str]:
    return sorted(_lowered(meta), reverse=meta["direction"] == "descending")


def _quoted(answer: str) -> str:
    return str([] if answer == "none" else answer.split())


def _separated(answer: str) -> str:
    return ", ".join(answer.split())


def _filter_prompt(meta: Meta) -> str:
    return f"{meta['operation'].replace('_', ' ')} than {meta['filter_value']}: {_listed(meta['original_numbers'])}"


_FEW_NUMBERS = {
    "min_numbers": 3,
    "max_numbers": 4,
    "min_decimals": 0,
    "max_decimals": 0,
    "min_value": 0,
    "max_value": 99,
}

TASKS: Mapping[str, Task] = {
    "chain_sum": Task(
        generator="chain_sum",
        system="sum",
        prompt=lambda meta: f"{meta['expression']} =",
        settings={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    ),
    "products": Task(
        generator="products",
        system="product",
        prompt=lambda meta: f"{meta['expression']} =",
        settings={"min_digits": 1, "max_digits": 1},
    ),
    "gcd": Task(
        generator="gcd",
        system="gcd",
        prompt=lambda meta: _listed(meta["numbers"]),
        settings={"max_value": 100},
    ),
    "letter_counting": Task(
        generator="letter_counting",
        system="count letter",
        prompt=lambda meta: f"{meta['target_letter']}: {_listed(meta['span'])}",
        settings={"min_words": 3, "max_words": 5},
    ),
    "count_bits": Task(
        generator="count_bits",
        system="count ones",
        prompt=lambda meta: str(meta["binary"]),
        settings={"max_n": 4095},
    ),
    "number_sorting": Task(
        generator="number_sorting",
        system="sort numbers",
        prompt=lambda meta: _ordered(meta, meta["original_numbers"]),
        answer=lambda meta: _listed(meta["sorted_numbers"]),
        settings=_FEW_NUMBERS,
        theirs=_quoted,
    ),
    "number_filtering": Task(
        generator="number_filtering",
        system="filter",
        prompt=_filter_prompt,
        answer=lambda meta: _listed(meta["result"]) or "none",
        settings=_FEW_NUMBERS,
        theirs=_quoted,
    ),
    "number_sequence": Task(
        generator="number_sequence",
        system="next number",
        prompt=lambda meta: _listed(meta["sequence"][:-1]),
        settings={"min_terms": 4, "max_terms": 4, "max_complexity": 1, "min_value": 0, "max_value": 20},
    ),
    # The letters are separated by spaces, because a word-piece tokenizer hides the letters of a word.
    "spell_backward": Task(
        generator="spell_backward",
        system="spell backward",
        prompt=lambda meta: _listed(meta["word"]),
        answer=lambda meta: _listed(meta["word"][::-1]),
        settings={"min_word_len": 3, "max_word_len": 5},
        theirs=lambda answer: "".join(answer.split()),
    ),
    "word_sequence_reversal": Task(
        generator="word_sequence_reversal",
        system="reverse",
        prompt=lambda meta: _listed(meta["words"]),
        answer=lambda meta: _listed(meta["words"][::-1]),
        settings={"min_words": 3, "max_words": 4},
        theirs=_separated,
    ),
    "word_sorting": Task(
        generator="word_sorting",
        system="sort words",
        prompt=lambda meta: _ordered(meta, _lowered(meta)),
        answer=lambda meta: _listed(_sorted_words(meta)),
        settings={"min_words": 3, "max_words": 3, "max_word_length": 6},
        theirs=_separated,
        truth=lambda meta: {**meta, "sorted_words": _sorted_words(meta)},  # of the words in small letters
    ),
    "leap_year": Task(
        generator="calendar_arithmetic",
        system="leap year",
        prompt=lambda meta: str(meta["year"]),
        settings={"tasks": ["is_leap_year"]},
    ),
}
