"""Records of tensors and values, taken apart into the flat lists that torch takes, and put together again.

An operator of torch.library has a flat list of arguments, and autograd keeps a flat list of tensors between its passes. A kernel family
says what its passes take and keep as records; everything else, the operator's schema too, follows from their fields.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar, get_type_hints

from torch import Tensor


class Operands:
    """The base of frozen dataclasses whose fields are tensors, lists of tensors, numbers, texts, lists of numbers, or other records.

    A field that its `__init__` does not take is no part of what is taken apart.
    """

    __match_args__: tuple[str, ...]


R = TypeVar("R", bound=Operands)


@cache
def leaf_types(kind: type[Operands]) -> dict[str, Any]:
    """Return the type of each leaf by its name, in order: that of a field, and for a field of a field both names with a point between."""
    hints, found = get_type_hints(kind), dict[str, Any]()
    for name in kind.__match_args__:
        inner = leaf_types(hints[name]) if _is_operands(hints[name]) else None
        found |= {name: hints[name]} if inner is None else {f"{name}.{leaf}": type_ for leaf, type_ in inner.items()}
    return found


def flattened(record: Operands) -> list[Any]:
    """Return the values of `leaf_types`."""
    found: list[Any] = []
    for name in record.__match_args__:
        value = getattr(record, name)
        found += flattened(value) if isinstance(value, Operands) else [value]
    return found


def unflattened(kind: type[R], leaves: Iterator[Any]) -> R:
    """Return the record whose leaves come next."""
    inner_kinds = _inner_kinds(kind)  # type: ignore[arg-type]
    return kind(*(next(leaves) if inner is None else unflattened(inner, leaves) for inner in inner_kinds))


@cache
def _inner_kinds(kind: type[Operands]) -> tuple[type[Operands] | None, ...]:
    hints = get_type_hints(kind)
    return tuple(hints[name] if _is_operands(hints[name]) else None for name in kind.__match_args__)


def _is_operands(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Operands)


Form = list[tuple[str, Any]]
"""the kind of each value that `take_apart` was given, and what `put_together` needs of it besides the tensors"""


def take_apart(values: Sequence[Any]) -> tuple[list[Tensor], Form]:
    """Return the tensors among the values and in their lists, and what `put_together` needs besides."""
    tensors: list[Tensor] = []
    form: Form = []
    for value in values:
        if isinstance(value, Tensor):
            form.append(("tensor", None))
            tensors.append(value)
        elif isinstance(value, list | tuple) and all(isinstance(each, Tensor) for each in value):
            form.append(("tensors", len(value)))
            tensors += value
        else:
            form.append(("value", value))
    return tensors, form


def put_together(tensors: Iterable[Tensor], form: Form) -> list[Any]:
    """Return the values that `take_apart` was given."""
    rest = iter(tensors)
    values: list[Any] = []
    for kind, value in form:
        if kind == "value":
            values.append(value)
        else:
            values.append(next(rest) if kind == "tensor" else list(itertools.islice(rest, value)))
    return values
