"""A submitted job uploads code and configurations, and nothing that could be a secret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import hecate
from hecate.errors import UserError
from hecate.launch.ray_job import upload
from hecate.launch.ray_job.driver import run_on_ray
from hecate.launch.ray_job.submit import submit
from hecate.launch.ray_job.upload import stage, uploaded_files

NAMED = ("config.yaml", "my/nested/deep.yml")
TAKEN = ("my/data/__init__.py", "my/data/read.py", "my/auth.py", "pyproject.toml", "my/data/preset.yaml", *NAMED)
LEFT = (
    "other.yaml",
    "apikeys.yaml",
    "kubeconfig.yaml",
    "auth.toml",
    "my/data/apikeys.yaml",
    "my/data/auth.toml",
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
    assert {str(path) for path in uploaded_files(filled(tmp_path, (*TAKEN, *LEFT)), set(map(Path, NAMED)))} == set(TAKEN)


@pytest.mark.parametrize("target", ["../outside", ".hidden", "runs", "venv"])
def test_a_link_does_not_bring_what_its_target_is_kept_from(tmp_path: Path, target: str) -> None:
    """To a folder outside, as a linked ~/.config is, or to one inside that is left out; and to single files in them."""
    root = tmp_path / "root"
    filled(root, ("code.py",))
    filled(root / target, ("x.py", "x.yaml"))
    (root / "shared").symlink_to(root / target)
    (root / "single.py").symlink_to(root / target / "x.py")
    (root / "plain.yaml").symlink_to(root / target / "x.yaml")
    assert uploaded_files(root, {Path("plain.yaml")}) == [Path("code.py")]
    with pytest.raises(UserError, match=r"plain.yaml: the job needs this file, and it would not be uploaded"):
        stage(root, tmp_path / "copy", {Path("plain.yaml")})


def test_a_pipe_is_left_out(tmp_path: Path) -> None:
    filled(tmp_path, ("code.py",))
    os.mkfifo(tmp_path / "pipe.py")
    assert uploaded_files(tmp_path) == [Path("code.py")]


def test_a_link_to_a_secret_is_left_out(tmp_path: Path) -> None:
    filled(tmp_path, ("token.py", "code.py"))
    (tmp_path / "harmless.py").symlink_to("token.py")
    assert uploaded_files(tmp_path) == [Path("code.py")]


def test_a_linked_package_is_taken_where_it_is_linked_and_circles_end(tmp_path: Path) -> None:
    """In a checkout of hecate, for example, hecate/launch is a link to launch."""
    filled(tmp_path, ("launch/ray_job/worker.py", "hecate/__init__.py"))
    (tmp_path / "hecate" / "launch").symlink_to("../launch")
    (tmp_path / "launch" / "again").symlink_to("..")
    assert {"launch/ray_job/worker.py", "hecate/launch/ray_job/worker.py", "hecate/__init__.py"} <= {
        str(path) for path in uploaded_files(tmp_path)
    }


def test_a_package_of_this_checkout_is_taken_whole() -> None:
    """Among others hecate/data, whose name is that of folders with data."""
    root = Path(hecate.__file__).parents[1]
    taken = {str(path) for path in uploaded_files(root)}
    packages = [path for path in (root / "hecate").rglob("*.py") if "__pycache__" not in path.parts]
    assert {str(path.relative_to(root)) for path in packages} <= taken
    assert "hecate/data/stream.py" in taken
    configurations = [path for path in (root / "configs").rglob("*") if path.suffix in (".yaml", ".jinja")]
    assert {f"hecate/{path.relative_to(root)}" for path in configurations} <= taken


def test_a_copy_is_staged_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, target = filled(tmp_path / "root", TAKEN), tmp_path / "target"
    target.mkdir()
    named = set(map(Path, NAMED))
    shown = stage(root, target, named)
    assert shown == f"uploading 7 files, 1 KiB, from {root}: config.yaml, my/nested/deep.yml, pyproject.toml, 4 files of my/"
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == set(TAKEN)
    monkeypatch.setattr(upload, "MAX_BYTES", 2)
    with pytest.raises(UserError, match="would be uploaded"):
        stage(root, tmp_path / "other", named)


CONFIG = "model: {{name_or_path: {model}}}\ndata: {{train: {train}}}\noutput_dir: {out}\nmax_steps: 1\n"


def test_what_the_copy_on_the_cluster_would_not_have_is_refused_before_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside.yaml"
    filled(inside, ("a.jsonl", "model/config.json", "model/model.safetensors", "model/tokenizer.json"))
    monkeypatch.chdir(inside)
    outside.write_text(CONFIG.format(train=inside / "a.jsonl", out=tmp_path / "runs", model=inside / "model"))
    with pytest.raises(UserError, match=rf"^{outside}: lies outside {inside}, which is uploaded; give --working-dir"):
        submit(outside, [], "http://127.0.0.1:9", working_dir=inside)
    (inside / "run.yaml").write_text(CONFIG.format(train="a.jsonl", out="runs/first", model="model"))
    relative = r"must be absolute paths .*\n  output_dir: runs/first\n  model\.name_or_path: model\n  data: a: a\.jsonl$"
    with pytest.raises(UserError, match=relative):
        submit(inside / "run.yaml", [], "http://127.0.0.1:9", working_dir=inside)
    with pytest.raises(UserError, match=relative):
        run_on_ray(inside / "run.yaml", [], "127.0.0.1:9", None)
    for address in ("127.0.0.1:8265", "http://127.0.0.1"):
        (inside / "run.yaml").write_text(CONFIG.format(train=inside / "a.jsonl", out=tmp_path / "runs", model=inside / "model"))
        with pytest.raises(UserError, match=rf"^--address: must be http://HOST:PORT .*, got '{address}'$"):
            submit(inside / "run.yaml", [], address, working_dir=inside)
