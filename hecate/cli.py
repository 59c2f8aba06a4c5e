"""The command line. Heavy imports stay inside the commands, so that --help is immediate."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hecate.errors import USER_ERROR_EXIT, UserError
from hecate.ranks.launched import ERRORS_VARIABLE, JOIN_VARIABLE, STORE_VARIABLE, error_file, mistakes

if TYPE_CHECKING:
    from hecate.config import Config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fully sharded sparse data parallel (FSSDP) training of mixtures of LoRA experts.",
)

_Overrides = Annotated[list[str] | None, typer.Argument(help="key=value pairs that take the place of the file's")]


def main() -> None:
    """Entry point: a user's mistake is a short text and exit status 2, never a traceback."""
    try:
        app()
    except UserError as error:
        _report(error)
        sys.exit(USER_ERROR_EXIT)


def _report(error: UserError) -> None:
    folder = os.environ.get(ERRORS_VARIABLE)
    if folder:
        # The launcher shows it if rank 0 had nothing to say: usually all ranks meet the same mistake.
        error_file(Path(folder), int(os.environ["RANK"])).write_text(f"hecate: {error}", encoding="utf-8")
        if os.environ["RANK"] != "0":
            return
    print(f"hecate: {error}", file=sys.stderr)


@app.command()
def train(config: Annotated[Path, typer.Argument(help="YAML file")], overrides: _Overrides = None) -> None:
    """Train as CONFIG says. Started plainly it spawns its own ranks; under torchrun it uses the ranks it is given."""
    rank = os.environ.get("RANK")
    if rank is None:
        from hecate.config import load_config
        from hecate.data.syntax import check_syntax
        from hecate.launch.local import launch_local
        from hecate.parallel.mesh import make_mesh

        loaded = load_config(config, overrides or ())
        _check_kernels(loaded.kernels)
        check_syntax([*loaded.data.train, *loaded.data.eval], loaded.data.on_bad_sample)
        count = loaded.nproc or _default_ranks()
        make_mesh(count, loaded.fssdp.shard_size, loaded.model.tensor_parallel)
        _check_vocabulary(loaded)
        status = launch_local(["train", str(config), *(overrides or ())], count, survives=loaded.fssdp.redundancy > 0)
        raise typer.Exit(status)
    errors = os.environ.get(ERRORS_VARIABLE)
    if errors and mistakes(Path(errors)):
        sys.exit(USER_ERROR_EXIT)  # an agent starts ranks again whatever ended them; a mistake stays one
    from hecate.config import load_config

    loaded = load_config(config, overrides or (), claim_output=False)
    _check_kernels(loaded.kernels)
    from hecate.train.preload import preload

    preload()
    from hecate.elastic.local_group import local_controller
    from hecate.elastic.restart import begin_or_resume
    from hecate.ranks.ranks import join_ranks, lost_a_peer
    from hecate.train.loop import train as run

    try:
        with join_ranks(loaded.fssdp.shard_size, loaded.model.tensor_parallel) as ranks:
            # Only one process may ask whether output_dir is free: rank 0 of torchrun, or the launcher before it started us.
            asks = ranks.is_first and STORE_VARIABLE not in os.environ
            loaded = begin_or_resume(loaded, ranks, claim=(lambda: load_config(config, overrides or ())) if asks else None)
            run(loaded, ranks, controller=local_controller(loaded), joins=JOIN_VARIABLE in os.environ)
    except RuntimeError as error:
        if not lost_a_peer(error):
            raise
        print(f"hecate: rank {rank} stops, for it has lost another: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        sys.exit(1)


@app.command()
def launch(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: _Overrides = None,
    nnodes: Annotated[str, typer.Option(help="nodes of the job, or MIN:MAX: it then shrinks and grows between them")] = "1",
    nproc_per_node: Annotated[int | None, typer.Option(min=1, help="ranks on each; left out: nproc, one a GPU, or 2")] = None,
    rdzv_endpoint: Annotated[str | None, typer.Option(help="HOST:PORT where the nodes meet: one of them, the same on all")] = None,
    rdzv_id: Annotated[str, typer.Option(help="name of the job, the same on all nodes")] = "hecate",
    max_restarts: Annotated[int, typer.Option(min=0, help="times that all ranks are started again after one has died")] = 3,
) -> None:
    """Train as CONFIG says, on one or several nodes: run it on each. When a rank or a node dies it goes on from its last checkpoint."""
    # Read when torch is imported. What the agent's store warns of, at length, we say in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from hecate.config import load_config
    from hecate.data.syntax import check_syntax
    from hecate.launch.torchrun import check_fit, node_range
    from hecate.launch.torchrun import launch as launch_torchrun

    nodes = node_range(nnodes)
    loaded = load_config(config, overrides or (), claim_output=nodes[1] == 1)
    _check_kernels(loaded.kernels)
    check_syntax([*loaded.data.train, *loaded.data.eval], loaded.data.on_bad_sample)
    ranks = nproc_per_node or loaded.nproc or _default_ranks()
    check_fit(loaded, nodes, ranks)
    _check_vocabulary(loaded)
    arguments = ["train", str(config), *(overrides or ())]
    status = launch_torchrun(arguments, nodes=nodes, ranks_per_node=ranks, endpoint=rdzv_endpoint, job=rdzv_id, max_restarts=max_restarts)
    raise typer.Exit(status)


@app.command()
def ray(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: _Overrides = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="HOST:PORT of the cluster's head, or local: a private one on this machine")
    ] = "",
    metrics_port: Annotated[int | None, typer.Option(min=0, max=65535, help="serve Prometheus metrics on 127.0.0.1; 0: any port")] = None,
) -> None:
    """Train as CONFIG says on a Ray cluster, from one of its nodes: places ranks, shares work by speed, survives lost devices."""
    if not address:
        raise UserError("--address: give HOST:PORT of the cluster's head, or local; no cluster is joined unasked")
    from hecate.launch.ray_driver import run_on_ray

    raise typer.Exit(run_on_ray(config, overrides or (), address, metrics_port))


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="YAML file, inside the working directory")],
    overrides: _Overrides = None,
    address: Annotated[str, typer.Option(help="http://HOST:PORT of the cluster's dashboard")] = "",
    working_dir: Annotated[
        Path, typer.Option(help="folder whose code and configurations are uploaded; never data, runs or secrets")
    ] = Path(),
) -> None:
    """Run `hecate ray CONFIG` as a job on a Ray cluster: waits for it, shows its output, ends with its exit status."""
    if not address:
        raise UserError("--address: give http://HOST:PORT of the cluster's dashboard; no cluster is looked for")
    from hecate.launch.submit import submit as run

    raise typer.Exit(run(config, overrides or (), address, working_dir=working_dir))


@app.command()
def status(run: Annotated[Path, typer.Argument(help="output_dir of a run that `hecate ray` has started, or its configuration")]) -> None:
    """What a running job does: state, devices, shares, imbalance, last checkpoint."""
    from hecate.launch.status import read_status, status_text

    if run.is_file():
        from hecate.config import load_config

        run = Path(load_config(run, claim_output=False).output_dir)
    print(status_text(read_status(run)))


@app.command(name="eval")
def evaluate(
    config: Annotated[Path, typer.Argument(help="the run's YAML file, or the config.yaml in its folder")],
    overrides: _Overrides = None,
    adapter: Annotated[Path | None, typer.Option(help="adapter or model folder; left out: the one in output_dir")] = None,
) -> None:
    """Held-out loss and exact accuracy of what a run has left, adapter or model, on data.eval, in one process."""
    from hecate.config import load_config

    loaded = load_config(config, overrides or (), claim_output=False)
    from hecate.train.inference import evaluate_trained

    evaluate_trained(loaded, adapter or Path(loaded.output_dir) / ("model" if loaded.moe.family == "full" else "adapter"))


@app.command()
def generate(
    adapter: Annotated[Path, typer.Argument(help="adapter or model folder, such as runs/quickstart/adapter")],
    prompt: Annotated[str, typer.Argument(help="what the user says")],
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    model: Annotated[str | None, typer.Option(help="base model; left out: the one the adapter names")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Answer one prompt, greedily, with an adapter over its base model, or with the model that a run has left."""
    from hecate.train.inference import answer

    print(answer(adapter, prompt, system=system, model=model, max_new_tokens=max_new_tokens))


@app.command()
def profile(
    out: Annotated[Path, typer.Option(help="YAML file to write; a run takes it as topology=FILE.yaml")],
    nproc: Annotated[int | None, typer.Option(min=1, help="local ranks; left out: one a GPU, or 2")] = None,
) -> None:
    """Measure devices and links as the ranks of a run meet them. Starts its own ranks, or uses those of torchrun."""
    rank = os.environ.get("RANK")
    if rank in (None, "0"):
        from hecate.parallel.topology_file import check_writable

        check_writable(out)
    if rank is None:
        from hecate.launch.local import launch_local

        raise typer.Exit(launch_local(["profile", "--out", str(out)], nproc or _default_ranks()))
    if nproc is not None:
        raise UserError("--nproc: torchrun has started the ranks already; give it --nproc-per-node instead")
    from hecate.profile.run import profile as measure
    from hecate.ranks.ranks import join_ranks

    with join_ranks() as ranks:
        measure(ranks, out)
    if rank == "0":
        print(f"{out}:\n{out.read_text(encoding='utf-8')}", end="")


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: _Overrides = None,
    topology: Annotated[str | None, typer.Option(help="in place of the file's: preset of configs/topologies, or a YAML file")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="with topology auto; left out: as train would start")] = None,
    workload: Annotated[str, typer.Option(help="synthetic loads to reckon with")] = "dirichlet_drift",
    json_path: Annotated[Path | None, typer.Option("--json", help="write all figures there")] = None,
) -> None:
    """Dry run: memory, bytes and time of a step of CONFIG on any topology. Loads no weights, needs no GPU."""
    # Compiling the planners' loops takes longer than running them a few times.
    os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
    from hecate.config import load_config
    from hecate.forecast.plan import run_plan

    loaded = load_config(config, overrides or (), claim_output=False)
    run_plan(loaded, topology=topology, ranks=ranks, workload=workload, json_path=json_path)


@app.command()
def simulate(
    context: typer.Context,
    topology: Annotated[str | None, typer.Option(help="preset of configs/topologies, or a YAML file")] = None,
    model: Annotated[str | None, typer.Option(help="preset of configs/models, or a YAML file")] = None,
    workload: Annotated[str, typer.Option(help="a name, several with commas between, or all")] = "zipf",
    trace: Annotated[Path | None, typer.Option(help="recorded loads in place of a workload")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of a rank in a step")] = 8192,
    policy: Annotated[str, typer.Option(help="a name, several with commas between, or all")] = "all",
    steps: Annotated[int, typer.Option(min=1)] = 12,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    exact: Annotated[bool, typer.Option("--exact", help="plan with the step's own loads in place of the last ones'")] = False,
    rematerialize: Annotated[bool, typer.Option("--rematerialize", help="drop replicas between forward and backward pass")] = False,
    max_imbalance: Annotated[float | None, typer.Option(min=1, help="largest over mean compute of the ranks; left out: none")] = None,
    sweep: Annotated[str | None, typer.Option(help="many cases: preset of configs/experiments, or a YAML file")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write all figures there")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="write a PNG of the step times there")] = None,
) -> None:
    """Put expert loads through placement policies on any cluster: time, bytes and memory of a step. Needs no GPU."""
    if sweep is not None:
        _refuse_beside(context, "--sweep", "its file says all the rest", allowed=("sweep", "json_path", "plot_path"))
        from hecate.forecast.simulate import run_sweep

        run_sweep(sweep, json_path, plot_path)
        return
    if trace is not None:
        others = ("workload", "tokens", "steps", "seed")
        _refuse_beside(context, "--trace", "it brings its own", allowed=tuple(name for name in context.params if name not in others))
    from hecate.forecast.simulate import run_simulation

    run_simulation(
        topology=topology,
        model=model,
        workload=workload,
        trace=trace,
        tokens=tokens,
        policy=policy,
        steps=steps,
        seed=seed,
        exact=exact,
        rematerialize=rematerialize,
        max_imbalance=max_imbalance,
        json_path=json_path,
        plot_path=plot_path,
    )


@app.command(name="make-tasks")
def make_tasks(
    folder: Annotated[Path, typer.Argument(help="where to write {task}.train.jsonl and {task}.eval.jsonl")],
    tasks: Annotated[str, typer.Option(help="comma-separated task names")] = "chain_sum,gcd,letter_counting,count_bits",
    train_size: Annotated[int, typer.Option(min=1)] = 1000,
    eval_size: Annotated[int, typer.Option(min=1)] = 50,
    seed: int = 0,
) -> None:
    """Write multi-task data with reasoning-gym (extra `quickstart`)."""
    from hecate.data.synthetic_tasks import write_tasks

    for written in write_tasks(folder, tasks.split(","), train_size, eval_size, seed):
        every = ", all the different prompts that there are" if written.exhausted else ""
        print(f"{written.task}: {written.train_samples} for training, {written.eval_samples} held out{every}")


def _refuse_beside(context: typer.Context, option: str, why: str, *, allowed: tuple[str, ...]) -> None:
    """No other option than the allowed ones was given."""
    named = {param.name: param.opts[0] for param in context.command.params if param.name is not None}
    given = [name for name in named if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"]
    if superfluous := [named[name] for name in given if name not in allowed]:
        raise UserError(f"{option}: {why}; leave out {', '.join(superfluous)}")


def _check_kernels(kernels: str) -> None:
    """Refuse Triton where it cannot run, on the machine that trains: elsewhere a configuration may well be planned with."""
    if kernels != "triton":
        return
    import torch

    from hecate.kernels.backend import triton_problem

    problem = triton_problem("cuda" if torch.cuda.is_available() else "cpu")
    if problem is not None:
        raise UserError(problem)


def _check_vocabulary(config: Config) -> None:
    """Refuse before any process starts parts that only the tokenizer can tell do not fit."""
    if config.model.tensor_parallel == 1:
        return
    from hecate.megatron.tokenizer import tokenizer_of, vocabulary_of

    vocabulary_of(config, tokenizer_of(config))


def _default_ranks() -> int:
    import torch

    return torch.cuda.device_count() or 2
