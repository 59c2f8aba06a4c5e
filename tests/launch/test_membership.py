"""Who goes on after a loss: one line for each sequence of events, and what the automaton orders."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from hecate.launch.membership.automaton import step
from hecate.launch.membership.facts import Cause, Do, Event, Fact
from hecate.launch.membership.job_generation import JobGeneration, RankEnd
from hecate.launch.membership.job_members import JobMembers, with_event
from hecate.launch.membership.job_policy import Decision, JobPolicy, Limits, decide
from hecate.launch.membership.job_states import ENDED, NEXT, State
from hecate.launch.membership.losses import causes_of
from hecate.launch.membership.turn import Turn

BEGINNING = "up 0 1 2, placed > begin 0 1 2; built 0 1 2"
FACTS: dict[str, dict[str, Any]] = {
    "died": {"fact": Fact.LOST},
    "node": {"fact": Fact.LOST, "cause": Cause.NODE_DIED},
    "hung": {"fact": Fact.LOST, "cause": Cause.HUNG},
    "effect": {"fact": Fact.LOST, "end": RankEnd.CONSEQUENCE},
    "mistake": {"fact": Fact.LOST, "end": RankEnd.MISTAKE, "more": "hecate: no such model"},
    "finished": {"fact": Fact.ENDED, "end": RankEnd.FINISHED},
    "saved": {"fact": Fact.ENDED, "end": RankEnd.STOPPED},
    "raised": {"fact": Fact.ENDED, "end": RankEnd.FAILED, "said": "OSError: boom"},
    "checkpoint": {"fact": Fact.SAVED},
}


def play(policy: JobPolicy, script: str, *, awaited: str = "") -> tuple[JobMembers, list[str]]:
    """Play a script, whose orders must be as it says; returns the last state, and what was said.

    A script is steps with `;` between them. A step is events, and after `>` the orders that must follow, texts aside. `+30` among the
    events: so many seconds pass.
    """
    devices = frozenset(map(int, awaited.split()))
    names = {device: f"device {device}" for device in range(6)}
    state, now, said = JobMembers(policy, described=frozenset(range(6)), names=names, awaited=devices), 0.0, []
    for part in script.split(";"):
        happened, _, expected = part.partition(">")
        events = []
        for word, *numbers in (text.split() for text in happened.split(",") if text.strip()):
            if word.startswith("+"):
                now += float(word)
                continue
            given = FACTS.get(word) or {"fact": Fact[word.upper()]}
            events += [Event(device=int(number), **given) for number in numbers or ["-1"]]
        state, orders = step(state, events, now)
        said += [order.text for order in orders if order.do is Do.SAY]
        found = [(order.do, order.devices or state.generation.members) for order in orders if order.do is not Do.SAY]
        assert ", ".join(" ".join([do.name.lower(), *map(str, of)]) for do, of in found) == expected.strip(), part
    return state, said


PROCESSES = JobPolicy(copied=True, fewest_to_begin=3)
TOGETHER = JobPolicy(copied=True, fewest_to_begin=4, tp_size=2)
AGAIN = JobPolicy(fewest_to_begin=2, most=2)
NO_MORE = JobPolicy(fewest_to_begin=3, most=0)


@pytest.mark.parametrize(
    ("policy", "script", "phase", "said"),
    [
        (PROCESSES, "finished 0 1 2", State.FINISHED, ""),
        (PROCESSES, "died 1 > go_on 0 2, prepare 1; loaded 1 > go_on 0 2 1", State.RUNNING, "2 ranks go on"),
        (PROCESSES, "died 1, effect 2 > go_on 0, prepare 1 2", State.RUNNING, "rank 1 ; 1 ranks go on"),
        (PROCESSES, "node 1 2, down 1 2 > go_on 0; up 1 2 > prepare 1 2", State.RUNNING, "1 ranks go on"),
        (PROCESSES, "died 1 > go_on 0 2, prepare 1; died 1 > prepare 1; died 1 > prepare 1; died 1", State.RUNNING, "was to join"),
        (PROCESSES, "died 1 > go_on 0 2, prepare 1; mistake 1", State.RUNNING, "no such model"),
        (PROCESSES, "halted 1 > end 1; died 1 > go_on 0 2, prepare 1", State.RUNNING, "has been stopped"),
        (PROCESSES, "finished 0, died 1; effect 2", State.FAILED, ""),
        (PROCESSES, "died 0 1 2", State.FAILED, ""),
        (PROCESSES, "mistake 1 > break_off 0 2; +4; +2 > end 0 2; died 0 2", State.FAILED, ""),
        (PROCESSES, "stop > stop 0 1 2; died 1 > go_on 0 2; finished 0 2", State.FINISHED, "2 ranks go on"),
        (PROCESSES, "up 3 > prepare 3; loaded 3 > go_on 0 1 2 3; finished 0 1 2 > end 3", State.RUNNING, ""),
        (PROCESSES, "up 3 > prepare 3; loaded 3, finished 0 1 2", State.FINISHED, ""),
        (TOGETHER, "died 3 > end 2, go_on 0 1", State.RUNNING, "1 more of its tensor group ended"),
        (
            AGAIN,
            "died 1 > break_off 0 2; effect 0; +2 > end 2; died 2 > begin 0 1 2",
            State.STARTING,
            "all ranks start again from the last",
        ),
        (AGAIN, "effect 1 > break_off 0 2; +2; died 2; +2 > end 0; died 0 > begin 0 1 2", State.STARTING, "rank 2 ; all ranks start again"),
        (AGAIN, "node 1, down 1 > break_off 0 2; effect 0 2 > begin 0 2", State.STARTING, "all ranks start again"),
        (AGAIN, "node 1 2, down 1 2 > break_off 0; effect 0; up 1 > begin 0 1", State.STARTING, "all ranks start again"),
        (AGAIN, "node 1 2, down 1 2 > break_off 0; effect 0; +601", State.FAILED, "all ranks start again"),
        (AGAIN, "node 1 2, down 1 2 > break_off 0; effect 0; stop", State.STOPPED, "all ranks start again"),
        (AGAIN, "died 0 1 2 > begin 0 1 2; died 0 1 2 > begin 0 1 2; died 0 1 2", State.FAILED, "again"),
        (AGAIN, "up 3 > make_way 0 1 2; finished 0 1; finished 2 > begin 0 1 2 3", State.STARTING, "a node has joined"),
        (AGAIN, "up 3 > make_way 0 1 2; died 0 > break_off 1 2; effect 1 2 > begin 0 1 2 3", State.STARTING, "start again from the last"),
        (NO_MORE, "died 1 > break_off 0 2; +2 > end 0 2; died 0 2", State.FAILED, ""),
        (NO_MORE, "halted 1; halted 1", State.RUNNING, "rank 1 is stopped, as by SIGSTOP, and the others wait for it"),
        (NO_MORE, "stop > stop 0 1 2; finished 0 1 2", State.FINISHED, ""),
        (NO_MORE, "stop > stop 0 1 2; died 0 > break_off 1 2; +2 > end 1 2; died 1 2", State.FAILED, ""),
    ],
)
def test_processes(policy: JobPolicy, script: str, phase: State, said: str) -> None:
    beginning = BEGINNING if policy is not TOGETHER else "up 0 1 2 3, placed > begin 0 1 2 3; built 0 1 2 3"
    state, lines = play(policy, f"{beginning}; {script}")
    assert state.phase is phase
    assert said in "\n".join(lines)
    assert bool(lines) is bool(said)
    assert (state.ending is None) is (phase is not State.FAILED)


WORKERS = JobPolicy(
    copied=True, workers=True, most=1, fewest=2, fewest_to_begin=2, limits=Limits(30, 30, 30, 30, by=" (ray.start_timeout)")
)
UNCOPIED = JobPolicy(workers=True, most=1, fewest=2, fewest_to_begin=2, limits=WORKERS.limits)
GONE = "end 1, request 1, break_off 0 2"


@pytest.mark.parametrize(
    ("policy", "script", "phase", "said"),
    [
        (WORKERS, "finished 0 1 2", State.FINISHED, ""),
        (WORKERS, f"died 1 > {GONE}; left 0; left 2 > go_on 0 2; built 0 2; up 1 > prepare 1", State.RUNNING, "the others go on"),
        (
            UNCOPIED,
            f"checkpoint, died 1 > {GONE}; left 0 2; up 1 > prepare 1; loaded 1 > go_on 0 1 2",
            State.STARTING,
            "all wait for another",
        ),
        (UNCOPIED, f"died 1 > {GONE}; left 0 2; up 1 > prepare 1; loaded 1 > begin 0 1 2", State.STARTING, "all wait for another"),
        (UNCOPIED, f"checkpoint, node 1 > {GONE}; left 0 2 > go_on 0 2", State.STARTING, "the others go on"),
        (WORKERS, f"hung 1 > {GONE}; left 0 2 > go_on 0 2", State.STARTING, "did not answer"),
        (WORKERS, f"halted 1 > {GONE}; left 0 2 > go_on 0 2", State.STARTING, "was stopped"),
        (WORKERS, "node 1 2 > end 1, request 1, break_off 0, end 2, request 2; left 0", State.WAITING, "waits for a device"),
        (WORKERS, "node 1 2 > end 1, request 1, break_off 0, end 2, request 2; left 0; +31", State.FAILED, "waits for a device"),
        (
            WORKERS,
            f"died 1 > {GONE}; +31 > end 0, request 0; left 2; up 0 > prepare 0; loaded 0 > go_on 0 2",
            State.STARTING,
            "it went on for 30 s",
        ),
        (WORKERS, "raised 1 > break_off 0 2; left 0 2 > go_on 0 2, prepare 1", State.STARTING, "all wait for another rank"),
        (WORKERS, "raised 0 1 2; > begin 0 1 2; built 0 1 2; raised 0 1 2; ", State.FAILED, "OSError: boom"),
        (WORKERS, "up 3, loaded 3 > make_way 0 1 2; left 0 1 2 > go_on 0 1 2 3", State.STARTING, "has returned and joins"),
        (WORKERS, "unfit 3 > end 3", State.RUNNING, "device 3 is left out"),
        (WORKERS, "unfit 1", State.FAILED, ""),
        (WORKERS, "stop > stop 0 1 2; +1000; saved 0 1 2", State.STOPPED, ""),
        (WORKERS, "stop > stop 0 1 2; died 1 > end 1, break_off 0 2; left 0 2", State.STOPPED, "the job stops without it"),
        (WORKERS, "stop > stop 0 1 2; died 1 > end 1, break_off 0 2; +31", State.FAILED, "the job stops without it"),
        (WORKERS, f"died 1 > {GONE}; stop", State.STOPPED, "the others go on"),
    ],
)
def test_workers(policy: JobPolicy, script: str, phase: State, said: str) -> None:
    state, lines = play(policy, f"{BEGINNING}; {script}", awaited="0 1 2")
    assert state.phase is phase
    assert said in "\n".join(lines)


def test_a_job_whose_workers_do_not_come_up() -> None:
    state, _ = play(WORKERS, "up 0 2, placed; +31", awaited="0 1 2")
    assert state.ending is not None
    assert (state.ending.device, state.ending.mistake, state.ending.never_up) == (1, True, True)


def test_of_workers_that_have_not_built_their_part_in_time_one_is_ended() -> None:
    _, said = play(WORKERS, "up 0 1 2, placed > begin 0 1 2; built 0 2; +31 > end 1, request 1, break_off 0 2", awaited="0 1 2")
    assert said == [
        "device 1 (rank 1): the worker did not answer (its part of the run was not built in time (ray.start_timeout)); the others go on"
    ]


@pytest.mark.parametrize(
    ("cause", "left", "copies", "decision"),
    [
        (Cause.PROCESS_DIED, 3, False, Decision.REPLACE),
        (Cause.PROCESS_DIED, 3, True, Decision.GO_ON),
        (Cause.PROCESS_DIED, 1, True, Decision.REPLACE),
        (Cause.PROCESS_DIED, 0, False, Decision.REPLACE),
        (Cause.NODE_DIED, 3, False, Decision.GO_ON),
        (Cause.NODE_DIED, 1, True, Decision.WAIT),
        (Cause.HUNG, 2, False, Decision.GO_ON),
        (Cause.STOPPED, 2, False, Decision.REPLACE),
        (Cause.ERROR, 4, True, Decision.REPLACE),
        (Cause.START, 4, True, Decision.REPLACE),
    ],
)
def test_what_follows_a_failure_of_a_worker(cause: Cause, left: int, copies: bool, decision: Decision) -> None:
    assert decide(WORKERS, cause, left, copies=copies, failures=1) is decision
    assert decide(WORKERS, cause, left, copies=copies, failures=2) is Decision.GIVE_UP


def test_every_cause_is_bounded_for_itself_and_a_step_forgives() -> None:
    state, _ = play(WORKERS, f"{BEGINNING}; died 1 > {GONE}; left 0 2 > go_on 0 2; built 0 2", awaited="0 1 2")
    assert state.failures == {Cause.PROCESS_DIED: 1}
    assert step(state, [Event(Fact.LOST, 2)], 0.0)[0].phase is State.FAILED
    for events in ([Event(Fact.LOST, 2, cause=Cause.HUNG)], [Event(Fact.STEPPED), Event(Fact.LOST, 2)]):
        assert step(state, events, 0.0)[0].phase is State.RECOVERING


def test_what_is_known_changes_without_a_decision() -> None:
    state = JobMembers(WORKERS, generation=JobGeneration(0, (0, 2, 3)))
    later = with_event(state, Event(Fact.ENDED, 2, "boom", RankEnd.FAILED))
    assert (state.generation.at_work, later.generation.at_work, later.generation.said) == ([0, 2, 3], [0, 3], {2: "boom"})
    assert (later.generation.rank_of(3), later.generation.rank_of(1), later.generation.culprit) == (2, None, 2)
    assert causes_of(Turn(later, 0.0)) == "a node was lost"


def test_the_likeliest_cause_of_all_ends() -> None:
    generation = JobGeneration(0, tuple(range(5)))
    ends = (RankEnd.FINISHED, RankEnd.KILLED, RankEnd.CONSEQUENCE, RankEnd.LOST, RankEnd.MISTAKE)
    for device, end in enumerate(ends):
        generation = generation.with_end(device, end)
        assert generation.culprit == (device or None)


def follows(*states: State) -> bool:
    return all(after in (*NEXT[before], State.FAILED, State.STOPPED) for before, after in pairwise(states))


def test_the_states_of_jobs_that_go_well_and_badly() -> None:
    begin = (State.PLACING, State.STARTING, State.RUNNING)
    assert follows(*begin, State.FINISHED)
    assert follows(*begin, State.RECOVERING, State.WAITING, State.STARTING, State.RUNNING, State.RESIZING, State.STARTING)
    assert follows(*begin, State.STOPPING, State.STOPPED)
    assert follows(State.PLACING, State.FAILED)
    assert not follows(State.RUNNING, State.STARTING), "a generation ends before the next one starts"
    assert not follows(State.WAITING, State.RUNNING)
    assert not follows(State.STOPPING, State.RUNNING)


def test_every_state_can_be_reached_and_only_ended_jobs_stay() -> None:
    reached, found = {State.PLACING}, set(NEXT[State.PLACING])
    while found - reached:
        reached |= found
        found = {after for state in reached for after in NEXT.get(state, ())}
    assert reached == set(State) - {State.FAILED, State.STOPPED}
    assert set(NEXT) == set(State) - set(ENDED)
