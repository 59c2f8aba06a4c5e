"""Turns the error texts of Ray into values. No other file of the launchers reads such texts.

Each function names the versions whose texts it was written for, and returns its least specific value for any other text.
(`lost_a_peer` and `loss_in_words` of `hecate.ranks.ranks` read gloo's texts about lost peers, because training without a launcher needs
them, too.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST = 300


@dataclass(frozen=True)
class WorkerFailure:
    """Why a Ray actor could not start, or has ended."""

    text: str
    """the reason, in one line"""
    cannot_import: bool
    """whether its node lacks hecate or a package that hecate needs"""


def worker_failure(error: BaseException) -> WorkerFailure:
    """Read Ray's error about an actor. The error contains the actor's traceback as a coloured text. Ray 2.50 to 2.56."""
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    missing = [line for line in lines if line.startswith(("ModuleNotFoundError:", "ImportError:"))]
    if missing:
        return WorkerFailure(missing[-1][:_LONGEST], cannot_import=True)
    text = lines[-1] if "Traceback" in str(error) and lines else " ".join(lines)
    return WorkerFailure(text[:_LONGEST] or type(error).__name__, cannot_import=False)


class JoinProblem(Enum):
    """Why Ray could not join a cluster."""

    WRONG_TOKEN = "wrong token"
    OTHER_VERSIONS = "other versions"
    OTHER = "other"


def join_problem(error: BaseException, standard_error: str) -> JoinProblem:
    """Read the error of `ray.init`, and what Ray's C++ part has written to standard error meanwhile. Ray 2.50 to 2.56."""
    if "Unauthenticated" in standard_error + str(error):
        return JoinProblem.WRONG_TOKEN
    return JoinProblem.OTHER_VERSIONS if "ersion mismatch" in str(error) else JoinProblem.OTHER
