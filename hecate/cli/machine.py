"""Verbs that tell what a user needs before a run: doctor looks at the machine, schema lists all configuration keys."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hecate.cli.arguments import Overrides
from hecate.io.terminal import show_text

if TYPE_CHECKING:
    from hecate.apps.check.doctor.finding import Finding


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="a run's YAML file or preset, whose inputs are checked, too")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, to paste into a bug report")] = False,
    compiles: Annotated[bool, typer.Option("--compile", help="first compile the planner's loops, if they are not")] = False,
) -> None:
    """Check that this machine has what training needs, and say how to mend what it lacks. Exit status 1 if something must be mended.

    Under torchrun, all nodes are checked together.
    """
    from hecate.apps.check.doctor import examine
    from hecate.apps.check.doctor.run_inputs import checks_of

    if compiles:
        from hecate.parallel.loops import jit

        jit.compile_and_wait()
    checks = examine.CHECKS
    if config is not None:
        from hecate.config import load_config

        checks = {**checks, **checks_of(lambda: load_config(config, overrides or (), claim_output=False))}
    if "RANK" not in os.environ:
        found: Mapping[str, Finding] = examine.examine(checks)
        shows = True
    else:
        from hecate.apps.check.doctor.several_ranks import findings_of_all
        from hecate.ranks.ranks import join_ranks

        with join_ranks() as ranks:
            found, shows = findings_of_all(examine.examine(checks), ranks), ranks.is_first
    if shows:
        show_text(json.dumps(examine.findings_json(found), indent=1) if as_json else examine.findings_text(found))
    raise typer.Exit(0 if examine.healthy(found) else 1)


def schema(as_page: Annotated[bool, typer.Option("--page", help="print the page of documentation instead")] = False) -> None:
    """Print the JSON schema of a configuration, by which an editor completes and checks its keys."""
    from hecate.config import reference

    show_text(reference.page() if as_page else json.dumps(reference.json_schema(), indent=1), end="" if as_page else "\n")
