"""Test how `benchmarks.same_training` compares the files of two runs, without training anything."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import same_training
from benchmarks.same_training import Difference, Failure, compare, distance_of, read_trained
from benchmarks.same_training_cases import RUNS

STEP = {"learning_rate": 1e-3, "tokens": 10, "loads": {"0": [4, 6]}, "calibrations": 0, "bytes_sent": 100, "imbalance": 1.2}
LOSSES = (2.5, 2.25, 2.125)


def tensors() -> dict[str, Tensor]:
    return {
        "owned/0.0": torch.linspace(0, 1, 7),
        "owned/0.0/step": torch.tensor(3.0),
        "replicated/gate": torch.ones(2, 3, dtype=torch.float64),
    }


def write(
    folder: Path,
    *,
    changed: dict[str, Tensor] | None = None,
    without: str = "",
    adapter: Tensor | None = None,
    losses: tuple[float, ...] = LOSSES,
    held_out: float = 1.5,
    bytes_sent: int = 100,
) -> Path:
    """What a run of three steps on two ranks leaves, as far as it is compared; an older checkpoint beside it is another one."""
    mine = {name: tensor for name, tensor in {**tensors(), **(changed or {})}.items() if name != without}
    for step, owned in ((2, {"owned/0.0": torch.zeros(7)}), (10, {name: t for name, t in mine.items() if name.startswith("owned/")})):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        save_file(owned, checkpoint / "rank-00000-of-00002.safetensors")
        save_file({name: t for name, t in mine.items() if name not in owned}, checkpoint / "rank-00001-of-00002.safetensors")
    (folder / "adapter").mkdir()
    save_file({"owned/0.0": torch.ones(1) if adapter is None else adapter}, folder / "adapter" / "adapter_model.safetensors")
    records = [
        {
            "kind": "step",
            "step": step,
            "loss": loss,
            "aux_loss": 1.0,
            "grad_norm": 0.5,
            **STEP,
            "bytes_sent": bytes_sent,
            "step_seconds": id(loss),
        }
        for step, loss in enumerate(losses, start=1)
    ]
    records += [{"kind": "eval", "step": 3, "sources": {"up": {"loss": held_out}}}, {"kind": "event", "step": 3, "text": str(folder)}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def difference(tmp_path: Path, **changes: object) -> Difference:
    return compare(read_trained(write(tmp_path / "here")), read_trained(write(tmp_path / "there", **changes)))  # type: ignore[arg-type]


def test_equal_runs_have_no_difference(tmp_path: Path) -> None:
    assert difference(tmp_path) == Difference(None, (), 0.0, same_plans=True)
    assert len(read_trained(tmp_path / "here").tensors) == 4


def test_one_bit_of_one_tensor_is_a_difference(tmp_path: Path) -> None:
    one_bit = tensors()["owned/0.0"].clone()
    one_bit.view(torch.int32)[-1] ^= 1  # the last one of 1.0
    found = difference(tmp_path, changed={"owned/0.0": one_bit})
    assert found.tensors == ("owned/0.0",)
    assert found.largest == 2.0**-23
    assert not found.is_none


def test_the_sign_of_a_zero_is_a_difference(tmp_path: Path) -> None:
    other_zero = tensors()["owned/0.0"].clone()
    other_zero[0] = -0.0
    found = difference(tmp_path, changed={"owned/0.0": other_zero})
    assert (found.tensors, found.largest) == (("owned/0.0",), 0.0)


def test_two_equal_nans_are_the_same() -> None:
    nan = torch.tensor([math.nan])
    assert distance_of(nan, nan.clone()) is None
    assert distance_of(nan, torch.zeros(1)) == math.inf


def test_a_missing_tensor_another_type_and_another_shape_are_differences(tmp_path: Path) -> None:
    assert difference(tmp_path / "missing", without="replicated/gate").tensors == ("replicated/gate",)
    found = difference(tmp_path / "other", changed={"replicated/gate": torch.ones(2, 3), "owned/0.0": torch.linspace(0, 1, 7)[None]})
    assert (found.tensors, found.largest) == (("owned/0.0", "replicated/gate"), math.inf)


def test_the_exported_adapter_is_compared_beside_the_checkpoint(tmp_path: Path) -> None:
    assert difference(tmp_path, adapter=torch.zeros(1)).tensors == ("adapter:owned/0.0",)


def test_losses_are_compared_step_by_step(tmp_path: Path) -> None:
    found = difference(tmp_path / "last bit", losses=(2.5, math.nextafter(2.25, 3), 2.125))
    assert (found.first_step, found.tensors, found.is_none) == (2, (), False)
    assert difference(tmp_path / "a step fewer", losses=LOSSES[:2]).first_step == 3
    assert difference(tmp_path / "held out", held_out=1.25).first_step == 3


def test_other_plans_are_said_but_are_no_difference(tmp_path: Path) -> None:
    found = difference(tmp_path, bytes_sent=99)
    assert found.is_none
    assert not found.same_plans


def test_renamed_metrics_and_tensors_are_compared_by_their_new_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = (
        write(tmp_path / "here"),
        write(tmp_path / "there", without="replicated/gate", changed={"replicated/router": tensors()["replicated/gate"]}),
    )
    text = (there / "metrics.jsonl").read_text(encoding="utf-8")
    (there / "metrics.jsonl").write_text(text.replace("aux_loss", "balance_loss"), encoding="utf-8")
    assert compare(read_trained(here), read_trained(there)).first_step == 1
    monkeypatch.setattr(same_training, "TENSOR_NAMES", (("/gate", "/router"),))
    monkeypatch.setitem(same_training.METRICS, "aux_loss", ("aux_loss", "balance_loss"))
    assert compare(read_trained(here), read_trained(there)).is_none


def test_a_run_that_has_left_nothing_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="no checkpoint"):
        read_trained(tmp_path)


def test_the_runs_have_names_of_their_own_and_five_are_quick() -> None:
    assert len({run.name for run in RUNS}) == len(RUNS)
    assert sum(run.quick for run in RUNS) == 5
