"""The status file of a job, how it is shown to a person, and how to Prometheus."""

from __future__ import annotations

import errno
import json
import os
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from hecate.errors import UserError
from hecate.launch.membership.job_states import State
from hecate.launch.ray_job.prometheus import exposition, serving
from hecate.launch.ray_job.status import DeviceState, DeviceStatus, JobStatus, StatusNote, read_status, status_text, write_status

DEVICE = DeviceStatus(
    device=0,
    rank=0,
    state=DeviceState.TRAINING,
    sequences=3,
    experts=6,
    speed=0.5,
    kind='H"100',
    node="10.0.0.1 abc",
    pid=7,
)
STATUS = JobStatus(
    state=State.RUNNING,
    detail="",
    generation=2,
    step=40,
    max_steps=100,
    loss=1.25,
    tokens_per_s=900.0,
    imbalance=None,
    last_checkpoint="checkpoint-20",
    devices=(DEVICE, replace(DEVICE, device=1, rank=None, state=DeviceState.COMING, sequences=None, experts=None, speed=None)),
    spares=1,
    topology=None,
    notes=(StatusNote(when="10:00:00", text="straggler: device 0"),),
    updated=1000.0,
)
KEYS = "state ended detail generation max_steps step loss tokens_per_s imbalance last_checkpoint devices spares topology notes updated"


def test_it_is_read_back_and_replaced_whole(tmp_path: Path) -> None:
    write_status(tmp_path, replace(STATUS, step=1))
    write_status(tmp_path, STATUS)
    assert read_status(tmp_path) == STATUS
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_its_json_has_the_keys_of_the_documentation(tmp_path: Path) -> None:
    write_status(tmp_path, STATUS)
    values = json.loads((tmp_path / "status.json").read_text(encoding="utf-8"))
    assert set(values) == set(KEYS.split())
    assert (values["state"], values["ended"], values["notes"]) == ("running", False, [{"when": "10:00:00", "text": "straggler: device 0"}])
    assert set(values["devices"][0]) == {"device", "rank", "state", "sequences", "experts", "speed", "kind", "node", "pid"}
    assert values["devices"][1]["state"] == "coming"


def test_a_full_disk_leaves_the_status_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_status(tmp_path, STATUS)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    write_status(tmp_path, replace(STATUS, step=41))
    assert read_status(tmp_path) == STATUS
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_what_a_person_sees() -> None:
    text = status_text(STATUS, now=1001.0)
    assert "running\n" in text
    assert "step         40 of 100, generation 2" in text
    assert "checkpoint-20" in text
    assert "10:00:00  straggler: device 0" in text
    assert [line.split()[:6] for line in text.splitlines() if "10.0.0.1" in line] == [
        ["0", "0", "training", "3", "6", "0.50"],
        ["1", "-", "coming", "-", "-", "-"],
    ]


def test_a_controller_that_has_gone_silent_is_told() -> None:
    assert "its controller has written nothing since" in status_text(STATUS, now=1100.0)
    assert "controller" not in status_text(replace(STATUS, state=State.FINISHED), now=1100.0)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [(None, "no such file"), (b"{", "cannot be read"), (b"[]", "must be a JSON object"), (b'{"state": "running"}', "has lost its field")],
)
def test_no_status_is_a_clear_error(tmp_path: Path, content: bytes | None, wanted: str) -> None:
    if content is not None:
        (tmp_path / "status.json").write_bytes(content)
    with pytest.raises(UserError, match=wanted):
        read_status(tmp_path)


def test_a_scrape_on_loopback() -> None:
    with serving(0, lambda: STATUS) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)
        with pytest.raises(UserError, match="--metrics-port"), serving(port, lambda: STATUS):
            pass
    assert 'hecate_device_sequences{device="0",kind="H\\"100"} 3' in lines
    assert "hecate_step 40" in lines
    assert 'hecate_state{state="running"} 1' in lines
    assert not [line for line in lines if line.startswith("hecate_imbalance")], "not known yet"
    assert all(line.startswith(("#", "hecate_")) for line in exposition(STATUS).splitlines())
