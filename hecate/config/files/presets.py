"""Find the files that hecate is installed with: YAML of runs, topologies, models and experiments, and chat templates."""

from __future__ import annotations

from pathlib import Path

from hecate.errors import UserError

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def preset_names(folder: str) -> list[str]:
    """Return the names of the presets in a folder of configs/, sorted."""
    return sorted(path.stem for path in (_CONFIGS / folder).glob("*.yaml"))


def run_presets() -> dict[str, Path]:
    """The configurations of runs by their names, sorted: starting points such as mixlora, and a recipe of each system of the field."""
    found = [*_CONFIGS.glob("*.yaml"), *(_CONFIGS / "recipes").glob("*.yaml")]
    return {path.stem: path for path in sorted(found, key=lambda path: path.stem)}


def base_presets() -> dict[str, Path]:
    """Files with the sizes of well-known base models, as transformers' config.json has them, by their names, sorted."""
    return {path.stem: path for path in sorted((_CONFIGS / "bases").glob("*.yaml"))}


def chat_templates() -> dict[str, Path]:
    """The Jinja files of conversation formats by their names, sorted."""
    return {path.stem: path for path in sorted((_CONFIGS / "chat_templates").glob("*.jinja"))}


def find_preset(folder: str, what: str, name_or_path: str, *, also: tuple[str, ...] = ()) -> Path:
    """Return the file of a preset's name or of a path. A path has a / or ends in .yaml or .yml.

    Args:
        folder: the presets' folder in configs/, such as topologies.
        what: the singular of `folder`, for the error text.
        also: further names that the caller accepts, for the error text.

    Raises:
        UserError: there is no such file; the text lists the presets.
    """
    is_path = "/" in name_or_path or name_or_path.endswith((".yaml", ".yml"))
    path = Path(name_or_path) if is_path else _CONFIGS / folder / f"{name_or_path}.yaml"
    try:
        found = path.is_file()
    except (OSError, ValueError):  # it is longer than any name, or has a zero byte
        found = False
    if not found:
        names = ", ".join([*also, *preset_names(folder)])
        raise UserError(
            f"{what} {name_or_path[:200]}: no such {'file' if is_path else 'preset'}\n  use one of {names}, or the path of a YAML file"
        )
    return path
