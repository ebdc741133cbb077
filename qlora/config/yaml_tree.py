"""YAML text as plain values, with the line and column of every key and value.

A job file follows the YAML 1.2 core schema: `1e-4` is a number, `yes`, `no` and `2024-01-31` are text, a key that is
given twice is an error. Nodes are composed and converted here, by hand; no tag constructs anything, so reading a
hostile file runs nothing, and a file that expands without end is stopped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qlora.config.problems import KeyPath, Problem, dotted, show
from qlora.errors import ConfigError

MOST_BYTES = 1 << 20  # a job file is a few kilobytes
MOST_NODES = 50_000
_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_SYNTAX_HINTS = (
    ("mapping values are not allowed", "text that holds a colon and a space needs quotes"),
    ("cannot start any token", "indent with spaces, and put text that starts with a special character in quotes"),
    ("undefined alias", "text that starts with * needs quotes"),
    ("expected <block end>", "check the indentation: keys of one section start in the same column"),
    ("expected a single document", "a job file is one document: remove the lines that are only ---"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would read as something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Escape what does not print: in its other styles PyYAML folds the line breaks U+0085 and U+2028 to spaces."""
        return self.represent_scalar(_TAG + "str", data, style=None if data.isprintable() else '"')


# Order matters: the first match wins, and every integer is also a float by its spelling.
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))
_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))


@dataclass
class Tree:
    """Plain values, where each stands, and what was already wrong on the way.

    `keys` and `values` map a path such as `('data', 'train', 0)` to `file:line:column`.
    """

    value: Any = None
    keys: dict[KeyPath, str] = field(default_factory=dict)
    values: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, path: KeyPath, default: str) -> str:
        """Return where the value at `path` stands, or the nearest thing around it that does."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.values:
                return self.values[path[:length]]
        return default

    def at(self, path: KeyPath) -> Any:
        """Return the value at `path`, None where there is none."""
        value = self.value
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def put(self, path: KeyPath, other: Tree) -> None:
        """Replace what stands at `path` by another tree (its root has a place, too); missing sections on the way are made.

        Raises KeyError with the path of the first thing on the way that is a value, not a section.
        """
        if not isinstance(self.value, dict):
            self.value = {}
        section = self.value
        for depth, part in enumerate(path[:-1], start=1):
            inner = section.get(part)
            if inner is None:
                inner = section[part] = {}
                self.keys[path[:depth]] = self.values[path[:depth]] = other.values[()]
            if not isinstance(inner, dict):
                raise KeyError(path[:depth])
            section = inner
        section[path[-1]] = other.value
        for table, new in ((self.keys, other.keys), (self.values, other.values)):
            for old_path in [key for key in table if key[: len(path)] == path]:
                del table[old_path]
            table.update({path + sub: where for sub, where in new.items()})


def read_text(path: Path) -> str:
    """Return the text of a file. Raises ConfigError where it is too large or not UTF-8; a byte order mark is accepted."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ConfigError(
                "too large for a job file", place=str(path), found=f"{size} bytes", wanted=f"at most {MOST_BYTES} bytes"
            )
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", place=str(path)) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            "not UTF-8",
            place=f"{path}:{line}",
            found=f"byte 0x{data[error.start]:02x} at offset {error.start}",
            next_step="save the file as UTF-8",
        ) from error


def parse(text: str, source: str, *, numbered: bool = True) -> Tree:
    """Return the tree of a YAML text; an empty text is the value null.

    Args:
        source: the file's name, or `command line`.
        numbered: places carry line and column; off for a value on the command line.

    Raises ConfigError for broken YAML and for tags that are not plain data. Duplicate keys become problems.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        raise ConfigError(
            "a control character is not allowed in YAML",
            place=f"{source}:{line}:{column}" if numbered else source,
            found=f"character {ord(text[error.position]):#06x}",
            next_step="remove it",
        ) from error
    except yaml.MarkedYAMLError as error:
        parts = [part for part in (error.context, error.problem) if part]
        reason = ", ".join(parts) or "cannot be read"
        mark = error.problem_mark or error.context_mark
        raise ConfigError(
            f"not valid YAML: {reason}",
            place=f"{source}:{mark.line + 1}:{mark.column + 1}" if mark is not None and numbered else source,
            found=_line_of(text, mark.line) if mark is not None else None,
            next_step=next((hint for words, hint in _SYNTAX_HINTS if words in reason), None),
        ) from error
    except RecursionError as error:
        raise ConfigError("nested too deeply", place=source) from error
    tree = Tree()
    if node is not None:
        tree.value = _Conversion(tree, source, numbered).value(node, ())
    return tree


def dump(values: dict[str, Any]) -> str:
    """Return YAML that `parse` and every other YAML reader read back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


class _Conversion:
    """Nodes to values, with a budget and a guard against a node that holds itself."""

    def __init__(self, tree: Tree, source: str, numbered: bool) -> None:
        self.tree, self.source, self.numbered = tree, source, numbered
        self.num_nodes = 0
        self.open: set[int] = set()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.num_nodes += 1
        if self.num_nodes > MOST_NODES or id(node) in self.open:
            raise ConfigError("expands to more than a job file can hold", place=self.where(node))
        self.tree.values[path] = self.where(node)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            if isinstance(node, yaml.ScalarNode):
                return self.scalar(node, path)
        finally:
            self.open.discard(id(node))
        raise self.refused_tag(node, path)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError("a key must be a word", place=self.where(key_node))
            key = key_node.value
            inner = (*path, key)
            if key in values:
                self.tree.problems.append(
                    Problem(self.where(key_node), dotted(inner), f"given twice, first at {self.tree.keys[inner]}")
                )
                continue
            self.tree.keys[inner] = self.where(key_node)
            values[key] = self.value(value_node, inner)
        return values

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        if kind == "str":
            return text
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            if kind == "int":
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            if kind == "float":
                return float(text.replace(".inf", "inf").replace(".nan", "nan") if text[-1:] in "fFnN" else text)
        except ValueError as error:
            raise ConfigError(f"cannot be read as {kind}", place=self.place(node, path), found=show(text)) from error
        raise self.refused_tag(node, path)

    def refused_tag(self, node: yaml.Node, path: KeyPath) -> ConfigError:
        tag = "!!" + node.tag.removeprefix(_TAG) if node.tag.startswith(_TAG) else node.tag
        return ConfigError(
            "YAML tags are not allowed in a job file", place=self.place(node, path), found=tag, next_step="remove the tag"
        )

    def place(self, node: yaml.Node, path: KeyPath) -> str:
        return f"{self.where(node)}: {dotted(path)}" if path else self.where(node)

    def where(self, node: yaml.Node) -> str:
        if not self.numbered:
            return self.source
        return f"{self.source}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _line_of(text: str, line: int) -> str | None:
    lines = text.splitlines()
    return show(lines[line].strip()) if line < len(lines) and lines[line].strip() else None
