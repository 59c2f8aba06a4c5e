"""`hecate export`: an adapter in the format that another program reads."""

from __future__ import annotations

from pathlib import Path

from hecate.adapters.adapter_format import AdapterFormat
from hecate.adapters.description import Adapter
from hecate.adapters.folder import refuse_existing
from hecate.adapters.format_table import FORMATS
from hecate.errors import UserError

FORMS = {name: one for name, one in FORMATS.items() if one.holds}
"""the formats that `--to` gives, by name"""


def form_named(name: str) -> AdapterFormat:
    """Return the form that `--to` names. Raises UserError: there is no such form."""
    if name not in FORMS:
        raise UserError(f"--to {name[:100]}: there is no such form\n  forms: {', '.join(FORMS)}")
    return FORMS[name]


def write_form(name: str, adapter: Adapter, out: Path) -> list[str]:
    """Write an adapter in a form to the new folder `out`; what the user should know, line by line.

    Raises:
        UserError: there is no such form, `out` exists, the form cannot hold the adapter, the base model cannot be read, or the disk fails.
    """
    form = form_named(name)
    refuse_existing(out)
    if not isinstance(adapter.description, form.holds):
        raise UserError(f"{adapter.folder}: is {adapter.description.what}, which the form {name} cannot hold\n  {what_to_give(adapter)}")
    try:
        return form.export(adapter, out)
    except UserError as error:
        where = "" if str(error).startswith(str(adapter.folder)) else f"{adapter.folder}: "
        raise UserError(f"{where}{error}") from error


def what_to_give(adapter: Adapter) -> str:
    """Return what `hecate export` is to be given so that it writes this adapter, or why there is no such thing."""
    others = [name for name, form in FORMS.items() if isinstance(adapter.description, form.holds)]
    return f"give --to {' or '.join(others)}" if others else adapter.description.why_no_form
