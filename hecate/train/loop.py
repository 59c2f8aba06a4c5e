"""A training run from beginning to end, on one rank.

    train one step, and agree with the other ranks -> re-plan -> re-shard -> save -> evaluate -> regroup, if ranks have come

Each phase happens on all ranks alike. When a rank is lost, the others regroup and go on with the phase that was interrupted.
"""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from hecate import faults
from hecate.checkpoint.manifest import step_of
from hecate.checkpoint.save_run import Saved, require_durable_folder
from hecate.config import Config
from hecate.elastic.mismatch_watch import MismatchWatch
from hecate.elastic.rebuild import Group, Membership
from hecate.elastic.run_controller import ControllerLink, RunController, begin_facts, step_facts
from hecate.elastic.stragglers import SlowRanks
from hecate.io.signals import on_signals
from hecate.parallel.cluster.topology import Topology, local_topology
from hecate.ranks.peak_memory import peak_memory
from hecate.ranks.ranks import Ranks, loss_in_words, lost_a_peer
from hecate.report.events import Evaluation, Rebuilt
from hecate.report.metrics import REPLANNED, STOPPED
from hecate.report.progress import epochs_text
from hecate.report.run_report import Reports
from hecate.train.best_model import end_in_words, ends_early, step_to_leave
from hecate.train.caller import Caller
from hecate.train.run_summary import Measured, show_summary
from hecate.train.steps.step_profile import StepProfile
from hecate.train.training import Training

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Agreement:
    """What the ranks do after a step; the same on every rank."""

    stop: bool
    """Whether the run saves, and returns."""
    regroup: bool
    """Whether ranks have come, so that a new group is formed."""
    replan: bool
    """Whether the first rank's controller has an order."""
    writing: bool
    """Whether a rank is still writing its part of a checkpoint."""
    save_failed: bool
    """Whether a rank could not write its part."""


@dataclass(frozen=True)
class _Outside:
    """What a run reports to, and what may ask it to stop, to change its plan or to go on with other ranks."""

    reports: Reports
    membership: Membership | None
    controller: ControllerLink | None
    caller: Caller | None
    stopping: _Stopping
    profile: StepProfile
    slow: SlowRanks | None
    """What names slow ranks; None: the controller does."""
    mismatches: MismatchWatch

    def note(self, text: str | None) -> None:
        """Show a line on the terminal; None: there is none."""
        if text is not None:
            self.reports.note(text)


def train(
    config: Config,
    ranks: Ranks,
    membership: Membership | None = None,
    *,
    joins: bool = False,
    topology: Topology | None = None,
    controller: RunController | None = None,
    caller: Caller | None = None,
) -> bool:
    """Train as configured, then save, evaluate, export and show. Every rank must call it.

    Args:
        membership: says with whom to go on when a rank is lost or has come; None: a lost rank is the end.
        joins: this process has come new to a run under way. It is alone in `ranks` until `membership` lets it in.
        topology: of the ranks' devices, in place of the configuration's.
        controller: the launcher's end of the run, which may change the plan or ask for a stop.
        caller: the program that called `hecate.api.train`; one on every rank, or on none.

    Returns:
        Whether the run came to its end; False: it was asked to stop before, and has saved.

    Raises:
        UserError: whatever of the configuration, the data, the model or the disk is wrong.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        stopping = stack.enter_context(_stop_on_signals())
        if joins:
            assert membership is not None
            training = _joined(config, ranks, membership)
        else:
            require_durable_folder(config, ranks)
            training = Training(config, ranks, topology, loss=caller.loss if caller else None)
        stack.callback(training.drop_save)
        config = training.parts.config
        reports = stack.enter_context(Reports(config, training.facts()))
        reports.begin()
        outside = stack.enter_context(_outside(training, reports, membership, controller, caller, stopping, joins=joins))
        measured = Measured(before=reports.scores_after(0) or None)
        if membership is not None and not joins:
            faults.at("loaded")
            membership.loaded()
        facts: list[tuple[str, str]] | None = None
        while facts is None:
            try:
                if _evaluates_first(training, lacks=not joins and measured.before is None):
                    measured.before = _evaluate(training, outside).scores
                if _evaluates_late(training, outside.reports):
                    measured.last = _evaluate(training, outside)
                if _is_over(training):
                    facts = _finish(training, outside, measured)
                elif not _one_step(training, outside, measured):
                    break
            except Exception as error:  # any: after an abort, whatever still uses the old group can fail in any way
                if not _went_on_after(error, training, outside):
                    raise
    if facts is not None and training.ranks.is_first:
        show_summary(Path(config.output_dir), training.run_state, measured, time.monotonic() - started, facts)
    return _ended(training, caller, finished=facts is not None)


def _ended(training: Training, caller: Caller | None, *, finished: bool) -> bool:
    """Give the calling program, if there is one, what the run has done, and return `finished`."""
    if caller:
        caller.ended(training, finished=finished)
    return finished


@contextmanager
def _outside(
    training: Training,
    reports: Reports,
    membership: Membership | None,
    controller: RunController | None,
    caller: Caller | None,
    stopping: _Stopping,
    *,
    joins: bool,
) -> Iterator[_Outside]:
    """What the run reports to and what may change it, until the end of the block."""
    config, say = training.parts.config, partial(_say, training, reports)
    for warning in training.warnings:
        reports.event(training.run_state.step, warning)
    for note in training.notes:
        reports.note(note)
    with ExitStack() as stack:
        link = ControllerLink(controller, say) if controller else None
        profile = StepProfile(Path(config.output_dir), training.ranks, wanted=config.profile and not joins)
        outside = _Outside(reports, membership, link, caller, stopping, profile, None if controller else SlowRanks(), MismatchWatch())
        stack.callback(outside.mismatches.end)
        _report_beginning(training, outside)
        yield outside


def _went_on_after(error: Exception, training: Training, outside: _Outside) -> bool:
    """Whether the ranks that are left go on after this error: it is of a lost rank, and the run can go on without it."""
    if not _is_of_a_loss(error, training.ranks):
        return False
    # Before a regroup, which would only repeat the difference: the ranks do different things, and none is lost.
    outside.mismatches.raise_found(error)
    if outside.membership is None or not _regroup(training, outside.membership, outside):
        return False
    outside.reports.event(training.run_state.step, f"went on after: {loss_in_words(error)}")
    return True


def _evaluates_first(training: Training, *, lacks: bool) -> bool:
    """Whether the evaluation before the first step comes now. Every rank must call it.

    If some ranks have done it before a loss and some have not, all do it again, and so do those that have come meanwhile.

    Args:
        lacks: this rank has not done it, and has begun the run.
    """
    if training.run_state.step > 0 or not training.parts.config.eval.on_start or not training.parts.eval_sources:
        return False
    return training.ranks.all_max(float(lacks)) > 0


def _evaluates_late(training: Training, reports: Reports) -> bool:
    """Whether the evaluation that was due after the last step comes now, because a stop came before it. Every rank must call it."""
    state = training.run_state
    if state.completed < state.step or not _evaluation_is_due(training):
        return False
    if training.parts.config.best_metric is not None:
        counted = (state.best.metric, state.best.evaluated)
        return training.ranks.all_max(float(counted != (training.parts.config.best_metric, state.step))) > 0
    return training.ranks.all_max(float(training.ranks.is_first and reports.lacks_evaluation(state.step))) > 0


def _is_over(training: Training) -> bool:
    """Whether everything is done after the last step that the run takes."""
    state = training.run_state
    return state.completed == state.step and (state.step >= training.parts.config.max_steps or ends_early(training.parts.config, state))


def _evaluation_is_due(training: Training) -> bool:
    """Whether an evaluation follows the step that was done last."""
    config, step = training.parts.config, training.run_state.step
    if step == 0 or not training.parts.eval_sources:
        return False
    return step == config.max_steps or (config.eval_steps is not None and step % config.eval_steps == 0)


def _finish(training: Training, outside: _Outside, measured: Measured) -> list[tuple[str, str]]:
    """Write what the run leaves, and return what the summary says of it, as names and values. It can be done again after a loss."""
    faults.at("output")
    config, state = training.parts.config, training.run_state
    written = training.leave()
    faults.at("output")
    said = end_in_words(config, state)
    for text in said.values():
        outside.reports.event(state.step, text)
    if step_to_leave(config, state) != state.step:  # whose last evaluation was of other parameters than it leaves
        measured.last = training.evaluate()
    peaks = peak_memory(training.ranks.device)
    fullest = training.ranks.all_most(list(map(float, peaks.values())))
    outside.note(outside.profile.merge(at_end=True))
    of = "" if training.epoch_samples is None else f" of {training.epoch_samples:,} samples"
    return [
        ("epochs", f"{epochs_text(training.epochs)}{of}"),
        *((label, f"{most / 2**30:.2f} GiB on the fullest rank") for label, most in zip(peaks, fullest, strict=True)),
        (training.parts.output.name, str(written)),
        *said.items(),
        *(line for one in training.additions if training.ranks.is_first for line in one.outcome(training.parts, training.run_state.step)),
    ]


def _one_step(training: Training, outside: _Outside, measured: Measured) -> bool:
    """One step and everything that comes after it; False: the run was asked to stop, and has saved."""
    config = training.parts.config
    if training.run_state.completed == training.run_state.step:
        asked: Sequence[bool] = _train_one(training, outside, measured)
    else:  # ranks were lost in what follows the step
        asked = [value > 0 for value in training.ranks.all_most([float(value) for value in _requests(training, outside)])]
    agreement = Agreement(*asked)
    if training.saving and (agreement.save_failed or not agreement.writing):
        _end_save(training, outside, failed=agreement.save_failed)
    if agreement.replan:
        _replan(training, outside)
    step = training.run_state.step
    if config.fssdp.reshard_interval and step % config.fssdp.reshard_interval == 0:
        _reshard(training, config.fssdp.reshard_interval, outside)
    evaluates = not agreement.stop and _evaluation_is_due(training)
    if evaluates and config.best_metric is not None:  # before the save, which holds what came of it
        measured.last = _evaluate(training, outside)
    done = step == config.max_steps or ends_early(config, training.run_state)
    is_best = config.best_metric is not None and training.run_state.best.step == step
    if done or agreement.stop or is_best or (config.save_steps and step % config.save_steps == 0):
        _save(training, outside, last=done or agreement.stop)
    if evaluates and config.best_metric is None:  # after the save, so that an evaluation that fails costs no steps
        measured.last = _evaluate(training, outside)
    for expert in training.copies.take_restored():
        outside.reports.event(step, f"memory has changed by itself: expert {expert}; it is restored from another rank's copy")
    # What a callback asks for at any of these points, all ranks do now.
    caller_stops = outside.caller is not None and not done and training.ranks.all_max(float(outside.caller.wants_stop)) > 0
    if caller_stops:
        _save(training, outside, last=True)
    training.complete_step()
    if agreement.stop or caller_stops:
        outside.note(outside.profile.merge(at_end=True))
        own = config.output_dir
        resume = f"train({own!r}, ['resume=true'], ...)" if outside.caller else f"hecate train {shlex.quote(own)} resume=true"
        outside.reports.event(step, f"{STOPPED} after step {step}; go on with: {resume}")
        return False
    if agreement.regroup and outside.membership is not None:
        # A group that is left cannot commit the save any more.
        _end_save(training, outside)
        if not _regroup(training, outside.membership, outside, agreed=True):
            raise dist.DistError(f"after step {step} the ranks left their group for another one, and none was formed; the reason is above")
    return True


def _train_one(training: Training, outside: _Outside, measured: Measured) -> tuple[bool, ...]:
    """One step, and what the ranks have asked for meanwhile (`Agreement`)."""
    with outside.profile.step():
        event = training.train_one(lambda: _requests(training, outside))
    outside.reports.step(event)
    if event.result.skipped:
        outside.reports.event(event.step, f"step {event.step} was skipped: {event.result.why_skipped}")
        if training.skipped_too_often:
            _end_save(training, outside)
            raise training.too_many_skipped(event.result)
    outside.note(outside.profile.merge())
    if outside.controller:
        outside.controller.stepped(step_facts(event))
    if outside.caller:
        outside.caller.stepped(event)
    if outside.slow:
        tp_size = training.ranks.tp_size
        work = {rank: done for rank, done in enumerate(event.result.work_before) if done.tokens and training.shares[rank // tp_size]}
        for line in outside.slow.after_step(work, training.parts.moe.engine.shards.config.topology):
            outside.reports.event(event.step, line)
    measured.train_seconds += event.seconds
    measured.tokens += event.tokens
    return event.result.asked


def _requests(training: Training, outside: _Outside) -> tuple[bool, bool, bool, bool, bool]:
    """What this rank asks for, in the order of `Agreement`. What any rank asks for, all ranks do; only the first rank's orders count."""
    controller, membership = outside.controller, outside.membership
    stop = outside.stopping.is_set or (controller is not None and controller.stop_requested())
    regroup = membership is not None and membership.regroup_requested()
    replan = controller is not None and training.ranks.is_first and controller.has_new_order()
    return stop, regroup, replan, *(training.saving.requests() if training.saving else (False, False))


def _replan(training: Training, outside: _Outside) -> None:
    """Change the plan as the controller's order says."""
    assert outside.controller is not None
    order = outside.controller.receive_order(training.ranks)
    now = training.parts.moe.engine.shards.config.topology
    shares = order.sequences or (training.shares if order.flops is None else None)
    training.plan_for(now if order.flops is None else replace(now, flops=order.flops), shares)
    step = training.run_state.step
    outside.reports.event(step, f"{REPLANNED} after step {step}: sequences {':'.join(map(str, training.shares))}")
    if order.reshard:
        _reshard(training, training.parts.config.max_steps, outside)


def _reshard(training: Training, steps: int, outside: _Outside) -> None:
    # The save's copies of tensors and the experts that move would both be in the host's memory.
    _end_save(training, outside)
    if done := training.reshard(steps):
        outside.reports.resharded(training.run_state.step, done)


def _evaluate(training: Training, outside: _Outside) -> Evaluation:
    faults.at("evaluate")
    found = training.evaluate()
    outside.reports.evaluated(training.run_state.step, found)
    training.judge(found)
    if outside.caller:
        outside.caller.evaluated(training.run_state.step, found)
    return found


def _save(training: Training, outside: _Outside, *, last: bool) -> None:
    """Save, or begin to; `last`: no step follows, so that there is nothing to train meanwhile."""
    _end_save(training, outside)
    outside.reports.saving()
    if training.parts.config.save_async and not last:
        training.begin_save()
    else:
        _report_saved(training, outside, training.save())


def _end_save(training: Training, outside: _Outside, *, failed: bool = False) -> None:
    """Wait for the save under way, if there is one, and commit it."""
    if training.saving:
        _report_saved(training, outside, training.end_save(failed=failed))


def _report_saved(training: Training, outside: _Outside, saved: Saved) -> None:
    for warning in saved.warnings:
        outside.reports.event(training.run_state.step, warning)
    if saved.folder is None:
        return
    step = step_of(saved.folder.name)
    assert step is not None
    outside.reports.saved(step, saved.folder)
    if outside.controller and training.ranks.is_first:
        outside.controller.saved(step, saved.folder)
    if outside.caller:
        outside.caller.saved(step, saved.folder)


def _is_of_a_loss(error: Exception, ranks: Ranks) -> bool:
    """Whether an error says that a peer is lost, or may be a consequence of this rank's groups having been aborted for that."""
    return not isinstance(error, torch.OutOfMemoryError) and (lost_a_peer(error) or ranks.aborted)


def _regroup(training: Training, membership: Membership, outside: _Outside, *, agreed: bool = False) -> bool:
    """Go on with the next group; False: there is none. Every rank of the old group that is left must call it.

    Args:
        agreed: the ranks have agreed on it, and none was lost.
    """
    started = time.monotonic()
    faults.at("lost")
    outside.note(outside.profile.give_up())
    training.ranks.leave(agreed=agreed)
    done = _join(training, membership.next_group)
    if done is None:
        return False
    faults.at("regrouped")
    if outside.slow:
        outside.slow.begin()
    outside.reports.regrouped(done, training.facts(), time.monotonic() - started)
    _report_beginning(training, outside)
    return True


def _joined(config: Config, ranks: Ranks, membership: Membership) -> Training:
    """Load the model alone, so that the others train on meanwhile, then join them."""
    training = Training(config, ranks, local_topology(1, cuda=ranks.device.type == "cuda"), joins=True)
    ranks.leave()
    _join(training, membership.first_group)
    return training


def _join(training: Training, next_group: Callable[[], Group | None]) -> Rebuilt | None:
    """Join the first group that loses no rank meanwhile; None: there is no further group."""
    while group := next_group():
        try:
            return training.join(group)
        except Exception as error:
            if not _is_of_a_loss(error, group.ranks):
                raise
            # Ranks of the group that wait for this one fail now, and come to the next group, too.
            group.ranks.leave()
    return None


def _report_beginning(training: Training, outside: _Outside) -> None:
    outside.mismatches.begin(training.ranks)
    if not outside.controller:
        return
    engine, config = training.parts.moe.engine, training.parts.config
    outside.controller.begins(begin_facts(step=training.run_state.step, max_steps=config.max_steps, shares=training.shares, engine=engine))


def _say(training: Training, reports: Reports, text: str) -> None:
    """Record and show an event of this rank alone."""
    if training.ranks.is_first:
        reports.event(training.run_state.step, text)
    else:
        _log.info(f"hecate: rank {training.ranks.rank}: {text}")


class _Stopping:
    is_set = False


@contextmanager
def _stop_on_signals() -> Iterator[_Stopping]:
    """SIGINT and SIGTERM ask for a stop after the step under way, however often they come. Only the main thread gets signals."""
    stopping = _Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def ask(_number: int, _frame: FrameType | None) -> None:
        # From a terminal the launcher and the ranks all get the signal, and the launcher passes it on: several signals, one request.
        stopping.is_set = True

    with on_signals(ask):
        yield stopping
