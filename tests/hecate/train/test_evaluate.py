"""Held-out data: answers are compared as the chat template writes them, and samples that are left out have files of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hecate.apps.answers.answers import Conversation, answers_to
from hecate.apps.answers.compare import Questions, compare
from hecate.apps.answers.inference import answering
from hecate.apps.answers.likelihood import _pair
from hecate.config import load_config
from hecate.data.files.choices import ChoiceItem
from hecate.data.files.prompts import asked
from hecate.model.base import BaseModel
from hecate.ranks.ranks import join_ranks
from hecate.train import evaluate as evaluate_module
from hecate.train.generation import Answer, Decoding, generate
from hecate.train.training import Training
from testing.byte_tokenizer import TEMPLATE, build_byte_tokenizer
from testing.tiny_run import make_workshop, write_samples
from tests.hecate.data.making import chat, encode_records

# As Qwen3's: an answer at the end has an empty block of thoughts, which the generation prompt lacks.
THINKING = TEMPLATE.replace(
    "'\\n' + message['content']",
    "'\\n' + ('<think>\\n\\n</think>\\n\\n' if loop.last and message['role'] == 'assistant' else '') + message['content']",
)


def test_a_model_that_says_what_it_was_trained_on_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says the content alone is, too; the template writes something before it."""
    workshop = make_workshop(tmp_path)
    build_byte_tokenizer(chat_template=THINKING).save_pretrained(workshop / "model")
    config = load_config(workshop / "config.yaml", [f"output_dir={workshop}/runs/a"], claim_output=False)
    asked: dict[str, str] = {}
    calls = []
    for path in (workshop / "up.eval.jsonl", workshop / "echo.eval.jsonl"):
        for line in path.read_text().splitlines():
            question, answer = (turn["content"] for turn in json.loads(line)["messages"])
            asked.setdefault(question, answer)  # of the same question in both files, the first file's answer

    def generate(base: BaseModel, prompts: Sequence[Sequence[int]], *_: Any, **__: Any) -> list[Answer]:
        calls.append(len(prompts))
        questions = [base.tokenizer.decode(ids).split("\n")[1].removesuffix("<e>") for ids in prompts]
        blocks = ["<think>\n\n</think>\n\n" if number % 2 else "" for number in range(len(questions))]
        return [Answer(block + asked[question], finished=True) for block, question in zip(blocks, questions, strict=True)]

    monkeypatch.setattr(evaluate_module, "generate", generate)
    with join_ranks() as ranks:
        scores = Training(config, ranks).evaluate().scores
    assert (scores["up.eval"].accuracy, scores["echo.eval"].accuracy) == (1.0, 0.0)
    assert calls == [scores["up.eval"].samples + scores["echo.eval"].samples], "questions of all sources are answered together"


def test_the_evaluation_before_the_first_step_may_have_fewer_samples(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path)
    settings = [f"output_dir={workshop}/runs/a", "eval.generate=false", "eval.on_start=true", "eval.max_samples_on_start=2"]
    config = load_config(workshop / "config.yaml", settings, claim_output=False)
    with join_ranks() as ranks:
        run = Training(config, ranks)
        before = run.evaluate().scores
        run.train_one()
        after = run.evaluate().scores
    assert {score.samples for score in before.values()} == {2}
    assert {name: score.samples for name, score in after.items()} == {one.name: len(one) for one in run.parts.eval_sources}
    assert min(score.samples for score in after.values()) > 2


def save_chain(folder: Path, tokenizer: Any, *said: int) -> None:
    """Write a model that says `said` one after another; it repeats the last of them, and any other token."""
    tokens = len(tokenizer)
    sizes = {"hidden_size": 272, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=tokens, bos_token_id=256, eos_token_id=2, pad_token_id=2))
    after = dict(pairwise(said))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, :tokens] = torch.eye(tokens)
        for token in range(tokens):
            model.lm_head.weight[after.get(token, token), token] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("eos", ["<e>", "<t>"])
def test_an_answer_ends_where_the_chat_template_ends_it(tmp_path: Path, eos: str) -> None:
    """The same weights say the same, whatever token the tokenizer names for the end of a sequence: base models often name another."""
    workshop = make_workshop(tmp_path)
    tokenizer = build_byte_tokenizer(eos_token=eos, additional_special_tokens=["<t>"])
    line, yes, no = (tokenizer(text)["input_ids"][0] for text in ("\n", "y", "n"))
    save_chain(workshop / "model", tokenizer, line, yes, tokenizer.convert_tokens_to_ids("<e>"), no)
    write_samples(workshop / "sure.jsonl", ["w1", "w2", "w3"], lambda _: "y")
    config = load_config(workshop / "config.yaml", [f"data.eval=[{workshop}/sure.jsonl]"], claim_output=False, trains=False)
    with join_ranks() as ranks:
        ((_, figures),) = compare(config, ["base"], Questions(), ranks)[0].tasks.items()
    assert figures.figures["exact"] == 1.0
    with answering(workshop / "model") as opened:
        ((_, found),) = answers_to(opened, iter([asked("w1", None)]), Decoding(4), batch_size=1)
        assert found == [Answer("y", finished=True)]
        assert Conversation(opened, Decoding(4)).say("w1") == Answer("y", finished=True)
        with opened.moe.engine.evaluation() as evaluation, evaluation.forward(opened.tokens([])):
            plain = generate(opened.base, [[line]], Decoding(4), batch_size=1)
        assert plain == [Answer("y", finished=True) if eos == "<e>" else Answer("ynn", finished=False)], "no template in plain text"


@pytest.mark.parametrize("template", [TEMPLATE, THINKING])
def test_choices_are_judged_as_they_were_trained(tmp_path: Path, template: str) -> None:
    tokenizer = build_byte_tokenizer(chat_template=template)
    trained = encode_records(tmp_path, [chat("red or blue?", " blue")], tokenizer)[0].input_ids.tolist()
    opened: Any = SimpleNamespace(base=SimpleNamespace(tokenizer=tokenizer))
    context, more = _pair(opened, ChoiceItem("red or blue?", True, ("red", " blue"), 1, "here"), " blue")
    assert context + more == trained
    assert tokenizer.decode(more) == " blue"


def test_ranks_with_nothing_to_ask_generate_nothing() -> None:
    """As where all conversations end in calls of tools, and ranks go forward together."""
    model = nn.Linear(1, 1)
    model.generation_config = SimpleNamespace(eos_token_id=0)  # type: ignore[assignment]
    base: Any = SimpleNamespace(model=model, tokenizer=build_byte_tokenizer())
    config: Any = SimpleNamespace(eval=SimpleNamespace(max_new_tokens=4, batch_size=2))
    ranks: Any = SimpleNamespace(rank=1, world_size=2)
    assert evaluate_module._answers(config, ranks, base, [], True, nullcontext) == []


def test_held_out_samples_that_are_left_out_have_a_file_of_their_own(tmp_path: Path) -> None:
    """Also where the training data have the same name; an evaluation writes none and makes no folder."""
    workshop, run = make_workshop(tmp_path), tmp_path / "runs/a"
    for part, word in (("train", "too long "), ("held", "very long ")):
        (tmp_path / part).mkdir()
        write_samples(tmp_path / part / "chats.jsonl", ["w1", "w2", 9 * word], str)
    sources = [f"data.{key}=[{tmp_path}/{part}/chats.jsonl]" for key, part in (("train", "train"), ("eval", "held"))]
    config = load_config(workshop / "config.yaml", [*sources, f"output_dir={run}", "eval.generate=false"], claim_output=False)
    with join_ranks() as ranks:
        Training(config, ranks)
        compare(replace(config, output_dir=str(tmp_path / "new")), ["base"], Questions(), ranks)
    left_out = {path.name: "very long" in path.read_text() for path in run.glob("quarantine*")}
    assert left_out == {"quarantine-chats.jsonl": False, "quarantine-eval-chats.jsonl": True}
    assert not (tmp_path / "new").exists()
