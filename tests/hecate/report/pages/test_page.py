"""The report of a run as one page: whole, sound, and honest about what was not recorded."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from hecate.apps.foresee.planned_memory import planned_memory
from hecate.errors import UserError
from hecate.parallel.values.units import Unit
from hecate.report.events import EvalScore, ShownAnswer
from hecate.report.metrics import Record, eval_record, event_record, step_record
from hecate.report.pages.expert_pictures import padded
from hecate.report.pages.page import MOST_TASKS, PlannedMemory, report_page, write_page
from hecate.report.pages.page_parts import bytes_text
from hecate.report.run_records import MOST_BINS, read_run
from testing.browser import NAMES, Browser, find_browser, open_page
from tests.hecate.report.made_runs import LINEARS, a_step, an_eval, usual_records, write_run
from tests.hecate.report.pages.sound_page import Sound, pictures

PLANNED = PlannedMemory(np.array([650_000.0]), {"base weights": 600_000.0, "replicas": 50_000.0}, on_gpu=False)
SECTIONS = [
    "Losses",
    "Tasks",
    "Imbalance between ranks",
    "Load of the experts",
    "Load over time",
    "Placement",
    "Time of a step",
    "Bytes by link",
    "Memory",
    "Events",
]
NEW_FIELDS = ("parts", "ranks", "static_imbalance", "copies", "new_copies", "bytes_between_nodes", "peak_bytes")
"""what earlier versions have not recorded"""


def page_of(folder: Path, planned: PlannedMemory | str = PLANNED) -> tuple[str, Sound]:
    page = report_page(read_run(folder), planned)
    return page, Sound(page)


def test_a_page_has_every_section_and_needs_nothing_else(tmp_path: Path) -> None:
    page, seen = page_of(write_run(tmp_path / "run", usual_records()))
    assert seen.headings == SECTIONS
    assert seen.outside == [], "something comes from outside the page"
    assert "prefers-color-scheme:dark" in page
    assert "not recorded" not in seen.text
    assert "12 of 12, finished" in seen.text
    assert "1.60 of 300 samples" in seen.text, "the epochs of 12 steps, of which 7.5 are one"
    assert "An epoch is 7.5 steps." in seen.text
    assert "2, from step 9 on 1" in seen.text, "the ranks"
    assert "4.000 → 1.500" in seen.text, "the first and the last held-out loss"
    assert "In the mean step 3 kB stayed inside nodes and 2 kB went from one node to another" in seen.text
    assert "1 ranks go on after step 8" in seen.text
    assert "4 3 4 kB 0.5 s 0.1 s" in seen.text, "the experts that moved after step 4"
    assert "Checkpoints saved: 1, the last one after step 8." in seen.text
    static = np.mean([a_step(step, ranks=2 if step < 9 else 1).static_imbalance for step in range(1, 13)])
    assert f"the same loads would have given {static:.2f} (computed, not run)" in seen.text
    assert static > 1.1
    drawn = pictures(page)
    marks = [line for line in drawn[0].iter("line") if line.attrib["class"] == "mark"]
    assert len(marks) == 2, "the move, and the loss of a rank"
    assert len(drawn) == 16
    maps = [imread(io.BytesIO(base64.b64decode(image.attrib["href"].split(",")[1]))) for svg in drawn for image in svg.iter("image")]
    # The loads of both layers, each expert's over time, and the unevenness; each with the scale of its colours.
    assert [one.shape[:2] for one in maps] == [(2, 4), (32, 1), (2, 12), (32, 1), (4, 12), (32, 1)]
    assert all(one[..., 3].min() == 1 for one in maps)


def test_epochs_are_known_between_records_and_without_a_number_of_samples(tmp_path: Path) -> None:
    """With logging_steps=5, after step 12; data that are not mixed have no samples of an epoch."""
    steps = [step_record(a_step(5)) | {"epoch_samples": None}, step_record(a_step(10)) | {"epoch_samples": None}]
    _, seen = page_of(write_run(tmp_path / "run", [*steps, event_record(12, "saved checkpoint-12")]))
    assert "1.60 epochs" in seen.text
    assert "samples" not in seen.text


def test_answers_of_the_first_and_the_last_evaluation_stand_side_by_side(tmp_path: Path) -> None:
    records = [answered(step, f"said at {step}") for step in (0, 5, 10)]
    _, seen = page_of(write_run(tmp_path / "run", [*records, step_record(a_step(10)), an_eval(12, 1.0)]))
    assert seen.headings[-1] == "Answers"
    assert "task prompt expected answer after step 0 answer after step 10" in seen.text
    assert "sum 1 + 1? 2 said at 0 said at 10" in seen.text
    assert "The first questions of each task, 1 in all" in seen.text
    assert "said at 5" not in seen.text
    other = answered(10, "said at 10", prompt="2 + 2?")  # as after a resume with other data
    assert "sum 2 + 2? 2 - said at 10" in page_of(write_run(tmp_path / "other", [records[0], other]))[1].text
    _, seen = page_of(write_run(tmp_path / "one", records[:1]))
    assert "task prompt expected answer after step 0 sum 1 + 1? 2 said at 0" in seen.text
    assert "Answers" not in page_of(write_run(tmp_path / "none", usual_records()))[1].headings


def test_an_answer_that_attacks_the_page_is_text(tmp_path: Path) -> None:
    """Of a model, a data file and a metrics.jsonl that a stranger has made; half a surrogate pair has no form in UTF-8."""
    attacks = [
        "</td></table><script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<!--",
        "&lt;script&gt;",
        "]]><style>*{}",
        "\ud800",
    ]
    for number, attack in enumerate(attacks):
        folder = write_run(
            tmp_path / str(number), [answered(0, attack, prompt=attack, expected=attack, source=attack), answered(1, attack)]
        )
        plain = write_run(tmp_path / f"{number} plain", [answered(0, "x", source="x"), answered(1, "x")])
        page, seen = page_of(folder)
        assert page.count("<") == page_of(plain)[0].count("<"), "a text made an element"
        assert attack in seen.text
        write_page(tmp_path / "page.html", page)


@pytest.mark.parametrize("answers", [{}, ["x"], [{"prompt": "a", "expected": "b"}], [{"prompt": "a", "expected": "b", "answer": 1}], None])
def test_answers_that_are_no_texts_are_refused(tmp_path: Path, answers: object) -> None:
    record = answered(0, "x")
    record["sources"]["sum"]["answers"] = answers
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a record of metrics: its answers are no texts"):
        read_run(write_run(tmp_path / "run", [record, step_record(a_step(1))]))


def answered(step: int, answer: str, *, prompt: str = "1 + 1?", expected: str = "2", source: str = "sum") -> Record:
    return eval_record(step, {source: EvalScore(1.0, 0.5, 8)}, {source: (ShownAnswer(prompt, expected, answer),)})


def test_what_was_not_recorded_is_said(tmp_path: Path) -> None:
    """A run of a version that recorded less has the same page, with holes."""
    steps = [step_record(a_step(step)) for step in (1, 2)]
    old = [{name: value for name, value in record.items() if name not in NEW_FIELDS} for record in steps]
    _, seen = page_of(write_run(tmp_path / "run", old, {"max_steps": 9}), "the run has recorded no memory")
    assert seen.headings == SECTIONS
    assert seen.text.count("not recorded") == 9
    assert "What static expert parallelism would have had: not recorded." in seen.text
    assert "2 of 9, under way, or ended without a word" in seen.text
    assert "By link: not recorded." in seen.text


def test_a_stopped_run_says_so_and_its_torn_line_is_left_out(tmp_path: Path) -> None:
    stop = event_record(2, "stopped by a signal after step 2; go on with: hecate train <b>run</b> resume=true")
    folder = write_run(tmp_path / "run", [*(step_record(a_step(step)) for step in (1, 2)), stop])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind":"step","step":3,"lo')
    page, seen = page_of(folder)
    assert "2 of 12, stopped" in seen.text
    assert "The last line of metrics.jsonl is torn" in seen.text
    assert "<b>run" not in page, "a text of the run became HTML"
    assert "The run has not evaluated" in seen.text


def test_how_far_a_run_has_come_is_known_between_records(tmp_path: Path) -> None:
    """With logging_steps=5 the steps 7 and 12 are recorded by events alone, and a run that was resumed is under way."""
    begun = [step_record(a_step(5)), event_record(7, "stopped by a signal after step 7"), event_record(7, "tracker one failed")]
    resumed = [*begun, event_record(7, "resumed after step 7")]
    ended = [*resumed, step_record(a_step(10)), event_record(12, "saved checkpoint-12")]
    for number, (records, said) in enumerate(((begun, "7 of 12, stopped"), (resumed, "7 of 12, under way"), (ended, "12 of 12, finished"))):
        assert said in page_of(write_run(tmp_path / str(number), records))[1].text


def test_skipped_steps_are_counted_also_where_they_are_not_recorded(tmp_path: Path) -> None:
    """With logging_steps=5, steps 3 and 5 were skipped."""
    skipped = [event_record(3, "step 3 was skipped: its loss was nan"), event_record(5, "step 5 was skipped: its loss was nan")]
    assert "2: a loss or gradient was not finite" in page_of(write_run(tmp_path / "run", [*skipped, step_record(a_step(5))]))[1].text


def test_a_policys_former_name_is_shown_as_the_present_one(tmp_path: Path) -> None:
    page, _ = page_of(write_run(tmp_path / "run", usual_records(), {"fssdp": {"policy": "hecate"}}))
    assert "policy: hecate_paper" in page


def test_no_text_of_a_run_becomes_html(tmp_path: Path) -> None:
    """The name of its folder, its configuration, its tasks and events, and what is said of its memory."""
    mark = "<i>&amp;"
    records = [eval_record(1, {f"{mark} task": EvalScore(1.0, 0.5, 8)}), step_record(a_step(1)), event_record(1, f"{mark} event")]
    folder = write_run(tmp_path / f"{mark} run", records, {"model": {"name_or_path": f"{mark} model"}})
    for planned in (f"{mark} reason", PlannedMemory(np.ones(2), {f"{mark} part": 1.0}, on_gpu=False)):
        page, seen = page_of(folder, planned)
        assert "<i>" not in page
        for text in ("run", "model", "task", "event", "reason" if isinstance(planned, str) else "part"):
            assert f"{mark} {text}" in seen.text, text


def test_more_tasks_than_colours_are_in_the_table_and_the_page_says_so(tmp_path: Path) -> None:
    scores = {f"task-{number}": EvalScore(1.0, None, 8) for number in range(MOST_TASKS + 2)}
    page, seen = page_of(write_run(tmp_path / "run", [eval_record(1, scores), step_record(a_step(1))]))
    assert f"The first {MOST_TASKS} of {MOST_TASKS + 2} tasks; the table has all." in seen.text
    assert page.count(f"task-{MOST_TASKS + 1}<") == 1


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    _, seen = page_of(write_run(tmp_path / "run", [event_record(0, "resumed after step 0")]), "nothing yet")
    assert seen.headings == [heading for heading in SECTIONS if heading != "Load over time"]
    assert "none recorded yet" in seen.text


def test_hundreds_of_units_are_drawn_by_kind_of_linear(tmp_path: Path) -> None:
    """128 units are four maps of 32 layers, and one row for each layer over time."""
    steps = [step_record(a_step(step, units=LINEARS, experts=8)) for step in range(1, 4)]
    page, seen = page_of(write_run(tmp_path / "run", steps))
    assert len(page) < 100_000
    maps = [imread(io.BytesIO(base64.b64decode(i.attrib["href"].split(",")[1]))) for svg in pictures(page) for i in svg.iter("image")]
    assert [one.shape[:2] for one in maps if one.shape[1] > 1] == [(32, 8)] * 4 + [(32, 3), (8, 3)]
    assert "self_attn.v_proj, by layer and expert" in seen.text


def test_layers_of_different_sizes_are_padded_and_many_experts_share_columns() -> None:
    grid, names = padded([np.array([1.0, 5.0, 2.0]), np.array([4.0])], most=2)
    assert names == ["0", "2"]
    assert grid[0].tolist() == [5.0, 2.0]
    assert grid[1, 0] == 4.0
    assert np.isnan(grid[1, 1])


def test_long_runs_are_summed_up_over_stretches_of_steps(tmp_path: Path) -> None:
    steps = 2 * MOST_BINS + 3
    run = read_run(write_run(tmp_path / "run", [step_record(a_step(step)) for step in range(1, steps + 1)]))
    assert run.loads.first_B.tolist() == list(range(1, steps + 1, 4))
    wanted = sum(np.asarray(a_step(step).result.loads[Unit(1)]).sum(1) for step in range(5, 9))
    assert run.loads.of(Unit(1))[1].tolist() == wanted.tolist()
    assert len(run.column("loss")) == steps  # type: ignore[arg-type]


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: metrics cannot be read: No such file.*\n.*output_dir of a run"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind":"event","step":1,"text":"x"}\nnonsense\n{"kind":"event","step":2,"text":"y"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a record of metrics"):
        read_run(tmp_path)
    two = write_run(tmp_path / "two", [step_record(a_step(1)), step_record(a_step(2, experts=5))])
    with pytest.raises(UserError, match="step 2 has other layers or numbers of experts"):
        read_run(two)
    (two / "config.yaml").write_text("a: [", encoding="utf-8")
    (two / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"config\.yaml: the run's configuration cannot be read"):
        read_run(two)
    with pytest.raises(UserError, match=r"the report cannot be written: No such file or directory\n  give another file with -o"):
        write_page(tmp_path / "nowhere" / "page.html", "")


def test_a_plan_that_cannot_be_made_gives_its_reason(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", usual_records())
    reason = planned_memory(folder, 2)
    assert isinstance(reason, str)
    _, seen = page_of(folder, reason)
    assert f"There is no plan to compare with: {reason}" in seen.text
    _, seen = page_of(folder, PlannedMemory(np.ones(2), {}, on_gpu=True))
    assert "The plan is for 2 ranks, so it is not compared." in seen.text


def test_sizes() -> None:
    assert [bytes_text(size) for size in (0, 999, 1500, 999_700, 2.5e9, 3e12)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "1 MB",
        "2.5 GB",
        "3 TB",
    ]


@pytest.mark.slow
def test_a_browser_complains_where_there_is_reason(tmp_path: Path) -> None:
    browser = a_browser()
    bad = tmp_path / "bad.html"
    bad.write_text("<div style='width: 900px'><img src='no.png'></div><script>console.warn('mind'); none()</script>", encoding="utf-8")
    opened = open_page(browser, bad, 400)
    assert opened.missing_pictures == 1
    assert opened.width > 400
    for piece in ("mind", "none is not defined", "ERR_FILE_NOT_FOUND"):
        assert any(piece in complaint for complaint in opened.complaints), opened.complaints


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1100], ids=["phone", "desk"])
def test_a_browser_shows_it_without_complaint(tmp_path: Path, width: int) -> None:
    browser = a_browser()
    long = [ShownAnswer(f"{number}: {'word ' * 60}", "word " * 60, "word " * 60) for number in range(3)]
    scores = {name: EvalScore(1.0, 0.5, 8) for name in ("sum", "count", "sort")}
    answers = [eval_record(step, scores, dict.fromkeys(scores, long)) for step in (0, 12)]
    page, _ = page_of(write_run(tmp_path / "run", [*usual_records(), *answers]))
    opened = open_page(browser, write_page(tmp_path / "page.html", page), width)
    assert opened.complaints == []
    assert opened.missing_pictures == 0
    assert opened.width == width, "the page must be scrolled sideways"
    shot = tmp_path / "shot.png"
    shot.write_bytes(opened.shot)
    if width == 1100:
        assert len(imread(shot)) <= 3 * 800, "a short run takes at most three screens"
    seen = (imread(shot)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    for colour in ((253, 231, 37), (0, 114, 178)):  # the brightest cell of a heat map; the first line's colour
        assert (np.abs(seen - colour).max(1) <= 2).any(), f"nothing on the page has the colour {colour}"


def a_browser() -> Browser:
    browser = find_browser()
    if browser is None:
        pytest.skip(f"no headless browser: none of {', '.join(NAMES)} is on the PATH; `make browser` fetches one")
    return browser
