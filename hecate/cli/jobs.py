"""Verbs that start a training job, or show one: train, launch, ray, submit, status, report.

Those that start one check the configuration and the data before they start any process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hecate.cli.arguments import ConfigFile, Overrides
from hecate.errors import UserError
from hecate.io.terminal import show_text

if TYPE_CHECKING:
    from hecate.config import Config

_log = logging.getLogger(__name__)

RANK_PROGRAM = "hecate.train.rank_main"
"""the module that a rank's process runs"""


def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train on this machine, as CONFIG says. Under torchrun, this process becomes one rank of torchrun's job."""
    if "RANK" in os.environ:
        from hecate.train.rank_main import main as become_rank

        become_rank([str(config), *(overrides or ())])
        return
    from hecate.config import load_config

    loaded = load_config(config, overrides or ())
    # After the configuration is checked, so that a mistake in it is answered at once.
    from hecate.io.one_writer import one_writer
    from hecate.launch.local_launcher import launch_local
    from hecate.launch.membership.job_policy import JobPolicy
    from hecate.train.preflight import check_data, warn_of_cores

    count = check_local(loaded, check_data)
    warn_of_cores(count, "nproc")
    # The ranks load torch, transformers and the model before they can say anything themselves.
    _log.info(f"hecate: starting {count} rank{'s' if count > 1 else ''}")
    survives = loaded.fssdp.redundancy > 0
    policy = JobPolicy(copied=survives, most=3 if survives else 0, tp_size=loaded.model.tensor_parallel)
    arguments = [str(config), *(overrides or ())]
    with one_writer(loaded.output_dir):
        status = launch_local(RANK_PROGRAM, arguments, count, policy, first=["--check", *arguments])
    raise typer.Exit(status)


def check_local(config: Config, check_data: Callable[[Config], None]) -> int:
    """Check that this machine can train as configured, and return the number of ranks.

    Args:
        check_data: raises UserError if something is wrong with the data.

    Raises:
        UserError: the machine, the data or the model does not go with the configuration.
    """
    from hecate.config.files.topology import AUTO, build_topology
    from hecate.model.sizes.model_check import check_model
    from hecate.parallel.cluster.mesh import make_mesh
    from hecate.train.preflight import check_devices, check_first_adapter, check_machine, check_resume, check_vocabulary, default_ranks

    check_resume(config)
    check_machine(config)
    count = config.nproc or default_ranks()
    check_devices(count, "nproc")
    make_mesh(count, config.fssdp.shard_size, config.model.tensor_parallel)
    if config.topology != AUTO:
        build_topology(config, count)
    check_model(config, count)
    check_first_adapter(config)
    check_data(config)
    check_vocabulary(config)
    return count


def replay_step(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="skipped-step-N in output_dir of a run that has stopped")],
) -> None:
    """Do a step that was skipped again, in one process, and show its loss, its gradient norm, and where numbers stop to be finite."""
    from hecate.ranks.ranks import join_ranks
    from hecate.train.steps.replay_step import replay_step as replay

    with join_ranks() as ranks:
        show_text(replay(folder, ranks).in_words())


def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    nnodes: Annotated[str, typer.Option(help="number of nodes, or MIN:MAX for a job that may shrink and grow")] = "1",
    nproc_per_node: Annotated[int | None, typer.Option(min=1, help="ranks on each node; default: nproc, or one for each GPU, or 2")] = None,
    rdzv_endpoint: Annotated[str | None, typer.Option(help="HOST:PORT on one of the nodes, where all nodes meet; the same on all")] = None,
    rdzv_id: Annotated[str, typer.Option(help="name of the job, the same on all nodes")] = "hecate",
    token_file: Annotated[
        Path | None,
        typer.Option(help="file with the secret that several nodes share, made if it does not exist; or set HECATE_TOKEN on all"),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(min=0, help="how many lost ranks are replaced; without fssdp.redundancy: how often all are restarted"),
    ] = 3,
) -> None:
    """Train on one or several nodes: run the same command on each node.

    After a rank or a node is lost, the others go on where they are and lose no step, if fssdp.redundancy is 1 or 2. Else all ranks start
    again from the last checkpoint.
    """
    from hecate.config import load_config
    from hecate.launch.membership.job_policy import JobPolicy
    from hecate.launch.node_launcher import NodesJob, check_job_fits, node_range
    from hecate.launch.node_launcher import launch as launch_nodes
    from hecate.model.sizes.model_check import check_model
    from hecate.train.preflight import (
        check_data,
        check_first_adapter,
        check_machine,
        check_resume,
        check_vocabulary,
        default_ranks,
        warn_of_cores,
    )

    nodes = node_range(nnodes)
    loaded = load_config(config, overrides or (), claim_output=nodes[1] == 1)
    check_resume(loaded)
    check_machine(loaded)
    check_data(loaded)
    ranks = nproc_per_node or loaded.nproc or default_ranks()
    check_job_fits(loaded, nodes, ranks)
    warn_of_cores(ranks, "--nproc-per-node" if nproc_per_node else "nproc")
    check_vocabulary(loaded)
    check_model(loaded, ranks)
    check_first_adapter(loaded)
    arguments = [str(config), *(overrides or ())]
    job = NodesJob(
        name=rdzv_id,
        output_dir=loaded.output_dir,
        nodes=nodes,
        ranks_per_node=ranks,
        endpoint=rdzv_endpoint,
        token_file=token_file,
        policy=JobPolicy(copied=loaded.fssdp.redundancy > 0, most=max_restarts, tp_size=loaded.model.tensor_parallel),
        first=["--check", *arguments],
    )
    raise typer.Exit(launch_nodes(RANK_PROGRAM, arguments, job))


def ray(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="HOST:PORT of the cluster's head, or local: a private cluster on this machine")
    ] = "",
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="serve Prometheus metrics on 127.0.0.1 at this port; 0: any free port")
    ] = None,
) -> None:
    """Train on a Ray cluster, from one of its nodes. Gives each device work by its speed, and goes on after devices are lost."""
    if not address:
        raise UserError("--address: give HOST:PORT of the cluster's head, or local; no cluster is joined unasked")
    from hecate.launch.ray_job.driver import run_on_ray

    raise typer.Exit(run_on_ray(config, overrides or (), address, metrics_port))


def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, inside the working directory")],
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="http://HOST:PORT of the cluster's dashboard")] = "",
    working_dir: Annotated[
        Path, typer.Option(help="folder whose code and configurations are uploaded; data, runs and secrets are not")
    ] = Path(),
) -> None:
    """Run `hecate ray CONFIG` as a job on a Ray cluster. Waits for the job, shows its output, and ends with its exit status."""
    if not address:
        raise UserError("--address: give http://HOST:PORT of the cluster's dashboard; no cluster is looked for")
    from hecate.launch.ray_job.submit import submit as run

    raise typer.Exit(run(config, overrides or (), address, working_dir=working_dir))


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="output_dir of a run that `hecate ray` has started, or its configuration")],
) -> None:
    """Show what a job started by `hecate ray` does: state, devices, shares, imbalance, last checkpoint."""
    from hecate.launch.ray_job.status import read_status, status_text

    if run.is_file():
        from hecate.config import load_config

        run = Path(load_config(run, claim_output=False).output_dir)
    show_text(status_text(read_status(run)))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="output_dir of a run, finished or not; several are compared")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="HTML file to write; default: report.html in RUN, or of several comparison.html"),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="write the page again and again until the run is finished or Ctrl-C")] = False,
) -> None:
    """Write one HTML page about a run: losses, load of the experts, imbalance, time, bytes, memory, events. Needs nothing but itself."""
    from hecate.apps.foresee.planned_memory import planned_memory
    from hecate.io.plain_files import refuse_links
    from hecate.parallel.loops.jit import plain_python
    from hecate.report.pages.comparison import MOST_RUNS, comparison_page
    from hecate.report.pages.page import write_page, write_report
    from hecate.report.run_records import read_run

    for run in runs:
        refuse_links(run)
    if len(runs) > 1:
        names = [str(run) for run in runs]
        if follow or len(set(names)) < len(runs) or len(runs) > MOST_RUNS:
            raise UserError(f"report: --follow takes one run; a comparison, 2 to {MOST_RUNS} runs, each once; got {', '.join(names)[:300]}")
        page = comparison_page({name: read_run(run) for name, run in zip(names, runs, strict=True)})
        show_text(write_page(out or runs[0] / "comparison.html", page))
        return
    run = runs[0]
    ranks = len(read_run(run).peak_bytes)
    with plain_python():  # a few plans take less time so than numba's import does
        planned = planned_memory(run, ranks) if ranks else "the run has recorded no memory"
    place = out or run / "report.html"
    if follow:
        show_text(f"{place}: a browser shows it live; Ctrl-C ends it")
    show_text(write_report(run, place, planned, follow=follow))
