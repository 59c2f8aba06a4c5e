"""A chat template is tried on the first conversations of each file before any process is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hecate.config import DataSource
from hecate.data.chat.conversations import render
from hecate.data.chat.template_check import check_template, template_of
from hecate.errors import UserError
from testing.byte_tokenizer import TEMPLATE, build_byte_tokenizer
from tests.hecate.data.making import chat, write_jsonl
from tests.hecate.data.talks import CALLING, TALK, TOOLS

REWRITING = "{{ '!' if messages | length > 2 else '' }}" + TEMPLATE


def model(folder: Path, template: str | None) -> Path:
    build_byte_tokenizer(chat_template=template).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("inside", [False, True])
def test_the_template_of_the_folder_writes_as_the_tokenizer_does(tmp_path: Path, inside: bool) -> None:
    template = "{{ bos_token or '' }}{{ eos_token }}{{ date_string }}" + TOOLS
    read = template_of(model(tmp_path, template), None)
    if inside:  # as older versions of transformers save it
        (tmp_path / "chat_template.jinja").unlink()
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}), encoding="utf-8")
        read = template_of(tmp_path, None)
    tokenizer = build_byte_tokenizer(chat_template=template)
    for messages, tools in ((TALK, []), (CALLING, [{"name": "add"}])):
        assert render(read, messages, tools=tools) == render(tokenizer, messages, tools=tools)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, r"data\.jsonl holds conversations, but the model's tokenizer has no chat template"),
        (REWRITING, r"data\.jsonl:2: the chat template cannot be used for training on this conversation: it rewrites earlier turns"),
        ("{{ raise_exception('no') }}", r"data\.jsonl:1: the chat template cannot be used for training on this conversation: no\n"),
        ("{% for", r"data\.jsonl:1: the chat template cannot be used for training on this conversation: "),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_the_line(tmp_path: Path, template: str | None, told: str) -> None:
    data = DataSource(path=str(write_jsonl(tmp_path / "data.jsonl", [chat("1", "2"), chat("1", "2", "3", "4"), b"{broken\n"])))
    with pytest.raises(UserError, match=told):
        check_template([data], model(tmp_path / "model", template), None, "skip_long")


def test_conversations_may_be_skipped_and_documents_need_no_template(tmp_path: Path) -> None:
    talk = DataSource(path=str(write_jsonl(tmp_path / "talk.jsonl", [b"{broken\n", chat("1", "2", "3", "4")])))
    text = DataSource(path=str(write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}])))
    check_template([talk], model(tmp_path / "rewriting", REWRITING), None, "skip")
    check_template([text], model(tmp_path / "none", None), None, "error")
    check_template([talk], model(tmp_path / "good", TEMPLATE), None, "error")
    with pytest.raises(UserError, match="no chat template"):
        check_template([talk], tmp_path / "none", None, "skip")


def test_torch_is_not_imported_for_it(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [chat("1", "2")])
    code = (
        "import sys; from pathlib import Path\n"
        "from hecate.config import DataSource; from hecate.data.chat.template_check import check_template\n"
        f"check_template([DataSource(path={str(data)!r})], Path({str(model(tmp_path / 'model', TEMPLATE))!r}), None, 'error')\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
