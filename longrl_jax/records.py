"""Frozen dataclasses from plain trees of values, every mistake named by its key; their --help."""

import ast
import dataclasses
import difflib
import inspect
import math
import sys
import typing
from typing import Any, TypeVar

X = TypeVar("X")


def build(cls: type[X], tree: Any, where: str = "") -> X:
    """Returns the dataclass that a tree holds the fields of; `where` begins the names of its keys.

    Raises ValueError that names the key for anything unknown, missing or of the wrong type.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"{where.rstrip('.')} must be a mapping, got {tree!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known keys: {sorted(fields)}"
            raise ValueError(f"unknown config key {where}{key}; {hint}")
        kwargs[key] = _value(hints[key], value, f"{where}{key}")
    unset = dataclasses.MISSING
    required = [n for n, f in fields.items() if f.default is unset and f.default_factory is unset]
    missing = [f"{where}{n}" for n in required if n not in kwargs]
    if missing:
        raise ValueError(f"missing config keys: {', '.join(missing)}")
    return cls(**kwargs)


def describe(cls: type) -> list[str]:
    """Returns a line for every key of a dataclass of dataclasses, with type and default, and below
    it the text that stands under the field in the source. Its own fields come before its sections.
    """
    hints: dict[str, Any] = typing.get_type_hints(cls)
    sections = {
        name: hint
        for name, hint in hints.items()
        if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    }
    lines = _describe_fields(cls, "", leave_out=tuple(sections))
    for name, section in sections.items():
        lines += _describe_fields(section, f"{name}.")
        for inner, hint in typing.get_type_hints(section).items():
            (item, *_) = typing.get_args(hint) or (None,)
            if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(item):
                lines += _describe_fields(item, f"{name}.{inner}[].")  # type: ignore[arg-type]
    return lines


def _describe_fields(cls: type, prefix: str, *, leave_out: tuple[str, ...] = ()) -> list[str]:
    module = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    node, lines = classes[cls.__name__], []
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or ast.unparse(field.target) in leave_out:
            continue
        default = "" if field.value is None else f" = {ast.unparse(field.value)}"
        lines.append(
            f"  {prefix}{ast.unparse(field.target)}: {ast.unparse(field.annotation)}{default}"
        )
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            lines += [f"      {line.strip()}" for line in str(after.value.value).splitlines()]
    return lines


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where=f"{where}.")  # type: ignore[arg-type]
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list):
            raise ValueError(f"{where} wants a list, got {value!r}")
        if dataclasses.is_dataclass(item):
            return tuple(_value(item, x, f"{where}[{i}]") for i, x in enumerate(value))
        return tuple(_value(item, x, where) for x in value)
    if origin is dict:
        item = typing.get_args(hint)[1]
        if not isinstance(value, dict):
            raise ValueError(f"{where} wants a mapping, got {value!r}")
        return {str(k): _value(item, x, f"{where}.{k}") for k, x in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:  # a whole number of 400 digits
            raise ValueError(f"{where} wants a number, got {value!r}") from None
    if isinstance(value, float) and not math.isfinite(value):  # NaN is neither over nor under 0
        raise ValueError(f"{where} wants a finite number, got {value}")
    right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if not right:
        name = "a number" if hint is float else getattr(hint, "__name__", str(hint))
        raise ValueError(f"{where} wants {name}, got {value!r}")
    return value
