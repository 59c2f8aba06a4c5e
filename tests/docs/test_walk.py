"""The commands of the pages are run, one after another in one folder, on tiny random models and data in the place of the reader's.

What is not run is in NOT_RUN with its reason. test_blocks.py proves all of them without running any.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from testing.byte_tokenizer import build_byte_tokenizer
from testing.commands import run_hecate
from testing.tiny_run import write_samples
from tests.docs.blocks import CommandLine, all_blocks, all_commands
from tests.rooms import ROOT

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "Qwen3-1.7B": ("qwen3", {"head_dim": 16}),
    "SmolLM2-1.7B": ("llama", {}),
    "Qwen3-30B-A3B": ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}),
}
SMALL = [
    *("max_steps=4", "save_steps=2", "data.seq_len=128", "micro_batch_size=1"),
    *("gradient_accumulation_steps=1", "model.dtype=float32"),
]
OVER_LLAMA = "hecate train mixlora model.name_or_path=/models/SmolLM2-1.7B data.train=chats.jsonl output_dir=runs/mistral"
STORY = ("README.md", *(f"docs/use/{page}.md" for page in ("lora", "moe_lora", "adapters", "answers", "data", "report", "launch")))
"""the pages whose commands follow each other: a later page uses what those of an earlier one have left"""
ALONE = ("docs/use/doctor.md", "docs/use/topology.md")
SLOW = r"runs/many|runs/sixteen|^torchrun|^hecate launch"
"""what later blocks do not need, and other tests nearly repeat: blocks with such a command are slow tests"""
NOT_RUN = {
    r"^([A-Z_]+=\S+ )*(make|\.) ": "installs, or is what runs this test",
    r"^examples/|[A-Z]+=\S+ examples/|^hecate sweep SWEEP": "tests/examples/test_examples.py runs the examples, of which the sweep is one",
    r"--nnodes": "needs two nodes: tests/launch has them",
    r"--address": "needs a Ray cluster: tests/launch has one",
    r"^hecate status": "shows a run of a Ray cluster: tests/launch has one",
    r"^hecate federate|runs/lora_fair": "tests/hecate/federate runs rounds of recipes; test_blocks.py looks up each name in it",
    r"^hecate checkpoint": "tests/hecate/cli/test_checkpoints.py runs all three",
    r"^hecate drill": "takes minutes: tests/hecate/drill runs drills",
    r"^hecate replay-step": "needs a run that has stopped: tests/hecate/train/steps/test_skipped_steps.py has one",
    r"^hecate plan mixtral": "takes long without compiled loops: tests/hecate/apps/foresee plans such recipes",
    r"^hecate simulate": "takes a minute for 16 ranks; test_blocks.py looks up each name in it",
    r"^hecate eval .*--tasks": "needs lm-eval: tests/hecate/apps/answers/test_compare.py has it where it is installed",
    r"^data\.train=": "an argument alone: tests/hecate/data reads such a file",
}
CHANGED = {
    "/models/": "models/",
    "checkpoint-400": "checkpoint-2",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--ranks 8": "--ranks 2",
    "runs/quickstart": "runs/qwen",
    "runs/b/adapter": "runs/more/adapter",
    "CONFIG": "first.yaml",
    "data.train=...": "data.train=chats.jsonl",
    "model.name_or_path=...": "model.name_or_path=models/Qwen3-1.7B",
    "output_dir=...": "output_dir=runs/new",
}
"""what is other than on the page: sizes, and names of what the reader has"""


def reason(command: CommandLine) -> str:
    """Why it is not run; empty: it is."""
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command.text)), "")


def commands(pages: tuple[str, ...]) -> list[CommandLine]:
    found = [command for command in all_commands() if not command.in_sentence and not reason(command)]
    return sorted((one for one in found if page_of(one) in pages), key=lambda one: pages.index(page_of(one)))


def page_of(command: CommandLine) -> str:
    return command.place.partition(":")[0]


def blocks(found: list[CommandLine]) -> list[list[CommandLine]]:
    """Commands on lines that follow each other belong together."""
    together: list[list[CommandLine]] = []
    for command in found:
        page, _, line = command.place.partition(":")
        if together and together[-1][-1].place == f"{page}:{int(line) - 1}":
            together[-1].append(command)
        else:
            together.append([command])
    return together


def what_the_reader_has(tmp_path: Path) -> Path:
    """A folder with models, conversations, texts, questions."""
    for name, (kind, more) in MODELS.items():
        tokenizer = build_byte_tokenizer()
        torch.manual_seed(0)
        ends = {"vocab_size": len(tokenizer), "eos_token_id": 257, "bos_token_id": 256, "pad_token_id": 257, "tie_word_embeddings": True}
        config = AutoConfig.for_model(kind, **SIZES, **more, **ends)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "models" / name)
        tokenizer.save_pretrained(tmp_path / "models" / name)
    for name in ("chats", "more", "held_out", "a", "b"):
        write_samples(tmp_path / f"{name}.jsonl", [f"w{number}" for number in range(60)], str.upper)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"The number {i} is even or odd."}) + "\n" for i in range(80)))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in range(3)))
    (tmp_path / "arc.jsonl").write_text(json.dumps({"question": "w1", "choices": ["W1", "W2"], "answer": 0}) + "\n")
    config = "model: {name_or_path: models/Qwen3-1.7B}\ndata: {train: chats.jsonl}\noutput_dir: runs/first\n"
    (tmp_path / "first.yaml").write_text(config + "".join(f"{one.replace('=', ': ')}\n" for one in SMALL if "." not in one))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return what_the_reader_has(tmp_path)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands of all pages of the story are run, one block after another."""
    folder = what_the_reader_has(tmp_path_factory.mktemp("story"))
    assert not (told := problem(CommandLine("", OVER_LLAMA, False), folder)), told
    return folder


def problem(command: CommandLine, folder: Path) -> str:
    """Run a command. What went wrong, with what it printed; empty: nothing."""
    text = as_run(command, len(list(folder.glob("runs/*"))))
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1", "HECATE_CACHE": str(folder / "cache")}
    environment, said = os.environ | variables, "hello\n/exit\n"
    if text.startswith("hecate ") and "|" not in text:
        done = run_hecate(shlex.split(text, comments=True)[1:], folder=folder, environment=environment, given=said, timeout=300)
    else:
        text = re.sub(r"^torchrun ", f"{sys.executable} -m torch.distributed.run ", text)
        text = re.sub(r"(^|\| )hecate ", rf"\1{sys.executable} -m hecate ", text)
        done = subprocess.run(
            text, shell=True, cwd=folder, env=environment, input=said, capture_output=True, text=True, timeout=300, check=False
        )
    expected = {0, 1} if "doctor" in command.words else {0}  # the machine may lack something
    told = f"{command.place}: {command.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return "" if done.returncode in expected and "Traceback" not in done.stderr else told


def as_run(command: CommandLine, number: int) -> str:
    """The command with this test's files in the place of the reader's, and with few steps; a run without a name gets a number."""
    words = command.words
    if any(word in ("train", "launch") for word in words) and "resume=true" not in words:
        one_rank = page_of(command) in STORY[1:] and "launch" not in words  # enough after README's, and half the time
        words += [*SMALL, f"nproc={1 if one_rank else 2}"]
        words += [] if any(word.startswith("output_dir=") for word in words) else [f"output_dir=runs/{number}"]
    text = shlex.join(words).replace("'|'", "|")
    if page_of(command) == "docs/use/moe_lora.md":
        text = text.replace("model.name_or_path=...", "model.name_or_path=/models/Qwen3-30B-A3B")
    if page_of(command) == "docs/use/answers.md":
        text = text.replace("runs/a", "runs/qwen")
    for theirs, ours in CHANGED.items():
        text = text.replace(theirs, ours)
    return text


def test_every_command_is_run_or_has_a_reason() -> None:
    places = {command.place for command in commands((*STORY, *ALONE))}
    left = [one for one in all_commands() if not one.in_sentence and one.place not in places and not reason(one)]
    assert not left


def as_case(block: list[CommandLine]) -> Any:
    slow = any(re.search(SLOW, command.text) for command in block)
    return pytest.param(block, id=block[0].place, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("block", [as_case(block) for block in blocks(commands(STORY))])
def test_a_reader_walks_through_the_pages(block: list[CommandLine], walked: Path) -> None:
    """Blocks need what those before them have left."""
    problems = [problem(command, walked) for command in block]
    assert not any(problems), "\n\n".join(filter(None, problems))


def test_the_walk_has_left_what_the_pages_say(walked: Path) -> None:
    assert len((walked / "answers.jsonl").read_text().splitlines()) == 3
    assert (walked / "runs" / "upcycled" / "model").is_dir()


@pytest.mark.slow
def test_peft_loads_what_moe_loras_page_has_left(walked: Path) -> None:
    (block,) = (one for one in all_blocks() if one.page == "docs/use/moe_lora.md" and one.text.startswith("from peft"))
    program = f"from transformers import AutoModelForCausalLM\nbase = 'models/Qwen3-30B-A3B'\n{block.text}"
    subprocess.run([sys.executable, "-c", program], cwd=walked, check=True, timeout=300)


@pytest.mark.parametrize("command", commands(ALONE), ids=lambda command: command.place)
def test_a_command_runs_by_itself(command: CommandLine, folder: Path) -> None:
    if "machine.yaml" in command.text and "--out" not in command.text:
        (folder / "machine.yaml").write_text((ROOT / "configs" / "topologies" / "two-cpu-ranks.yaml").read_text())
    assert not (told := problem(command, folder)), told
