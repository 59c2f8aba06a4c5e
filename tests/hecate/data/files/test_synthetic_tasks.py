import json
import math
import operator
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hecate.data.encode import encode_source
from hecate.data.files.synthetic_tasks import TASKS, verdict, write_tasks
from hecate.errors import UserError
from tests.hecate.data.making import Source, needs_reasoning_gym


def pairs(path: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of every line."""
    records = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [(user["content"], assistant["content"]) for _, user, assistant in records]


def ordered(prompt: str, items: list[Any]) -> list[Any]:
    return sorted(items, reverse=prompt.startswith("down"))


def computed(prompt: str) -> str:
    left, sign, right, _ = prompt.split()
    return str({"+": operator.add, "-": operator.sub, "*": operator.mul}[sign](int(left), int(right)))


def filtered(prompt: str) -> str:
    rule, numbers = prompt.split(":")
    action, size, _, bound = rule.split()
    matching = {n for n in map(int, numbers.split()) if (n > int(bound) if size == "larger" else n < int(bound))}
    kept = [n for n in map(int, numbers.split()) if (n in matching) == (action == "keep")]
    return " ".join(map(str, kept)) or "none"


# Each answer computed anew from the short prompt: the prompt must hold all that the answer needs.
SOLVERS = {
    "chain_sum": computed,
    "products": computed,
    "gcd": lambda p: str(math.gcd(*map(int, p.split()))),
    "letter_counting": lambda p: str(p[3:].lower().count(p[0])),
    "count_bits": lambda p: str(p.count("1")),
    "number_sorting": lambda p: " ".join(map(str, ordered(p, [int(n) for n in p.split()[1:]]))),
    "number_filtering": filtered,
    "spell_backward": lambda p: p[::-1],
    "word_sequence_reversal": lambda p: " ".join(p.split()[::-1]),
    "word_sorting": lambda p: " ".join(ordered(p, p.split()[1:])),
    "leap_year": lambda p: "Yes" if int(p) % 4 == 0 and (int(p) % 100 != 0 or int(p) % 400 == 0) else "No",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: Any) -> Any:
    needs_reasoning_gym()
    return write_tasks(tmp_path_factory.mktemp("tasks"), list(TASKS), train_size=160, eval_size=60, seed=3)


def test_held_out_prompts_are_not_trained_on(written: Any) -> None:
    for task in written:
        train, held_out = pairs(task.train_path), pairs(task.eval_path)
        assert (len(train), len(held_out)) == (task.train_samples, task.eval_samples), task.task
        assert len({prompt for prompt, _ in train + held_out}) == len(train) + len(held_out), task.task
        assert len(held_out) >= 25, task.task


@pytest.mark.parametrize("task", SOLVERS)
def test_answer_follows_from_the_prompt(written: Any, task: str) -> None:
    (files,) = (files for files in written if files.task == task)
    for prompt, answer in pairs(files.train_path) + pairs(files.eval_path):
        assert SOLVERS[task](prompt) == answer, prompt


def test_the_verifier_takes_every_held_out_answer_and_not_the_next_one(written: Any) -> None:
    for files in written:
        records = [json.loads(line) for line in files.eval_path.read_text(encoding="utf-8").splitlines()]
        answers = [record["messages"][-1]["content"] for record in records]
        judged = [verdict(one["entry"], given, task=files.task, place="") for one, given in zip(records, answers, strict=True)]
        assert set(judged) == {1.0}, files.task
        pairs_of = zip(records, answers, answers[1:], strict=False)
        wrong = [verdict(one["entry"], other, task=files.task, place="") for one, own, other in pairs_of if other != own]
        assert max(wrong) < 1, files.task
    with pytest.raises(UserError, match=r"x:1: entry\.metadata\.source_dataset: reasoning-gym has no generator 'sums'"):
        verdict({"metadata": {"source_dataset": "sums"}}, "1", task=None, place="x:1")


def test_only_the_rule_of_number_sequences_is_not_in_the_prompt() -> None:
    assert TASKS.keys() - SOLVERS.keys() == {"number_sequence"}


def test_small_spaces_hold_out_a_quarter_and_say_so(tmp_path: Path) -> None:
    needs_reasoning_gym()
    (task,) = write_tasks(tmp_path, ["products"], train_size=500, eval_size=100, seed=0)
    # 10 x 10 digits.
    assert (task.train_samples, task.eval_samples, task.exhausted) == (75, 25, True)
    (task,) = write_tasks(tmp_path, ["products"], train_size=70, eval_size=20, seed=0)
    assert (task.train_samples, task.eval_samples, task.exhausted) == (70, 20, False)


def test_same_seed_same_files_and_more_training_leaves_the_held_out(tmp_path: Path) -> None:
    needs_reasoning_gym()
    texts = []
    for folder, train_size, seed in (("a", 30, 0), ("b", 30, 0), ("c", 50, 0), ("d", 30, 1)):
        (task,) = write_tasks(tmp_path / folder, ["gcd"], train_size=train_size, eval_size=10, seed=seed)
        texts.append((task.train_path.read_text(), task.eval_path.read_text()))
    assert texts[0] == texts[1]
    assert texts[0][1] == texts[2][1]
    assert texts[2][0].startswith(texts[0][0])
    assert texts[0][1] != texts[3][1]


def test_samples_are_short_for_smollm2(written: Any, smollm2_tokenizer: Any) -> None:
    for task in written:
        source = encode_source(Source(str(task.train_path)), smollm2_tokenizer, seq_len=128, vocab_size=49152)
        assert len(source.input_ids) / len(source) < 45, task.task


def test_unknown_task_and_missing_package(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match=r"task 'sums' is unknown: it must be one of chain_sum"):
        write_tasks(tmp_path, ["sums"], 10, 10, 0)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"\[quickstart\]"):
        write_tasks(tmp_path, ["gcd"], 10, 10, 0)


def test_tasks_need_no_package_that_must_be_compiled(tmp_path: Path) -> None:
    needs_reasoning_gym()
    draw = f"""
import sys
sys.modules["pycosat"] = None  # as if it were not installed
from hecate.data.files.synthetic_tasks import write_tasks
print(write_tasks({str(tmp_path)!r}, ["gcd"], 2, 2, 0)[0].train_samples)
"""
    done = subprocess.run([sys.executable, "-c", draw], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "2\n", done.stderr
