"""YAML text to a tree of nodes that remember their line and whether they were quoted, without giving scalars a type.

Types come later, from the key that a scalar belongs to (`typed.py`), so that YAML 1.1's readings (NO is false, 012 is
10) never happen unseen. Anchors, aliases and tags are marked on their node, to be refused with the key.
"""

from dataclasses import dataclass

import yaml

MAX_DEPTH = 8


@dataclass(frozen=True)
class Scalar:
    text: str
    plain: bool
    """Written without quotes, and not as a block."""
    line: int
    flaw: str = ""
    """An anchor, alias or tag, which we do not read."""


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
    """Text that is no YAML document of ours. `line` counts from 1."""

    def __init__(self, line: int, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.line = line
        self.what = what
        self.hint = hint


def parse(text: str) -> Node | None:
    """The document in `text`, or None. Raises BadYaml: bad syntax, more than 8 levels, a second document."""
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
