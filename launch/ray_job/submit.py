"""Runs `hecate submit`: starts a job on a Ray cluster from a machine outside it, shows the job's output, and waits for its end."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hecate.config import Config, load_config
from hecate.config.effective import leaves_of
from hecate.errors import UserError
from hecate.io.signals import on_signals
from hecate.io.terminal import PROGRESS, show_text
from hecate.launch.ray_job.cluster import TOKEN_MODE, WRONG_TOKEN, check_token, import_ray, refuse_if_nobody_listens
from hecate.launch.ray_job.driver import check_for_ray
from hecate.launch.ray_job.upload import SUFFIXES, stage
from hecate.ranks.launcher_files import COLLECTIVES_VARIABLE

_log = logging.getLogger(__name__)

_STOP_SECONDS = "120"
"""seconds from the request that a job stop to its being killed, in which its ranks save"""


def submit(config: Path, overrides: Sequence[str], address: str, *, working_dir: Path) -> int:
    """Run `hecate ray CONFIG` on the cluster whose dashboard is at `address`, http://HOST:PORT.

    Args:
        working_dir: a folder whose code and configurations are uploaded (`hecate.launch.ray_job.upload`). The job starts in the copy.

    Returns:
        The job's exit status.

    Raises:
        UserError: the configuration or the address is wrong, or the cluster takes no job.
    """
    inside = _inside(config, working_dir)
    loaded = load_config(config, overrides, claim_output=False)
    check_for_ray(loaded)
    client = _client(address)
    with tempfile.TemporaryDirectory(prefix="hecate-upload-") as folder:
        staged = Path(folder, "job")
        staged.mkdir()
        _log.info(f"hecate: {stage(working_dir, staged, {inside, *_named_files(loaded, working_dir)})}")
        command = shlex.join(["python", "-m", "hecate", "ray", str(inside), *overrides])
        variables = {name: os.environ[name] for name in (COLLECTIVES_VARIABLE,) if name in os.environ}
        variables["RAY_JOB_STOP_WAIT_TIME_S"] = _STOP_SECONDS
        if (mode := os.environ["RAY_AUTH_MODE"]) != TOKEN_MODE:  # a token is the nodes' own: the dashboard shows a job's variables to all
            variables["RAY_AUTH_MODE"] = mode
        try:
            job = client.submit_job(entrypoint=command, runtime_env={"working_dir": str(staged), "env_vars": variables})
        except RuntimeError as error:
            raise _takes_no_job(address, error) from None
    PROGRESS.info(f"hecate: job {job} on {address}")
    return _follow(client, job)


def _follow(client: Any, job: str) -> int:
    """Show a job's output until it has ended; SIGINT and SIGTERM stop it."""

    def stop(_number: int, _frame: Any) -> None:
        _log.info(f"hecate: asking job {job} to save and stop")
        client.stop_job(job)

    printed: list[str] = []
    with on_signals(stop):
        with suppress(ConnectionError):
            asyncio.run(_show(client, job, printed))
        while not (status := client.get_job_status(job)).is_terminal():
            time.sleep(0.2)
    text = client.get_job_logs(job)
    shown = "".join(printed)
    if text.startswith(shown):  # what came after the stream had ended
        show_text(text[len(shown) :], end="")
    info = client.get_job_info(job)
    if status.value == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None:
        _log.error(f"hecate: job {job} {status.value.lower()}: {info.message}")
    return info.driver_exit_code or 1


async def _show(client: Any, job: str, printed: list[str]) -> None:
    async for text in client.tail_job_logs(job):
        show_text(text, end="")
        printed.append(text)


def _client(address: str) -> Any:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port is None:
        raise UserError(f"--address: must be http://HOST:PORT of the cluster's dashboard, such as http://127.0.0.1:8265, got {address!r}")
    refuse_if_nobody_listens(parts.hostname, parts.port, "Ray dashboard")
    ray = import_ray()
    check_token()
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except ray.exceptions.AuthenticationError:
        raise UserError(f"{address}: {WRONG_TOKEN}") from None
    except (ConnectionError, RuntimeError) as error:
        raise _takes_no_job(address, error) from None


def _takes_no_job(address: str, error: Exception) -> UserError:
    return UserError(f"{address}: Ray takes no job: {' '.join(str(error).split())[:300]}")


def _inside(config: Path, working_dir: Path) -> Path:
    try:
        return config.resolve().relative_to(working_dir.resolve())
    except ValueError:
        raise UserError(f"{config}: lies outside {working_dir}, which is uploaded; give --working-dir a folder that holds it") from None


def _named_files(config: Config, working_dir: Path) -> set[Path]:
    """The files inside the folder that values of a configuration name, such as a topology's, relative to the folder."""
    texts = [value for value in leaves_of(asdict(config)).values() if isinstance(value, str) and value.endswith(SUFFIXES)]
    return {Path(text) for text in texts if not Path(text).is_absolute() and (working_dir / text).is_file()}
