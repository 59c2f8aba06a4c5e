"""Answers do not depend on their batch, and those of a conversation are what a model says that reads all of it anew."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from hecate.apps.answers.answers import Conversation, answers_to, prompt_ids
from hecate.apps.answers.inference import answering
from hecate.apps.answers.opened import Opened
from hecate.cli import app
from hecate.cli.answers import talk
from hecate.config import load_config
from hecate.data.files.prompts import asked, read_prompts
from hecate.errors import UserError
from hecate.model.files import load as load_module
from hecate.ranks.ranks import join_ranks
from hecate.train.generation import Decoding, _sampling, answer_of, generate, stop_tokens
from hecate.train.training import Training
from testing.answering import answer
from testing.byte_tokenizer import build_byte_tokenizer
from testing.tiny_run import make_workshop
from tests.hecate.data.making import encode_records

QUESTIONS = ["w1x1", "a", "a longer question than the others", "w2x2", "", "w3x3?", "what is w4x4, and what is w5x5?"]
SAMPLED = Decoding(8, temperature=0.9, top_p=0.95, top_k=50, seed=3)
OVERRIDES = {"mixlora": (), "linears": ("moe.unit=linear", "lora.target_modules=[q_proj,down_proj]")}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the checkpoints of two runs after a step."""
    made = make_workshop(tmp_path_factory.mktemp("workshop"))
    for name, overrides in OVERRIDES.items():
        config = load_config(made / "config.yaml", [*overrides, f"output_dir={made}/runs/{name}"], claim_output=False)
        with join_ranks() as ranks:
            run = Training(config, ranks)
            run.train_one()
            run.save()
    return made


@pytest.fixture(params=["mixlora", "linears", "base"])
def opened(workshop: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    folder = workshop / "model" if request.param == "base" else workshop / "runs" / request.param / "checkpoint-1"
    with answering(folder) as found:
        yield found


def said(opened: Opened, decoding: Decoding, batch_size: int, count: int = 1) -> list[str]:
    prompts = (asked(question, None) for question in QUESTIONS)
    found = list(answers_to(opened, prompts, decoding, batch_size=batch_size, count=count))
    assert [prompt.messages[-1]["content"] for prompt, _ in found] == QUESTIONS
    return [one.text for _, answers in found for one in answers]


def test_a_batch_gives_what_single_prompts_give(opened: Opened) -> None:
    """Greedy answers are transformers' own; samples are of the seed, the prompt's number and the answer's, and of nothing else."""
    single = said(opened, Decoding(8), 1)
    assert said(opened, Decoding(8), 3) == single
    tokenizer, model = opened.base.tokenizer, opened.base.model
    with opened.moe.engine.evaluation():
        for question, text in zip(QUESTIONS, single, strict=True):
            ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt")
            given = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
            out = model.generate(given, max_new_tokens=8, do_sample=False, pad_token_id=257)  # type: ignore[operator]
            assert tokenizer.decode(out[0, given.shape[1] :], skip_special_tokens=True).strip() == text
    sampled = said(opened, SAMPLED, 1, count=2)
    assert said(opened, SAMPLED, 5, count=2) == sampled
    assert sampled != said(opened, Decoding(8, temperature=0.9, seed=4), 5, count=2)
    assert len(set(sampled)) > len(QUESTIONS)


def test_a_plain_text_begins_as_in_training(tmp_path: Path) -> None:
    """With the tokenizer's mark before a text, and without the one behind it."""
    tokenizer = build_byte_tokenizer(chat_template=None)
    marks = TemplateProcessing(single="<s> $A <e>", special_tokens=[("<s>", 256), ("<e>", 257)])
    tokenizer.backend_tokenizer.post_processor = marks
    opened: Any = SimpleNamespace(chats=False, trained="here", base=SimpleNamespace(tokenizer=tokenizer))
    trained = encode_records(tmp_path, [{"text": "ab"}], tokenizer)[0].input_ids.tolist()
    assert trained[0] == 256
    assert prompt_ids(opened, asked("ab", None)) == trained


def test_samples_are_of_the_softmax() -> None:
    """4000 rows with a key each: the shares of the tokens that top-k leaves."""
    shares, rows = torch.tensor([0.5, 0.3, 0.15, 0.05]), 4000
    scores = (shares.log() * 0.7).repeat(rows, 1)
    for step in _sampling(Decoding(1, temperature=0.7, top_k=3), [str(row) for row in range(rows)], torch.device("cpu")):
        scores = step(torch.zeros((rows, 1), dtype=torch.int64), scores)
    drawn = Counter(scores.argmax(1).tolist())
    for token, share in enumerate((shares[:3] / shares[:3].sum()).tolist()):
        assert abs(drawn[token] / rows - share) < 4 * (share * (1 - share) / rows) ** 0.5
    assert not drawn[3]


def test_what_a_model_recommends_for_generation_does_not_apply(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers are the most likely tokens, whatever penalty on repetition the model's folder has; its end tokens stay."""
    shutil.copytree(workshop / "model", tmp_path / "model")

    def answers(recommended: dict[str, float]) -> list[str]:
        values = {"eos_token_id": [2, 5]} | recommended
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
        with answering(tmp_path / "model") as opened:
            assert stop_tokens(opened.base, chat=False)[:2] == [2, 5]
            return said(opened, Decoding(16), 2)

    penalty = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 1, "min_new_tokens": 15}
    plain = answers({})
    assert answers(penalty) == plain
    monkeypatch.setattr(load_module, "_end_tokens_alone", lambda recommended: recommended)
    assert answers(penalty) != plain, "nothing that a penalty would change"


def test_an_answer_ends_before_a_stop_text(workshop: Path) -> None:
    """A text in the prompt is no stop, and rows that have ended do not end the others."""
    with answering(workshop / "model") as opened:
        plain = said(opened, SAMPLED, 4)
        stop = next(text[3] for text in plain if len(text) > 4)
        stopped = said(opened, replace(SAMPLED, stop=(stop,)), 4)
        assert stopped == [text.split(stop)[0].strip() for text in plain]
        assert stopped != plain
        ids = opened.base.tokenizer("w1\n", add_special_tokens=False)["input_ids"]
        with opened.moe.engine.evaluation():
            (free,) = generate(opened.base, [ids], Decoding(4), batch_size=1)
            (found,) = generate(opened.base, [ids], Decoding(4, stop=("\n",)), batch_size=1)
        assert len(free.raw) > 1
        assert found.raw == free.raw.partition("\n")[0]
    base: Any = SimpleNamespace(
        model=SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 3])),
        tokenizer=SimpleNamespace(eos_token_id=2, decode=lambda ids, skip_special_tokens: "".join(map(str, ids.tolist()))),
    )
    assert answer_of(base, torch.tensor([5, 3, 2, 2]), Decoding(4)).text == "5"
    assert [answer_of(base, torch.tensor(row), Decoding(4, stop=("65",))).finished for row in ([5, 6], [5, 6, 5], [5, 2])] == [
        False,
        True,
        True,
    ]


REWRITING = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ('' if loop.last else ' before') + message['content'] + '<e>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", ["appending", "rewriting"])
def test_a_conversation_is_what_reading_it_anew_gives(workshop: Path, template: str) -> None:
    """The second turn computes the new tokens alone, or those from where the template has changed the text."""
    with answering(workshop / "runs" / "mixlora" / "checkpoint-1") as opened:
        if template == "rewriting":
            opened.base.tokenizer.chat_template = REWRITING
        computed: list[int] = []
        embedding: Any = opened.base.model.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_hook(lambda _module, ids, _out: computed.append(ids[0].numel()))
        conversation = Conversation(opened, Decoding(6), system="be brief")
        messages = [{"role": "system", "content": "be brief"}]
        for turn, text in enumerate(["w1x1 and a few words more", "w2x2", "w3x3"]):
            computed.clear()
            before = conversation.cached
            found = conversation.say(text)
            first = computed[0]
            messages.append({"role": "user", "content": text})
            line = json.dumps({"messages": messages}).encode()
            ((_, (anew,)),) = answers_to(opened, read_prompts("-", [line]), Decoding(6), batch_size=1)
            assert found == anew
            messages.append({"role": "assistant", "content": found.text})
            whole = len(opened.base.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"])
            if template == "appending":
                # Bytes of the answer that are no text are tokens of another kind when they are read again.
                assert 0 <= first - (whole - before) <= 6 * (turn > 0), turn
            else:
                assert (whole - before < first < whole) == (turn > 0), turn
        conversation.reset()
        assert conversation.cached == 0


def test_prompts_of_a_file_are_answered_in_place(workshop: Path, tmp_path: Path) -> None:
    model = str(workshop / "model")
    lines = [{"prompt": "w1x1", "id": "7\ud800"}, {"messages": [{"role": "user", "content": "w2x2"}]}]
    (tmp_path / "asked.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    out = tmp_path / "answered.jsonl"
    run = CliRunner().invoke
    given = ["generate", model, "--max-new-tokens", "4", "--prompts"]
    done = run(app, [*given, str(tmp_path / "asked.jsonl"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = [answer(Path(model), text, system=None, model=None, max_new_tokens=4) for text in ("w1x1", "w2x2")]
    assert [record["answers"] for record in records] == [[text] for text in wanted]
    assert records[0]["id"] == "7\ud800", "half a surrogate pair, which UTF-8 has no bytes for"
    piped = run(app, [*given, "-", "-n", "2", "--temperature", "1"], input=json.dumps(lines[0]))
    assert len(json.loads(piped.output)["answers"]) == 2
    alone = run(app, ["generate", model, "w1x1", "--max-new-tokens", "4"])
    assert alone.output == wanted[0] + "\n"
    several = run(app, ["generate", model, "w1x1", "w2x2", "--max-new-tokens", "4"])
    assert several.output == f"> w1x1\n{wanted[0]}\n> w2x2\n{wanted[1]}\n"


def test_what_cannot_be_asked_is_refused(workshop: Path) -> None:
    model = str(workshop / "model")
    for arguments, reason in (
        ([], "give a PROMPT, or --prompts FILE.jsonl"),
        (["w1", "--prompts", "-"], "give a PROMPT, or --prompts"),
        (["w1", "--out", "x"], "--out is for the answers of --prompts"),
        (["--prompts", "-", "--out", "no/such/x"], "--out no/such/x: there is no folder no/such; make it first"),
        (["w1", "-n", "2"], "without sampling all answers to a prompt are the same"),
        (["w1", "--top-p", "0.5"], "--top-p was given without --temperature"),
        (["w1", "--temperature", "1", "--top-p", "1.5"], "must be above 0 and at most 1"),
        (["w1", "--stop", ""], "would end every answer"),
        (["w1", "--user", "u1"], "--user was given without --features"),
        (["w1", "--features", "x.npz"], "--features was given without --user"),
    ):
        done = CliRunner().invoke(app, ["generate", model, *arguments])
        assert reason in str(done.exception), arguments
    for line, reason in (
        ("{", "standard input:1: not valid JSON"),
        ("[" * 100_000, "standard input:1: JSON nested too deeply"),
        ("[]", "standard input:1: a JSON list where an object is needed"),
        ('{"prompt": "a", "tools": [{}]}', "standard input:1: tools are not supported"),
        ('{"prompt": "a", "messages": []}', 'standard input:1: needs an object with "prompt" or "messages"'),
        ('{"prompt": "a\\ud800"}', "standard input:1: lone surrogate"),
        ('{"prompt": 3}', "standard input:1: prompt must be a text"),
        ('{"messages": [{"role": "poet", "content": ""}]}', "standard input:1: messages must be a list of"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "standard input:1: the last message is the assistant's"),
        ("", "standard input holds no prompts"),
    ):
        with pytest.raises(UserError, match=reason):
            list(read_prompts("-", [line.encode()] if line else []))
    with answering(Path(model)) as opened:
        prompts = iter([asked("w1", None, "u1")])
        with pytest.raises(UserError, match="a prompt names the user 'u1', but no features were given"):
            list(answers_to(opened, prompts, Decoding(1), batch_size=1))
        opened.base.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
        with pytest.raises(UserError, match="the chat template refuses the conversation: no system role"):
            Conversation(opened, Decoding(1)).say("w1")
        opened.base.tokenizer.chat_template = None
        with pytest.raises(UserError, match="has no chat template, which a conversation needs"):
            Conversation(opened, Decoding(1))


def test_a_talk_in_the_terminal(workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = iter(["w1x1", "", "/what", "/reset", "w1x1", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(inputs))
    with answering(workshop / "model") as opened:
        talk(Conversation(opened, Decoding(4)), opened.base.tokenizer)
    first, unknown, forgotten = (capsys.readouterr().out).partition("/what is no command: /reset begins anew, /exit ends\n")
    assert unknown
    assert forgotten == "(forgotten)\n" + first
