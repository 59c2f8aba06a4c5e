"""Experiment trackers that a run reports to beside metrics.jsonl (`report_to`): an adapter of a few lines for each.

What is not installed is refused before a run starts (`check_trackers`). How a run keeps a slow or broken tracker from disturbing it is in
`hecate.report.tracking.tracker_threads`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hecate.errors import UserError

if TYPE_CHECKING:
    import numpy as np

PROJECT = "hecate"
"""the trackers' project, where they have projects and the user's environment names none"""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it is opened."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    """all keys, nested"""
    step: int
    """steps done before; not 0: the run is resumed, and what a tracker has of later steps no longer counts"""
    known_as: str | None
    """`Tracker.run_id` of the run's beginning; None: the tracker does not know the run"""


class Tracker(Protocol):
    """A run, as a tracker has it open. All calls come from the thread that has opened it."""

    @property
    def run_id(self) -> str | None:
        """By what the tracker goes on with this run after a resume; None: it needs nothing."""
        ...

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Report a step. Pictures are uint8 [rows, columns, 3]."""
        ...

    def close(self) -> None:
        """Report what is still held back, and end."""
        ...


class TensorBoard:
    """Writes event files to OUTPUT_DIR/tensorboard."""

    run_id = None

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.step else None)

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        for name, pixels in pictures.items():
            self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases. WANDB_MODE=offline writes to OUTPUT_DIR/wandb alone; WANDB_PROJECT names the project."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            dir=str(run.folder),
            config=dict(run.config),
            id=run.known_as,
            resume="allow",
            settings=wandb.Settings(console="off"),  # the terminal is the run's own
        )

    @property
    def run_id(self) -> str:
        return str(self._run.id)

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        self._run.log({**numbers, **{name: self._wandb.Image(pixels) for name, pixels in pictures.items()}}, step=step)

    def close(self) -> None:
        self._run.finish()


_NOT_IN_MLFLOW = re.compile(r"[^/\w.\- :]")
"""Characters that MLflow refuses in names of metrics. Sources of data may have them."""


class Mlflow:
    """MLflow. MLFLOW_TRACKING_URI says where, MLFLOW_EXPERIMENT_NAME in which experiment; without the first, files of this machine."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self._mlflow = mlflow
        self._run = mlflow.start_run(run_id=run.known_as, run_name=None if run.known_as else run.name)
        mlflow.log_dict(dict(run.config), "config.yaml")

    @property
    def run_id(self) -> str:
        return str(self._run.info.run_id)

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        self._mlflow.log_metrics({_NOT_IN_MLFLOW.sub("_", name): value for name, value in numbers.items()}, step=step)
        for name, pixels in pictures.items():
            # By default MLflow's own threads send it, for which the process would wait at its end.
            self._mlflow.log_image(pixels, key=name, step=step, synchronous=True)

    def close(self) -> None:
        self._mlflow.end_run()


class Trackio:
    """Trackio, whose runs are on this machine. It knows a run by its name, and gives a run whose name is taken another one."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._trackio = trackio
        resume = "allow" if run.known_as else "never"
        opened = trackio.init(project=PROJECT, name=run.known_as or run.name, config=dict(run.config), resume=resume)
        self.run_id = str(opened.name)

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        self._trackio.log({**numbers, **{name: self._trackio.Image(pixels) for name, pixels in pictures.items()}}, step=step)

    def close(self) -> None:
        self._trackio.finish()


ADAPTERS: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}
"""name in `report_to`, which is also that of the Python package -> how a run is opened"""


def check_trackers(names: Sequence[str]) -> None:
    """Check that the trackers are installed.

    Raises:
        UserError: some are not.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"report_to: {', '.join(missing)}: not installed\n  pip install {' '.join(missing)}, or leave out of report_to")
