"""Data files of every form hold the same samples."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hecate.config.files.paths import data_files, name_of_source
from hecate.data.files import json_array, tables
from hecate.data.files.formats import Fault, Sample, read_samples
from hecate.data.files.records import places_of_records, read_records
from hecate.errors import UserError

RECORDS = [{"prompt": f'q{i}, "ü🙂"\nsecond line', "completion": "a" * i + "\\"} for i in range(1, 30)]


def as_csv(records: list[dict[str, str]]) -> str:
    cells = [list(records[0]), *([text.replace('"', '""') for text in record.values()] for record in records)]
    return "".join(",".join(f'"{cell}"' for cell in row) + "\r\n" for row in cells)


TEXTS = {
    "a.jsonl": "".join(json.dumps(record) + "\n" for record in RECORDS),
    "a.json": json.dumps(RECORDS),
    "b.json": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "lines.json": "".join(json.dumps(record) + "\n" for record in RECORDS),
    "a.csv": as_csv(RECORDS),
    "a.TSV": as_csv(RECORDS).replace('","', '"\t"'),
}


def values(path: Path | str) -> list[Any]:
    return [record.value for record in read_records(str(path))]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", TEXTS)
def test_every_text_form_holds_the_same_records(tmp_path: Path, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "_CHUNK", chunk)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + TEXTS[name].encode())
    assert values(tmp_path / name) == RECORDS
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(TEXTS[name].encode()))
    assert values(tmp_path / f"{name}.gz") == RECORDS


def test_records_are_found_again_by_their_numbers(tmp_path: Path) -> None:
    """A record takes two lines in a CSV with a header, and four in an indented list; records of several files are numbered on."""
    for name in ("a.csv", "b.json", "a.jsonl"):
        (tmp_path / name).write_bytes(TEXTS[name].encode())
    assert places_of_records(f"{tmp_path}/a.csv", {1, 3}) == {1: f"{tmp_path}/a.csv:2", 3: f"{tmp_path}/a.csv:6"}
    assert places_of_records(f"{tmp_path}/b.json", {2}) == {2: f"{tmp_path}/b.json:6"}
    assert places_of_records(f"{tmp_path}/a.jsonl", {3}) == {3: f"{tmp_path}/a.jsonl:3"}
    (tmp_path / "b.jsonl").write_bytes(TEXTS["a.jsonl"].encode())
    assert places_of_records(f"{tmp_path}/*.jsonl", {31, 99}) == {31: f"{tmp_path}/b.jsonl:2"}


def test_times_finer_than_pythons_are_no_damage(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"text": ["a"]}
    for name, kind in (("when", pyarrow.timestamp("ns", "UTC")), ("long", pyarrow.duration("ns")), ("at", pyarrow.time64("ns"))):
        columns[name] = pyarrow.array([1_234_567], type=kind)
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    (record,) = read_records(str(tmp_path / "a.parquet"))
    assert record.value["text"] == "a"


@pytest.mark.parametrize("form", ["parquet", "arrow file", "arrow stream"])
def test_tables_hold_the_same_records(tmp_path: Path, form: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [*RECORDS, {"prompt": "q", "completion": None}]
    table, path = pyarrow.Table.from_pylist(records), str(tmp_path / f"a.{form.split()[0]}")
    if form == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(path, "wb") as file:
            new = pyarrow.ipc.new_file if form == "arrow file" else pyarrow.ipc.new_stream
            with new(file, table.schema) as writer:
                writer.write_table(table)
    assert values(path) == [*RECORDS, {"prompt": "q"}]
    fault = list(read_samples(path))[-1]
    assert isinstance(fault, Fault)
    assert (fault.place, fault.reason) == (f"{path}, row 30", "no 'completion' in the record (its keys: prompt)")
    Path(path).write_bytes(Path(path).read_bytes()[:100])
    with pytest.raises(UserError, match=f"{path}: cannot be read as"):
        values(path)


def test_a_pyarrow_that_may_unpickle_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", old := ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", ModuleType("pyarrow.ipc"))
    for version in ("14.0.2", "23.0.0", "22.9.9.dev1"):
        old.__dict__["__version__"] = version
        with pytest.raises(UserError, match="is not used to read it, because it may run code") as caught:
            list(tables.read_arrow("a.arrow"))
        assert str(caught.value).endswith("update it with: pip install 'pyarrow >= 23.0.1'")


def test_a_cell_of_a_csv_file_may_be_long() -> None:
    (row,) = tables.read_csv(io.StringIO("text\n" + "a" * 200_000 + "\n"), "a.csv")
    assert row == (2, {"text": "a" * 200_000}, "")


@pytest.mark.parametrize(
    ("content", "delimiter", "record"),
    [
        ("text;note, short\n1;a\n", None, {"text": "1", "note, short": "a"}),
        ("text;note, short\n1,5;a\n", ";", {"text": "1,5", "note, short": "a"}),
        ("text,note; short\na,b\n", None, {"text": "a", "note; short": "b"}),
        ("text|note\na|b\n", None, {"text": "a", "note": "b"}),
        ("text^note\na,b^c\n", "^", {"text": "a,b", "note": "c"}),
        ('text;note\n"a\n;b";c\n', None, {"text": "a\n;b", "note": "c"}),
        ("text;note,\na;b\n", ";", {"text": "a", "note,": "b"}),
    ],
)
def test_any_sign_may_part_the_cells_of_a_table(tmp_path: Path, content: str, delimiter: str | None, record: dict[str, str]) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert [read.value for read in read_records(str(tmp_path / "a.csv"), delimiter=delimiter)] == [record]


def test_a_table_of_one_column_may_have_another_sign(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question^answer\n1^2\n")
    with pytest.raises(UserError, match=r"\nif another sign parts its cells, say which: \{path: \.\.\., delimiter: '\^'\}\n"):
        list(read_samples(tmp_path / "a.csv"))


def test_folders_and_patterns_are_read_by_name_and_numbered_through(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "_hidden.jsonl", ".more.jsonl", "README.md", "c.txt"):
        (tmp_path / name).write_text("".join(f'{{"text": "{name}{i}"}}\n' for i in range(2)))
    for path in (tmp_path, tmp_path / "[ab]*.jsonl", tmp_path / "?.jsonl"):
        found = [(Path(record.file).name, record.line, record.number) for record in read_records(str(path))]
        assert found == [("a.jsonl", 1, 1), ("a.jsonl", 2, 2), ("b.jsonl", 1, 3), ("b.jsonl", 2, 4)]
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n{\n')
    fault = list(read_samples(tmp_path))[-1]
    assert isinstance(fault, Fault)
    assert (fault.place, fault.number) == (f"{tmp_path / 'b.jsonl'}:2", 4)


def test_folders_that_do_not_say_what_is_meant_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match=rf"no data file in the folder .*\nit has folders: name one of them, such as {tmp_path}/train"):
        data_files(str(tmp_path))
    with pytest.raises(UserError, match=r"no data file in the folder .*\ndata files end in \.jsonl, "):
        data_files(str(tmp_path / "train"))
    with pytest.raises(UserError, match="no file matches"):
        data_files(str(tmp_path / "*.jsonl"))
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=rf"files of several forms: csv, json, jsonl\nname the files by a pattern, such as {tmp_path}/\*"):
        data_files(str(tmp_path))


def test_a_folder_of_arrow_files_has_descriptions_beside_them(tmp_path: Path) -> None:
    for name in ("data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "dataset_info.json", "state.json"):
        (tmp_path / name).write_text("")
    assert [Path(path).name[:10] for path in data_files(str(tmp_path))] == ["data-00000", "data-00001"]


@pytest.mark.parametrize(
    ("path", "name"),
    [("chats.jsonl", "chats"), ("data/", "data"), ("data/*.jsonl", "data"), ("data/chats-*.jsonl", "chats"), ("*.csv", "data")],
)
def test_a_source_is_called_after_its_files(path: str, name: str) -> None:
    assert name_of_source(path) == name


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[{"text": "a"},\n {"text": "b"\n', r"a.json:3: not valid JSON: Expecting ',' delimiter \(the file ends"),
        ("a.json", b'[{"text": "a"},\n {"text": oops}]', r"a.json:2: not valid JSON: Expecting value\nthe file is read as one JSON list"),
        ("a.json", b'[{"text": "a"}\n', r"a.json:2: .*followed by , or \] \(the file ends at this place"),
        ("a.json", b'[{"text": "a"}] {', "a.json:1: there is more behind the end"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', "a.json:2: not UTF-8"),
        ("a.json", b"[" * 100_000, "a.json:1: JSON nested too deeply"),
        ("a.json", b'{\n  "data": [{"text": "a"}]\n}\n', "a.json:1: the file is one JSON object, but samples are read from a list"),
        ("a.json", b"[]", "a.json is empty"),
        ("a.json", b"[\0", "a.json is no text"),
        ("a.jsonl", b'[\n{"text": "a"}\n]\n', "a.jsonl:1: the file is one JSON list.*\nrename it to end in .json"),
        ("a.text", b"Once upon a time\n", r"a.text:1: not valid JSON.*\nthe file's name does not say its form, so it was read as JSONL"),
        ("a.csv", b"text,text\na,b\n", "a.csv:1: the first line names column 'text' twice"),
        ("a.csv", b"text,\na,b\n", "a.csv:1: the first line leaves a column without a name"),
        ("a.csv", b'text\n"a\n', "a.csv:2: not valid CSV: unexpected end of data"),
        ("a.csv", b"text\n", "a.csv is empty"),
        ("a.jsonl.gz", gzip.compress(mtime=0, data=b'{"text": "a"}\n' * 99)[:-9], "a.jsonl.gz cannot be unpacked: "),
    ],
)
def test_a_file_that_cannot_be_read_to_its_end_is_refused(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        values(tmp_path / name)


def test_rows_and_elements_that_cannot_be_used_are_faults_in_their_places(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,n\n"a\nb",1\n\nc\nd\xff,2\ne,3\n')
    (tmp_path / "a.json").write_text('[{"text": "a"}, 12,\n\n[3], {"text": "b"}]')
    found = [
        (item.place.removeprefix(str(tmp_path)), item.number, item.text if isinstance(item, Sample) else item.reason)
        for name in ("a.csv", "a.json")
        for item in read_samples(tmp_path / name)
    ]
    assert found == [
        ("/a.csv:2", 1, "a\nb"),
        ("/a.csv:5", 2, "the row has 1 cells, but the first line names 2 columns"),
        ("/a.csv:6", 3, "not UTF-8"),
        ("/a.csv:7", 4, "e"),
        ("/a.json:1", 1, "a"),
        ("/a.json:1", 2, "a JSON number where an object is needed"),
        ("/a.json:3", 3, "a JSON list where an object is needed"),
        ("/a.json:3", 4, "b"),
    ]
