"""All formats of adapters by name, each a file of `hecate.adapters.formats`; and which one a folder is of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hecate.adapters.adapter_format import AdapterFormat
from hecate.adapters.description import Adapter
from hecate.adapters.folder import CONFIG, described_template, peft_type_of, read_adapter_config
from hecate.data.chat.templates import template_beside
from hecate.errors import UserError
from hecate.io.registry import registered

FORMATS: dict[str, AdapterFormat] = {one.name: one for one in registered("hecate.adapters.formats", "FORMAT").values()}


def format_of(folder: Path) -> AdapterFormat:
    """Return the format of a folder.

    Raises:
        UserError: it is of none, or its adapter_config.json cannot be read.
    """
    for one in FORMATS.values():
        if one.recognises(folder):
            return one
    read_adapter_config(folder)  # which says what is wrong with a folder that has none
    kinds = sorted({one.peft_type for one in FORMATS.values()} - {""})
    raise UserError(f"{folder / CONFIG}: peft_type is {str(peft_type_of(folder))[:100]!r}; supported: {', '.join(kinds)}")


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder of any format.

    Raises:
        UserError: naming the file, the key or the tensor that is missing or wrong.
    """
    adapter = format_of(folder).read(folder)
    extra = {**adapter.description.extra, **described_template(template_beside(folder))}
    return replace(adapter, description=replace(adapter.description, extra=extra))
