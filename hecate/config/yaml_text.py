"""Parse YAML text into a tree of nodes with their lines and quoting, but without types.

A scalar's type comes later, from the key that it belongs to (`typed.py`), so that YAML 1.1 never silently reads NO as false or 012
as 10. Anchors, aliases and tags are marked on their node, and `typed.py` refuses them with the key.
"""

from dataclasses import dataclass

import yaml

MAX_DEPTH = 8


@dataclass(frozen=True)
class Scalar:
    text: str
    plain: bool
    """Whether the text was written without quotes and not as a block."""
    line: int
    flaw: str = ""
    """The anchor, alias or tag of the node, which is not supported; "" if it has none."""


@dataclass
class Sequence:
    items: "list[Node]"
    line: int
    flaw: str = ""


@dataclass
class Mapping:
    pairs: "list[tuple[Node, Node]]"
    line: int
    flaw: str = ""


Node = Scalar | Sequence | Mapping


class BadYaml(Exception):
    """The text is not a YAML document that a configuration may be. `line` counts from 1."""

    def __init__(self, line: int, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.line = line
        self.what = what
        self.hint = hint


def parse(text: str) -> Node | None:
    """Return the document in `text`, or None if it is empty. Raises BadYaml for bad syntax, over 8 levels, or a second document."""
    root: Node | None = None
    open_nodes: list[Sequence | Mapping] = []
    keys: list[Node | None] = []  # for each open node, the key that waits for its value
    documents = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            assert event.start_mark is not None
            line = event.start_mark.line + 1
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise BadYaml(line, "a second document starts here", "remove the ---: one file, one document")
            elif isinstance(event, yaml.CollectionEndEvent):
                open_nodes.pop()
                keys.pop()
            elif isinstance(event, yaml.NodeEvent):
                node = _node(event, line)
                if not open_nodes:
                    root = node
                elif isinstance(parent := open_nodes[-1], Sequence):
                    parent.items.append(node)
                elif (key := keys[-1]) is None:
                    keys[-1] = node
                else:
                    parent.pairs.append((key, node))
                    keys[-1] = None
                if not isinstance(node, Scalar):
                    if len(open_nodes) == MAX_DEPTH:
                        raise BadYaml(line, f"nested more than {MAX_DEPTH} levels deep", "no key needs more than 4")
                    open_nodes.append(node)
                    keys.append(None)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadYaml(line, f"unprintable character U+{error.character:04X}", "save it as plain UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = "not YAML: " + ", ".join(part for part in (error.context, error.problem) if part)
        tab = "'\\t'" in what
        hint = "indent with spaces, not tabs" if tab else "put special characters in quotes, check the indentation"
        raise BadYaml(1 if mark is None else mark.line + 1, what, hint) from None
    return root


def _node(event: yaml.NodeEvent, line: int) -> Node:
    if isinstance(event, yaml.AliasEvent):
        return Scalar(f"*{event.anchor}", True, line, f"the alias *{event.anchor}")
    flaw = f"the anchor &{event.anchor}" if event.anchor else ""
    assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
    if event.tag is not None:
        flaw = f"the tag {event.tag.replace('tag:yaml.org,2002:', '!!')}"
    if isinstance(event, yaml.ScalarEvent):
        return Scalar(event.value, event.style is None or event.style == "", line, flaw)
    return Sequence([], line, flaw) if isinstance(event, yaml.SequenceStartEvent) else Mapping([], line, flaw)
