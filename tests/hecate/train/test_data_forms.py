"""A run's samples do not depend on the form of its files, nor on where their tokens are kept."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

from transformers import AutoTokenizer

from hecate.config import load_config
from hecate.train.training import Training
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.train.in_process import OVERRIDES, ranks_of_default_group


def write_forms(folder: Path) -> list[str]:
    """The samples of up.train.jsonl as other files; values of data.train that name them."""
    lines = (folder / "up.train.jsonl").read_text(encoding="utf-8").splitlines()
    talks = [json.loads(line)["messages"] for line in lines]
    (folder / "up.json").write_text(json.dumps([{"messages": talk} for talk in talks], indent=1), encoding="utf-8")
    (folder / "parts").mkdir()
    for number, part in enumerate((lines[:50], lines[50:])):
        (folder / "parts" / f"{number}.jsonl.gz").write_bytes(gzip.compress("\n".join(part).encode()))
    with open(folder / "up.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["question", "answer"], *([turn["content"] for turn in talk] for talk in talks)])
    (folder / "other.csv").write_text((folder / "up.csv").read_text(encoding="utf-8").replace(",", "^"), encoding="utf-8")
    answers = "fields: {prompt: question, completion: answer}"
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "up.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"up": entry}), encoding="utf-8")
    write_tokens(folder, talks)
    tables = [f"{{path: {folder}/up.csv, {answers}}}", f"{{path: {folder}/other.csv, delimiter: '^', {answers}}}"]
    others = [f"{folder}/tokens.jsonl", f"'{folder}/dataset_info.json:up'"]
    return [f"{folder}/up.train.jsonl", f"{folder}/up.json", f"{folder}/parts", *tables, *others]


def write_tokens(folder: Path, talks: list[list[dict[str, str]]]) -> None:
    """The same conversations as token ids, with labels for what is behind the prompt, without the last line break."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = []
    for talk in talks:
        ids = tokenizer(tokenizer.apply_chat_template(talk, tokenize=False).rstrip("\n"), add_special_tokens=False)["input_ids"]
        asked = tokenizer.apply_chat_template(talk[:-1], tokenize=False, add_generation_prompt=True)
        given = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        rows.append({"input_ids": ids, "labels": [-100] * given + ids[given:], "attention_mask": [1] * len(ids)})
    (folder / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def losses(rank: int, world: int, folder: str, sources: list[str]) -> list[tuple[str, float, float]]:
    """(kind of source, loss, norm of the gradient) of the first step with each value of data.train, and without a cache."""
    found = []
    for source, cache in [*((source, f"{folder}/tokens") for source in sources), (sources[0], "null")]:
        given = [*OVERRIDES, f"data.train=[{source}]", f"data.cache={cache}", f"output_dir={folder}/runs/any"]
        run = Training(load_config(f"{folder}/config.yaml", given, claim_output=False), ranks_of_default_group(rank, world))
        result = run.train_one().result
        found.append((type(run.parts.stream.sources[0]).__name__, result.loss, result.grad_norm))
    return found


def test_the_first_step_is_the_same_bit_for_bit_from_files_of_all_forms(tmp_path: Path) -> None:
    folder = make_workshop(tmp_path)
    (found,) = run_ranks(1, losses, str(folder), write_forms(folder))
    assert [kind for kind, *_ in found] == ["MappedSource"] * 7 + ["EncodedSource"]
    assert len({(loss, norm) for _, loss, norm in found}) == 1
