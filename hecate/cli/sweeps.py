"""Verbs that train many runs: `sweep`, one configuration with many values, and `federate`, rounds of clients and a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hecate.cli.arguments import ConfigFile, Overrides, check_json, write_json
from hecate.errors import UserError
from hecate.io.terminal import PROGRESS, show_text

if TYPE_CHECKING:
    from hecate.config import Config
    from hecate.launch.many_runs.sweep import Sweep


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="the sweep's YAML file (docs/use/sweeps.md)")],
    overrides: Overrides = None,
    table: Annotated[bool, typer.Option("--table", help="only show the table of what there is so far; nothing is trained")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write all figures to this file")] = None,
    address: Annotated[str | None, typer.Option(help="train on Ray, as hecate ray does: HOST:PORT of the cluster's head, or local")] = None,
) -> None:
    """Train many runs of one configuration with other values, one after another, and compare them in one table.

    The same command goes on: finished runs are skipped, and stopped ones resumed. Exit status 1 if a run has failed.
    """
    if "RANK" in os.environ:
        raise UserError("hecate sweep: starts runs itself and cannot be a rank of torchrun's job\n  give the command without torchrun")
    from hecate.apps.sweep.sweep_file import load_run_sweep
    from hecate.config import load_config

    check_json(json_path)
    loaded = load_run_sweep(str(file), overrides or ())
    if table and overrides:
        load_config(loaded.run, loaded.runs[0].overrides, claim_output=False)  # a key that does not exist is said
    status = 0 if table else _train(loaded, address)
    _show(loaded, json_path)
    raise typer.Exit(status)


def federate(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="train on Ray, as hecate ray does: HOST:PORT of the cluster's head, or local")] = None,
) -> None:
    """Train clients in rounds: each trains an adapter on its own data, and all go on with what becomes of them (docs/use/federated.md).

    With resume=true the same command goes on at the round, and in it at the step, where it was stopped.
    """
    if "RANK" in os.environ:
        raise UserError(
            "hecate federate: starts trainings itself and cannot be a rank of torchrun's job\n  give the command without torchrun"
        )
    from dataclasses import replace

    from hecate.apps.federate.checks import check_federated
    from hecate.apps.federate.privacy.clients import refuse_cluster
    from hecate.cli.jobs import check_local
    from hecate.config import load_config
    from hecate.train.preflight import check_data, default_ranks

    loaded = load_config(config, overrides or ())
    if address is None and loaded.nproc is None:  # all rounds have as many ranks
        loaded = replace(loaded, nproc=default_ranks())

    def check_here(one: Config) -> None:
        check_local(one, check_data)

    if address is not None:
        refuse_cluster(loaded)
    check_federated(loaded, check_here if address is None else _ray_check(1))
    from hecate.apps.federate.rounds import federate as train_rounds

    verb = ["train"] if address is None else ["ray", f"--address={address}"]
    raise typer.Exit(train_rounds(loaded, verb, lambda text: PROGRESS.info(f"hecate: {text}")))


def _train(loaded: Sweep, address: str | None) -> int:
    from hecate.apps.sweep.checks import checked_configs
    from hecate.launch.many_runs.devices import check_share, places_environment, visible_gpus
    from hecate.launch.many_runs.ledger import read_entries
    from hecate.launch.many_runs.processes import train_runs
    from hecate.train.preflight import default_ranks

    gpus = visible_gpus() if loaded.jobs > 1 and address is None else []
    check_share(loaded.jobs, gpus)
    check = _local_check(loaded, gpus) if address is None else _ray_check(loaded.jobs)
    configs = checked_configs(loaded, read_entries(loaded), check)

    def environment(place: int, config: Config) -> Mapping[str, str]:
        return {} if address is not None else places_environment(place, loaded.jobs, gpus, config.nproc or default_ranks())

    verb = ["train"] if address is None else ["ray", f"--address={address}"]
    return train_runs(loaded, configs, verb, environment, lambda text: PROGRESS.info(f"hecate: {text}"))


def _local_check(loaded: Sweep, gpus: list[str]) -> Callable[[Config], None]:
    from dataclasses import replace

    from hecate.cli.jobs import check_local
    from hecate.launch.many_runs.devices import check_ranks
    from hecate.train.preflight import check_data

    check_once = once_for_data(check_data)

    def check(config: Config) -> None:
        check_ranks(config.nproc, loaded.jobs, gpus)
        # By default a run has a rank for each GPU that it gets.
        check_local(replace(config, nproc=len(gpus) // loaded.jobs) if gpus and config.nproc is None else config, check_once)

    return check


def _ray_check(jobs: int) -> Callable[[Config], None]:
    from hecate.launch.ray_job.driver import check_for_ray
    from hecate.model.sizes.model_check import check_model
    from hecate.report.tracking.trackers import check_trackers
    from hecate.train.preflight import check_data, check_first_adapter

    check_once = once_for_data(check_data)

    def check(config: Config) -> None:
        if jobs > 1 and config.ray.workers is None:
            raise UserError("ray.workers: must be given with jobs > 1, because a run takes all devices otherwise\n  add it to set")
        check_for_ray(config)
        check_trackers(config.report_to)
        check_model(config)
        check_first_adapter(config)
        check_once(config)

    return check


def once_for_data(check: Callable[[Config], None]) -> Callable[[Config], None]:
    """The check, which runs that read the same data, for the same model, pay for once."""
    passed = set()

    def check_once(config: Config) -> None:
        if (read := (config.data, config.moe.router, config.moe.replay, config.model, config.eval.generate)) not in passed:
            check(config)
            passed.add(read)

    return check_once


def _show(loaded: Sweep, json_path: Path | None) -> None:
    from hecate.apps.sweep.results import read_result, rows_of
    from hecate.apps.sweep.table import table_json, table_text
    from hecate.launch.many_runs.ledger import at_work, read_entries

    entries, working = read_entries(loaded), at_work(loaded.output_dir)
    results = [read_result(run, entries.get(run.name), working=working) for run in loaded.runs]
    rows = rows_of(results)
    plus_minus = "±" if (sys.stdout.encoding or "").lower().startswith("utf") else "+-"
    show_text(table_text(rows, loaded.keys, named=loaded.named, plus_minus=plus_minus))
    for result in results:
        if result.reason:
            show_text(f"{result.name}: failed with {result.reason}")
    if json_path is not None:
        write_json(json_path, table_json(rows, results, loaded.file))
