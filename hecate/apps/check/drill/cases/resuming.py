"""Runs that go on from checkpoints, and with other numbers of ranks: R4, R10, R11."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from hecate.apps.check.drill.armed import Injected
from hecate.apps.check.drill.cases.saves import load
from hecate.apps.check.drill.outcome import DrillCase, DrillOutcome, Scope, outcome_of
from hecate.apps.check.drill.ranks import TOLERANCE, Started, begin_run, call_on_ranks, difference, loss_difference
from hecate.apps.check.drill.tiny_training import digests, tiny_config, tiny_training, train_until
from hecate.checkpoint.save_run import save_state
from hecate.checkpoint.train_state import load_state
from hecate.elastic.rebuild import Group
from hecate.parallel.cluster.mesh import shard_size_for
from hecate.parallel.cluster.topology import local_topology
from hecate.ranks.ranks import Ranks, connect
from hecate.train.training import Training

_SAVED_AT = 2


def save_here_load_there(scope: Scope) -> DrillOutcome:
    """R10"""
    sizes = (1, 2, 3) if scope.quick else tuple(range(1, 9))
    cases = []
    for size in sizes:
        call_on_ranks(scope, size, save_at, scope.workshop, str(scope.path / f"saved-{size}"))
    for size in sizes:
        call_on_ranks(scope, size, load_and_save, scope.workshop, [str(scope.path / f"saved-{other}") for other in sizes], timeout=300)
        for other in sizes:
            folders = (f"saved-{other}", f"saved-{other}-on-{size}")
            saved, again = (digests(scope.path / name / f"checkpoint-{_SAVED_AT}") for name in folders)
            wrong = [name for name in saved.keys() | again.keys() if saved.get(name) != again.get(name)]
            cases.append(DrillCase(f"{other} ranks to {size}", f"{len(wrong)} tensors differ, such as {wrong[0]}" if wrong else ""))
    return outcome_of(cases, f"every tensor bitwise the same, {sizes[0]} to {sizes[-1]} ranks", {"world_sizes": len(sizes)})


def save_at(ranks: Ranks, workshop: str, output: str) -> None:
    train_until(tiny_training(ranks, workshop, output), _SAVED_AT)


def load_and_save(ranks: Ranks, workshop: str, outputs: list[str]) -> None:
    """Load the checkpoint of each folder, and save it in another one."""
    run = tiny_training(ranks, workshop, f"{outputs[0]}-unused")
    for output in outputs:
        state = load_state(replace(run.parts.config, output_dir=output), ranks, run.parts.trained).state
        save_state(replace(run.parts.config, output_dir=f"{output}-on-{ranks.world_size}"), ranks, run.parts.trained, state)


def resume_after_each_step(scope: Scope) -> DrillOutcome:
    """R11"""
    steps = 6
    after = (1, 4) if scope.quick else tuple(range(1, steps))
    sizes = (2,) if scope.quick else (1, 2, 3)
    cases = []
    for size in sizes:
        folder = scope.path / f"on-{size}"
        slow = scope.path / f"slow-{size}.yaml"  # so that it pays to move experts
        slow.write_text(_SLOW.format(size=size), encoding="utf-8")
        for kind, also in {"deterministic": [], "as by default": [*_BY_LOADS, f"topology={slow}"]}.items():
            given = (scope.workshop, str(folder / kind), steps, list(after), also)
            for step, wrong in call_on_ranks(scope, size, resume_each, *given, timeout=300)[0]:
                cases.append(DrillCase(f"{size} ranks, {kind}, after step {step}", wrong))
    return outcome_of(cases, f"the last checkpoint is bitwise that of a run that never stopped, on {', '.join(map(str, sizes))} ranks")


_BY_LOADS = ("deterministic=false", "fssdp.plan=history", "fssdp.memory_slots=1")
"""settings with which experts are placed by the loads of the last steps"""
_SLOW = "nodes: [{{devices: {size}, flops: 1e6, memory: 1e9}}]\nintra_node: {{bandwidth: 1e9, latency: 1e-6}}\n"


def resume_each(ranks: Ranks, workshop: str, folder: str, steps: int, after: list[int], also: list[str]) -> list[tuple[int, str]]:
    """(step, what is wrong) of a run that is resumed after each of these steps."""
    whole = Path(folder) / "whole"
    sent = train_until(tiny_training(ranks, workshop, whole, f"max_steps={steps}", *also), steps, save_each=True)
    wanted, found = digests(whole / f"checkpoint-{steps}"), []
    for step in after:
        output = Path(folder) / f"resumed-{step}"
        if ranks.is_first:
            shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
        ranks.barrier()
        run = tiny_training(ranks, workshop, output, f"max_steps={steps}", "resume=true", *also)
        begun = run.run_state.step
        sent_again = train_until(run, steps)
        same = digests(output / f"checkpoint-{steps}") == wanted and sent_again == sent[step:]
        text = f"resumed at step {begun}; the end is {'' if same else 'not '}the same; bytes sent {sent_again}, not {sent[step:]}"
        found.append((step, "" if same and begun == step else text))
    return found


RESIZES = ([0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 2], [0, 1, 2], [0, 1], [1], [0, 1], [0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3])
"""the members of each group in turn. A member that is not in one has lost all it had; never an expert together with its backup."""
RESIZES_IN_GROUPS = tuple({(0, 2): [0, 3], (0, 1, 2): [0, 1, 3]}.get(tuple(members), members) for members in RESIZES)
"""likewise, where members 0 and 2 own the same experts, and so do 1 and 3"""
_DRIFT = 1e-6
"""by how much a result may differ after some hundred steps of which other numbers of ranks took part"""
_HANDED_OVER = 1
"""steps that each group trains"""


def resized(scope: Scope) -> DrillOutcome:
    """R4"""
    most = 4 if scope.quick else len(RESIZES)
    steps = most * _HANDED_OVER
    call_on_ranks(scope, 4, save_after, scope.workshop, str(scope.path / "whole"), steps)
    cases = []
    for name, size, resizes in (("", None, RESIZES), (" in sharding groups", 2, RESIZES_IN_GROUPS)):
        groups, output = [*resizes[:most]], scope.path / f"changed{size}"
        told = call_on_ranks(scope, 4, change_groups, scope.workshop, str(output), groups, size)
        off = difference(load(output / f"checkpoint-{steps}"), load(scope.path / "whole" / f"checkpoint-{steps}"))
        for number, group in enumerate(groups[1:], 1):
            cases.append(DrillCase(f"resize {number}, to {len(group)} ranks{name}", told[group[0]][number]))
        cases.append(DrillCase(f"the last checkpoint{name}", "" if off <= TOLERANCE else f"is off by {off:.2g}"))
    if not scope.quick:
        cases.append(DrillCase("a new process in the place of a killed one", _replaced(scope)))
        cases.append(DrillCase("a new process in the place of a killed one in sharding groups", _replaced(scope, "fssdp.shard_size=2")))
    return outcome_of(cases, f"{most - 1} resizes between 1 and 4 ranks, result within {TOLERANCE:g} of 4 ranks that never changed")


def _replaced(scope: Scope, *also: str) -> str:
    """What is wrong with a run under the launcher, which starts a new process for a lost rank and lets it join when it has loaded."""
    given = ("learning_rate=1e-4", *also)  # with small steps the order of sums matters little, however many steps there are
    slowly = Injected(action="sleep", place="step", value=0.1)  # so that there are few while the new process loads
    death = Injected(action="kill", place="backward", rank=1, step=2)
    run = begin_run(scope, "replaced", 4, "max_steps=100000", *given, injected=[slowly, death], started=Started(joins=True))
    run.wait_for("4 ranks go on", 120)
    run.process.send_signal(signal.SIGTERM)
    ended = run.end()
    steps = max(ended.losses)
    whole = begin_run(scope, "stayed", 4, f"max_steps={steps}", *given).end()
    off = loss_difference(ended.losses, {step: whole.losses[step] for step in ended.losses})
    off = max(off, difference(ended.tensors, whole.tensors))
    return "" if ended.status == 143 and off <= _DRIFT else f"status {ended.status}, off by {off:.2g} after {steps} steps"


def save_after(ranks: Ranks, workshop: str, output: str, steps: int) -> None:
    train_until(tiny_training(ranks, workshop, output, f"max_steps={steps}", "fssdp.redundancy=1"), steps)


def change_groups(ranks: Ranks, workshop: str, output: str, groups: list[list[int]], shard_size: int | None) -> list[str]:
    """Go through the groups as one member; what is wrong after each change, as this member saw it."""
    member = ranks.rank
    given = (f"max_steps={len(groups) * _HANDED_OVER}", "fssdp.redundancy=1", f"fssdp.shard_size={shard_size or 'null'}")
    if shard_size:
        ranks.leave()
        ranks = connect(dist.FileStore(f"{output}-0", ranks.world_size), member, ranks.world_size, shard_size)
    run: Training | None = tiny_training(ranks, workshop, output, *given)
    problems = []
    for number, group in enumerate(groups):
        problem = ""
        if number:
            if run is not None:
                run.ranks.leave()
            if member not in group:
                run = None
            elif run is None:
                run = _new_member(workshop, output, *given)
        if member in group:
            assert run is not None
            if number:
                place = group.index(member)
                store = dist.FileStore(f"{output}-{number}", len(group))
                joined = connect(store, place, len(group), shard_size_for(len(group), shard_size, 1))
                done = run.join(Group(joined, local_topology(len(group), cuda=False)))
                if done.lost or done.step != number * _HANDED_OVER:
                    problem = f"went on after step {done.step}" + (f", without {done.lost}" if done.lost else "")
            for _ in range(_HANDED_OVER):
                run.train_one()
                run.complete_step()
        problems.append(problem)
    if run is not None:
        run.save()
    return problems


def _new_member(workshop: str, output: str, *given: str) -> Training:
    """A process that has loaded the model by itself, and knows nothing of the run."""
    alone = connect(dist.HashStore(), 0, 1)
    run = Training(tiny_config(workshop, output, *given), alone, local_topology(1, cuda=False), joins=True)
    alone.leave()
    return run
