"""`adapter: lora`: the steps of PEFT's LoRA on any number of ranks, without a word of experts, through a resume and a lost rank."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from hecate.config import load_config
from hecate.parallel.planners.policies import auto
from hecate.ranks.sockets import tcp_sockets
from hecate.train.steps import step as step_module
from hecate.train.steps.step_totals import Totals, exchange_totals
from hecate.train.training import Training
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.elastic.losing import DEATH_STEP, Dead, regroup
from tests.hecate.train.command_line import run
from tests.hecate.train.in_process import ranks_of_default_group

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEXTS = ("one text", "another, longer text", "3", "the fourth of four")
STEPS, RATE, LIMIT = 5, 1e-2, 0.3
"""the last: of the norm of the gradients"""
OF_MIXTURES = re.compile(
    r"experts?\b|mixture|moe\b|router|routing|imbalance|static EP|policy|aux\b|load-balancing|replica|placement", re.IGNORECASE
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, four texts, and an adapter of PEFT whose A and B both differ from zero."""
    folder = make_workshop(tmp_path_factory.mktemp("workshop"))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(LINEARS), task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    model.peft_config["default"].base_model_name_or_path = str(folder / "model")
    model.save_pretrained(folder / "begin")
    return folder


def training(rank: int, world: int, workshop: Path, name: str, *overrides: str) -> Training:
    """Of all texts in each step, whatever the number of ranks."""
    given = {
        "model": f"{{name_or_path: {workshop}/model, dtype: float64}}",
        "data": f"{{train: {workshop}/texts.jsonl, seq_len: 32, packing: false}}",
        "output_dir": f"{workshop}/runs/{name}",
        "max_steps": "100",
        "num_train_epochs": "null",
        "micro_batch_size": "1",
        "gradient_accumulation_steps": "1",
        "gradient_checkpointing": "false",
        "learning_rate": str(RATE),
        "max_grad_norm": str(LIMIT),
        "lr_scheduler_type": "constant",
        "warmup_ratio": "0",
        "lora": f"{{r: 4, alpha: 8, dropout: 0, init_from: {workshop}/begin}}",
    }
    ranks = replace(ranks_of_default_group(rank, world), connections=frozenset(tcp_sockets()))
    config = load_config("lora", [*(f"{key}={value}" for key, value in given.items()), *overrides], claim_output=False)
    training = Training(config, ranks)
    training.parts.stream.sequences_per_step = len(TEXTS)
    training.plan_for(training.parts.moe.engine.shards.config.topology)
    return training


Step = tuple[float, float]
"""loss and norm of the gradients"""


def steps(training: Training, until: int = STEPS) -> list[Step]:
    done = []
    while training.run_state.step < until:
        result = training.train_one().result
        done.append((result.loss, result.grad_norm))
    return done


def trained(rank: int, world: int, workshop: Path, *overrides: str) -> list[Step]:
    return steps(training(rank, world, workshop, f"trained-{world}", *overrides))


def of_peft(workshop: Path) -> list[Step]:
    """The plain reference: PEFT's model and torch's AdamW, one text after the other."""
    tokenizer = AutoTokenizer.from_pretrained(workshop / "model")
    base = AutoModelForCausalLM.from_pretrained(workshop / "model", dtype=torch.float64)
    model = PeftModel.from_pretrained(base, workshop / "begin", is_trainable=True, autocast_adapter_dtype=False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    rows = [torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]) for text in TEXTS]
    labels = sum(row.shape[1] - 1 for row in rows)
    done = []
    for _ in range(STEPS):
        loss = sum(cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="sum") for row in rows) / labels
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, LIMIT)
        optimizer.step()
        done.append((float(loss.detach()), float(norm)))
    return done


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_steps_are_pefts_on_any_number_of_ranks(workshop: Path, world: int) -> None:
    wanted = of_peft(workshop)
    assert wanted[0][1] > LIMIT, "no gradient is clipped"
    for got in run_ranks(world, trained, workshop):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=1e-6, atol=0)


def _times_planned(rank: int, world: int, workshop: Path) -> tuple[int, int]:
    """How often two steps of plain LoRA, and two of a mixture, have layers planned."""
    config = load_config(workshop / "config.yaml", [f"output_dir={workshop}/runs/mixture"], claim_output=False)
    found = []
    for one in (training(rank, world, workshop, "unplanned"), Training(config, ranks_of_default_group(rank, world))):
        with mock.patch.object(auto, "_plan_layers", wraps=auto._plan_layers) as planned:
            steps(one, 2)
        found.append(planned.call_count)
    return found[0], found[1]


def test_nothing_is_planned(workshop: Path) -> None:
    for plain, mixture in run_ranks(2, _times_planned, workshop):
        assert (plain, mixture > 0) == (0, True)


def _saved(rank: int, world: int, workshop: Path) -> list[Step]:
    run = training(rank, world, workshop, "saved")
    done = steps(run, 3)
    run.save()
    return done


def _resumed(rank: int, world: int, workshop: Path) -> list[Step]:
    run = training(rank, world, workshop, "saved", "resume=true")
    assert run.run_state.step == 3
    return steps(run)


@pytest.mark.parametrize("world", [1, 3])
def test_a_run_is_resumed_on_other_ranks(workshop: Path, world: int) -> None:
    (before, _) = run_ranks(2, _saved, workshop)
    for after in run_ranks(world, _resumed, workshop):
        torch.testing.assert_close(torch.tensor([*before, *after]), torch.tensor(of_peft(workshop)), rtol=1e-6, atol=0)


def _lost(rank: int, world: int, workshop: Path) -> dict[int, Step]:
    """The steps of a run whose rank 1 dies when the norm of one is known, by their numbers."""
    run = training(rank, world, workshop, "lost", "fssdp.redundancy=1")
    done = dict(enumerate(steps(run, DEATH_STEP), 1))

    def fail(*shares: object) -> Totals:
        totals = exchange_totals(*shares)  # type: ignore[arg-type]
        if rank > 0:
            raise Dead if rank == 1 else RuntimeError("a peer is lost")
        return totals

    try:
        with mock.patch.object(step_module, "exchange_totals", fail):
            steps(run)
    except (Dead, RuntimeError):
        if rank == 1:
            run.ranks.leave()
            return {}
        regroup(run, f"{workshop}/lost-store", rank - (rank > 1), world - 1)
    resumed_at = run.run_state.step
    return done | dict(enumerate(steps(run), resumed_at + 1))


def test_the_others_go_on_after_a_lost_rank(workshop: Path) -> None:
    first, lost, third = run_ranks(3, _lost, workshop)
    assert lost == {}
    wanted = dict(enumerate(of_peft(workshop), 1))
    for got in (first, third):
        assert {1, 2, STEPS} <= got.keys()
        torch.testing.assert_close(torch.tensor([*got.values()]), torch.tensor([wanted[step] for step in got]), rtol=1e-6, atol=0)


def test_a_run_says_nothing_of_experts_and_leaves_an_adapter_of_peft(workshop: Path) -> None:
    folder = workshop / "runs" / "whole"
    given = [f"model.name_or_path={workshop}/model", f"data={{train: {workshop}/up.train.jsonl, eval: {workshop}/up.eval.jsonl}}"]
    given += [f"output_dir={folder}", "data.seq_len=64", "eval.on_start=true", "nproc=2", "model.dtype=float64"]
    done = run("train", "lora", *given, "num_train_epochs=null", "max_steps=3", "micro_batch_size=1", "gradient_accumulation_steps=1")
    again = run("train", folder, "resume=true", "max_steps=4").stdout
    assert re.search(r"loss before (→|->) after", again), (
        f"the table of a resumed run lacks what was measured before the first step\n{again}"
    )
    page = workshop / "page.html"
    run("report", folder, "-o", page)
    shown = re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    planned = run("plan", "lora", *given[:2], "data.seq_len=64", "--ranks", "2").stdout
    texts = {
        "output": done.stdout + done.stderr + again,
        "card": (folder / "adapter" / "README.md").read_text(),
        "page": shown,
        "plan": planned,
    }
    for name, text in texts.items():
        assert not (found := OF_MIXTURES.findall(text)), f"{name}: {found}\n{text}"
    assert "loss" in shown
    base = AutoModelForCausalLM.from_pretrained(workshop / "model", dtype=torch.float64)
    tokens = torch.arange(40)[None]
    before = base(tokens).logits
    after = PeftModel.from_pretrained(base, folder / "adapter", autocast_adapter_dtype=False)(tokens).logits
    assert float((after - before).abs().max()) > 1e-4
    run("export", folder, "--to", "merged", "-o", workshop / "merged")
    merged = AutoModelForCausalLM.from_pretrained(workshop / "merged", dtype=torch.float64)(tokens).logits
    torch.testing.assert_close(merged, after, rtol=1e-5, atol=1e-5)
