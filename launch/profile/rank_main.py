"""The program of one rank of `hecate profile`: `python -m hecate.launch.profile.rank_main FILE`.

`hecate profile` starts one process of it for each rank. Under torchrun, `hecate profile` runs it in its own process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hecate.errors import UserError
from hecate.io.terminal import show_messages, show_text
from hecate.ranks.launcher_files import exit_with_user_error


def preload() -> None:
    """Import the modules that a rank needs. The fork server calls this once, for all ranks of a machine."""
    from hecate.launch.profile import run  # noqa: F401
    from hecate.ranks import ranks  # noqa: F401


def main(arguments: Sequence[str]) -> None:
    """Run the measurements of one rank.

    Args:
        arguments: the path of the topology file to write.

    Raises:
        SystemExit: with status 2 after a user's mistake, whose text is printed.
    """
    show_messages()
    try:
        if len(arguments) != 1:
            raise UserError("a rank needs the file to write: python -m hecate.launch.profile.rank_main FILE")
        profile_as_rank(Path(arguments[0]))
    except UserError as error:
        exit_with_user_error(error)


def profile_as_rank(out: Path) -> None:
    """Join the ranks that the environment describes and measure with them. Rank 0 writes the topology to `out` and prints it.

    Raises:
        UserError: `out` cannot be written.
    """
    from hecate.launch.profile.run import profile
    from hecate.ranks.ranks import join_ranks

    with join_ranks() as ranks:
        profile(ranks, out)
        shows = ranks.is_first
    if shows:
        show_text(f"{out}:\n{out.read_text(encoding='utf-8')}", end="")


if __name__ == "__main__":
    main(sys.argv[1:])
