"""Where the checks work: a folder, the GPUs that there are, and programs in processes of their own, so that no check ends another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from testing.tiny_run import save_random_llama
from tests.mock_cuda import trainings
from tests.mock_cuda.runs import Runs, do
from tests.mock_cuda.trainings import Settings
from tests.plain_moe_lora import save_tiny

ROOT = Path(__file__).resolve().parents[2]
Figures = dict[str, float | str]
"""what a check has found, by name"""
TRAINING_SECONDS = 150
"""that the trainings of one process may take, so that one that hangs leaves time for the other checks; Triton compiles meanwhile"""
LAYERS = 2
"""decoder layers of the models that are trained, all of them with experts"""
DENSE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2}
SPARSE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "moe_intermediate_size": 192}
"""sizes of the models on a real GPU; the interpreter of Triton, on a mock one, takes the tiny ones of tests"""


class Failed(Exception):
    """The check has found that something is wrong."""


class Skipped(Exception):
    """The check cannot be made on this machine; its text says why."""


@dataclass
class Bench:
    """One call of the checks."""

    folder: Path
    mock: bool
    gpus: int
    seconds: float
    """that all checks together may take"""
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> int:
        return int(self.seconds - (time.monotonic() - self.began))

    def needs(self, gpus: int) -> None:
        """Raises Skipped: there are fewer GPUs."""
        if self.gpus < gpus:
            raise Skipped(f"needs {gpus} GPUs, and there {'is' if self.gpus == 1 else 'are'} {self.gpus}")

    def real(self) -> None:
        """Raises Skipped: the GPUs are mock ones."""
        if self.mock:
            raise Skipped("a mock GPU cannot show this")

    def train(
        self,
        name: str,
        cases: Mapping[str, Settings],
        *,
        world: int = 1,
        on_cpu: bool = False,
        environment: Mapping[str, str] | None = None,
        asked: Sequence[str] = (),
        begun: Runs | None = None,
    ) -> Runs:
        """Do trainings on GPUs, or on the CPU. For the arguments see `Runs` and `do`. Raises Failed: a rank has failed."""
        overrides = {case: trainings.overrides(settings, self.folder) for case, settings in cases.items()}
        runs = Runs(str(self.folder / "config.yaml"), str(self.folder / f"runs-{name}"), world, self.mock and not on_cpu, overrides, asked)
        limit = max(self.seconds_left if self.mock else min(self.seconds_left, TRAINING_SECONDS), 1)
        runs = replace(runs, gpu=not (self.mock or on_cpu), environment=environment or {}, seconds=limit)
        try:
            return do(runs, begun)
        except AssertionError as error:
            raise Failed(str(error)) from None

    def program(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        seconds: float | None = None,
        first_path: Path | None = None,
    ) -> str:
        """What a command prints.

        Args:
            seconds: that it may take; None: what is left of all.
            first_path: where its Python looks for modules first.

        Raises:
            Failed: it does not end in time, or its exit status is not 0.
        """
        limit = max(min(seconds or self.seconds_left, self.seconds_left), 1)
        variables = _variables(first_path) | (environment or {})
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            printed, _ = process.communicate()
            raise Failed(f"did not end in {limit:.0f} seconds: {' '.join(command)}\n{printed[-2000:]}") from None
        if process.returncode:
            raise Failed(f"exit status {process.returncode}: {' '.join(command)}\n{printed[-2000:]}")
        return printed

    @contextmanager
    def beside(self, command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
        """Another program, until the end of the block."""
        process = subprocess.Popen(command, cwd=ROOT, env=_variables(None))
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def on_device(self, module: str, *arguments: str) -> str:
        """What `python -m tests.gpu.on_device MODULE` prints: a module's `main` in a process that has the GPU. Raises Failed."""
        return self.program([sys.executable, "-m", "tests.gpu.on_device", module, "mock" if self.mock else "gpu", *arguments])


Check = Callable[[Bench], Figures]
"""Makes a check and returns what it has found. Raises Failed or Skipped."""


def make_bench(folder: Path, *, mock: bool, gpus: int, seconds: float) -> Bench:
    """Fill the empty `folder` with models and data."""
    trainings.make_folder(folder)
    if not mock:
        save_random_llama(folder / "model", **DENSE, num_hidden_layers=LAYERS)
        ends = {"eos_token_id": 257, "bos_token_id": 256, "pad_token_id": 257, "vocab_size": 258}
        save_tiny("qwen3_moe", folder / "moe", torch.float32, max_position_embeddings=128, num_hidden_layers=LAYERS, **SPARSE, **ends)
    return Bench(folder, mock, gpus, seconds)


def _variables(first_path: Path | None) -> dict[str, str]:
    """The environment of a program."""
    paths = [*([str(first_path)] if first_path else []), str(ROOT)]
    settings = {"OMP_NUM_THREADS": "4", "GLOO_SOCKET_IFNAME": "lo", "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1"}
    return os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)}
