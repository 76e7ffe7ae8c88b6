"""From a YAML file and `KEY=VALUE` to a checked config, or to a message that names the field and the fix."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sandbox.config.base import brief
from sandbox.config.sections import Config
from sandbox.errors import ConfigError

__all__ = ["check", "load"]

S = TypeVar("S", bound=BaseModel)

_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What the parser says: also of a 13th month or a number of 5000 digits, and of 1000 brackets in one another."""


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the config at `path` and apply `KEY=VALUE` overrides, such as `mesh.dp.degree=4`.

    Raises ConfigError: no such file, not YAML, an unknown key, a value of the wrong kind, or settings at odds.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        there = {p.name: p for here in (path.parent / "configs", path.parent) for p in here.glob("[!.]*.yaml")}
        near = difflib.get_close_matches(path.name, there, 1, 0.4)
        hint = f" Did you mean {there[near[0]]}?" if near else ""
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).{hint}") from None
    try:
        tree = yaml.safe_load(text)
    except _NOT_YAML as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, not sections such as `mesh:` and `train:`.")
    for item in overrides:
        _override(tree, item)
    tree.setdefault("name", path.stem)
    return check(Config, tree, source=str(path))


def check(kind: type[S], values: dict[str, Any], *, source: str = "", prefix: str = "", also: Iterable[str] = ()) -> S:
    """Validate `values` as `kind`; on failure raise a ConfigError that names the field's path and the fix.

    `prefix` is the path of `values` in the config, `also` further names that are right at this place.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_problem(kind, dict(item), prefix, also) for item in error.errors(include_url=False)]
    where = f"{source}: " if source else ""
    raise ConfigError("\n".join(where + problem for problem in dict.fromkeys(problems)))


def _override(tree: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not last:
        raise ConfigError(f"--set {item}: write KEY=VALUE, such as mesh.dp.degree=4.")
    try:
        value = yaml.safe_load(text)
    except _NOT_YAML:
        raise ConfigError(f"--set {item}: the value is not YAML. Quote it.") from None
    for depth, part in enumerate(path):
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {item}: {'.'.join(path[: depth + 1])} is a value, not a section.")
        tree = child
    tree[last] = value


def _problem(kind: type[BaseModel], item: dict[str, Any], prefix: str, also: Iterable[str]) -> str:
    """One line about one pydantic error."""
    parts = [prefix, *(str(part) for part in item["loc"])]
    path = ".".join(part for part in parts if part)
    if item["type"] == "extra_forbidden":
        *parents, name = (str(part) for part in item["loc"])
        right = [*_fields(kind, parents), *(also if not parents else ())]
        near = difflib.get_close_matches(name, right, 1, 0.5)
        stem = path.removesuffix(name)
        hint = f"Did you mean {stem}{near[0]}?" if near else f"It may be one of: {', '.join(sorted(right)) or 'none'}."
        return f"{path} is not a field. {hint}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "literal_error":
        return f"{path}: {brief(item['input'])} is not one of {item['ctx']['expected']}."
    message = str(item["msg"]).removeprefix("Input ")
    return f"{path}: {brief(item['input'])} {message[0].lower()}{message[1:]}."


def _fields(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        field = kind.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        kind = field.annotation
    return list(kind.model_fields)
