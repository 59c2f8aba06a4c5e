"""All drills by name, each with what is done, what is expected, and the function that does it. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Drill:
    """One drill."""

    name: str
    fault: str
    expected: str
    function: str
    """MODULE:FUNCTION, in the folder `cases`"""


_ALL = (
    Drill(
        "R1",
        "any rank killed in any phase of a step, or of a save",
        "the others go on with the same result, 0 steps lost; noticed in 250 ms, back in 1 s (medians)",
        "losses:kill_any_rank",
    ),
    Drill(
        "R2",
        "two or three ranks killed, at once or one after the other",
        "goes on while each expert has a copy; else the lost experts are named, and it goes back to a checkpoint",
        "losses:two_deaths",
    ),
    Drill("R3", "a rank stopped by SIGSTOP", "it is named and removed in 3 s, and the others go on", "losses:stopped_rank"),
    Drill("R4", "ranks leave and come, ten resizes", "the same result as ranks that stayed", "resuming:resized"),
    Drill("R5", "SIGKILL at every file operation of a save", "0 torn checkpoints", "saves:kill_at_each_operation"),
    Drill("R6", "the same step saved twice, with kills", "never a mixture of two saves", "saves:same_step_twice"),
    Drill(
        "R7",
        "disk full, I/O errors, no free descriptors",
        "the old checkpoint is intact, and the message says why",
        "saves:failing_disk",
    ),
    Drill("R8", "single bits flipped in every file of a checkpoint", "all found", "damage:bit_flips"),
    Drill("R10", "saved on one number of ranks, loaded on another", "all pairs bitwise", "resuming:save_here_load_there"),
    Drill("R11", "stopped after every step, and resumed", "the end is bitwise the same", "resuming:resume_after_each_step"),
    Drill("R12", "ranks killed over three epochs", "each sample is trained on once an epoch", "losses:each_sample_once"),
    Drill(
        "R13",
        "a number that is not finite, anywhere, on any one rank",
        "all ranks skip the step, the state is bitwise unchanged, and ten in a row stop the run",
        "numbers:poisoned",
    ),
    Drill("R14", "spikes", "the same steps are skipped and clipped on every number of ranks", "numbers:spiked"),
    Drill("R15", "all tokens to one expert", "finite results, no more replicas than slots, idle experts unchanged", "numbers:one_way"),
    Drill("R18", "one rank does another collective than the others", "rank and operation named in 2 s", "naming:mismatched"),
    Drill("R19", "a rank that is slow", "named within ten steps", "naming:straggler"),
    Drill(
        "R20",
        "a bit that flips in memory",
        "named, restored where a right copy is known, never saved",
        "memory:flipped_in_memory",
    ),
    Drill("R21", "sockets of a run", "all on loopback", "launching:only_loopback"),
    Drill("R22", "launchers killed, fifty starts and ends", "no process, socket or file is left", "launching:killed_launcher"),
    Drill("R23", "SIGINT and SIGTERM", "checkpoint and exit in 10 s", "launching:signals"),
    Drill(
        "R24",
        "rank 0 killed, and then whoever takes its place",
        "no rank is special: reports, checkpoint and adapter are complete",
        "losses:no_rank_is_special",
    ),
    Drill(
        "R25",
        "trackers that raise or hang",
        "named, and the run goes on with the same result",
        "followers:bad_followers",
    ),
)
TASTE = "R1"
"""the drill that `hecate drill` does, in its short form, where nothing else is asked for"""
DRILLS: dict[str, Drill] = {drill.name: drill for drill in _ALL}
