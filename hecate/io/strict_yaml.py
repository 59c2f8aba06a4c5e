"""Read YAML that others have written: only plain values, of a bounded depth and number, and no error but one of our own."""

from __future__ import annotations

from typing import Any

import yaml

from hecate.errors import UserError

MOST_BYTES = 1 << 20
"""The most bytes that a YAML file may have."""
_DEEPEST = 32
_LONGEST_NUMBER = 400
"""The most characters of a number; Python writes no float with more."""
_MOST_NODES = 200_000
"""The most values in a document, where a value counts as often as an alias repeats it."""


class YamlError(UserError):
    """The text is not YAML of plain values: its syntax, a tag, a value that YAML cannot read, or too many or too deep values."""


class _Loader(yaml.SafeLoader):
    """A SafeLoader that ends at what is nested too deep while it reads: the parser's time grows with the square of the depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.depth == _DEEPEST:
            raise YamlError(f"nested more than {_DEEPEST} levels deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse_yaml(text: str) -> Any:
    """Return the value of the only document in `text`; None: there is none.

    Raises:
        YamlError: see there. Its text may have several lines.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except YamlError:
        raise
    # A scalar that looks like a number or a date, but is none, raises whatever Python's own constructor does.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, RecursionError, KeyError) as error:
        raise YamlError(str(error)[:600] or type(error).__name__) from error
    finally:
        if loader is not None:
            loader.dispose()


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes a node stands for when each alias is written out. Raises YamlError: too many, or it holds itself."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise YamlError("an alias stands within what it repeats")
        return known[id(node)]
    known[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated_keys(node)
    # YAML 1.1 counts in sixties, for which PyYAML takes time that grows with the square of the length.
    if isinstance(node, yaml.ScalarNode) and len(node.value) > _LONGEST_NUMBER and node.tag.endswith((":int", ":float")):
        raise YamlError(f"line {node.start_mark.line + 1}: a number of {len(node.value)} characters")
    inner = node.value if isinstance(node, yaml.CollectionNode) else []
    total = 1 + sum(_count(child, known) for item in inner for child in (item if isinstance(item, tuple) else (item,)))
    if total > _MOST_NODES:
        raise YamlError(f"more than {_MOST_NODES} values, with those that aliases repeat")
    known[id(node)] = total
    return total


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    """Raises YamlError: a key is given twice, of which YAML would keep the last."""
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise YamlError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
            seen.add((key.tag, key.value))
