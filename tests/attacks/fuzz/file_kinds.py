"""What a kind of file is to the fuzzing: a sound example of it, and who reads it.

They are listed by who writes them: an author of models and adapters (`model_files`), of data (`data_files`), or a run (`run_files`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """One kind of file."""

    name: str
    file: str
    """the file that is changed, as a pattern in the folder of the example"""
    write: Callable[[Path], object]
    """write(folder): writes the example into an empty folder"""
    read: Callable[[Path], object]
    """read(folder): reads it as the product does, and goes through what it has read where that is lazy"""
    form: str = "bytes"
    """what the file's content is made of: json, yaml, lines (of JSON), safetensors, or bytes"""
    closed: bool = False
    """whether the file may name no other file than its neighbours; a configuration, say, may name any"""
    named: bool = True
    """whether errors must name the file: False for what no path leads to"""
    lists: bool = False
    """whether an error has all problems at once, so that its text may be long"""
    is_file: bool = True
    """whether something else may stand in its place: False for a message that only travels"""
    forge: Callable[[Path], object] | None = None
    """forge(folder): makes checksums fit to the changed content"""
    most_mib: int = 96
    """MiB of memory that reading may take; a device or a file of 64 GiB may not take more"""

    def file_in(self, folder: Path) -> str:
        """The path of the file in a folder that `write` has filled."""
        return str(min(folder.rglob(self.file)).relative_to(folder))
