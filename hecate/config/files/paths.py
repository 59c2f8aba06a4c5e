"""Find the files of the base model and of the data sets that a configuration names."""

import glob
import importlib.util
import os
import re
from pathlib import Path

from hecate.config.files.hub import hub_hint
from hecate.config.files.presets import base_named, base_presets
from hecate.config.problems import shorten
from hecate.errors import UserError

PACKAGE_PREFIX = "package:"
CONFIG_SUFFIXES = (".json", ".yaml")
"""of a file with a model's sizes, like transformers' config.json"""
ADAPTER_CONFIG = "adapter_config.json"
TRAINED_HINT = "give the folder of a run, a checkpoint, an adapter or a whole model"
INDEXED_SUFFIXES = (".idx", ".bin")
"""the endings of the two files of one of Megatron's indexed data sets"""

FORMS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
}
"""the endings of data files, and the forms that they say; a form that is no table of Arrow's may be compressed, and then ends in .gz"""
_BESIDE_ARROW = ("dataset_info.json", "dataset_dict.json", "state.json")
"""what the library `datasets` writes beside Arrow files"""


def find_model(name_or_path: str, *, weights: bool = True) -> Path:
    """Return the .gguf file or the folder (with config.json and *.safetensors) that `model.name_or_path` names.

    A package is searched without importing it.

    Args:
        weights: False where only the model's sizes are wanted: it may then also be a folder with config.json alone, a file like that, or
            the name of one in configs/bases, or a path that is not there and ends in such a model's name.

    Raises:
        UserError: there is no such file or folder.
    """
    if name_or_path.startswith(PACKAGE_PREFIX):
        return _gguf_of_package(name_or_path.removeprefix(PACKAGE_PREFIX))
    path, shown = Path(name_or_path), shorten(name_or_path)
    if not os.path.exists(path):
        known = base_presets()
        if not weights and (base := base_named(name_or_path)):
            return base
        sizes = "" if weights else f" To plan by sizes alone, give one of the names {', '.join(known)}."
        raise UserError(f"no such file or folder: {shown}\nGive a local path; nothing is downloaded.{hub_hint(name_or_path)}{sizes}")
    if os.path.isdir(path):
        if not os.path.isfile(path / "config.json"):
            raise UserError(f"no config.json in the folder {shown}\nGive the folder that the model was saved to.")
        if weights and not any(path.glob("*.safetensors")):
            raise UserError(f"no *.safetensors in the folder {shown}\nSave the model in safetensors form.")
    elif path.suffix != ".gguf" and (weights or path.suffix not in CONFIG_SUFFIXES):
        raise UserError(f"neither a folder nor a .gguf file: {shown}\nGive the model's folder, or a .gguf file.")
    return path


def is_gguf_name(name_or_path: str) -> bool:
    """Return whether `model.name_or_path` names a .gguf file, or a package that holds one."""
    return name_or_path.startswith(PACKAGE_PREFIX) or name_or_path.endswith(".gguf")


def require_trained(name: str | os.PathLike[str]) -> None:
    """Raises UserError: a path to what was trained leads nowhere. A package that holds a .gguf file is not looked for."""
    if not is_gguf_name(os.fspath(name)) and not os.path.lexists(name):
        raise UserError(f"{name}: no such folder\n  {TRAINED_HINT}")


def named_model(name_or_path: str) -> str:
    """Return `model.name_or_path` as adapters name it: an existing path from the root on, so that it holds in every working directory."""
    return os.path.abspath(name_or_path) if os.path.exists(name_or_path) else name_or_path


def adapter_in(folder: str | os.PathLike[str]) -> Path:
    """Return the adapter folder that a path means: a run's folder means the adapter that the run has left."""
    path = Path(folder)
    inside = path / "adapter"
    return inside if not (path / ADAPTER_CONFIG).is_file() and (inside / ADAPTER_CONFIG).is_file() else path


def _gguf_of_package(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None:
        raise UserError(f"no Python package {shorten(package)} is installed\nInstall it, or give the path of a model.")
    found = sorted(file for folder in spec.submodule_search_locations or () for file in Path(folder).rglob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:4]) or "none"
        raise UserError(f"package {package} must hold one .gguf file, found {names}\nGive the path of a .gguf file.")
    return found[0]


def indexed_prefix(path: str) -> str | None:
    """Return PREFIX if the path names an indexed data set, and None otherwise.

    The path may be PREFIX.idx, PREFIX.bin, or PREFIX itself if those two files exist and no file PREFIX does.
    """
    if path.endswith(INDEXED_SUFFIXES):
        return path[:-4]
    both = all(os.path.isfile(path + suffix) for suffix in INDEXED_SUFFIXES)
    return path if both and not os.path.isfile(path) else None


def file_form(path: str) -> str | None:
    """Return the form that a data file's ending says (a value of `FORMS`); None: none."""
    return FORMS.get(Path(path.removesuffix(".gz")).suffix.lower())


def data_files(path: str) -> list[str]:
    """Return the files that a source's path names: itself, the data files in the folder, or the files that match the pattern, by name.

    Files in a folder whose names begin with a dot or an underscore, or do not end as a data file's, are none; nor is plain text beside
    others. Its folders are not entered.
    Raises UserError: there is none, or a folder holds several forms.
    """
    if os.path.isdir(path):
        return _files_in(path)
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]
    try:
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    except RecursionError:  # of a pattern of a thousand folders
        found = []
    if not found:
        hint = f"relative paths start from the working directory; ~ is not expanded.{hub_hint(path)}".removesuffix(".")
        raise UserError(f"no file matches {shorten(path)}\n{hint}")
    return found


def _files_in(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"the folder {shorten(folder)} cannot be read: {error.strerror}") from error
    files = [name for name in names if file_form(name) and name[0] not in "._" and os.path.isfile(os.path.join(folder, name))]
    if any(file_form(name) == "arrow" for name in files):
        files = [name for name in files if name not in _BESIDE_ARROW]
    if any(file_form(name) != "text" for name in files):  # a data set has a README.md beside it, and a license
        files = [name for name in files if file_form(name) != "text"]
    if not files or files == ["dataset_dict.json"]:
        inside = [name for name in names if os.path.isdir(os.path.join(folder, name)) and name[0] not in "._"]
        hint = f"data files end in {', '.join(FORMS)}"
        if inside:
            hint = f"it has folders: name one of them, such as {os.path.join(folder, inside[0])}"
        raise UserError(f"no data file in the folder {shorten(folder)}\n{hint}")
    if len(forms := sorted({file_form(name) or "" for name in files})) > 1:
        hint = f"name the files by a pattern, such as {os.path.join(folder, '*' + Path(files[0]).suffix)}"
        raise UserError(f"the folder {shorten(folder)} has files of several forms: {', '.join(forms)}\n{hint}")
    return [os.path.join(folder, name) for name in files]


def name_of_source(path: str) -> str:
    """Return the name of a source that gives none: the file's or folder's without its last suffix, a pattern's as far as it is plain."""
    prefix = indexed_prefix(path)
    if prefix is not None:
        return Path(prefix).name
    if os.path.exists(path) or not glob.has_magic(path):
        return Path(path).stem
    parts = [part for part in Path(path).parts if not glob.has_magic(part)]
    plain = re.split(r"[*?\[]", Path(path).stem)[0].rstrip("-_.")
    return plain or (Path(parts[-1]).name if parts else "data")
