"""Verbs that measure a machine and predict a run: profile, plan, simulate."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from hecate.cli.arguments import ConfigFile, Overrides
from hecate.errors import UserError

RANK_PROGRAM = "hecate.launch.profile.rank_main"
"""the module that a rank's process runs"""


def profile(
    out: Annotated[Path, typer.Option(help="YAML file to write; a run reads it with topology=FILE.yaml")],
    nproc: Annotated[int | None, typer.Option(min=1, help="ranks on this machine; default: one for each GPU, or 2")] = None,
) -> None:
    """Measure the devices and the links between them. Starts ranks on this machine; under torchrun, becomes one of its ranks."""
    rank = os.environ.get("RANK")
    if rank in (None, "0"):
        from hecate.parallel.cluster.topology_file import check_writable

        check_writable(out)
    if rank is None:
        from hecate.launch.local_launcher import launch_local
        from hecate.train.preflight import check_devices, default_ranks

        count = nproc or default_ranks()
        check_devices(count, "--nproc")
        raise typer.Exit(launch_local(RANK_PROGRAM, [str(out)], count))
    if nproc is not None:
        raise UserError("--nproc: torchrun has started the ranks already; give it --nproc-per-node instead")
    from hecate.launch.profile.rank_main import main as become_rank

    become_rank([str(out)])


def plan(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    topology: Annotated[
        str | None, typer.Option(help="replaces the configuration's topology: a preset of configs/topologies, or a YAML file")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="number of ranks with topology auto; default: as many as train would start")
    ] = None,
    workload: Annotated[str, typer.Option(help="synthetic expert loads to predict with")] = "dirichlet_drift",
    trace: Annotated[
        Path | None, typer.Option(help="expert loads that a run has recorded, its folder loads, in place of a workload")
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="what a device costs in an hour, in place of the topology's")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write all figures to this file")] = None,
) -> None:
    """Predict memory, time and price of CONFIG on any topology. Loads no weights, needs no GPU.

    The model's folder may lack its weights, and model.name_or_path may be a config.json or a name such as llama-3-8b; data are not read.
    """
    if trace is not None:
        _refuse_beside(context, "--trace", "it has the loads", allowed=tuple(name for name in context.params if name != "workload"))
    from hecate.apps.foresee.plan import run_plan
    from hecate.config import load_config
    from hecate.parallel.loops.jit import plain_python

    if price_per_hour is not None and not 0 < price_per_hour < math.inf:
        raise UserError(f"--price-per-hour {price_per_hour}: must be a positive number, what a device costs in an hour")
    loaded = load_config(config, overrides or (), claim_output=False, inputs=False)
    loads = workload if trace is None else trace
    with plain_python():  # a few plans take less time so than numba's import does
        run_plan(loaded, topology=topology, ranks=ranks, loads=loads, price_per_hour=price_per_hour, json_path=json_path)


def simulate(
    context: typer.Context,
    topology: Annotated[
        str | None, typer.Option(help="preset of configs/topologies, or a YAML file; several separated by commas are compared")
    ] = None,
    price_per_hour: Annotated[
        str | None, typer.Option(help="what a device costs in an hour, in place of the topology's: one number, or one for each topology")
    ] = None,
    model: Annotated[str | None, typer.Option(help="preset of configs/models, or a YAML file")] = None,
    workload: Annotated[str, typer.Option(help="a name, several names separated by commas, or all")] = "zipf",
    trace: Annotated[
        Path | None, typer.Option(help="recorded loads (a run's folder loads, or Megatron's routing trace), in place of a workload")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of one rank in a step")] = 8192,
    policy: Annotated[str, typer.Option(help="a name, several names separated by commas, or all")] = "all",
    steps: Annotated[int, typer.Option(min=1, help="number of steps that are simulated")] = 12,
    run_steps: Annotated[int, typer.Option(min=1, help="number of steps of the run that means are taken over")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="seed of the workload")] = 0,
    plan: Annotated[
        str, typer.Option(help="from which loads layers are planned, as fssdp.plan: history, calibrated, exact, replay, auto")
    ] = "history",
    rematerialize: Annotated[bool, typer.Option("--rematerialize", help="free replicas between forward and backward pass")] = False,
    prefetch: Annotated[int, typer.Option(min=0, help="decoder layers by which a gather starts early; 0: nothing hides it")] = 1,
    micro_steps: Annotated[int, typer.Option(min=1, help="micro-steps that share a step's tokens, its gather and its reduction")] = 1,
    route: Annotated[str, typer.Option(help="how experts travel: fastest, flat, two_level or sliced")] = "fastest",
    max_imbalance: Annotated[
        float | None, typer.Option(min=1, help="bound on the ranks' largest over mean compute; default: no bound")
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="ranks that share one copy of all experts, as fssdp.shard_size; default: all")
    ] = None,
    sweep: Annotated[str | None, typer.Option(help="many cases: preset of configs/experiments, or a YAML file")] = None,
    wide: Annotated[bool, typer.Option("--wide", help="print every figure, in tables of 160 characters")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write all figures to this file")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="write a PNG of the step times to this file")] = None,
) -> None:
    """Compare placement policies on any cluster: predicted time, bytes and memory of a step. Needs no GPU."""
    from hecate.apps.foresee.simulate import Shown, named_cases, run_cases, sweep_cases

    shown = Shown(wide, json_path, plot_path)
    if sweep is not None:
        _refuse_beside(context, "--sweep", "its file says all the rest", allowed=("sweep", "wide", "json_path", "plot_path"))
        run_cases(*sweep_cases(sweep), shown)
        return
    if trace is not None:
        others = ("workload", "tokens", "steps", "seed")
        _refuse_beside(context, "--trace", "the trace says them", allowed=tuple(name for name in context.params if name not in others))
    from hecate.apps.foresee.cases import Options, chosen_policies, known_plan, known_route
    from hecate.parallel.cost.cost_model import ExecutionMode

    mode, choose_modes = known_plan(plan, prefetch, "--plan")
    execution = ExecutionMode(mode, rematerialize, prefetch, micro_steps, known_route(route, "--route"))
    cases = named_cases(topology, model, trace or workload, tokens, price_per_hour)
    run_cases(
        cases,
        Options(
            policies=chosen_policies(policy, "--policy"),
            steps=steps,
            run_steps=run_steps,
            seed=seed,
            execution=execution,
            choose_modes=choose_modes,
            max_imbalance=max_imbalance,
            shard_size=shard_size,
        ),
        shown,
    )


def _refuse_beside(context: typer.Context, option: str, why: str, *, allowed: tuple[str, ...]) -> None:
    """Check that the command line has no option beside `option` that `allowed` does not name.

    Raises:
        UserError: it has one.
    """
    option_of = {param.name: param.opts[0] for param in context.command.params if param.name is not None}
    given = [name for name in option_of if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"]
    if superfluous := [option_of[name] for name in given if name not in allowed]:
        raise UserError(f"{option}: {why}; leave out {', '.join(superfluous)}")
