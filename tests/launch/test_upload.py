"""A submitted job uploads code and configurations, and nothing that could be a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecate.errors import UserError
from hecate.launch.ray_job import upload
from hecate.launch.ray_job.upload import stage, uploaded_files

TAKEN = ("config.yaml", "my/family.py", "pyproject.toml", "my/nested/deep.yml")
LEFT = (
    ".env",
    ".env.yaml",
    "token",
    "auth_token.yaml",
    "hf-token.py",
    "secrets.yaml",
    "my/credentials.toml",
    "db_password.py",
    "key.pem",
    "id_rsa",
    "train.jsonl",
    "model.safetensors",
    "notes.txt",
    "data/prepare.py",
    "runs/first/config.yaml",
    "out/config.yaml",
    "out/metrics.jsonl",
    "checkpoint-5/x.yaml",
    ".git/config.toml",
    ".venv/lib/a.py",
    "env/pyvenv.cfg",
    "env/lib/b.py",
    "__pycache__/c.py",
)


def filled(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x", encoding="utf-8")
    return root


def test_only_code_and_configurations_are_taken(tmp_path: Path) -> None:
    assert {str(path) for path in uploaded_files(filled(tmp_path, (*TAKEN, *LEFT)))} == set(TAKEN)


def test_a_linked_package_is_taken_where_it_is_linked_and_circles_end(tmp_path: Path) -> None:
    """As in a checkout of hecate: hecate/launch is a link to launch."""
    filled(tmp_path, ("launch/ray_job/worker.py", "hecate/__init__.py"))
    (tmp_path / "hecate" / "launch").symlink_to("../launch")
    (tmp_path / "launch" / "again").symlink_to("..")
    assert {"launch/ray_job/worker.py", "hecate/launch/ray_job/worker.py", "hecate/__init__.py"} <= {
        str(path) for path in uploaded_files(tmp_path)
    }


def test_a_copy_is_staged_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, target = filled(tmp_path / "root", TAKEN), tmp_path / "target"
    target.mkdir()
    assert stage(root, target) == len(TAKEN)
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == set(TAKEN)
    monkeypatch.setattr(upload, "MAX_BYTES", 2)
    with pytest.raises(UserError, match="would be uploaded"):
        stage(root, tmp_path / "other")
