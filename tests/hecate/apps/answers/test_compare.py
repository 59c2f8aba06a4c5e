"""Likelihoods beside plain ones, and several models on held-out data, questions with choices and tasks of lm-eval."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import hecate.apps.answers.compare
from hecate.apps.answers.compare import Questions, compare
from hecate.apps.answers.evaluation_main import EvaluationRequest, main
from hecate.apps.answers.inference import answering
from hecate.apps.answers.likelihood import accuracies, log_likelihoods, split_tokens
from hecate.apps.answers.lm_eval_tasks import LmEvalTasks, _decoding, lm_eval_figures
from hecate.apps.answers.opened import Opened, load_trained
from hecate.apps.answers.trained import export
from hecate.cli import app
from hecate.config import load_config, to_yaml
from hecate.data.files.choices import read_choices
from hecate.errors import UserError
from hecate.ranks.ranks import join_ranks
from hecate.train.training import Training
from testing.answering import answer
from testing.tiny_run import make_workshop
from tests.hecate.data.making import needs_reasoning_gym
from tests.hecate.train.command_line import run

WORDS = ["red", "a long choice", "blue green", "x"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the checkpoint of a run after two steps, a file of questions, and one of sums with their verifier's entries."""
    made = make_workshop(tmp_path_factory.mktemp("workshop"))
    config = load_config(made / "config.yaml", [f"output_dir={made}/runs/a"], claim_output=False)
    with join_ranks() as ranks:
        training = Training(config, ranks)
        training.train_one()
        training.train_one()
        training.save()
        (made / "runs/a/config.yaml").write_text(to_yaml(training.parts.config))
    lines = [{"prompt": f"what of {number}? ", "choices": WORDS[: 2 + number % 3], "answer": number % 2} for number in range(8)]
    chats = [{"question": line["prompt"], "choices": line["choices"], "answer": line["answer"]} for line in lines]
    for name, records in (("which", lines), ("asked", chats)):
        (made / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return made


def plain(opened: Opened, context: list[int], more: list[int]) -> float:
    """The log-likelihood in one pass of its own over all tokens, as transformers computes logits."""
    model: Any = opened.base.model
    with torch.no_grad():
        logs = model(torch.tensor([context + more]), use_cache=False).logits[0].double().log_softmax(-1)
    return math.fsum(float(logs[len(context) - 1 + place, token]) for place, token in enumerate(more))


@pytest.mark.parametrize("name", ["model", "runs/a/checkpoint-2"])
def test_likelihoods_are_the_plain_ones(workshop: Path, name: str) -> None:
    """In batches of rows of several lengths; and the choices that they make."""
    with answering(workshop / name) as opened, opened.moe.engine.evaluation() as evaluation:
        texts = [("a context ", "more"), ("b", " and more of it"), ("another one, which is longer", "?")]
        pairs = [split_tokens(opened.base.tokenizer, *text) for text in texts]
        assert [len(more) for _, more in pairs] == [5, 15, 1]
        found = log_likelihoods(opened.base, evaluation, pairs, batch_size=2)
        assert [one.log for one in found] == pytest.approx([plain(opened, *pair) for pair in pairs], rel=1e-5)
        best = [opened.base.model(torch.tensor([pairs[2][0]])).logits[0, -1].argmax().item()]
        assert [one.greedy for one in log_likelihoods(opened.base, evaluation, [pairs[2], (pairs[2][0], best)], batch_size=2)][1]
        items = read_choices(workshop / "which.jsonl")
        judged = accuracies(opened, evaluation, items, batch_size=3)
        for item, right, normed in zip(items, *judged, strict=True):
            logs = [plain(opened, *split_tokens(opened.base.tokenizer, item.text, choice)) for choice in item.choices]
            per = [log / len(choice) for log, choice in zip(logs, item.choices, strict=True)]
            assert (right, normed) == (logs.index(max(logs)) == item.answer, per.index(max(per)) == item.answer)
        too_long = [*pairs, ([1] * 3000, [2])]
        with pytest.raises(UserError, match="a text of 3000 tokens is longer than the 2048 positions that the model knows"):
            log_likelihoods(opened.base, evaluation, too_long, batch_size=2)


def test_models_side_by_side(workshop: Path, tmp_path: Path) -> None:
    """A run, its base, and a verifier that takes +4 for 4 where the file does not."""
    needs_reasoning_gym()
    given = answer(workshop / "model", "w1x1", system=None, model=None, max_new_tokens=4)
    turns = [{"role": "user", "content": "w1x1"}, {"role": "assistant", "content": "4"}]
    entry = {"answer": given or "4", "metadata": {"source_dataset": "chain_sum"}}
    (tmp_path / "sums.jsonl").write_text(json.dumps({"messages": turns, "entry": entry, "task": "chain_sum"}) + "\n")
    names = ["base", str(workshop / "runs/a"), str(workshop / "model")]
    arguments = [str(workshop / "config.yaml"), f"data.eval=[{workshop}/up.eval.jsonl,{tmp_path}/sums.jsonl]"]
    more = ["--models", ",".join(names), "--choices", str(workshop / "which.jsonl"), "--choices", str(workshop / "asked.jsonl")]
    done = CliRunner().invoke(app, ["eval", *arguments, *more, "--json", str(tmp_path / "figures.json")])
    assert done.exit_code == 0, done.output
    models = json.loads((tmp_path / "figures.json").read_text())["models"]
    assert [(model["name"], model["what"]) for model in models] == list(zip(names, ["base", "checkpoint", "model"], strict=True))
    base, trained, whole = (model["tasks"] for model in models)
    assert base == whole
    assert base["up.eval"]["loss"] != trained["up.eval"]["loss"]
    assert set(base["up.eval"]) == {"samples", "loss", "exact"}
    assert (base["sums"]["exact"], base["sums"]["verified"]) == (0.0, 1.0 if given else 0.0)
    assert set(base["which"]) == {"samples", "acc", "acc_norm"}
    assert base["which"]["samples"] == 8
    shown = [line for line in done.output.splitlines() if "up.eval" in line]
    assert f"{base['up.eval']['loss']:.3f}" in shown[0]
    assert f"{trained['up.eval']['loss']:.3f}" in shown[0]
    alone = CliRunner().invoke(app, ["eval", str(workshop / "model"), "--choices", str(workshop / "which.jsonl"), "--json", "-"])
    assert json.loads(alone.stdout)["models"][0]["tasks"]["which"] == base["which"]


def test_adapters_alike_change_places_in_one_base_model(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRAs a and b are alike, and c has another rank; the figures are those of each alone."""
    base = LlamaForCausalLM.from_pretrained(workshop / "model")
    for number, (name, rank) in enumerate({"a": 2, "b": 2, "c": 3}.items()):
        torch.manual_seed(number)
        made = peft.get_peft_model(base, peft.LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        made.save_pretrained(tmp_path / name)
        base = made.unload()
    config = load_config(workshop / "config.yaml", [f"data.eval=[{workshop}/up.eval.jsonl]"], claim_output=False)
    names = [str(tmp_path / name) for name in ("a", "b", "c", "a")]
    with join_ranks() as ranks:
        alone = [compare(config, [name], Questions(), ranks)[0].tasks for name in names]
        opened: list[Path] = []
        monkeypatch.setattr(
            hecate.apps.answers.compare, "load_trained", lambda folder, *more: opened.append(folder) or load_trained(folder, *more)
        )
        together = compare(config, names, Questions(), ranks)
    assert [one.tasks for one in together] == alone
    assert [str(one.folder) for one in together] == names
    assert alone[0] != alone[1]
    assert [folder.name for folder in opened] == ["a", "c", "a"]


def test_a_rank_is_told_all_that_was_asked(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, which = str(workshop / "model"), str(workshop / "which.jsonl")
    request = EvaluationRequest(config=None, overrides=(), models=(model,), choices=(which,), json_path="-")
    main([request.as_text()])
    with answering(workshop / "model") as opened, opened.moe.engine.evaluation() as evaluation:
        acc, normed = accuracies(opened, evaluation, read_choices(Path(which)), batch_size=4)
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert found["tasks"]["which"] == {"samples": 8, "acc": sum(acc) / 8, "acc_norm": sum(normed) / 8}
    with pytest.raises(SystemExit):
        main([EvaluationRequest(config=None, overrides=(), models=(model,), choices=("no such file",)).as_text()])
    assert "data file no such file cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_share_the_work(workshop: Path, tmp_path: Path) -> None:
    """Two ranks, one of them with fewer questions: the figures of one process. A checkpoint is refused with the way out."""
    export(workshop / "runs/a", tmp_path / "adapter")
    arguments = ["eval", workshop / "config.yaml", "--models", f"base,{tmp_path}/adapter", "--choices", workshop / "which.jsonl"]
    figures = []
    for nproc in ("1", "2"):
        run(*arguments, "eval.max_samples=5", "--nproc", nproc, "--json", tmp_path / f"{nproc}.json")
        figures.append(json.loads((tmp_path / f"{nproc}.json").read_text())["models"])
    for one, two in zip(*figures, strict=True):
        assert one["tasks"].keys() == two["tasks"].keys() == {"up.eval", "echo.eval", "which"}
        for task, values in one["tasks"].items():
            assert two["tasks"][task] == pytest.approx(values, rel=1e-6), task
    refused = run("eval", workshop / "runs/a", "--nproc", "2", status=2)
    assert "checkpoint-2: a checkpoint is opened by one process\n  leave --nproc out" in refused.stderr
    shutil.copytree(workshop / "runs/a", tmp_path / "moved: run #2")  # no name for output_dir
    moved = run("eval", tmp_path / "moved: run #2", "--nproc", "2", status=2)
    assert "checkpoint-2: a checkpoint is opened by one process\n  leave --nproc out" in moved.stderr


def test_what_cannot_be_compared_is_refused(workshop: Path, tmp_path: Path) -> None:
    config, which, model = str(workshop / "config.yaml"), str(workshop / "which.jsonl"), str(tmp_path / "base")
    shutil.copytree(workshop / "model", model)
    for arguments, reason in (
        ([config, "--adapter", "a", "--models", "a,b"], "--adapter and --models were given"),
        ([config, "--task-folder", "x"], "--task-folder was given without --tasks"),
        ([config, "--apply-chat-template"], "--apply-chat-template was given without --tasks"),
        ([config, "--json", "no/such/x"], "--json no/such/x: there is no folder no/such; make it first"),
        ([config, "--choices", which, "--choices", which], "--choices: two files have the same name"),
        ([model], "not the folder of a run, nor one in it"),
        ([model, "seed=1", "--choices", which], "nothing that seed=1 could change"),
        ([model, "--models", "base", "--choices", which], "without a configuration there is no base model"),
        (
            # an evaluation reads neither the training data nor what the training began from
            [config, "data.eval=[]", "eval.generate=false", "data.train=gone.jsonl", "lora.init_from=gone"],
            "data.eval is empty\n  name held-out files, as in hecate eval runs/qwen data.eval=held_out.jsonl, or give --choices",
        ),
    ):
        done = CliRunner().invoke(app, ["eval", *arguments])
        assert reason in str(done.exception), (arguments, done.output)
    loaded = load_config(config, [f"output_dir={workshop}/runs/a"], claim_output=False)
    items = read_choices(workshop / "which.jsonl")
    with join_ranks() as ranks:
        for questions in (Questions({"up.eval": items}), Questions(lm_eval=LmEvalTasks(("up.eval",)))):
            with pytest.raises(UserError, match=r"up\.eval: two files or tasks have this name"):
                compare(loaded, ["base"], questions, ranks)


def test_tasks_need_lm_eval(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    done = CliRunner().invoke(app, ["eval", str(workshop / "model"), "--tasks", "arc_easy"])
    assert "--tasks needs lm-eval, which is not installed\n  pip install lm-eval" in str(done.exception)


TASKS = {
    "which": "output_type: multiple_choice\ndoc_to_text: '{{prompt.strip()}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "said": "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: x\n"
    "generation_kwargs: {until: ['q'], max_gen_toks: 4, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
    "text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{prompt}}'\nmetric_list: [{metric: bits_per_byte}]\n",
}


def test_tasks_of_lm_eval(workshop: Path, tmp_path: Path) -> None:
    """Choices are judged as --choices does, texts have the plain likelihood, and a whole model has the figures of lm-eval's own loader."""
    pytest.importorskip("lm_eval")
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {workshop}/which.jsonl}}}}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(head + text)
    with answering(workshop / "runs/a/checkpoint-2") as opened, opened.moe.engine.evaluation() as evaluation:
        found = lm_eval_figures(opened, evaluation, LmEvalTasks(tuple(TASKS), tmp_path), batch_size=3)
        items = read_choices(workshop / "which.jsonl")
        acc, normed = accuracies(opened, evaluation, items, batch_size=4)
        assert found["which"] == (8, {"acc": sum(acc) / 8, "acc_norm": sum(normed) / 8})
        ids = [opened.base.tokenizer(item.text)["input_ids"] for item in items]
        bits = -sum(plain(opened, [257], one) for one in ids) / sum(len(item.text.encode()) for item in items) / math.log(2)
        assert found["text"][1]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        assert found["said"] == (8, {"exact_match": 0.0})
        assert (
            lm_eval_figures(opened, evaluation, LmEvalTasks(("which",), tmp_path, chat_template=True), batch_size=3, limit=2)["which"][0]
            == 2
        )
        with pytest.raises(UserError, match=r"--tasks what: .* has no such task\n  it has said, text, which"):
            lm_eval_figures(opened, evaluation, LmEvalTasks(("what",), tmp_path), batch_size=1)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(workshop / "model"), "dtype": "float32"},
        tasks=list(TASKS),
        task_manager=manager,
        device="cpu",
        bootstrap_iters=0,
    )
    with answering(workshop / "model") as opened, opened.moe.engine.evaluation() as evaluation:
        for name, (_, figures) in lm_eval_figures(opened, evaluation, LmEvalTasks(tuple(TASKS), tmp_path), batch_size=3).items():
            assert figures == pytest.approx({key: theirs["results"][name][f"{key},none"] for key in figures}, rel=1e-5), name


def test_what_tasks_say_of_answers() -> None:
    assert _decoding({"until": "x", "do_sample": True, "top_p": 0.5}).temperature == 1.0
    assert _decoding({"temperature": 0.7, "do_sample": False}).temperature == 0.0
    assert _decoding({}).max_new_tokens == 256
    with pytest.raises(UserError, match="generation_kwargs have num_beams, which hecate does not know"):
        _decoding({"num_beams": 4})
