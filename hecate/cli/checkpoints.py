"""The verb checkpoint, with three of its own: list, show, verify. They read a run's checkpoints, and change nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from hecate.errors import UserError
from hecate.io.terminal import safe_line, show_text

if TYPE_CHECKING:
    from hecate.checkpoint.survey import ListedCheckpoint


class _NeedsVerb(TyperGroup):
    """Says which verbs there are to whoever names the folder alone."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and Path(args[0]).exists():
            ways = ", ".join(f"`hecate checkpoint {verb} {args[0]}`" for verb in self.commands)
            raise UserError(f"checkpoint takes a verb before the folder: {ways}")
        return super().resolve_command(ctx, args)


verbs = typer.Typer(
    cls=_NeedsVerb, no_args_is_help=True, help="Say which checkpoints a run has, what they hold, and whether they are whole."
)
_AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@verbs.command("list")
def list_checkpoints(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="output_dir of a run")],
    as_json: _AsJson = False,
) -> None:
    """List a run's checkpoints: step, time, ranks, size, state. Compares manifests and sizes of files; `verify` reads the tensors, too."""
    from hecate.checkpoint.survey import survey

    found = survey(_existing(folder))
    if as_json:
        show_text(json.dumps([_listed_value(one) for one in found], indent=1))
    elif found:
        show_text("\n".join(_listed_lines(found)))
    else:
        show_text(f"{folder} has no checkpoint")


@verbs.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a checkpoint, or output_dir of a run: its newest one")],
    as_json: _AsJson = False,
) -> None:
    """Show what a checkpoint holds: its run, its experts, and its tensors by kind. Reads no tensor."""
    from hecate.checkpoint import latest_good
    from hecate.checkpoint.survey import contents, is_checkpoint_folder

    taken = folder if is_checkpoint_folder(_existing(folder)) else latest_good(folder)
    if taken is None:
        raise UserError(f"{folder}: neither a checkpoint nor a folder with a sound one")
    held = contents(taken)
    show_text(json.dumps(held, indent=1) if as_json else _contents_text(held))


@verbs.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a checkpoint, or output_dir of a run: all of its checkpoints")],
    as_json: _AsJson = False,
) -> None:
    """Read every byte of a checkpoint, compare all digests, and name each file and tensor that is damaged. Exit status 1 if any is."""
    from hecate.checkpoint import committed
    from hecate.checkpoint.survey import is_checkpoint_folder
    from hecate.checkpoint.verify import find_damage

    folders = [folder] if is_checkpoint_folder(_existing(folder)) else committed(folder)
    if not folders:
        raise UserError(f"{folder}: neither a checkpoint nor a folder with one")
    verdicts = []
    for one in folders:
        damage = list(find_damage(one))
        verdicts.append({"folder": str(one), "whole": not damage, "damage": [vars(each) for each in damage]})
        if not as_json:
            show_text("\n".join([f"{one}: {'damaged' if damage else 'whole'}", *(f"  {safe_line(each.text)}" for each in damage)]))
    if as_json:
        show_text(json.dumps(verdicts, indent=1))
    raise typer.Exit(0 if all(verdict["whole"] for verdict in verdicts) else 1)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder")
    return folder


def _listed_value(one: ListedCheckpoint) -> dict[str, Any]:
    return {**vars(one), "folder": str(one.folder)}


def _listed_lines(found: list[ListedCheckpoint]) -> list[str]:
    head = ("step", "when", "ranks", "bytes", "folder", "state")
    rows = [
        (
            str(one.step),
            _time(one.when),
            "-" if one.ranks is None else str(one.ranks),
            f"{one.num_bytes:,}",
            one.folder.name,
            safe_line(f"{one.state}: {one.reason}" if one.reason else one.state),
        )
        for one in found
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    numbers = ("step", "ranks", "bytes")
    lines = []
    for row in (head, *rows):
        cells = [cell.rjust(width) if name in numbers else cell.ljust(width) for name, cell, width in zip(head, row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _contents_text(held: dict[str, Any]) -> str:
    experts = held["experts"]
    rows = [
        ("step", f"{held['step']} of {_known(held['max_steps'])}"),
        ("saved", f"{_time(held['when'])}, by {held['ranks']} ranks, {held['bytes']:,} bytes"),
        ("base model", _known(held["base_model"])),
        ("family", _known(held["family"])),
        ("experts", f"{sum(experts.values())} in {len(experts)} units"),
        ("tokens trained", _known(held["tokens"])),
        ("steps skipped", _known(held["skipped"])),
        ("sequences per step", _known(held["sequences_per_step"])),
        *((kind, f"{of['tensors']} tensors, {of['bytes']:,} bytes, {', '.join(of['dtypes'])}") for kind, of in held["tensors"].items()),
        *((file, f"{size:,} bytes") for file, size in held["files"].items()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([held["folder"], *(f"  {safe_line(name).ljust(width)}  {text}" for name, text in rows)])


def _known(value: object) -> str:
    return "-" if value is None else safe_line(str(value))


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
