"""Every block of code and every command of the pages is proved; what cannot be is listed with its reason, and nothing else may stand there.

Commands are parsed by the real command line, and their keys, values, presets and files are looked up (`command_lines`). The slow tests of
test_walk.py run them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest

from hecate.apps.sweep.sweep_file import load_run_sweep
from hecate.config.schema import LEAVES
from hecate.data.files.formats import Sample, read_samples
from hecate.parallel.cluster.topology_file import parse_topology
from hecate.parallel.values.traces import Trace, save_trace
from hecate.parallel.values.units import Unit
from tests.docs.blocks import HISTORY, PAGES, Block, CommandLine, all_blocks, all_commands, blocks_of
from tests.docs.command_lines import accepts, prove
from tests.rooms import ROOT

BLOCKS = all_blocks()
COMMANDS = all_commands()


def _sweep(block: Block, folder: Path) -> None:
    (folder / "sweep.yaml").write_text(block.text, encoding="utf-8")
    assert len(load_run_sweep(str(folder / "sweep.yaml")).runs) == 12


def _topology(block: Block, folder: Path) -> None:
    assert parse_topology(block.text, block.place).world_size == 12


def _sample(block: Block, folder: Path) -> None:
    text = block.text.replace("{...}", "{}").replace("[...]", '[{"role": "user", "content": "2"}, {"role": "assistant", "content": "4"}]')
    (folder / "data.jsonl").write_text(json.dumps(json.loads(text)) + "\n", encoding="utf-8")
    assert all(isinstance(sample, Sample) for sample in read_samples(folder / "data.jsonl"))


def _trace(block: Block, folder: Path) -> None:
    recorded = Trace(np.ones((1, 1, 2, 2), np.int64), (1,), (Unit(3),), num_experts=(2,), top_k=1, tokens_per_rank=2)
    (folder / "runs/first").mkdir(parents=True)
    save_trace(recorded, folder / "runs/first/loads")
    names: dict[str, object] = {"Path": lambda path: folder / path}
    exec(compile(block.text, block.place, "exec"), names)
    assert np.array_equal(getattr(names["trace"], "loads"), recorded.loads)  # noqa: B009  (names of the block have no types)


def _peft(block: Block, folder: Path) -> None:
    compile(block.text, block.place, "exec")


def _shown(block: Block, folder: Path) -> None:
    """Not code."""


LISTED: dict[tuple[str, str], tuple[Callable[[Block, Path], None], str]] = {
    ("docs/use/sweeps.md", "run: mixlora"): (_sweep, "the sweep is read"),
    ("docs/use/topology.md", "nodes:"): (_topology, "the topology is read"),
    ("docs/use/data.md", '{"tools": '): (_sample, "the record is read"),
    ("docs/use/data.md", '{"user": '): (_sample, "the record is read"),
    ("docs/use/data.md", '{"text": "ab"'): (_sample, "the record is read"),
    ("docs/use/data.md", "chats.jsonl: keys"): (_shown, "a line that a run prints"),
    ("docs/use/traces.md", "from hecate.parallel.values.traces"): (_trace, "runs on a trace that is written before"),
    ("docs/use/federated.md", "round 1/1"): (_shown, "a line that a round prints"),
    ("docs/use/moe_lora.md", "from peft import"): (_peft, "compiled; tests/hecate/adapters run it, because it needs a trained adapter"),
    ("docs/design/experts.md", "y = W x"): (_shown, "a formula"),
    ("docs/design/kernels.md", "sort, cut"): (_shown, "the order of kernels"),
    ("docs/design/training.md", "begin "): (_shown, "the order of a step"),
    ("docs/use/report.md", "step 12/200"): (_shown, "a line that a run prints"),
    ("docs/use/sweeps.md", "learning_rate  r"): (_shown, "a table that a sweep prints"),
}
"""(page, how a block begins) -> its proof, and what that is or why there is none"""


def listed(block: Block) -> list[tuple[str, str]]:
    return [key for key in LISTED if key[0] == block.page and block.text.startswith(key[1])]


def proved_elsewhere(block: Block) -> bool:
    """Is it among the blocks that another test runs: test_extend.py, tests/examples/test_examples.py or test_library.py?"""
    if block.page.startswith("docs/extend/"):
        return block.language in ("python", "diff", "sh")
    if block.page.startswith("examples/"):  # the last lines that its command prints
        return not block.language and (ROOT / block.page).with_name("run.sh").is_file()
    return block.page == "docs/use/library.md" and block.language == "python"


def test_all_pages_are_seen() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/use/launch.md", "docs/extend/router.md", "examples/sweep/README.md"} <= {
        b.page for b in BLOCKS
    }
    assert len(COMMANDS) > 100


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_block_is_proved(block: Block, tmp_path: Path) -> None:
    if block.language == "commands" or proved_elsewhere(block):
        return
    keys = listed(block)
    assert len(keys) == 1, (
        f"{block.place}: a block of an unknown kind; prove it, or add it to LISTED with the reason why not:\n{block.text}"
    )
    LISTED[keys[0]][0](block, tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if page.relative_to(ROOT).as_posix() not in HISTORY], ids=lambda page: page.stem)
def test_a_named_value_of_a_key_exists(page: Path) -> None:
    """`fssdp.policy: auto` in a sentence, where the key takes names; pages of docs/extend/ add some."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)(?:: |=)([\w.-]+)`", text)
    names = {key: get_args(LEAVES[key].type) for key, _ in named if key in LEAVES and get_origin(LEAVES[key].type) is Literal}
    new = set(re.findall(r'"(\w+)"', text)) if page.parent.name == "extend" else set()
    assert not [(key, value) for key, value in named if key in names and value not in {*names[key], *new}]


def test_what_is_listed_is_there() -> None:
    assert {key for block in BLOCKS for key in listed(block)} == set(LISTED)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.place}:{command.text[:60]}")
def test_a_command_is_proved(command: CommandLine) -> None:
    prove(command.words, in_sentence=command.in_sentence)


@pytest.mark.slow
@pytest.mark.parametrize("command", [one for one in COMMANDS if one.words[:2] == ["python", "-m"]], ids=lambda command: command.place)
def test_a_module_accepts_its_arguments(command: CommandLine) -> None:
    module, *arguments = [word.strip("[]") for word in command.words[2:]]
    if module != "pytest":
        accepts(module, arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        "hecate trane mixlora",
        "hecate train mixlora model.name_or_pth=/models/Qwen3-1.7B",
        "hecate train mixlora fssdp.policy=fastest",
        "hecate train finetunes",
        "hecate train mixlora --steps 3",
        "hecate simulate --topology three-h100-nodes",
        "hecate simulate --policies auto",
        "hecate export runs/qwen --to gguf -o new",
        "hecate merge runs/a runs/b --method dare -o new",
        "cat questions.jsonl | hecate generate runs/qwen --promptz -",
        "torchrun --nproc-per-node 8 -m hecate train mixlora maxsteps=3",
        "python -m benchmarks.nothing",
        "python -m benchmarks.start_stop --cycels 50",
        "make all-of-it",
        "pip install 'hecate-moe[gpu]'",
        "pip install leftpad",
        "examples/sweep/start.sh",
        "NODE=1 examples/two_nodes/run.sh",
        "data.train='[{path: qa.csv, columns: {prompt: question}}]'",
        "curl https://example.org",
    ],
)
def test_a_wrong_command_is_seen(wrong: str) -> None:
    with pytest.raises(Exception, match=r".") as error:
        prove(CommandLine("", wrong, False).words)
    assert not isinstance(error.value, (NameError, TypeError, AttributeError))


def test_blocks_are_found_in_the_text_of_a_page() -> None:
    text = "A\n\n    hecate train x\n    make test\n\nB\n    no block\n\n```yaml\na: 1\n```\n\n    x = 3\n"
    found = [(block.line, block.language, block.text) for block in blocks_of("p", text)]
    assert found == [(3, "commands", "hecate train x\nmake test\n"), (9, "yaml", "a: 1\n"), (13, "", "x = 3\n")]
