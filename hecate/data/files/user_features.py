"""The users of a recommendation data set: the vectors by which a router may decide, in an .npz file.

The file holds two arrays: `ids` [users], text or whole numbers, and `features` [users, width], floats. The key `user` of a JSONL line names
an id; 7 and "7" are the same one.

Shapes: U users, F numbers of a user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from hecate.config import Config
from hecate.errors import UserError
from hecate.io.npz import ArrayError, read_npz


@dataclass(frozen=True, eq=False)
class UserFeatures:
    """The vectors of all users."""

    path: str
    values_UF: NDArray[np.floating[Any]]
    row_of: Mapping[str, int]
    """The row of each id."""

    @property
    def width(self) -> int:
        return int(self.values_UF.shape[1])

    def digest(self) -> str:
        """Return the xxh3-64 hash of the ids and vectors, by which a resume detects that they changed."""
        digest = xxhash.xxh3_64("\n".join(self.row_of).encode())
        digest.update(np.ascontiguousarray(self.values_UF).tobytes())
        return digest.hexdigest()

    def row(self, user: str) -> int:
        """The row of an id. Raises UserError: there is none."""
        if user not in self.row_of:
            raise UserError(f"user {user[:80]!r} has no features in {self.path}\n  it has {_some(self.row_of)}")
        return self.row_of[user]

    def problem(self, record: Mapping[str, Any]) -> str | None:
        """Say why a JSONL line cannot be given to a router that decides by users; None: it can.

        Args:
            record: the line's keys beside the conversation.
        """
        if "user" not in record:
            return 'there is no key "user", by which the router decides (moe.router.input: user)'
        user = record["user"]
        if isinstance(user, bool) or not isinstance(user, str | int):
            return f"user is {str(user)[:40]!r}: it must be text or a whole number"
        return None if str(user) in self.row_of else f"user {str(user)[:40]!r} has no features in {self.path}"


def users_of(config: Config) -> UserFeatures | None:
    """Read the features of the data's users, if routers decide by them. Raises UserError as `read_user_features`."""
    if not config.moe.router.by_user:
        return None
    assert config.data.features is not None
    return read_user_features(config.data.features)


def read_user_features(path: str | Path) -> UserFeatures:
    """Read the features of all users.

    Raises:
        UserError: the file cannot be read or holds something else than described above; ids repeat; a number is not finite.
    """
    try:
        arrays = read_npz(path, ("ids", "features"))
    except (OSError, ArrayError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        what = f"no sound .npz file of users' features: {reason}"
        raise UserError(f"{path}: {what}\n  it must hold ids [users] and features [users, width]") from error
    ids, values = arrays["ids"], arrays["features"]
    if ids.ndim != 1 or ids.dtype.kind not in "iuU":
        raise UserError(f"{path}: ids must be a list of texts or whole numbers, got {ids.dtype} of shape {list(ids.shape)}")
    if values.ndim != 2 or values.dtype.kind != "f" or values.shape[0] != len(ids) or 0 in values.shape:
        wanted = f"floats of shape [{len(ids)}, width], a row for each id"
        raise UserError(f"{path}: features must be {wanted}, got {values.dtype} of shape {list(values.shape)}")
    row_of = {str(user): row for row, user in enumerate(ids.tolist())}
    if len(row_of) < len(ids):
        first = next(str(user) for row, user in enumerate(ids.tolist()) if row_of[str(user)] != row)
        raise UserError(f"{path}: the id {first!r} is there twice; each user has one row")
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        raise UserError(f"{path}: the features of user {str(ids[wrong[0]])!r} ({len(wrong)} such) are not finite")
    return UserFeatures(str(path), values, row_of)


def _some(row_of: Mapping[str, int]) -> str:
    names = list(row_of)[:5]
    return f"{len(row_of)} users: {', '.join(names)}{', ...' if len(row_of) > len(names) else ''}"
