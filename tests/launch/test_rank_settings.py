"""Every way to start a rank sets what torch's libraries read of the environment, unless the user has set it.

`test_local` has the GPU allocator under `hecate train`.
"""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest

from hecate.errors import UserError
from hecate.launch import local_launcher, node_launcher
from hecate.launch.addresses import Endpoint
from hecate.launch.ray_job.worker import Worker
from hecate.ranks.gpu_allocator import gpu_allocator_defaults
from hecate.ranks.processor import ONEDNN_SETTINGS
from hecate.train.rank_main import train_as_rank

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_set_stays(name: str) -> None:
    assert gpu_allocator_defaults({name: "max_split_size_mb:64"}) == {}
    assert gpu_allocator_defaults({name: ""}) == {}


def launch(folder: Path) -> None:
    meeting = Endpoint("127.0.0.1", 1, "127.0.0.1", "lo", on_this_node=True)
    os.environ.update(node_launcher._environment(meeting, b"secret", 2))


def plain_torchrun(folder: Path) -> None:
    with pytest.raises(UserError):
        train_as_rank(folder / "missing.yaml", [])


def ray(folder: Path) -> None:
    Worker("127.0.0.1", 1, "secret", 0, "", 1, "127.0.0.1")


@pytest.mark.parametrize("start", [launch, plain_torchrun, ray])
@pytest.mark.parametrize("given", [{}, {NAMES[1]: "backend:cudaMallocAsync"}])
def test_ranks_have_expandable_segments(start: object, given: dict[str, str], tmp_path: Path) -> None:
    assert callable(start)
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    with mock.patch.dict(os.environ, clean | given, clear=True):
        start(tmp_path)
        found = {name: os.environ[name] for name in NAMES if name in os.environ}
    assert found == (given or {NAMES[0]: "expandable_segments:True"})


def train(_folder: Path) -> None:
    os.environ.update(local_launcher._environment(2))


@pytest.mark.parametrize("start", [train, launch, plain_torchrun])
@pytest.mark.parametrize("given", [{}, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}])
def test_ranks_keep_the_kernels_of_many_shapes(start: object, given: dict[str, str], tmp_path: Path) -> None:
    assert callable(start)
    clean = {name: value for name, value in os.environ.items() if name not in ONEDNN_SETTINGS}
    with mock.patch.dict(os.environ, clean | given, clear=True):
        start(tmp_path)
        assert {name: os.environ[name] for name in ONEDNN_SETTINGS} == (given or {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4096"})
