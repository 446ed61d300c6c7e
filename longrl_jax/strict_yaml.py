"""YAML without double keys and without guesses; errors of one line name file, line and key.

PyYAML reads YAML 1.1, other readers YAML 1.2, and they disagree about some words without quotes:
010 is 8 or 10, 1:30 is 90 or a text, no is false or a text. These are refused. Numbers like 1e-3
are numbers, as in YAML 1.2 and JSON (PyYAML alone would read a text).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

TAG = "tag:yaml.org,2002:"
EXPONENT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+"
ONLY_LATER = r"0o[0-7]+|[-+]?0[0-9]*[89][0-9]*"
"""Whole numbers to YAML 1.2, but texts to PyYAML: 0o17, 08."""
SAME = {  # type -> what both versions read as this type, with the same value (YAML 1.2.2, 10.3.2)
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+",
    "float": rf"{EXPONENT}|[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
    "timestamp": r"(?!)",
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one, with numbers like 1e-3."""


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe one; quotes what `parse` would not read back as the same text."""


for _reader_or_writer in (_Loader, _Dumper):
    _reader_or_writer.add_implicit_resolver(
        f"{TAG}float", re.compile(rf"(?:{EXPONENT})\Z"), [*"-+.0123456789"]
    )
_Dumper.add_implicit_resolver(f"{TAG}int", re.compile(rf"(?:{ONLY_LATER})\Z"), [*"-+0"])


def read(path: str | Path) -> dict[str, Any]:
    """Returns the mapping that a file holds; raises ValueError that names the file, as `parse`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"there is no config file {path}; see configs/README.md") from None
    except OSError as error:
        raise ValueError(
            f"the config file {path} cannot be read ({error.strerror}); name a YAML file"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"the config file {path} is not UTF-8 text; name a YAML file") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping of sections, got {type(tree).__name__}")
    return tree


def override(tree: dict[str, Any], item: str) -> None:
    """Puts the value (YAML) of an item `section.key=value` into a tree; nothing: the empty text."""
    dotted, equals, text = item.partition("=")
    if not equals:
        raise ValueError(f"override {item!r} is not of the form section.key=value")
    *parents, leaf = dotted.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ValueError(f"override {item!r}: {name} is a value, not a section")
    node[leaf] = parse(text, f"override {item!r}", key=dotted) if text else ""


def parse(text: str, where: str, *, key: str = "") -> Any:
    """Reads YAML of plain values; `where` (a file, say) is what an error is named by.

    key: what the text is the value of, as section.key; empty: a whole document. Raises ValueError,
    in one line, for what is not YAML, for a key that stands twice in one mapping (PyYAML would
    silently keep the last), and for a word without quotes that YAML 1.1 and 1.2 read differently.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        tree = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(f"{where} is not valid YAML: {at}{what}") from None
    for node, path, is_key in _nodes(root, key):
        if isinstance(node, yaml.MappingNode):
            _refuse_double_keys(node, where)
        elif isinstance(node, yaml.ScalarNode) and node.style is None:  # without quotes
            name = f"the key {path}" if is_key else f"{path}={node.value}" if path else node.value
            _refuse_guess(node, f"{where}, line {node.start_mark.line + 1}: {name}")
    return tree


def dump(tree: Mapping[str, Any]) -> str:
    """Returns YAML that `parse` reads back to an equal tree, its keys in order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def _nodes(root: yaml.Node | None, key: str) -> Iterator[tuple[yaml.Node, str, bool]]:
    """Yields every node in the order of the text, its path as section.key, and whether it is a key.

    An item of a list has the path of the list.
    """
    waiting = [(root, key, False)] if root is not None else []
    seen: set[int] = set()  # a node may stand in several places, and in itself
    while waiting:
        node, path, is_key = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node, path, is_key
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, path, False) for item in reversed(node.value)]
        elif isinstance(node, yaml.MappingNode):
            for name, value in reversed(node.value):
                inner = ".".join(filter(None, (path, str(name.value))))
                waiting += [(value, inner, False), (name, inner, True)]


def _refuse_double_keys(node: yaml.MappingNode, where: str) -> None:
    first_line: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and key.value in first_line:
            raise ValueError(
                f"{where} says {key.value} twice, in lines {first_line[key.value]} and {line} "
                "of one section; keep one"
            )
        first_line[str(key.value)] = line


def _refuse_guess(node: yaml.ScalarNode, name: str) -> None:
    text, kind = node.value, node.tag.removeprefix(TAG)
    if kind == "str" and re.fullmatch(ONLY_LATER, text):
        number = int(text, 8) if "o" in text else int(text)
        raise ValueError(
            f"{name} would be read as a text; write {number} for the number, '{text}' for the text"
        )
    if kind not in SAME or re.fullmatch(SAME[kind], text):
        return
    if kind == "timestamp":
        raise ValueError(f"{name} would be read as a date; write '{text}' for the text")
    value = yaml.safe_load(text)
    if kind == "bool":
        wanted = str(value).lower()
        raise ValueError(
            f"{name} would be read as {wanted}; write {wanted}, or '{text}' for the text"
        )
    octal = re.fullmatch(r"[-+]?0[0-7_]+", text)
    decimal = int(text.replace("_", "")) if octal else value
    base = " (base 8)" if octal else " (base 60)" if ":" in text else ""
    numbers = f"{decimal} or {value}" if decimal != value else f"{value}"
    raise ValueError(
        f"{name} would be read as {value}{base}; write {numbers} for the number, '{text}' for the "
        "text"
    )
