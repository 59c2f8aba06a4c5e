"""Where the base model and the data that a configuration names lie on this machine."""

import importlib.util
import os
from pathlib import Path

from hecate.config.problems import shorten
from hecate.errors import UserError

PACKAGE_PREFIX = "package:"
INDEXED_SUFFIXES = (".idx", ".bin")
"""of the two files of an indexed data set of Megatron's"""


def find_model(name_or_path: str) -> Path:
    """The .gguf file or the folder (config.json, *.safetensors) that `model.name_or_path` means.

    Raises UserError if there is none. A package is searched, not imported.
    """
    if name_or_path.startswith(PACKAGE_PREFIX):
        return _gguf_of_package(name_or_path.removeprefix(PACKAGE_PREFIX))
    path, shown = Path(name_or_path), shorten(name_or_path)
    if not os.path.exists(path):
        raise UserError(f"no such file or folder: {shown}\nGive a local path; nothing is downloaded.")
    if os.path.isdir(path):
        if not os.path.isfile(path / "config.json"):
            raise UserError(f"no config.json in the folder {shown}\nGive the folder that the model was saved to.")
        if not any(path.glob("*.safetensors")):
            raise UserError(f"no *.safetensors in the folder {shown}\nSave the model in safetensors form.")
    elif path.suffix != ".gguf":
        raise UserError(f"neither a folder nor a .gguf file: {shown}\nGive the model's folder, or a .gguf file.")
    return path


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
    """PREFIX, if the path means an indexed data set: PREFIX.idx, PREFIX.bin, or PREFIX where only those two files exist. Otherwise None."""
    if path.endswith(INDEXED_SUFFIXES):
        return path[:-4]
    both = all(os.path.isfile(path + suffix) for suffix in INDEXED_SUFFIXES)
    return path if both and not os.path.isfile(path) else None
