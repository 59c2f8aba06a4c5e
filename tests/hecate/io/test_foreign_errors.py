"""What a library raises about a user's file becomes one sentence with the file's name."""

from __future__ import annotations

import pytest

from hecate.errors import UserError
from hecate.io.foreign_errors import in_a_line, reading


class OutOfMemoryError(RuntimeError): ...


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("  two\nlines "), "two lines"),
        (KeyError("x"), "KeyError: 'x'"),
        (TypeError(), "TypeError"),
        (FileNotFoundError(2, "No such file"), "[Errno 2] No such file"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth exceeded"),
        (ValueError("x" * 1000), "x" * 300),
        (ValueError("set trust_remote_code=True"), "it is made by code of its own (auto_map), which hecate does not run"),
    ],
)
def test_an_error_becomes_a_sentence(error: Exception, said: str) -> None:
    assert in_a_line(error) == said
    with pytest.raises(UserError) as caught, reading("model", "cannot be read"):
        raise error
    assert str(caught.value) == f"model: cannot be read: {said}"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [UserError("as it is"), MemoryError(), OutOfMemoryError("CUDA"), KeyboardInterrupt()])
def test_what_is_no_verdict_on_the_file_stays(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, reading("model", "cannot be read"):
        raise error
    assert caught.value is error
