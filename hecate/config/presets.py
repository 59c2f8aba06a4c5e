"""Names of the YAML files that come with hecate: topologies, models, experiments."""

from __future__ import annotations

from pathlib import Path

from hecate.errors import UserError

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def preset_names(folder: str) -> list[str]:
    """What there is in a folder of configs/, sorted."""
    return sorted(path.stem for path in (_CONFIGS / folder).glob("*.yaml"))


def find_preset(folder: str, what: str, name_or_path: str, *, also: tuple[str, ...] = ()) -> Path:
    """The file that a name or a path means; a path has a / or ends in .yaml or .yml.

    Args:
        folder: of configs/, such as topologies.
        what: the same in the singular, for the message.
        also: further names that the caller takes, for the message.

    Raises:
        UserError: there is no such file; it lists what exists.
    """
    is_path = "/" in name_or_path or name_or_path.endswith((".yaml", ".yml"))
    path = Path(name_or_path) if is_path else _CONFIGS / folder / f"{name_or_path}.yaml"
    if not path.is_file():
        names = ", ".join([*also, *preset_names(folder)])
        raise UserError(
            f"{what} {name_or_path}: no such {'file' if is_path else 'preset'}\n  there are {names}; or give the path of a YAML file"
        )
    return path
