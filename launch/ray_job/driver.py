"""`hecate ray`: run one job on a Ray cluster, with its controller in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from hecate.config import Config, load_config, to_yaml
from hecate.config.rules.of_apps import refuse_training
from hecate.config.schema import MEGATRON_EP
from hecate.errors import UserError
from hecate.io.one_writer import one_writer
from hecate.io.signals import on_signals
from hecate.io.terminal import PROGRESS
from hecate.launch.local_launcher import STOPPING
from hecate.launch.policy.devices import Device, choose_devices, devices_of, one_machine, parse_labels
from hecate.launch.ray_job.cluster import connected, private_cluster
from hecate.launch.ray_job.worker import Worker
from hecate.launch.run_folder import run_folder
from hecate.model.sizes.model_check import check_model
from hecate.report.tracking.trackers import check_trackers
from hecate.train.preflight import check_architecture, check_data, check_first_adapter, check_resume

LOCAL = "local"
_FOLDER_SECONDS = 10.0
"""how long the working folder may be missing while Ray copies it"""


def run_on_ray(config_path: Path, overrides: Sequence[str], address: str, metrics_port: int | None, worker: type[Worker] = Worker) -> int:
    """Train as configured on the cluster at `address` (HOST:PORT), or on a private cluster of this machine alone ("local").

    Args:
        worker: the class of the ranks' actors.

    Returns:
        The job's exit status.

    Raises:
        UserError: something is wrong with the configuration, the cluster or its devices.
    """
    config = load_config(config_path, overrides)
    check_for_ray(config)
    check_trackers(config.report_to)
    check_resume(config)
    check_model(config)
    check_first_adapter(config)
    check_data(config)
    with run_folder() as empty:  # into which torch makes a folder as soon as it is asked about a model
        check_architecture(config)
        topology = _configured_topology(config)
        import torch  # noqa: F401 - must come first: once Ray runs, the working folder may be gone for a moment

        working_folder = Path.cwd()
        os.chdir(empty)  # Ray has its workers look for modules where this process is when it joins
        cluster = private_cluster((config.ray.workers or 2) * config.ray.cpus_per_worker) if address == LOCAL else connected(address)
        with cluster as ray:
            _return_to(working_folder)
            found = devices_of(ray.nodes(), parse_labels(config.ray.labels), config.ray.cpus_per_worker)
            devices = choose_devices(found, config.ray.workers, config.ray.min_workers)
            if topology is not None and topology.world_size != len(devices):
                raise UserError(
                    f"topology: {config.topology} has {topology.world_size} devices, but the job gets {len(devices)}\n"
                    "  set ray.workers, or let the ranks measure: topology: auto"
                )
            with one_writer(config.output_dir):
                return _drive(ray, config, devices, topology, metrics_port, worker)


def check_for_ray(config: Config) -> None:
    """Check that a configuration asks for nothing that is unsupported on Ray.

    Raises:
        UserError: it does.
    """
    refuse_training(config)
    _refuse_relative(config)
    if config.model.tensor_parallel > 1:
        raise UserError(
            "model.tensor_parallel: is not supported on Ray, where each rank computes its own sequences\n"
            "  set it to 1, or use hecate launch"
        )
    if config.fssdp.shard_size is not None:
        raise UserError(
            "fssdp.shard_size: is not supported on Ray, where the number of ranks may change\n  set it to null, or use hecate launch"
        )
    if config.fssdp.policy == MEGATRON_EP:
        raise UserError(
            "fssdp.policy: megatron_ep is not supported on Ray, where the number of ranks may change\n"
            "  choose another policy, or use hecate launch"
        )


def _refuse_relative(config: Config) -> None:
    """Refuse relative paths, which would name other files on the cluster, where workers start in a copy of the working folder."""
    paths = {"output_dir": config.output_dir, "model.name_or_path": config.model.name_or_path}
    paths |= {f"data: {source.name}": source.path for source in (*config.data.train, *config.data.eval)}
    wrong = [f"  {key}: {path}" for key, path in paths.items() if not Path(path).is_absolute()]
    if wrong:
        raise UserError(
            "on Ray, data, models and runs are not uploaded; these must be absolute paths on a disk that all nodes share:\n"
            + "\n".join(wrong[:6])
        )


def _return_to(folder: Path) -> None:
    """Change into the working folder, and wait until it exists.

    Each raylet of a machine unpacks the job's files into the same folder again, so the folder may be replaced under a running process.
    """
    deadline = time.monotonic() + _FOLDER_SECONDS
    while True:
        try:
            os.chdir(folder)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _drive(ray: Any, config: Config, devices: list[Device], topology: Any, metrics_port: int | None, worker: type[Worker]) -> int:
    from hecate.launch.ray_job.controller import Controller
    from hecate.launch.ray_job.prometheus import serving
    from hecate.launch.ray_job.rendezvous import Rendezvous
    from hecate.launch.ray_job.status import FILE, JobStatus, write_status
    from hecate.launch.ray_job.worker_group import WorkerGroup, WorkerSettings

    folder = Path(config.output_dir)
    inside = one_machine(devices, ray.nodes())
    host = "127.0.0.1" if inside else ray.util.get_node_ip_address()
    rendezvous = Rendezvous(host)
    settings = WorkerSettings(
        config=to_yaml(replace(config, topology="auto")),
        report_steps=config.ray.report_steps,
        worker=worker,
        node=ray.get_runtime_context().get_node_id(),
        address=host if inside else None,
    )
    group = WorkerGroup(ray, devices, rendezvous, settings)

    def show(status: JobStatus) -> None:
        write_status(folder, status)

    def say(text: str) -> None:
        PROGRESS.info(f"hecate: {text}")

    controller = Controller(group, config, topology, say, show)
    with ExitStack() as stack:
        if metrics_port is not None:
            port = stack.enter_context(serving(metrics_port, lambda: controller.shown))
            say(f"metrics on http://127.0.0.1:{port}/metrics")
        signals = stack.enter_context(_stop_on_signals(controller))
        try:
            status = controller.run()
            return 128 + signals[0] if signals and status == 0 else status
        finally:
            if not controller.began:  # so that the same command can be given again
                (folder / FILE).unlink(missing_ok=True)


def _configured_topology(config: Config) -> Any:
    if config.topology == "auto":
        return None
    from hecate.config.files.presets import find_preset
    from hecate.parallel.cluster.topology_file import load_topology

    return load_topology(find_preset("topologies", "topology", config.topology))


@contextmanager
def _stop_on_signals(controller: Any) -> Iterator[list[int]]:
    """Let the job save and stop at the first SIGINT or SIGTERM, and end at once at the second one. Yields the signals that have come."""
    signals: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        if controller.stop_wanted:
            raise KeyboardInterrupt
        controller.stop_wanted = True
        with suppress(OSError):  # not print, which the signal may have interrupted
            os.write(2, STOPPING.encode())

    with on_signals(ask):
        yield signals
