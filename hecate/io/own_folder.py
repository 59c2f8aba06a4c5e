"""Tell folders that only this user can write from those in which others may have put something."""

import os
import stat
from pathlib import Path


def ours_alone(folder: Path) -> bool:
    """Whether nobody else can write to a folder, so that this process may trust it: in one for all, anybody may have made it first."""
    found = folder.stat()
    return found.st_uid == folder.lstat().st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
