"""Files and texts that people write, read strictly: YAML and JSON in which nothing can be misunderstood.

YAML here is the part of YAML 1.2 that JSON has too, plus plain scalars and blocks: true and false, null, decimal
numbers and text. ``yes``, ``1:30``, ``0o17`` and ``1_000`` are texts. What could hurt is refused: aliases, tags,
several documents, keys that come twice or are no text, NaN and infinity, depth, and files that no person has written.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import yaml

from mustdrop.checks import LARGEST, shown

MOST_YAML = 1 << 17
MOST_JSON = 1 << 30
DEEPEST = 20
INTEGER = r"[-+]?(?:0|[1-9][0-9]*)"


def read_yaml(path: str | Path, most: int = MOST_YAML) -> Any:
    """What a YAML file holds; ValueError with one line that names the file if it cannot be read."""
    return parse_yaml(read_text(path, most), f"{path}: ")


def parse_yaml(text: str, where: str = "") -> Any:
    """What a YAML text means; ValueError with one line, `where` in front, if it is not plain YAML."""
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{where}not valid YAML: {_place(error)}") from None
    except RecursionError:
        raise ValueError(f"{where}not valid YAML: nested deeper than {DEEPEST} levels") from None


def read_json(path: str | Path, most: int = MOST_JSON) -> Any:
    """What a JSON file holds; ValueError with one line that names the file if it cannot be read."""
    try:
        return json.loads(read_text(path, most), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        told = str(error)
        raise ValueError(told if told.startswith(f"{path}: ") else f"{path}: not valid JSON: {told}") from None


def read_text(path: str | Path, most: int) -> str:
    """A regular file's text in UTF-8, at most so many bytes; ValueError with one line that names the file."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path}: expected a file, it is a {'folder' if os.path.isdir(path) else 'device'}")
        with open(path, "rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"{path}: larger than {most} bytes, more than such a file can need")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


class _Loader(yaml.SafeLoader):
    """Refuses what the module's first lines say, and resolves plain scalars by its own short list."""

    yaml_implicit_resolvers: dict = {}
    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _wrong("an alias (*); write out what it stands for", event)
        if getattr(event, "tag", None) not in (None, "!"):
            raise _wrong(f"a tag ({shown(event.tag)}); leave it out", event)
        if self.depth >= DEEPEST:
            raise _wrong(f"nested deeper than {DEEPEST} levels", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def mapping(self, node):
        """A mapping with distinct keys that are text; a number is the text that it is written as."""
        found = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True) if isinstance(key_node, yaml.ScalarNode) else None
            if isinstance(key, (int, float)) and not isinstance(key, bool):
                key = key_node.value  # the budgets of a method's file; as text, 64 and "64" are one key
            if not isinstance(key, str):
                raise _wrong("a key that is no text", key_node)
            if key in found:
                raise _wrong(f"the key {shown(key)} comes twice", key_node)
            found[key] = self.construct_object(value_node, deep=True)
        return found

    def number(self, node):
        """An integer or a float, both finite and of a size that somebody may mean."""
        whole = re.fullmatch(INTEGER, node.value)
        value = float(node.value)
        if not math.isfinite(value) or (whole and abs(value) >= LARGEST):
            raise _wrong(f"{shown(node.value)} is too large for a number", node)
        return int(node.value) if whole else value

    def unbounded(self, node):
        """NaN and infinity."""
        raise _wrong(f"{node.value} is no number that a setting can have", node)


_RESOLVED = {  # what a plain scalar looks like -> tag and the letters that it may begin with
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "number": (rf"{INTEGER}|[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    "unbounded": (r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
}
for _name, (_form, _letters) in _RESOLVED.items():
    _first = [*_letters, ""] if _name == "null" else list(_letters)
    _Loader.add_implicit_resolver(f"!{_name}", re.compile(rf"^(?:{_form})$"), _first)
_Loader.add_constructor("!null", lambda loader, node: None)
_Loader.add_constructor("!bool", lambda loader, node: node.value.lower() == "true")
_Loader.add_constructor("!number", _Loader.number)
_Loader.add_constructor("!unbounded", _Loader.unbounded)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", lambda loader, node: loader.construct_sequence(node, deep=True))


def _wrong(problem: str, where: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def _place(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if problem is None:
        return " ".join(str(error).split())[:200]
    return problem + (f" (line {mark.line + 1}, column {mark.column + 1})" if mark else "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(name for name in names if names.count(name) > 1))} comes twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that a file can hold")
