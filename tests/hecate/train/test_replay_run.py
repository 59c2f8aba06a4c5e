"""The whole story: train, record what the routers choose, and train with that routing replayed and planned ahead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hecate.apps.answers.compare import Questions, compare
from hecate.apps.answers.record_routing import RoutingRecord
from hecate.config import Config, DataSource, load_config
from hecate.data.encode import encode_source
from hecate.data.routed_experts import RoutingShape
from hecate.data.sequences import build_sequence, empty_sequence, piece_of
from hecate.errors import UserError
from hecate.experts.routers.router import RouterStats
from hecate.parallel.values.units import Unit
from hecate.ranks.groups import ExpertGroups
from hecate.ranks.ranks import Ranks
from hecate.report.metrics import step_record
from hecate.train.training import Training
from testing.byte_tokenizer import build_byte_tokenizer
from tests.hecate.train.command_line import losses, records, run, train_arguments, workshop

__all__ = ["workshop"]  # a fixture

ALIKE = ("model.dtype=float64", "lora.dropout=0", "eval.generate=false", "eval.on_start=false")


def config_of(workshop: Path, name: str, *overrides: str) -> Config:
    return load_config(workshop / "config.yaml", [*ALIKE, f"output_dir={workshop}/runs/{name}", *overrides], claim_output=False)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_recorded_is_what_the_routers_choose_and_can_be_forced(workshop: Path, one_rank: dist.ProcessGroup) -> None:
    ranks = Ranks(0, 1, torch.device("cpu"), ExpertGroups(one_rank, one_rank))
    data = workshop / "up.train.jsonl"
    first = Training(config_of(workshop, "first", f"data.train=[{data}]"), ranks)
    for _ in range(2):
        first.train_one()
    checkpoint, adapter, routed = first.save().folder, workshop / "adapter", workshop / "routed.jsonl"
    assert checkpoint is not None
    first.parts.output.write(adapter, first.parts.moe, ranks)
    compare(config_of(workshop, "any", f"data.eval=[{data}]"), [str(checkpoint)], Questions(record_routing=routed), ranks)
    written = lines_of(routed)
    assert [{"messages": line["messages"]} for line in written] == lines_of(data), "the same records in the same order"
    shape = RoutingShape((3, 3), 2)
    used = [int(expert) for line in written for expert in shape.routing(line)[0, 0]]
    assert 1 < len(set(used)) <= 3

    at_adapter = (f"data.train=[{routed}]", f"lora.init_from={adapter}", "fssdp.plan=replay", "data.eval=[]")
    checked = Training(config_of(workshop, "checked", *at_adapter, "moe.replay=check"), ranks).train_one()
    assert checked.result.differing == 0, "the recorded pass and this one are of the same adapter"
    assert step_record(checked)["routing_differs"] == 0
    forced = Training(config_of(workshop, "forced", *at_adapter), ranks)
    event = forced.train_one()
    assert event.result.loss == pytest.approx(checked.result.loss, rel=1e-12)
    assert step_record(event)["routing_differs"] is None

    turned = workshop / "turned.jsonl"  # each expert's number is the next one's
    other = [line | {"routed_experts": ((shape.routing(line) + 1) % 3).tolist()} for line in written]
    turned.write_text("".join(json.dumps(line) + "\n" for line in other), encoding="utf-8")
    again = Training(config_of(workshop, "turned", f"data.train=[{turned}]", *at_adapter[1:]), ranks).train_one()
    for unit, loads_ED in event.result.loads.items():
        assert again.result.loads[unit][[1, 2, 0]].tolist() == loads_ED.tolist(), "tokens go where the samples say"
    assert abs(again.result.loss - event.result.loss) > 1e-6


def test_packed_rows_are_taken_apart_and_the_pieces_of_a_document_put_together(tmp_path: Path) -> None:
    """Passes come in any order, and rows without tokens among them."""
    records = [{"text": "abcde", "id": "half a pair: \ud800"}, {"text": "xy"}]
    named = DataSource(path=str(tmp_path / "data.jsonl"), name="data")
    Path(named.path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    source = encode_source(named, build_byte_tokenizer(), seq_len=3, vocab_size=300)
    assert source.starts.tolist() == [0, 3, 5, 7]
    rows = [build_sequence(0, [piece_of([source], 0, 2), piece_of([source], 0, 1)], [source]), empty_sequence()]
    record = RoutingRecord()
    for row, first in ((rows, 10), ([empty_sequence(), build_sequence(1, [piece_of([source], 0, 0)], [source])], 20)):
        tokens = sum(len(one.input_ids) for one in row)
        number_TK = first + torch.arange(tokens)[:, None].expand(-1, 1)
        stats = {Unit(layer): RouterStats(torch.zeros(99), torch.zeros(1, 99), expert_TK=number_TK + 40 * layer) for layer in (1, 0)}
        record.note(row, stats)
    assert record.write(tmp_path / "routed.jsonl", source, named) == 2
    written = lines_of(tmp_path / "routed.jsonl")
    assert written[0]["id"] == records[0]["id"]
    first, second = (RoutingShape((99, 99), 1).routing(line)[..., 0].tolist() for line in written)
    assert first == [[20, 60], [21, 61], [22, 62], [12, 52], [13, 53]]
    assert second == [[10, 50], [11, 51]]
    del record._of_sample[1]  # as eval.max_samples leaves it out
    assert record.write(tmp_path / "routed.jsonl", source, named) == 1
    assert lines_of(tmp_path / "routed.jsonl")[0]["text"] == "xy"


@pytest.mark.parametrize(
    ("names", "tasks", "reason"),
    [
        (["base"], ["up"], "--record-routing: base is a model whose layers compute their experts themselves"),
        (["base", "base"], ["up"], r"--record-routing: .* but there are 1 evaluated sources, 2 models and 1 ranks\n  name one of each"),
        (["base"], ["up", "echo"], "--record-routing: .* but there are 2 evaluated sources"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    workshop: Path, one_rank: dist.ProcessGroup, names: list[str], tasks: list[str], reason: str
) -> None:
    ranks = Ranks(0, 1, torch.device("cpu"), ExpertGroups(one_rank, one_rank))
    given = [f"data.eval=[{','.join(f'{workshop}/{task}.eval.jsonl' for task in tasks)}]"]
    with pytest.raises(UserError, match=reason):
        compare(config_of(workshop, "none", *given), names, Questions(record_routing=workshop / "none.jsonl"), ranks)


@pytest.mark.slow
def test_whole_commands(workshop: Path) -> None:
    """Two ranks that share the experts; stopped and resumed; a resume that lets the router choose again is another training."""
    data, routed = workshop / "up.train.jsonl", workshop / "whole.jsonl"
    run(*train_arguments(workshop, "whole", *ALIKE, f"data.train=[{data}]"))
    run("eval", workshop / "runs" / "whole", f"data.eval=[{data}]", "eval.generate=false", "--record-routing", routed)
    replayed = (*ALIKE, f"data.train=[{routed}]", "fssdp.policy=llep", "gradient_checkpointing=true", "fssdp.reshard_interval=2")
    run(*train_arguments(workshop, "ahead", *replayed, "fssdp.plan=replay"))
    run(*train_arguments(workshop, "history", *replayed, "moe.replay=force"))
    for ahead, history in zip(losses(workshop, "ahead"), losses(workshop, "history"), strict=True):
        assert ahead == pytest.approx(history, rel=1e-10)
    (ahead, history) = (records(workshop, name, "eval")[-1]["sources"]["up.eval"]["loss"] for name in ("ahead", "history"))
    assert ahead == pytest.approx(history, rel=1e-9), "held-out data bring no routing"
    run(*train_arguments(workshop, "part", *replayed, "fssdp.plan=replay", "max_steps=3", "lr_scheduler_type=constant"))
    run("train", workshop / "runs" / "part" / "config.yaml", "resume=true", "max_steps=6")
    free = ("resume=true", "max_steps=7", "moe.replay=null", "fssdp.plan=exact")
    other = run("train", workshop / "runs" / "part" / "config.yaml", *free, status=2)
    assert "moe.replay: 'force' then, None now" in other.stderr
    missing = run(*train_arguments(workshop, "missing", f"data.train=[{data}]", "fssdp.plan=replay"), status=2)
    assert f"{data}:1: no 'routed_experts' beside the text" in missing.stderr
