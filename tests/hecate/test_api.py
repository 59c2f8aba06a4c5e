"""Training as a function: it does what `hecate train` does, its callbacks are heard, and its loss is what is trained for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hecate.api import Callback, Result, train
from hecate.apps.answers.opened import open_trained
from hecate.config import load_config
from hecate.errors import UserError
from hecate.model.base import BaseChoice
from hecate.ranks.ranks import join_ranks
from hecate.report.events import Evaluation, StepEvent
from hecate.train.caller import Caller
from testing.ranks import run_ranks
from testing.tiny_run import make_workshop
from tests.hecate.plain_losses import focal
from tests.hecate.train.in_process import train_until
from tests.rooms import ROOT

PLAIN = ("model.dtype=float64", "eval.generate=false", "fssdp.policy=hecate_paper")


class Heard(Callback):
    """Keeps what it is told, and asks for a stop where `stop_at` says."""

    def __init__(self, stop_at: str = "") -> None:
        self.told: list[str] = []
        self.results: list[Result] = []
        self.stop_at = stop_at

    def _hear(self, what: str) -> str | None:
        self.told.append(what)
        return "stop" if what == self.stop_at else None

    def on_step(self, event: StepEvent) -> str | None:  # type: ignore[override]
        return self._hear(f"step {event.step}")

    def on_evaluate(self, step: int, evaluation: Evaluation) -> str | None:  # type: ignore[override]
        return self._hear(f"evaluate {step} {sorted(evaluation.scores)}")

    def on_save(self, step: int, folder: Path) -> str | None:  # type: ignore[override]
        assert (folder / "manifest.json").exists()
        return self._hear(f"save {step}")

    def on_end(self, result: Result) -> None:
        self.results.append(result)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def whole(workshop: Path) -> tuple[Result, Heard]:
    heard = Heard()
    return train(workshop / "config.yaml", [*PLAIN, f"output_dir={workshop}/runs/whole"], callbacks=[heard]), heard


def test_it_trains_as_a_rank_that_a_launcher_starts(workshop: Path, whole: tuple[Result, Heard]) -> None:
    result, _ = whole
    more = ("micro_batch_size=2", "moe.num_experts=3", "eval.on_start=true")
    (launched,) = run_ranks(1, train_until, str(workshop), "launched", 6, (*PLAIN, *more))
    assert result.losses == dict(enumerate((loss for loss, _, _ in launched), 1))
    assert result.finished
    assert result.step == 6


def test_the_result_has_scores_and_the_adapter(workshop: Path, whole: tuple[Result, Heard]) -> None:
    result, _ = whole
    records = [json.loads(line) for line in (workshop / "runs/whole/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {one["step"]: one["loss"] for one in records if one["kind"] == "step"} == result.losses
    assert set(result.evaluations) == {0, 6}
    assert set(result.evaluations[6]) == {"up.eval", "echo.eval"}
    assert result.evaluations[6]["up.eval"].loss < result.evaluations[0]["up.eval"].loss
    assert result.output == workshop / "runs/whole/adapter"
    assert (result.output / "adapter_model.safetensors").exists()


def test_the_model_of_the_result_is_that_of_its_adapter(workshop: Path, whole: tuple[Result, Heard]) -> None:
    result, _ = whole
    ids = torch.arange(40, 60)[None]
    assert result.model is not None
    assert result.output is not None
    with torch.no_grad():
        ours = result.model(input_ids=ids).logits
        answer = result.model.generate(ids, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
        with join_ranks() as ranks:
            opened = open_trained(result.output, ranks, BaseChoice(dtype="float64"))
            with opened.moe.engine.evaluation():
                model = opened.base.model
                assert torch.allclose(model(input_ids=ids).logits, ours, atol=1e-4)  # the adapter's file is in float32
                assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), answer)  # type: ignore[operator]


def test_callbacks_are_told_in_order(whole: tuple[Result, Heard]) -> None:
    result, heard = whole
    both = "['echo.eval', 'up.eval']"
    assert heard.told == [f"evaluate 0 {both}", *(f"step {step}" for step in range(1, 7)), "save 6", f"evaluate 6 {both}"]
    assert heard.results == [result]


@pytest.mark.parametrize(
    ("stop_at", "keys"),
    [
        ("step 2", ()),
        ("save 2", ("save_steps=2",)),
        ("save 2", ("save_steps=2", "save_async=false")),
        ("evaluate 2 ['echo.eval', 'up.eval']", ("eval_steps=2",)),
    ],
)
def test_a_callback_stops_the_run_after_the_step_and_it_goes_on_exactly(
    workshop: Path, tmp_path: Path, whole: tuple[Result, Heard], stop_at: str, keys: tuple[str, ...]
) -> None:
    heard = Heard(stop_at)
    given = [*PLAIN, f"output_dir={tmp_path}/run", *keys]
    stopped = train(workshop / "config.yaml", given, callbacks=[heard])
    assert not stopped.finished
    assert stopped.output is None
    assert stopped.step <= 3 if "save" in stop_at else stopped.step == 2  # a save may be complete a step later
    assert (tmp_path / f"run/checkpoint-{stopped.step}").is_dir()
    assert heard.results == [stopped]
    rest = train(tmp_path / "run/config.yaml", ["resume=true"])
    assert rest.finished
    assert {**stopped.losses, **rest.losses} == whole[0].losses
    assert set(stopped.losses).isdisjoint(rest.losses)


def test_a_stop_at_the_last_step_changes_nothing(workshop: Path, tmp_path: Path) -> None:
    assert train(workshop / "config.yaml", [*PLAIN, f"output_dir={tmp_path}/run"], callbacks=[Heard("step 6")]).finished


def test_what_a_callback_raises_reaches_the_caller(workshop: Path, tmp_path: Path) -> None:
    class Failing(Callback):
        def on_step(self, event: StepEvent) -> None:
            raise LookupError("of the caller")

    with pytest.raises(LookupError, match="of the caller"):
        train(workshop / "config.yaml", [*PLAIN, f"output_dir={tmp_path}/run"], callbacks=[Failing()])


def test_an_answer_that_means_nothing_is_refused() -> None:
    class Answering(Callback):
        def on_save(self, step: int, folder: Path) -> bool:  # type: ignore[override]
            return True

    with pytest.raises(UserError, match=r'Answering.on_save has returned True\n  return "stop"'):
        Caller([Answering()]).saved(1, Path("checkpoint-1"))


def test_mistakes_are_refused_before_anything_is_made(workshop: Path, tmp_path: Path) -> None:
    config, free = workshop / "config.yaml", f"output_dir={tmp_path}/run"
    with pytest.raises(UserError, match=r"callbacks: \w+ is no hecate.api.Callback"):
        train(config, [free], callbacks=[print])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"nproc: 2 ranks, but .*\n  start it by torchrun --nproc-per-node 2"):
        train(config, [free, "nproc=2"])
    with pytest.raises(UserError, match="a Config has its values already"):
        train(load_config(config, [free]), ["max_steps=1"])
    assert not (tmp_path / "run").exists()


def test_a_config_is_taken_as_loaded_and_a_folder_in_use_is_refused(workshop: Path, tmp_path: Path) -> None:
    loaded = load_config(workshop / "config.yaml", [*PLAIN, f"output_dir={tmp_path}/run", "max_steps=1", "eval.on_start=false"])
    assert train(loaded).step == 1
    with pytest.raises(UserError, match="exists and is not empty\n  choose another, or pass resume=true"):
        train(loaded)


def _counted(calls: list[int], logits_NV: Tensor, label_N: Tensor) -> Tensor:
    calls.append(len(label_N))
    return cross_entropy(logits_NV, label_N, reduction="none")


def test_the_cross_entropy_as_a_loss_of_ones_own_trains_the_same(workshop: Path, tmp_path: Path, whole: tuple[Result, Heard]) -> None:
    calls: list[int] = []

    def own(logits_NV: Tensor, label_N: Tensor) -> Tensor:
        return _counted(calls, logits_NV, label_N)

    result = train(workshop / "config.yaml", [*PLAIN, f"output_dir={tmp_path}/run"], loss=own)
    assert list(result.losses.values()) == pytest.approx(list(whole[0].losses.values()), abs=1e-6)
    assert calls


def test_a_run_with_a_loss_of_ones_own_goes_on_with_it_alone(workshop: Path, tmp_path: Path, whole: tuple[Result, Heard]) -> None:
    config, given = workshop / "config.yaml", [*PLAIN, f"output_dir={tmp_path}/run", "eval.on_start=false"]
    result = train(config, given, callbacks=[Heard("step 3")], loss=focal)
    assert all(result.losses[step] < whole[0].losses[step] for step in (1, 2, 3))  # each factor is below 1
    with pytest.raises(UserError, match=r"trained for the loss focal of a calling program, and this one is for the cross-entropy"):
        train(config, [*given, "resume=true"])
    with pytest.raises(UserError, match="this one is for the loss partial of a calling program"):
        train(config, [*given, "resume=true"], loss=partial(_counted, []))
    assert train(config, [*given, "resume=true"], loss=focal).step == 6


def test_a_loss_that_is_a_mean_is_refused(workshop: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss of each of \d+ label tokens, got shape \[\]\n  with cross_entropy: reduction='none'"):
        train(workshop / "config.yaml", [*PLAIN, f"output_dir={tmp_path}/run", "eval.on_start=false"], loss=cross_entropy)


def run_under_torchrun(workshop: Path, world: int, output: Path) -> list[dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "-m", "tests.hecate.api_program"]
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    sizes = f"{workshop}/world-{world}.yaml"
    text = (workshop / "config.yaml").read_text(encoding="utf-8")
    text = text.replace("gradient_accumulation_steps: 2", "gradient_accumulation_steps: 1").replace(
        "micro_batch_size: 2", f"micro_batch_size: {4 // world}"
    )
    Path(sizes).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [*command, sizes, str(output)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{output}.{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]


@pytest.fixture(scope="module")
def alone(workshop: Path) -> dict:
    return run_under_torchrun(workshop, 1, workshop / "runs/torchrun-1")[0]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_of_torchrun_stop_and_go_on_together(workshop: Path, alone: dict, world: int) -> None:
    """Only the first rank's callbacks are called, each rank has the result, and a loss of one's own does not depend on the ranks."""
    found = run_under_torchrun(workshop, world, workshop / f"runs/torchrun-{world}")
    assert alone["seen"] == ["step 1", "step 2", "step 3", "step 4", "save 4", "end 4"]
    assert [one["seen"] for one in found] == [alone["seen"]] + [[]] * (world - 1)
    for one in found:
        assert one["finished"] == [False, True]
        assert one["losses"] == pytest.approx(alone["losses"], abs=1e-6)
        assert one["evaluated"] == found[0]["evaluated"]
        assert one["output"] == f"{workshop}/runs/torchrun-{world}/adapter"
    assert alone["has_model"]
    assert not any(one["has_model"] for one in found)
