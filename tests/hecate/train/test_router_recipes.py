"""Recipes whose routers are not the usual ones, as whole runs: trained, evaluated, written, and used again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from hecate.adapters.format_table import read_adapter
from hecate.adapters.formats.linears import FORMAT, LinearsDescription
from hecate.adapters.formats.lora import with_loras
from hecate.adapters.mixlora.description import load_mixlora
from hecate.config import Config, load_config
from hecate.errors import UserError
from hecate.model.base import BaseChoice
from hecate.ranks.ranks import connect, join_ranks
from hecate.ranks.sockets import tcp_sockets
from hecate.report.events import Evaluation
from hecate.train.steps import step as step_module
from hecate.train.steps.step_totals import Totals, exchange_totals
from hecate.train.training import Training
from testing.answering import answer, evaluate_trained
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.elastic.losing import DEATH_STEP, Dead, regroup
from tests.hecate.train.in_process import ranks_of_default_group

SEQUENCES = 8
"""of a step, whatever the number of ranks"""


OVERRIDES: dict[str, tuple[str, dict[str, str]]] = {
    "llava_mole": ("llava_mole", {}),
    "many_adapters": ("adapters", {"moe.num_experts": "2"}),
    "many_linears": (
        "adapters",
        {"moe.num_experts": "2", "moe.unit": "linear", "lora.target_modules": "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"},
    ),
    "smora": ("smora", {"lora.r": "1", "moe.num_experts": "16", "moe.top_k": "4", "moe.router.bias_rate": "0.01"}),
}
"""recipes by the names that runs have here, and what is changed for a tiny model"""


def config_of(workshop: str, recipe: str, name: str, *overrides: str) -> Config:
    tasks, (file, changed) = ("up", "echo"), OVERRIDES[recipe]
    given = {
        "model": f"{{name_or_path: {workshop}/model, dtype: float64}}",
        "data.train": "[" + ",".join(f"{{path: {workshop}/{task}.train.jsonl, name: {task}}}" for task in tasks) + "]",
        "data.eval": "[" + ",".join(f"{{path: {workshop}/{task}.eval.jsonl, name: {task}}}" for task in reversed(tasks)) + "]",
        "output_dir": f"{workshop}/runs/{name}",
        "data.seq_len": "64",
        "learning_rate": "1e-2",
        "warmup_ratio": "0",
        "micro_batch_size": "1",
        "gradient_accumulation_steps": "2",
        "lora.r": "4",
        "lora.alpha": "8",
        "eval": "{generate: true, max_new_tokens: 4, batch_size: 4}",
        "fssdp.policy": "hecate_paper",
        **changed,
    }
    return load_config(file, [*(f"{key}={value}" for key, value in given.items()), *overrides], claim_output=False)


def training(rank: int, world: int, workshop: str, recipe: str, name: str, *overrides: str) -> Training:
    ranks = replace(ranks_of_default_group(rank, world), connections=frozenset(tcp_sockets()))
    run = Training(config_of(workshop, recipe, name, *overrides), ranks)
    run.parts.stream.sequences_per_step = SEQUENCES
    run.plan_for(run.parts.moe.engine.shards.config.topology)
    return run


def tensors(run: Training) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.parts.optimizer.state_tensors().items()}


def whole(rank: int, world: int, workshop: str, recipe: str, steps: int) -> tuple[Evaluation, list[float], dict[str, torch.Tensor]]:
    """Trains to the end, with a checkpoint after two steps."""
    run = training(rank, world, workshop, recipe, f"{recipe}-{world}")
    losses = []
    while run.run_state.step < steps:
        losses.append(run.train_one().result.loss)
        if run.run_state.step == 2:
            run.save()
    evaluation = run.evaluate()
    run.parts.output.replace(Path(run.parts.config.output_dir), run.parts.moe, run.ranks)
    return evaluation, losses, tensors(run)


def resumed(rank: int, world: int, workshop: str, recipe: str, of_world: int, steps: int) -> dict[str, torch.Tensor]:
    run = training(rank, world, workshop, recipe, f"{recipe}-{of_world}", "resume=true")
    assert run.run_state.step == 2
    while run.run_state.step < steps:
        run.train_one()
    return tensors(run)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workshop(tmp_path_factory.mktemp("workshop")))


@pytest.fixture(scope="module")
def many(workshop: str) -> Evaluation:
    """What a run of `many_adapters` on two ranks has found out last; its folder is runs/many_adapters-2."""
    return run_ranks(2, whole, workshop, "many_adapters", 2)[0][0]


@pytest.fixture(scope="module")
def many_linears(workshop: str) -> Evaluation:
    """The same over all linears."""
    return run_ranks(2, whole, workshop, "many_linears", 2)[0][0]


def logits_of_ours(folders: list[Path]) -> torch.Tensor:
    with join_ranks() as ranks:
        base, moe = with_loras([read_adapter(folder) for folder in folders], ranks, BaseChoice(dtype="float64"))
        with moe.engine.evaluation(), torch.no_grad():
            ids = torch.arange(40, 70)[None]
            return base.head.logits(base.head.hidden(ids, None, torch.arange(30)[None]))


@pytest.mark.parametrize("run", ["many_adapters", "many_linears"])
def test_each_source_leaves_an_ordinary_adapter_that_peft_reads(
    workshop: str, many: Evaluation, many_linears: Evaluation, run: str
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    folder = Path(workshop) / "runs" / f"{run}-2" / "adapters"
    assert sorted(path.name for path in folder.iterdir()) == ["echo", "up"]
    logits = {}
    for source in ("up", "echo"):
        base: Any = AutoModelForCausalLM.from_pretrained(f"{workshop}/model", dtype=torch.float64)
        with torch.no_grad():
            plain = base(input_ids=torch.arange(40, 70)[None]).logits
            logits[source] = peft.PeftModel.from_pretrained(base, folder / source).eval()(input_ids=torch.arange(40, 70)[None]).logits
        assert float((logits[source] - plain).abs().max()) > 1e-4, "the adapter does nothing"
        torch.testing.assert_close(logits_of_ours([folder / source]), logits[source], rtol=1e-6, atol=1e-6)
    assert float((logits["up"] - logits["echo"]).abs().max()) > 1e-4
    held = load_file(folder / "up" / "adapter_model.safetensors")
    assert any("self_attn.q_proj" in name for name in held) == (run == "many_linears")


def test_a_source_is_evaluated_with_its_own_adapter(workshop: str, many: Evaluation, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(many.scores) == ["echo", "up"]
    for source, expert in (("up", 0), ("echo", 1)):
        for counts in many.loads[source].values():
            assert [count > 0 for count in counts] == [number == expert for number in (0, 1)]
    config = config_of(workshop, "many_adapters", "many_adapters-2")
    evaluate_trained(config, Path(config.output_dir) / config.moe.output_folder)
    shown = capsys.readouterr().out
    for score in many.scores.values():
        assert f"{score.loss:.3f}" in shown
        assert f"{score.accuracy:.3f}" in shown


def test_one_adapter_answers_and_several_ask_which(workshop: str, many: Evaluation, tmp_path: Path) -> None:
    folder = Path(workshop) / "runs" / "many_adapters-2" / "adapters"
    assert isinstance(answer(folder / "up", "w1x1", system=None, model=None, max_new_tokens=4), str)
    with pytest.raises(UserError, match=r"adapters: holds the adapters of several sources: echo, up\n  name one: .*/echo"):
        answer(folder, "w1x1", system=None, model=None, max_new_tokens=4)
    other = tmp_path / "other"
    shutil.copytree(folder / "up", other)
    description = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**description, "r": 2}))
    with pytest.raises(UserError, match=r"lora_A\.weight has the shape \[4, 48\] and its B \[32, 4\], but its rank is 2"):
        answer(other, "w1x1", system=None, model=None, max_new_tokens=4)
    tensors = load_file(other / "adapter_model.safetensors")
    halves = {name: tensor[:2] if "lora_A" in name else tensor[:, :2] for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in halves.items()}, other / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"other: r is 2, but 4 in .*\n  adapters are used together only if they are alike"):
        logits_of_ours([folder / "up", other])
    (other / "adapter_config.json").write_text(json.dumps({**description, "r": 2, "target_modules": ["gate_proj", "qkv"]}))
    with pytest.raises(UserError, match="adapts qkv, which is no linear of the base model's decoder layers: q_proj, "):
        answer(other, "w1x1", system=None, model=None, max_new_tokens=4)
    (other / "adapter_config.json").write_text(json.dumps(description))
    held, name = tensors, next(name for name in tensors if "lora_A" in name)
    extra = {"extra.lora_A.weight": held[name], "extra.lora_B.weight": held[name.replace("lora_A", "lora_B")]}
    save_file({**held, **{other_name: one.clone() for other_name, one in extra.items()}}, other / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"the tensor extra.lora_A.weight \(2 such\) belongs to no weight that the adapter is for"):
        answer(other, "w1x1", system=None, model=None, max_new_tokens=4)
    save_file({other_name: one for other_name, one in held.items() if other_name != name}, other / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"has no tensor {name}"):
        answer(other, "w1x1", system=None, model=None, max_new_tokens=4)


def test_an_adapter_of_a_learned_bias_comes_back(workshop: str) -> None:
    """LLaVA-MoLE's recipe: router and bias are those of the run, and routing as in training is what the adapter says."""
    (_, losses, trained), *_ = run_ranks(1, whole, workshop, "llava_mole", 1)
    assert losses
    folder = Path(workshop) / "runs" / "llava_mole-1" / "adapter"
    held, description = load_mixlora(folder)
    assert (description.router.weights, description.router.bias, description.router_buffers) == ("one", "learned", ("bias",))
    for layer in (0, 1):
        bias = trained[f"replicated/layers.{layer}.router.bias"]
        assert bias.any(), "the bias has not moved"
        torch.testing.assert_close(held[f"mixlora.layers.{layer}.mlp.moe_gate.bias"], bias.float())
    assert isinstance(answer(folder, "w1x1", system=None, model=None, max_new_tokens=4), str)


def test_smora_leaves_its_bias_and_says_how_it_is_used(workshop: str) -> None:
    """A run of single ranks as experts: routed by as many as configured, evened out by a bias that every rank moves alike, read back."""
    found = run_ranks(2, whole, workshop, "smora", 2)
    (evaluation, losses, _), *_ = found
    assert losses
    assert all(sum(counts) % 4 == 0 and len(counts) == 16 for counts in evaluation.loads["up"].values())
    folder = Path(workshop) / "runs" / "smora-2" / "adapter"
    read = FORMAT.read(folder)
    held, description = read.tensors, read.description
    assert isinstance(description, LinearsDescription)
    assert description.router == config_of(workshop, "smora", "smora-2").moe.router
    assert (description.r, description.alpha, description.top_k) == (1, 8, 4)
    biases = {name: tensor for name, tensor in held.items() if name.endswith("router.router.bias")}
    assert len(biases) == 2 * 7
    for name, tensor in biases.items():
        moves = tensor / 0.01
        torch.testing.assert_close(moves, moves.round(), rtol=0, atol=1e-4)
        assert float(moves.abs().max()) <= 2, name
    assert any(tensor.any() for tensor in biases.values()), "no bias has moved"
    assert isinstance(answer(folder, "w1x1", system=None, model=None, max_new_tokens=4), str)


def half_stepped(rank: int, world: int, workshop: str, steps: int) -> dict[str, torch.Tensor]:
    """Rank 1 dies with the norms of a step, which rank 0 has taken and the others have not: they take it after it, by the same norms."""
    run = training(rank, world, workshop, "many_adapters", "half", "fssdp.redundancy=1", "max_grad_norm=0.01")
    while run.run_state.step < DEATH_STEP:
        run.train_one()

    def fail(*shares: Any) -> Totals:
        totals = exchange_totals(*shares)
        if rank > 0:
            raise Dead if rank == 1 else RuntimeError("a peer is lost")
        return totals

    try:
        with mock.patch.object(step_module, "exchange_totals", fail):
            while run.run_state.step < steps:
                run.train_one()
    except (Dead, RuntimeError):
        if rank == 1:
            run.ranks.leave()
            return {}
        regroup(run, f"{workshop}/half-store", rank - (rank > 1), world - 1)
    while run.run_state.step < steps:
        run.train_one()
    return tensors(run)


def grown(rank: int, world: int, workshop: str, steps: int) -> dict[str, torch.Tensor]:
    """A third rank, which has loaded alone, joins two that have trained two steps; there is nothing that all ranks hold alike."""
    ranks_of_default_group(rank, world).leave()
    if rank == 2:
        connect(dist.HashStore(), 0, 1)
        run = training(0, 1, workshop, "many_adapters", "grown", "max_grad_norm=0.01")
        run.state = None
    else:
        connect(dist.FileStore(f"{workshop}/grown-two", 2), rank, 2)
        run = training(rank, 2, workshop, "many_adapters", "grown", "max_grad_norm=0.01")
        while run.run_state.step < 2:
            run.train_one()
    regroup(run, f"{workshop}/grown-three", (rank + 1) % 3, 3)
    while run.run_state.step < steps:
        run.train_one()
    return tensors(run)


def undisturbed(rank: int, world: int, workshop: str, steps: int) -> dict[str, torch.Tensor]:
    run = training(rank, world, workshop, "many_adapters", "undisturbed", "max_grad_norm=0.01")
    while run.run_state.step < steps:
        run.train_one()
    return tensors(run)


@pytest.mark.slow
def test_ranks_may_be_lost_and_come_new(workshop: str) -> None:
    steps = DEATH_STEP + 2
    (wanted,) = run_ranks(1, undisturbed, workshop, steps)
    for world, function in ((3, half_stepped), (3, grown)):
        got: dict[str, torch.Tensor] = {}
        for of_rank in run_ranks(world, function, workshop, steps):
            got |= of_rank
        assert got.keys() == wanted.keys()
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-10, msg=f"{name}, {function.__name__}")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OVERRIDES)
def test_a_run_is_the_same_on_any_ranks_and_resumed_on_others(workshop: str, recipe: str) -> None:
    steps = 4
    wanted: dict[str, torch.Tensor] = {}
    for of_rank in run_ranks(2, whole, workshop, recipe, steps):
        wanted |= of_rank[2]
    found: dict[int, dict[str, torch.Tensor]] = {}
    for world in (1, 3, 4):
        found[world] = {}
        for of_rank in run_ranks(world, whole, workshop, recipe, steps):
            found[world] |= of_rank[2]
    for world in (1, 4):
        found[10 + world] = {}
        for of_rank in run_ranks(world, resumed, workshop, recipe, 2, steps):
            found[10 + world] |= of_rank
    for world, got in found.items():
        assert got.keys() == wanted.keys()
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-10, msg=f"{name} on {world}")


NOTES = {
    "moe.top_k=2": "",
    "moe.top_k=1": "only the load-balancing loss trains the routers",
    "moe.top_k=1 moe.router_aux_loss_coef=0": "nothing trains the routers",
    "moe.top_k=1 moe.router.weights=gate": "",
    "moe.top_k=1 moe.num_experts=1": "",
}
"""settings -> what the user is told of the routers"""


def notes_and_routers_moved(rank: int, world: int, workshop: str) -> list[tuple[list[str], bool]]:
    """For each of these settings: what is said at the start, and whether the loss of the text has trained a router in a step."""
    found = []
    for number, settings in enumerate(NOTES):
        given = [*settings.split(), "moe.unit=linear", "data.eval=[]", "eval.generate=false", f"output_dir={workshop}/runs/notes-{number}"]
        run = Training(load_config(f"{workshop}/config.yaml", given, claim_output=False), ranks_of_default_group(rank, world))
        routers = [layer.router for layer in run.parts.moe.layers.values()]
        before = [[one.clone() for one in router.parameters()] for router in routers]
        run.train_one()
        after = [list(router.parameters()) for router in routers]
        moved = any(not torch.equal(one, was) for held, old in zip(after, before, strict=True) for one, was in zip(held, old, strict=True))
        found.append((run.notes, moved))
    return found


def test_a_run_says_that_the_text_trains_no_router(tmp_path: Path) -> None:
    (found,) = run_ranks(1, notes_and_routers_moved, str(make_workshop(tmp_path)))
    for (settings, wanted), (notes, moved) in zip(NOTES.items(), found, strict=True):
        said = [note for note in notes if "routers" in note]
        assert len(said) == bool(wanted), settings
        assert wanted in "".join(said), settings
        assert moved == ("nothing" not in wanted and "num_experts=1" not in settings), settings
