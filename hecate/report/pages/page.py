"""The report of a run as one HTML page that needs nothing but itself: no script, no font, no picture from outside.

`report_page` puts sections together; each section is a function from what the run has recorded to HTML, and says "not recorded" where
the run has left nothing to say.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from hecate.errors import UserError
from hecate.io.durable import replace_output
from hecate.parallel.values.policy_names import current_name
from hecate.report.metrics import ENDED_EARLY, REGROUPED, REPLANNED, RESUMED, SAVED, STOPPED
from hecate.report.pages.expert_pictures import expert_sections
from hecate.report.pages.page_parts import NOT_RECORDED, bytes_text, figure, not_recorded, section, table
from hecate.report.pages.style import STYLE
from hecate.report.pages.svg import Bar, Line, area_chart, bar_chart, line_chart, number_text
from hecate.report.progress import epochs_text
from hecate.report.run_records import Record, RunRecords, read_run

MOST_RANKS, MOST_EVENTS = 16, 40
"""how many ranks, and how many events, a page shows at once"""
RELOAD_SECONDS = 10
"""after which a page about a run under way is written again"""
MOST_TASKS = 16
"""how many tasks have curves"""


@dataclass(frozen=True, eq=False)
class PlannedMemory:
    """What `hecate plan` predicts for a run's memory."""

    bytes_D: np.ndarray
    """float64 [ranks]: of each rank in its fullest phase"""
    parts: dict[str, float]
    """part -> bytes, on the fullest rank in its fullest phase"""
    on_gpu: bool
    """whether the devices are GPUs"""


def report_page(run: RunRecords, planned: PlannedMemory | str, *, reload_seconds: int | None = None) -> str:
    """Return the page.

    Args:
        planned: the memory that was predicted, or why nothing could be.
        reload_seconds: after which a browser reads the page again; None: it does not.
    """
    sections = (
        _overview(run),
        _losses(run),
        _tasks(run),
        *((_imbalance(run), *expert_sections(run), _placement(run)) if _has_experts(run) else ()),
        _time(run),
        *((_bytes(run),) if _has_experts(run) else ()),
        _memory(run, planned),
        _events(run),
        _answers(run),
    )
    return document(f"{run.name}: report of a training run", "".join(sections), reload_seconds)


def document(title: str, body: str, reload_seconds: int | None = None) -> str:
    """Return a whole page of HTML sections."""
    again = f'<meta http-equiv="refresh" content="{reload_seconds}">' if reload_seconds else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f'{again}<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def write_page(path: Path, page: str) -> Path:
    """Write the page, and return where it is.

    Raises:
        UserError: the disk refuses.
    """
    try:
        replace_output(path, [page.encode(errors="replace")])
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written: {error.strerror or error}\n  give another file with -o") from error
    return path


def write_report(folder: Path, place: Path, planned: PlannedMemory | str, *, follow: bool) -> Path:
    """Write the report of a run and return where it is; with `follow` again every `RELOAD_SECONDS` until the run is finished or Ctrl-C.

    Raises:
        UserError: records cannot be read, or the disk refuses.
    """
    with suppress(KeyboardInterrupt):
        while follow and not _state(records := read_run(folder)).endswith("finished"):
            write_page(place, report_page(records, planned, reload_seconds=RELOAD_SECONDS))
            time.sleep(RELOAD_SECONDS)
    return write_page(place, report_page(read_run(folder), planned))


def _has_experts(run: RunRecords) -> bool:
    return run.config_value("adapter") != "lora"


def _overview(run: RunRecords) -> str:
    ranks = run.column("ranks")
    speed, imbalance, static = (run.column(name) for name in ("tokens_per_s", "imbalance", "static_imbalance"))
    loss = run.column("loss")
    # Each skipped step is an event, also one whose record `logging_steps` leaves out.
    skipped = sum(bool(re.match(r"step \d+ was skipped: ", str(event.get("text")))) for event in run.events)
    tiles = [
        ("steps", _state(run)),
        *([] if (an_epoch := _steps_of_epoch(run)) is None else [("epochs", _epochs(run, an_epoch))]),
        ("loss, last", NOT_RECORDED if loss is None else f"{loss[np.isfinite(loss)][-1]:.3f}"),
        ("tokens/s, median", NOT_RECORDED if speed is None else number_text(float(np.nanmedian(speed)))),
        ("ranks", NOT_RECORDED if ranks is None else _changes(run.step_S, ranks)),
    ]
    if _has_experts(run):
        of_static = NOT_RECORDED if static is None else f"{np.nanmean(static):.2f}"
        tiles.append(("imbalance (static EP)", NOT_RECORDED if imbalance is None else f"{np.nanmean(imbalance):.2f} ({of_static})"))
    if skipped:
        tiles.append(("steps skipped", f"{skipped}: a loss or gradient was not finite, or a norm was a spike"))
    of_experts = (
        ("experts", "moe.family"),
        ("unit", "moe.unit"),
        ("policy", "fssdp.policy"),
        ("plan", "fssdp.plan"),
        ("topology", "topology"),
    )
    facts = [
        (label, current_name(str(value)))
        for label, key in (("base model", "model.name_or_path"), *(of_experts if _has_experts(run) else (("LoRA rank", "lora.r"),)))
        if (value := run.config_value(key)) is not None
    ]
    shown = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in tiles)
    described = " · ".join(f"{escape(label)}: {escape(value)}" for label, value in facts) or "The run has left no config.yaml."
    torn = "<p>The last line of metrics.jsonl is torn, as a kill leaves it; it is left out.</p>" if run.torn else ""
    return f'<header><h1>{escape(run.name)}</h1><p class="dim">{described}</p>{torn}<div class="tiles">{shown}</div></header>'


def _state(run: RunRecords) -> str:
    """How far the run has come, and whether it has ended.

    Events tell of steps that are not recorded themselves (`logging_steps`): the checkpoint at the end, and a stop.
    """
    last = _last_step(run)
    if not last:
        return "none recorded yet"
    most = run.config_value("max_steps")
    if most is None:
        return f"{last}"
    if not isinstance(most, int | float):
        return f"{last}"
    if last >= most:
        return f"{last} of {most}, finished"
    texts = [str(event.get("text")) for event in run.events]
    turns = [text for text in texts if text.startswith((STOPPED, RESUMED, ENDED_EARLY))]
    if turns and turns[-1].startswith(ENDED_EARLY):
        return f"{last} of {most}, finished: {ENDED_EARLY}"
    stopped = turns and turns[-1].startswith(STOPPED)
    return f"{last} of {most}, " + ("stopped" if stopped else "under way, or ended without a word")


def _last_step(run: RunRecords) -> int:
    return int(max([0, *run.step_S[-1:].tolist(), *(event["step"] for event in run.events)]))


def _steps_of_epoch(run: RunRecords) -> float | None:
    """None: not recorded."""
    epoch_S = run.column("epoch")
    if epoch_S is None:
        return None
    last = np.flatnonzero((epoch_S > 0) & (run.step_S > 0))[-1:]
    return float(run.step_S[last[0]] / epoch_S[last[0]]) if len(last) else None


def _epochs(run: RunRecords, steps_of_epoch: float) -> str:
    """ "2.00 of 300 samples": also after a step that is not recorded itself."""
    samples = run.column("epoch_samples")
    of = "" if samples is None else f" of {samples[np.isfinite(samples)][-1]:,.0f} samples"
    return epochs_text(_last_step(run) / steps_of_epoch) + of


def _changes(step_S: np.ndarray, value_S: np.ndarray) -> str:
    """ "4", or "4, from step 30 on 3": a value that seldom changes."""
    known = [(int(step), int(value)) for step, value in zip(step_S, value_S, strict=True) if np.isfinite(value)]
    changed = [here for before, here in zip([(0, -1), *known], known, strict=False) if here[1] != before[1]]
    if len(changed) > 4:
        return f"{changed[0][1]} at first, {changed[-1][1]} at last, {len(changed) - 1} changes"
    return ", ".join([f"{changed[0][1]}", *(f"from step {step} on {value}" for step, value in changed[1:])])


def _one_line(run: RunRecords, name: str, title: str, text: str, *, from_zero: bool = False) -> str:
    values = run.column(name)
    if values is None:
        return not_recorded(title)
    chart = line_chart([Line(title, run.step_S, values)], f"{title} by step", marks=_marks(run), from_zero=from_zero)
    return figure(title, chart, text)


def _losses(run: RunRecords) -> str:
    an_epoch = _steps_of_epoch(run)
    epochs = "" if an_epoch is None else f" An epoch is {number_text(an_epoch)} steps."
    return section(
        "Losses",
        _one_line(run, "loss", "training loss", f"Cross-entropy per label token, by step.{epochs}"),
        _one_line(run, "aux_loss", "load-balancing loss", "Before its coefficient; top_k where the load is even.")
        if _has_experts(run)
        else "",
        _one_line(run, "grad_norm", "norm of the gradients", "Before clipping.", from_zero=True),
        _one_line(run, "learning_rate", "learning rate", "", from_zero=True),
    )


def _tasks(run: RunRecords) -> str:
    """The held-out results of each source: curves, and a table of the first and the last."""
    names = list(dict.fromkeys(name for record in run.evals for name in record["sources"]))
    if not names:
        return section(
            "Tasks", not_recorded("held-out results", "The run has not evaluated: data.eval is empty, or no evaluation has come yet.")
        )
    steps = np.array([record["step"] for record in run.evals])

    def values(name: str, what: str) -> np.ndarray:
        found = [record["sources"].get(name, {}).get(what) for record in run.evals]
        return np.array([np.nan if value is None else float(value) for value in found])

    parts = []
    for what, title in (("loss", "held-out loss"), ("accuracy", "exact answers")):
        lines = [Line(name, steps, values(name, what)) for name in names[:MOST_TASKS] if np.isfinite(values(name, what)).any()]
        if lines:
            chart = line_chart(lines, f"{title} by step and task", dots=True, from_zero=what == "accuracy")
            some = f"The first {MOST_TASKS} of {len(names)} tasks; the table has all." if len(names) > MOST_TASKS else ""
            parts.append(figure(title, chart, some, [line.name for line in lines]))
    rows = []
    for name in names:
        row = [name]
        for what in ("loss", "accuracy"):
            known = [value for value in values(name, what) if np.isfinite(value)]
            row.append("-" if not known else f"{known[0]:.3f}" if len(known) == 1 else f"{known[0]:.3f} → {known[-1]:.3f}")
        rows.append(row)
    return section("Tasks", *parts, table(["task", "loss, first → last", "exact, first → last"], rows))


def _answers(run: RunRecords) -> str:
    """The answers of the first evaluation that has any beside those of the last to the same questions; empty: none has."""
    said = [record for record in run.evals if any(source.get("answers") for source in record["sources"].values())]
    if not said:
        return ""
    steps = [record["step"] for record in (said if len(said) == 1 else (said[0], said[-1]))]
    earlier = {(name, one["prompt"], one["expected"]): one["answer"] for name, one in _said_in(said[0])}
    asked = [((name, one["prompt"], one["expected"]), one["answer"]) for name, one in _said_in(said[-1])]
    rows = [[*question, *([earlier.get(question, "-")] if len(steps) > 1 else []), answer] for question, answer in asked]
    shown = table(["task", "prompt", "expected", *(f"answer after step {step}" for step in steps)], rows)
    text = f'<p class="dim">The first questions of each task, {len(rows)} in all; the table can be scrolled.</p>'
    return f'<div class="answers">{section("Answers", text, shown)}</div>'


def _said_in(record: Record) -> list[tuple[str, dict[str, str]]]:
    return [(name, one) for name, source in record["sources"].items() for one in source.get("answers", [])]


def _imbalance(run: RunRecords) -> str:
    was, static = run.column("imbalance"), run.column("static_imbalance")
    if was is None:
        return section("Imbalance between ranks", not_recorded("imbalance"))
    lines = [Line("this run", run.step_S, was)]
    text = "Assignments of the busiest rank over the mean, averaged over the layers; 1 is perfect. The other ranks wait for the busiest."
    if static is None:
        text += f" What static expert parallelism would have had: {NOT_RECORDED}."
    else:
        lines.append(Line("static expert parallelism", run.step_S, static))
        text += (
            f" On average it was {np.nanmean(was):.2f}. With every expert fixed on one rank, in blocks, the same loads would have given "
            f"{np.nanmean(static):.2f} (computed, not run)."
        )
    chart = line_chart(lines, "imbalance by step, as it was and under static expert parallelism", marks=_marks(run))
    names = [] if static is None else [line.name for line in lines]
    return section("Imbalance between ranks", figure("imbalance", chart, text, names))


def _placement(run: RunRecords) -> str:
    moves = [event for event in run.events if event["kind"] == "reshard"]
    rows = [
        [
            str(one["step"]),
            str(one["experts"]),
            bytes_text(one["bytes_sent"]),
            *(_seconds(one.get(name), digits) for name, digits in (("seconds", 3), ("saved_seconds", 2))),
        ]
        for one in moves
    ]
    owners = (
        table(["after step", "experts", "sent", "took", "predicted to save a step"], rows)
        if rows
        else "<p>No expert has changed its owner for balance (fssdp.reshard_interval).</p>"
    )
    return section(
        "Placement",
        _one_line(run, "copies", "copies", "Replicas on other ranks than the experts' owners, all layers together.", from_zero=True),
        _one_line(run, "new_copies", "new copies", "Of these, those that were not there in the step before.", from_zero=True),
        owners,
    )


def _seconds(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}g} s"


def _time(run: RunRecords) -> str:
    speed = _one_line(run, "tokens_per_s", "tokens/s", "", from_zero=True)
    seconds = run.column("step_seconds")
    if seconds is None or not run.parts:
        return section("Time of a step", not_recorded("parts of a step"), speed)
    rest = seconds - np.nansum(list(run.parts.values()), axis=0)
    known = np.isfinite(next(iter(run.parts.values())))
    layers = [*run.parts.items(), ("the rest: data, optimizer", np.where(known, rest, np.nan))]
    mean = float(np.nanmean(seconds[known]))
    rows = [[name, f"{np.nanmean(part):.3g} s", f"{100 * np.nanmean(part) / mean:.0f} %"] for name, part in layers]
    chart = area_chart(run.step_S, layers, "seconds of a step's parts by step")
    text = f"Rank 0; the mean step took {mean:.3g} s."
    return section(
        "Time of a step",
        figure("seconds by part", chart, text, [name for name, _ in layers]),
        speed,
        table(["part", "mean", "share"], rows),
    )


def _bytes(run: RunRecords) -> str:
    sent, far = run.column("bytes_sent"), run.column("bytes_between_nodes")
    if sent is None:
        return section("Bytes by link", not_recorded("bytes"))
    if far is None:
        chart = line_chart([Line("bytes", run.step_S, sent)], "bytes sent by step", from_zero=True)
        return section("Bytes by link", figure("bytes of a step", chart, f"By link: {NOT_RECORDED}."))
    near = sent - far
    chart = area_chart(run.step_S, [("inside nodes", near), ("between nodes", far)], "bytes sent by step and kind of link")
    text = (
        f"All ranks together, for experts and tokens. In the mean step {bytes_text(float(np.nanmean(near)))} stayed inside nodes and "
        f"{bytes_text(float(np.nanmean(far)))} went from one node to another."
    )
    return section("Bytes by link", figure("bytes of a step", chart, text, ["inside nodes", "between nodes"]))


def _memory(run: RunRecords, planned: PlannedMemory | str) -> str:
    """Each rank's peak beside what `hecate plan` says of it."""
    if not run.peak_bytes:
        return section("Memory", not_recorded("peak memory of the ranks"))
    peaks = np.array(run.peak_bytes, dtype=float)
    comparable = not isinstance(planned, str) and len(planned.bytes_D) == len(peaks)
    fullest = np.argsort(-peaks, kind="stable")[:MOST_RANKS]
    bars = []
    for rank in sorted(fullest.tolist()):
        goal = float(planned.bytes_D[rank]) if comparable and not isinstance(planned, str) else None
        bars.append(Bar(f"rank {rank}", float(peaks[rank]), goal))
    text = "Peak of each rank since it began." if len(peaks) <= MOST_RANKS else f"Peaks of the {MOST_RANKS} fullest of {len(peaks)} ranks."
    parts = ""
    if isinstance(planned, str):
        text += f" There is no plan to compare with: {planned}"
    elif not comparable:
        text += f" The plan is for {len(planned.bytes_D)} ranks, so it is not compared."
    else:
        text += " The mark is what `hecate plan` predicts."
        if not planned.on_gpu:
            text += " Measured is all that is resident on the host, with torch and other libraries; the plan counts tensors alone."
        rows = [[name, bytes_text(size)] for name, size in planned.parts.items() if size]
        parts = table(["planned, on the fullest rank in its fullest phase", "bytes"], rows)
    return section("Memory", figure("peak memory", bar_chart(bars, "peak memory by rank", bytes_text), text), parts)


def _events(run: RunRecords) -> str:
    texts = [(str(event["step"]), str(event["text"])) for event in run.events if event["kind"] == "event"]
    saved = [step for step, text in texts if text.startswith(SAVED)]
    said = f"Checkpoints saved: {len(saved)}, the last one after step {saved[-1]}." if saved else "No checkpoint was saved."
    rows = [[step, text] for step, text in texts if not text.startswith(SAVED)]
    if not rows:
        return section("Events", f"<p>{said} Nothing else is recorded: no stop, no resume, no loss of a rank.</p>")
    shown = f"<p>{said}</p>" + table(["after step", "what happened"], rows[-MOST_EVENTS:])
    if len(rows) > MOST_EVENTS:
        earlier = table(["after step", "what happened"], rows[:-MOST_EVENTS])
        shown = f"<details><summary>{len(rows) - MOST_EVENTS} earlier events</summary>{earlier}</details>{shown}"
    return section("Events", shown)


def _marks(run: RunRecords) -> Sequence[int]:
    """The steps at which other ranks went on, the plan changed or experts moved."""
    telling = (REGROUPED, REPLANNED, RESUMED)
    steps = {
        event["step"] for event in run.events if event["kind"] == "reshard" or any(words in str(event.get("text")) for words in telling)
    }
    return sorted(step for step in steps if len(run.step_S) and run.step_S[0] <= step <= run.step_S[-1])
