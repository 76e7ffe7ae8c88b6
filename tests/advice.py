"""What a refusal advises, as settings to try: `Set a.b: 1 or 2, or c.d: x.`, `Degrees that do: 1, 2.`"""

import copy
import re
from typing import Any

import yaml

__all__ = ["advised", "changed", "settings"]

Settings = dict[str, Any]

FIELD = r"engine|(?:mesh|model|data|train)\.[a-z_.]*[a-z_]"


def advised(message: str) -> list[Settings]:
    """Every change that a message names, in its first line if it has several: path -> value, or None to leave it out.

    Of fields that are none, one a line, all are left out at once.
    """
    line, *_ = lines = message.splitlines()
    subject = re.search(FIELD, line)
    if subject is None:
        return []
    found: list[Settings] = []
    if listed := re.search(r" that do: ([\d, ]+?|(\d+) to (\d+))(?:, \.\.\.)?\.", line):
        numbers = range(int(listed[2]), int(listed[3]) + 1) if listed[2] else map(int, listed[1].split(", "))
        found += [{subject[0]: number} for number in numbers]
    if choices := re.search(r" is not one of (.+?)\.$", line):
        found += [{subject[0]: choice} for choice in re.findall(r"'(.+?)'", choices[1])]
    if " is not a field." in line:
        found.append({line.split()[0]: None for line in lines if " is not a field." in line})
    if named := re.search(r"(?:Use|Nearest:) engine (\w+)", line):
        found.append({"engine": named[1]})
    for sentence in re.findall(r"\b[Ss]et (.+?)\.(?: |$)", line):
        field = subject[0]
        for part in sentence.split(", or "):
            named = re.fullmatch(rf"(?:({FIELD}): )?(.+?)(?: with ({FIELD}): (.+))?", part)
            assert named, part
            field = named[1] or field
            also = {named[3]: yaml.safe_load(named[4])} if named[3] else {}
            found += [{field: yaml.safe_load(value), **also} for value in named[2].split(" or ")]
    return found


def changed(tree: dict[str, Any], values: Settings) -> dict[str, Any]:
    """A config with other settings."""
    made = copy.deepcopy(tree)
    for path, value in values.items():
        *sections, last = path.split(".")
        inner = made
        for part in sections:
            inner = inner.setdefault(part, {})
        inner[last] = value
        if value is None:
            del inner[last]
    return made


def settings(text: str) -> Settings:
    """`a.b=1 a.c=x`, as one gives them to `--set`."""
    return {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in text.split())}
