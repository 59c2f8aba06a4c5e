"""The secret that the nodes of a job share, without which the store where they meet answers nobody (`hecate.ranks.job_store`)."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from hecate.errors import UserError
from hecate.io.plain_files import open_plain
from hecate.ranks.launcher_files import TOKEN_VARIABLE

_FEWEST, _MOST = 32, 1024
"""the numbers of characters that a secret may have"""


def job_secret(file: Path | None) -> bytes:
    """The secret out of a file, which is made with a new one if it does not exist, or out of the variable HECATE_TOKEN.

    Raises:
        UserError: neither is given; the file cannot be read or made, belongs to somebody else, or can be read by others; or its text is
            too short.
    """
    if file is None:
        where, text = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE, "")
        if not text:
            raise UserError(
                "--token-file: several nodes need a secret that they share, or whoever reaches the port could join the job\n"
                "  give all nodes the same file, in a folder that all of them see; the first makes it if it does not exist\n"
                f"  or set the variable {TOKEN_VARIABLE} on all of them to the same text, such as `openssl rand -hex 32` gives"
            )
    else:
        where, text = f"--token-file {file}", _read_or_make(file)
    if not _FEWEST <= len(text) <= _MOST or not text.isascii() or not text.isprintable():
        raise UserError(f"{where}: a secret has {_FEWEST} to {_MOST} printable characters, such as `openssl rand -hex 32` gives")
    return text.encode()


def _read_or_make(file: Path) -> str:
    try:
        if not file.exists():
            _make(file)
        with open_plain(file) as opened:
            found = os.fstat(opened.fileno())  # of what is read; by its path somebody could have put another file in its place
            text = opened.read(_MOST + 2).decode("utf-8", errors="replace").strip()
    except OSError as error:
        raise UserError(f"--token-file {file}: {error.strerror or error}") from None
    if found.st_uid != os.geteuid():
        raise UserError(f"--token-file {file}: it belongs to another user, who would know the secret; name a file of your own")
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"--token-file {file}: other users can read the secret; mend it with: chmod 600 {file}")
    return text


def _make(file: Path) -> None:
    """Make the file in one operation, so that another node, which may do the same at the same time, never reads a part of it."""
    staged = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, f"{secrets.token_hex(32)}\n".encode())
        os.close(descriptor)
        with suppress(FileExistsError):  # another node was faster
            os.link(staged, file)
    finally:
        os.unlink(staged)
