"""The verb drill: faults on this machine, and what became of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hecate.cli.arguments import check_json, write_json
from hecate.io.terminal import show_text

UNDECIDED_EXIT = 3
"""the exit status where no drill has failed, and a limit of the wall clock leaves one open"""


def drill(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME ...", help="such as R1 R8; default: R1 in its short form")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="all drills, or those named, in their short form, which judges no times")] = False,
    everything: Annotated[bool, typer.Option("--all", help="all drills in full; takes up to half an hour on two cores")] = False,
    listed: Annotated[bool, typer.Option("--list", help="only show what the drills are")] = False,
    prove: Annotated[bool, typer.Option("--prove", help="run each without the feature that it is about; it must fail")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write all figures to this file")] = None,
) -> None:
    """Inject faults into tiny runs on this machine, such as killed ranks and full disks, and show what became of them (docs/use/drills.md).

    Without a name, a first taste of less than a minute of a processor. Named drills run in full; with --quick or --prove, in their short
    form. Nothing is downloaded, and no other run is touched. Exit status 1 if a drill has failed; 3 if none has failed, and the machine was
    too slow to decide one; with --prove, 1 if one has passed.
    """
    from hecate.apps.check.drill.catalogue import DRILLS, TASTE
    from hecate.apps.check.drill.table import drills_json, list_text, proof_text, proofs_json, proofs_text, report_text, summary_text

    if listed:
        show_text(list_text(DRILLS.values()))
        return
    from hecate.apps.check.drill.run import chosen_drills, drill_folder

    check_json(json_path)
    taste = not (names or quick or everything or prove)
    wanted, reports = chosen_drills([TASTE] if taste else names or ()), []
    with drill_folder() as made:
        for one in wanted:
            reports.append(made.run(one, quick=quick or prove or taste, without=prove))
            show_text(proof_text(reports[-1]) if prove else report_text(reports[-1]))
    show_text(proofs_text(reports) if prove else summary_text(reports))
    if json_path is not None:
        write_json(json_path, proofs_json(reports) if prove else drills_json(reports))
    if taste:
        show_text(f"This was {TASTE} in its short form. hecate drill --quick does all {len(DRILLS)} so; --all does them in full.")
    if prove:
        raise typer.Exit(int(any(report.outcome.ok for report in reports)))
    open_only = all(report.outcome.ok or report.outcome.undecided for report in reports)
    raise typer.Exit(0 if all(report.outcome.ok for report in reports) else UNDECIDED_EXIT if open_only else 1)
