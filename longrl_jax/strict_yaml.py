"""YAML without double keys, and errors of one line that name the file."""

from typing import Any

import yaml


def parse(text: str, where: str) -> Any:
    """Reads YAML of plain values; `where` (a file, say) is what an error is named by.

    Raises ValueError, in one line, for what is not YAML and for a key that stands twice in one
    mapping, of which PyYAML would silently keep the last.
    """
    try:
        _refuse_double_keys(yaml.compose(text, Loader=yaml.SafeLoader), where)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(f"{where} is not valid YAML: {at}{what}") from None


def _refuse_double_keys(root: yaml.Node | None, where: str) -> None:
    waiting: list[yaml.Node | None] = [root]
    seen: set[int] = set()  # a node may stand in several places, and in itself
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        first_line: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in first_line:
                raise ValueError(
                    f"{where} says {key.value} twice, in lines {first_line[key.value]} and {line} "
                    "of one section; keep one"
                )
            first_line[str(key.value)] = line
            waiting.append(value)
