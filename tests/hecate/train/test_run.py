"""Whole runs of a tiny model through the command line: two ranks, checkpoints, a kill, a signal, and an adapter."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hecate.parallel.values.traces import load_trace
from hecate.train.first_answers import MOST_ANSWERS
from testing.byte_tokenizer import build_byte_tokenizer
from testing.tiny_run import STEPS
from tests.hecate.train.command_line import hecate, kill_rank_1_after, losses, records, run, train_arguments, workshop

__all__ = ["workshop"]  # a fixture


@pytest.fixture(scope="module")
def whole(workshop: Path) -> subprocess.CompletedProcess[str]:
    """The uninterrupted run."""
    return run(*train_arguments(workshop, "whole", "trace=true"))


def test_a_run_learns_and_leaves_everything_behind(workshop: Path, whole: subprocess.CompletedProcess[str]) -> None:
    folder = workshop / "runs" / "whole"
    steps = records(workshop, "whole", "step")
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.05  # six small steps from random weights; the quickstart shows real learning
    for record in steps:
        # Two assignments of every token, padding left out, in both layers.
        assert {layer: sum(load) for layer, load in record["loads"].items()} == {"0": 2 * record["tokens"], "1": 2 * record["tokens"]}
    trace = load_trace(folder / "loads")
    assert trace.loads.shape == (STEPS, 2, 3, 2)  # steps, layers, experts, ranks
    for step, loads_LED in zip(trace.steps, trace.loads, strict=True):
        assert {str(layer): loads_ED.sum(1).tolist() for layer, loads_ED in enumerate(loads_LED)} == steps[step - 1]["loads"]
    before, after = records(workshop, "whole", "eval")
    assert set(after["sources"]) == {"up.eval", "echo.eval"}
    assert all(after["sources"][name]["loss"] < before["sources"][name]["loss"] for name in after["sources"])
    assert (folder / "expert_load.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "config.yaml").is_file()
    report = json.loads((folder / "trainable.json").read_text(encoding="utf-8"))
    expert = 4 * (32 + 48) * 3
    assert report["by_owner"]["rank 0"]["parameters"] + report["by_owner"]["rank 1"]["parameters"] == 2 * 3 * expert
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert tensors["mixlora.layers.1.mlp.down_proj.experts.2.lora_B.weight"].shape == (32, 4)
    assert all(float(tensor.abs().max()) > 0 for name, tensor in tensors.items() if "lora_B" in name), "an expert did not train"
    assert "up.eval" in whole.stdout


def test_a_page_about_the_run_has_its_plan(workshop: Path, whole: subprocess.CompletedProcess[str]) -> None:
    page = workshop / "runs" / "whole.html"
    assert run("report", workshop / "runs" / "whole", "-o", page).stdout == f"{page}\n"
    text = page.read_text(encoding="utf-8")
    assert f"{STEPS} of {STEPS}, finished" in text
    assert "The mark is what `hecate plan` predicts." in text
    assert f"answer after step 0</th><th>answer after step {STEPS}</th>" in text
    before, after = records(workshop, "whole", "eval")
    shown = [(name, one) for record in (before, after) for name, source in record["sources"].items() for one in source["answers"]]
    assert [name for name, _ in shown] == [name for _ in range(2) for name in ("up.eval", "echo.eval") for _ in range(MOST_ANSWERS)]
    assert all(escape(one[part]) in text for _, one in shown for part in ("prompt", "expected", "answer"))
    for name in ("up.eval", "echo.eval"):
        lines = (workshop / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:MOST_ANSWERS]
        asked = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
        for (question, answer), one in zip(asked, after["sources"][name]["answers"], strict=True):
            assert question in one["prompt"]
            assert answer == one["expected"]
    last = records(workshop, "whole", "step")[-1]
    assert f">{last['epoch']:.2f} of {last['epoch_samples']} samples<" in text
    assert f"epochs             {last['epoch']:.2f} of {last['epoch_samples']} samples" in whole.stdout
    assert f"step {STEPS}/{STEPS}  epoch {last['epoch']:.2f}  loss" in whole.stdout
    assert "not recorded" not in text


def test_a_killed_run_continues_bit_for_bit(workshop: Path, whole: subprocess.CompletedProcess[str]) -> None:
    """SIGKILL of one rank between two checkpoints; the launcher ends the other; resume gives the losses of the uninterrupted run."""
    arguments = train_arguments(workshop, "killed", "save_steps=2", "eval.on_start=false", "trace=true")
    errors = kill_rank_1_after("step 3/", arguments)
    assert "rank 1 of 2 was killed by SIGKILL" in errors
    assert "Traceback" not in errors.split("rank 1 of 2")[-1]
    assert (workshop / "runs/killed/checkpoint-2/COMMIT").is_file()
    run(*arguments, "resume=true")
    assert losses(workshop, "killed") == losses(workshop, "whole")
    assert records(workshop, "killed", "eval")[-1] == records(workshop, "whole", "eval")[-1], "the answers, too"
    epochs = [[record["epoch"] for record in records(workshop, name, "step")] for name in ("killed", "whole")]
    assert epochs[0] == epochs[1]
    again, once = (load_trace(workshop / "runs" / name / "loads") for name in ("killed", "whole"))
    assert again.steps == once.steps == tuple(range(1, STEPS + 1))
    assert (again.loads == once.loads).all()
    ours = load_file(workshop / "runs/killed/adapter/adapter_model.safetensors")
    theirs = load_file(workshop / "runs/whole/adapter/adapter_model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(workshop: Path, whole: subprocess.CompletedProcess[str]) -> None:
    arguments = train_arguments(workshop, "early", "eval.on_start=false", "trace=true")
    kill_rank_1_after("step 2/", arguments)
    shutil.rmtree(workshop / "runs/early/checkpoint-6", ignore_errors=True)  # the kill may have come that late
    shutil.rmtree(workshop / "runs/early/adapter", ignore_errors=True)
    printed = run(*arguments, "resume=true").stdout
    assert "was stopped before its first checkpoint: it begins again" in printed
    assert losses(workshop, "early") == losses(workshop, "whole")


@pytest.mark.slow
def test_a_run_that_resharded_continues_bit_for_bit(workshop: Path) -> None:
    """At first rank 0 owns two of each layer's three experts. On devices this slow it pays to share all six evenly, which is done after
    step 2; checkpoint 3 holds the new owners; a kill after step 4, and resume goes on from it as if nothing had happened."""
    slow = workshop / "slow.yaml"
    slow.write_text("nodes: [{devices: 2, flops: 1e6, memory: 1e9}]\nintra_node: {bandwidth: 1e9, latency: 1e-6}\n", encoding="utf-8")
    overrides = ["fssdp.policy=static_ep", "fssdp.reshard_interval=2", f"topology={slow}", "data.eval=[]", "eval.generate=false"]
    printed = run(*train_arguments(workshop, "resharded", *overrides)).stdout
    errors = kill_rank_1_after("step 4/", train_arguments(workshop, "reshard-killed", *overrides, "save_steps=3"))
    assert "rank 1 of 2 was killed by SIGKILL" in errors
    assert (workshop / "runs/reshard-killed/checkpoint-3/COMMIT").is_file()
    shutil.rmtree(workshop / "runs/reshard-killed/checkpoint-6", ignore_errors=True)  # the kill may have come that late
    resumed = run(*train_arguments(workshop, "reshard-killed", *overrides, "save_steps=3", "resume=true")).stdout
    assert "resumed after step 3" in resumed
    assert losses(workshop, "reshard-killed") == losses(workshop, "resharded")
    ours = load_file(workshop / "runs/reshard-killed/adapter/adapter_model.safetensors")
    theirs = load_file(workshop / "runs/resharded/adapter/adapter_model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    moves = [records(workshop, name, "reshard") for name in ("resharded", "reshard-killed")]
    first = moves[0][0]
    assert first["step"] == 2
    assert f"re-sharded after step 2: {first['experts']} experts moved" in printed
    # Master and two moments in fp32 of 4 x (32 + 48) elements in three projections, and a count of steps.
    assert first["bytes_sent"] == first["experts"] * (3 * 4 * 3 * 4 * (32 + 48) + 4)
    assert [{**record, "seconds": 0} for record in moves[1]] == [{**record, "seconds": 0} for record in moves[0]]
    by_owner = json.loads((workshop / "runs/reshard-killed/trainable.json").read_text(encoding="utf-8"))["by_owner"]
    assert by_owner["rank 0"]["parameters"] == by_owner["rank 1"]["parameters"] == 3 * 3 * 4 * (32 + 48)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_stops(workshop: Path, number: signal.Signals) -> None:
    name = f"stopped-{number.name}"
    arguments = train_arguments(workshop, name, "max_steps=5000", "eval.on_start=false", "trace=true")
    with subprocess.Popen(hecate(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 2/"):
                break
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 128 + number, rest
    saved = [int(path.name.partition("-")[2]) for path in (workshop / "runs" / name).glob("checkpoint-*")]
    assert len(saved) == 1
    assert saved[0] == records(workshop, name, "step")[-1]["step"] == load_trace(workshop / "runs" / name / "loads").steps[-1]
    assert "resume=true" in rest


@pytest.mark.slow
def test_the_same_training_on_one_rank_and_under_every_policy(workshop: Path, whole: subprocess.CompletedProcess[str]) -> None:
    """Same global batches, same losses within rounding, whatever the number of ranks or the policy."""
    for name, overrides in {
        "one": ["nproc=1", "micro_batch_size=4"],
        "three": ["nproc=3", "micro_batch_size=2", "gradient_accumulation_steps=2", "max_steps=2"],
        "static": ["fssdp.policy=static_ep"],
        "full": ["fssdp.policy=full", "gradient_checkpointing=true"],
    }.items():
        run(*train_arguments(workshop, name, *overrides, "eval.on_start=false", "eval.generate=false", "data.eval=[]"))
        if name == "three":  # another global batch: it only has to run
            continue
        # The output tensors of one rank's and of two ranks' sums differ in their order of adding.
        assert torch.tensor(losses(workshop, name)).sub(torch.tensor(losses(workshop, "whole"))).abs().max() < 2e-4, name


@pytest.mark.slow
def test_torchrun_uses_the_ranks_it_is_given(workshop: Path, whole: subprocess.CompletedProcess[str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hecate"]
    arguments = train_arguments(workshop, "torchrun", "eval.on_start=false")
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(workshop, "torchrun") == losses(workshop, "whole")


def test_an_adapter_answers_and_is_evaluated(workshop: Path, whole: subprocess.CompletedProcess[str]) -> None:
    adapter = workshop / "runs/whole/adapter"
    assert run("generate", adapter, "w1x1", "--max-new-tokens", 3).stdout.strip() != ""
    shown = run("eval", workshop / "config.yaml", "--adapter", adapter).stdout
    after = records(workshop, "whole", "eval")[-1]["sources"]
    for name, score in after.items():
        line = next(line for line in shown.splitlines() if name in line)
        assert f"{score['loss']:.3f}" in line


BAD_RUNS: dict[str, tuple[list[str], str]] = {
    "run folder that exists": (["output_dir={workshop}/model"], "exists and is not empty"),
    "unknown key": (["learning_rat=1"], "learning_rate"),
    "a top_k above the number of experts": (["moe.top_k=4"], "top_k"),
    "no such model": (["model.name_or_path={workshop}/nowhere"], "nowhere"),
    "unsupported model": (["model.name_or_path={workshop}/gpt2"], "unsupported architecture"),
    "broken line": (["data.train={workshop}/broken.jsonl"], "broken.jsonl:2"),
    "token beyond the vocabulary": (["model.name_or_path={workshop}/small"], "vocabulary"),
    "empty data": (["data.train={workshop}/empty.jsonl"], "empty.jsonl"),
    "no such target": (["lora.target_modules=[gate_proj,w_proj]"], "w_proj"),
    "nothing to resume": (["resume=true"], "no checkpoint"),
    "no such preset": (["topology=nowhere"], "topology: no such preset: nowhere"),
}


@pytest.fixture(scope="module")
def bad_inputs(workshop: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = build_byte_tokenizer()
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer))).save_pretrained(workshop / "gpt2")
    small = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=100)
    LlamaForCausalLM(small).save_pretrained(workshop / "small")
    for name in ("gpt2", "small"):
        tokenizer.save_pretrained(workshop / name)
    good = (workshop / "up.train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (workshop / "broken.jsonl").write_text(good[0] + '{"messages": [\n' + good[1], encoding="utf-8")
    (workshop / "empty.jsonl").write_text("", encoding="utf-8")
    return workshop


SLOW_RUNS = (
    "unsupported model",
    "token beyond the vocabulary",
    "no such target",
    "nothing to resume",
    "no such preset",
)
"""those that others nearly repeat, and what only ranks that have started can find"""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_RUNS else ()) for name in BAD_RUNS])
def test_a_mistake_is_a_short_text_and_no_traceback(bad_inputs: Path, name: str) -> None:
    overrides, wanted = BAD_RUNS[name]
    given = [override.format(workshop=bad_inputs) for override in overrides]
    where = [] if any(g.startswith("output_dir") for g in given) else [f"output_dir={bad_inputs}/runs/bad-{name.replace(' ', '-')}"]
    done = run("train", bad_inputs / "config.yaml", *where, *given, status=2)
    assert wanted in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 8, done.stderr


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "numpy", "omegaconf"}
    code = (
        "import atexit, sys; sys.argv = ['hecate', '--help']\n"
        f"atexit.register(lambda: print(sorted({heavy} & set(sys.modules))))\n"
        "from hecate.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert done.stdout.strip().endswith("[]")
