"""Kinds of files that users write for a run, and that runs, sweeps, jobs and federated rounds leave for whoever goes on with them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hecate.apps.federate.client import read_plan
from hecate.apps.federate.codec import decode, encode
from hecate.apps.federate.held_out import read_figures
from hecate.apps.federate.privacy.accountant import PrivacySpent
from hecate.apps.federate.records import RoundRecord, add_record, line_of, read_rounds
from hecate.apps.federate.server_optimizer import ServerState, load_server, save_server
from hecate.apps.foresee.sweep import load_sweep
from hecate.apps.sweep.results import read_result
from hecate.apps.sweep.sweep_file import load_run_sweep
from hecate.config import load_config, saved_config, to_yaml
from hecate.elastic.run_controller import ReplanOrder
from hecate.io.plain_files import read_plain
from hecate.io.strict_json import parse_json
from hecate.launch.many_runs.ledger import RunState, SweepEntry, changed_values, read_entries, write_entry
from hecate.launch.many_runs.sweep import Sweep, SweepRun
from hecate.launch.membership.job_states import State
from hecate.launch.ray_job.messages import PartBuilt, event_from_json, message_json
from hecate.launch.ray_job.status import JobStatus, StatusNote, read_status, status_text, write_status
from hecate.parallel.cluster.topology_file import load_topology
from hecate.parallel.cost.model_shapes import load_model_shape
from hecate.ranks.launcher_files import Generation, read_generation, write_generation
from hecate.report.pages.page import report_page
from hecate.report.run_records import read_run
from hecate.report.timeline import write_timeline
from hecate.train.steps.replay_step import read_step
from tests.attacks.fuzz.file_kinds import FileKind

_TOPOLOGY = b"""nodes:
  - {devices: 2, flops: [1.0e+14, 2.0e+14], memory: 8.0e+10, port: 3.0e+11, uplink: 4.0e+11, memory_bandwidth: 3.0e+12, price_per_hour: 1.5}
  - {devices: 1, flops: 7.0e+13, memory: 2.4e+10, uplink: 1.25e+10, price_per_hour: 1}
intra_node: {bandwidth: 3.0e+11, latency: 1.0e-5}
inter_node: {bandwidth: 1.25e+10, latency: 2.0e-5}
overlap_slowdown: 1.1
"""
_SHAPE = b"{kind: moe_lora, rank: 16, hidden: 2048, ffn: 1024, layers: 16, seq: 4096, experts: 64, top_k: 8, causal: true}\n"
_FORECAST = b"""policies: [static_ep, full]
steps: 2
seed: 1
prefetch: 1
max_imbalance: 1.5
runs:
  - {topologies: [mixed], models: olmoe-1b-7b, workloads: [balanced], tokens_per_rank: 64, experts: 8}
"""
_SWEEP = b"""run: quickstart
output_dir: runs/a
jobs: 1
seeds: [1, 2]
set: {max_steps: 10}
grid: {learning_rate: [1e-4, 1e-3], lora.r: [4, 8]}
"""
_METRICS: tuple[dict[str, Any], ...] = (
    *(
        {
            "kind": "step",
            "step": step,
            "loss": 1.5,
            "aux_loss": None,
            "learning_rate": 0.1,
            "grad_norm": 1.0,
            "skipped": False,
            "tokens": 100,
            "tokens_per_s": 50.0,
            "step_seconds": 2.0,
            "parts": {"experts": 1.0, "other": None},
            "ranks": 2,
            "imbalance": 1.1,
            "static_imbalance": 1.5,
            "copies": 1,
            "new_copies": 0,
            "bytes_sent": 1000,
            "bytes_between_nodes": 10,
            "peak_bytes": [1000, 2000],
            "plan_modes": {"0": "a"},
            "loads": {"0": [5, 6], "1.q_proj": [1, 2, 3]},
            "routing_differs": None,
        }
        for step in (1, 2, 3)
    ),
    {
        "kind": "eval",
        "step": 2,
        "sources": {"a": {"loss": 1.0, "accuracy": None, "samples": 3}, "b": {"loss": 1, "accuracy": 1, "samples": 3}},
    },
    {"kind": "event", "step": 2, "text": "saved checkpoint-2"},
    {"kind": "reshard", "step": 3, "experts": 1, "bytes_sent": 5, "seconds": 0.1, "saved_seconds": 0.1, "moving_seconds": None},
    {"kind": "event", "step": 3, "text": "stopped by a signal"},
)
_FIGURES = {"models": [{"name": "union", "tasks": {"a": {"loss": 1.5, "accuracy": 0.5, "samples": 3}}}]}
_STEP = {
    "step": 3,
    "why": "a gradient was not finite",
    "loss": 1.0,
    "aux_loss": None,
    "grad_norm": None,
    "norm_limit": None,
    "ranks": 2,
    "seed": 1,
    "versions": {"hecate": "1", "torch": "2"},
    "samples": [["a:1"]],
    "sequences": [{"input_ids": [1, 2], "targets": [2, -100], "position_ids": [0, 1]}],
}
_PLAN = {
    "config": "a.yaml",
    "verb": ["train"],
    "adapters": "a",
    "begin": "b",
    "clients": [
        {
            "name": "ann",
            "begin": "b",
            "down": None,
            "up": "c",
            "density": 0.5,
            "kept_before": None,
            "keeps": None,
            "shape": {
                "sites": [{"path": "model.layers.0.q", "layer": 0, "place": "q", "inputs": 4, "outputs": 6}],
                "rank": 2,
                "scale": 2.0,
                "trains_a": True,
                "dtype": "float32",
                "seed": 1,
            },
            "described": {"base": "b", "alpha": 4, "use_rslora": False, "target_modules": ["q"]},
            "merging": {"down": "d", "rank": 2, "into": "b", "out": "o"},
        }
    ],
}
_EVENTS = {
    "baseTimeNanoseconds": 5,
    "traceEvents": [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "a"}}, {"ph": "X", "ts": 1, "pid": 1}],
}


def _writes(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content())


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _config_text(folder: Path) -> str:
    """Of a run whose model and data are in the folder."""
    return f"""model: {{name_or_path: {folder}/model, dtype: float32}}
data:
  train: [{{path: {folder}/data.jsonl, weight: 2, fields: {{text: body}}}}, {{path: {folder}/data.jsonl, name: more}}]
  eval: [{folder}/data.jsonl]
  seq_len: 64
output_dir: {folder}/run
max_steps: 6
learning_rate: 1e-2
lora: {{r: 4, alpha: 8.0, target_modules: [q_proj, up_proj]}}
moe: {{num_experts: 3, top_k: 2, router: {{input: token}}}}
fssdp: {{policy: full}}
"""


def _config(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "model" / "model.safetensors").write_bytes(b"")
    (folder / "data.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (folder / "config.yaml").write_text(_config_text(folder), encoding="utf-8")


def _effective(folder: Path) -> str:
    _config(folder)
    return to_yaml(load_config(folder / "config.yaml"))


def _saved(folder: Path) -> None:
    text = _effective(folder)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def _read_saved(folder: Path) -> None:
    """The text as a checkpoint has it, and as a federated run or a sweep compares it."""
    try:
        text = read_plain(folder / "config.yaml").decode()
    except (OSError, UnicodeDecodeError):
        return  # in the product it is a part of another file
    config = saved_config(text)
    changed_values(text, config)


def _run(folder: Path) -> None:
    _saved(folder)
    (folder / "metrics.jsonl").write_bytes(b"".join(_json(one) + b"\n" for one in _METRICS))


def _read_run(folder: Path) -> None:
    records = read_run(folder)
    report_page(records, "no plan")
    read_result(SweepRun("a", None, (), 1, (), str(folder)), SweepEntry(RunState.FINISHED, "", 1.0, "max_steps: 3\n"), working=False)


def _status(folder: Path) -> None:
    note = StatusNote(when="10:00:00", text="a")
    figures: dict[str, Any] = {"loss": 1.5, "tokens_per_s": 10.0, "imbalance": None, "last_checkpoint": None, "devices": ()}
    more: dict[str, Any] = {"spares": 0, "topology": None, "notes": (note,), "updated": 1.0}
    write_status(folder, JobStatus(state=State.RUNNING, detail="", generation=0, max_steps=9, step=3, **figures, **more))
    value = json.loads((folder / "status.json").read_bytes())
    device = {
        "device": 0,
        "rank": 0,
        "state": "training",
        "sequences": 2,
        "experts": 1,
        "speed": 1.0,
        "kind": "cpu",
        "node": "n",
        "pid": None,
    }
    (folder / "status.json").write_bytes(_json(value | {"devices": [device]}))


def _of_sweep(folder: Path) -> Sweep:
    return Sweep("sweep.yaml", "quickstart", str(folder), 1, (SweepRun("a", None, (), None, (), str(folder / "a")),))


def _entry(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "sweep").mkdir()
    write_entry(str(folder), "a", SweepEntry(RunState.FAILED, "it failed", 2.5, "max_steps: 3\n"))


def _read_entry(folder: Path) -> None:
    for run, entry in zip(_of_sweep(folder).runs, read_entries(_of_sweep(folder)).values(), strict=False):
        read_result(run, entry, working=False)


def _round(folder: Path) -> None:
    held_out = {"union": {"a": {"loss": 1.0}}, "ann": {"a": {"loss": 2.0}}}
    record = RoundRecord(
        1, {"ann": 1.0}, ("bob",), {"ann": 5}, {"ann": 6}, 0.0, 0.1, held_out, {"ann": PrivacySpent(1.0, 2.0, 1e-5, 0.1, 3)}, 1.0
    )
    add_record(folder, record)
    add_record(folder, replace(record, round=2))


def _read_rounds(folder: Path) -> None:
    for record in read_rounds(folder):
        line_of(record, 2)


def _server(folder: Path) -> None:
    vector = torch.arange(6.0)
    save_server(
        folder / "server.safetensors", ServerState(vector, {"exp_avg": vector + 1, "exp_avg_sq": vector + 2, "step": torch.ones(())})
    )


def _message(density: float) -> bytes:
    return encode(torch.arange(1.0, 41.0), density)


def _timeline(folder: Path) -> None:
    for rank in (0, 1):
        (folder / f"rank-{rank}.json.gz").write_bytes(gzip.compress(_json(_EVENTS), mtime=0))


def _merge_timeline(folder: Path) -> None:
    write_timeline(folder / "timeline.json.gz", {rank: folder / f"rank-{rank}.json.gz" for rank in (0, 1)})


def _generation(folder: Path) -> None:
    write_generation(folder / "store", Generation(1, (0, 2), (0, 1)))


def _read_json(read: Callable[[Any], object], name: str) -> Callable[[Path], object]:
    return lambda folder: read(parse_json((folder / name).read_bytes()))


_BEGUN = PartBuilt(step=1, max_steps=3, sequences=(1, 2), owned=(3, 4), topology=_TOPOLOGY.decode())
_ORDER = ReplanOrder(number=1, flops=(1.0, 2.0), sequences=(1, 2), reshard=True)

KINDS = (
    FileKind(
        name="configuration",
        file="config.yaml",
        write=_config,
        read=lambda folder: load_config(folder / "config.yaml"),
        form="yaml",
        lists=True,
    ),
    FileKind(name="configuration in a checkpoint", file="config.yaml", write=_saved, read=_read_saved, form="yaml", named=False),
    FileKind(
        name="sweep of runs",
        file="sweep.yaml",
        write=_writes("sweep.yaml", _SWEEP),
        read=lambda folder: load_run_sweep(str(folder / "sweep.yaml")),
        form="yaml",
        lists=True,
    ),
    FileKind(
        name="sweep of forecasts",
        file="sweep.yaml",
        write=_writes("sweep.yaml", _FORECAST),
        read=lambda folder: load_sweep(folder / "sweep.yaml"),
        form="yaml",
    ),
    FileKind(
        name="topology",
        file="topology.yaml",
        write=_writes("topology.yaml", _TOPOLOGY),
        read=lambda folder: load_topology(folder / "topology.yaml"),
        form="yaml",
        closed=True,
    ),
    FileKind(
        name="shape of a model",
        file="model.yaml",
        write=_writes("model.yaml", _SHAPE),
        read=lambda folder: load_model_shape(folder / "model.yaml"),
        form="yaml",
        closed=True,
    ),
    FileKind(name="run, metrics", file="metrics.jsonl", write=_run, read=_read_run, form="lines", closed=True),
    FileKind(name="run, configuration", file="config.yaml", write=_run, read=_read_run, form="yaml", closed=True),
    FileKind(
        name="run, a skipped step",
        file="step.json",
        write=_writes("step.json", _json(_STEP)),
        read=lambda folder: read_step(folder),
        form="json",
        closed=True,
    ),
    FileKind(name="run, timeline of a rank", file="rank-1.json.gz", write=_timeline, read=_merge_timeline, closed=True),
    FileKind(name="sweep, what became of a run", file="a.json", write=_entry, read=_read_entry, form="json", closed=True),
    FileKind(
        name="job, status",
        file="status.json",
        write=_status,
        read=lambda folder: status_text(read_status(folder)),
        form="json",
        closed=True,
    ),
    FileKind(
        name="job, message of a worker",
        file="order.json",
        write=_writes("order.json", lambda: _json(message_json(_BEGUN))),
        read=_read_json(lambda value: event_from_json(value), "order.json"),
        form="json",
        named=False,
        is_file=False,
    ),
    FileKind(
        name="job, order to plan anew",
        file="order.json",
        write=_writes("order.json", _ORDER.to_bytes),
        read=lambda folder: ReplanOrder.from_bytes((folder / "order.json").read_bytes()),
        form="json",
        named=False,
        is_file=False,
    ),
    FileKind(
        name="launcher, who trains together",
        file="generation",
        write=_generation,
        read=lambda folder: read_generation(folder / "store"),
        form="json",
        named=False,
        is_file=False,
    ),
    FileKind(name="rounds, records", file="rounds.jsonl", write=_round, read=_read_rounds, form="lines", closed=True),
    FileKind(
        name="rounds, state of the server",
        file="server.safetensors",
        write=_server,
        read=lambda folder: load_server(folder / "server.safetensors"),
        form="safetensors",
        closed=True,
    ),
    FileKind(
        name="rounds, plan of a process",
        file="plan.json",
        write=_writes("plan.json", _json(_PLAN)),
        read=lambda folder: read_plan(folder / "plan.json"),
        form="json",
        closed=True,
    ),
    FileKind(
        name="rounds, held-out figures",
        file="held_out.json",
        write=_writes("held_out.json", _json(_FIGURES)),
        read=lambda folder: read_figures(folder / "held_out.json"),
        form="json",
        closed=True,
    ),
    *(
        FileKind(
            name=f"rounds, message of density {density}",
            file="message",
            write=_writes("message", lambda density=density: _message(density)),  # type: ignore[misc]
            read=lambda folder: decode((folder / "message").read_bytes(), 40),
            named=False,
            is_file=False,
        )
        for density in (1.0, 0.5, 0.01)
    ),
)
