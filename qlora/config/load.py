"""Job file and command line in, `JobConfig` out; and the way back for the run directory.

The command line's `a.b=c` is laid over the file before anything is checked, so that both are held to the same schema
and a value is always named by where it really came from: `file:line:column` or `command line`. Nothing here imports
torch, so that a mistake is answered within a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from qlora.config import yaml_tree
from qlora.config.paths import missing_hint
from qlora.config.problems import KeyPath, Keys, Problem, as_error, dotted, show
from qlora.config.schema import JobConfig
from qlora.config.yaml_tree import Tree
from qlora.errors import ConfigError

COMMAND_LINE = "command line"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job file, lay `a.b=c` overrides over it and check it against the schema.

    A later override of the same key wins. An override replaces what stands at its key, a whole section too; sections
    that are absent are made. Its value is YAML: `data.train=[a,b]`, `model.quantization=null`, `train.learning_rate=1e-4`.
    Relative paths in the values are kept as they are: they start at the working directory, not at the file.

    Raises:
        ConfigError: naming file, line, column and key, for all mistakes at once; broken YAML is reported alone.
    """
    path = Path(path)
    tree = yaml_tree.parse(_read(path), str(path))
    problems = tree.problems
    if tree.value is None:
        tree.value = {}
    if not isinstance(tree.value, dict):
        raise ConfigError("not a job", place=str(path), found=show(tree.value), wanted="sections such as `train:`")
    for override in overrides:
        problems += _apply(tree, override)
    for section, value in tree.value.items():
        if value is None:  # a section whose keys are all commented out
            tree.value[section] = {}
    keys = Keys(JobConfig.model_json_schema())
    problems += _bool_problems(tree, keys)
    try:
        config = JobConfig.model_validate(tree.value)
    except ValidationError as error:
        problems += _schema_problems(error, tree, keys, str(path))
    if problems:
        raise as_error(_first_of_each_place(problems), str(path))
    return config


def dump_config(config: JobConfig, versions: dict[str, str] | None = None) -> str:
    """Return the resolved job as YAML: every value, defaults included. `load_config` reads it back to the same config.

    Args:
        versions: package name to version; they become comments at the top, which a reader skips.
    """
    lines = [f"# {name}: {version}" for name, version in (versions or {}).items()]
    lines = ["".join(c if c.isprintable() else " " for c in line) for line in lines]  # a comment ends with its line
    head = "\n".join(["# Resolved job: every value, defaults included.", *lines])
    return f"{head}\n{yaml_tree.dump(config.model_dump(mode='json'))}"


def _read(path: Path) -> str:
    if path.is_file():
        return yaml_tree.read_text(path)
    if path.is_dir():
        raise ConfigError(
            "a job file is wanted, this is a folder", place=str(path), next_step=missing_hint(path / "?", (".yaml", ".yml"))
        )
    if "=" in str(path):
        raise ConfigError(
            "no such job file", place=str(path), next_step="the job file comes first, then key=value: CONFIG a.b=c"
        )
    raise ConfigError("no such job file", place=str(path), next_step=missing_hint(path, (".yaml", ".yml")))


def _apply(tree: Tree, override: str) -> list[Problem]:
    key, equals, text = override.partition("=")
    path: KeyPath = tuple(key.strip().split("."))
    if not equals or not all(path):
        return [
            Problem(COMMAND_LINE, "", "not an override", found=show(override), wanted="key=value, as in train.max_steps=10")
        ]
    try:
        value = yaml_tree.parse(text, COMMAND_LINE, numbered=False)
    except ConfigError as error:
        next_step = error.next_step or f"quote it for YAML and for the shell: {key}=\"'...'\""
        return [Problem(COMMAND_LINE, dotted(path), error.message, found=show(text), next_step=next_step)]
    value.keys[()] = value.values[()] = COMMAND_LINE
    problems = value.problems
    try:
        tree.put(path, value)
    except KeyError as error:
        inner: KeyPath = error.args[0]
        problems = [*problems, Problem(COMMAND_LINE, dotted(path), f"{dotted(inner)} is a value, not a section")]
    return problems


def _bool_problems(tree: Tree, keys: Keys) -> list[Problem]:
    return [
        _wrong_value(tree, keys, path, tree.values[path])
        for path in tree.values
        if isinstance(tree.at(path), bool) and not keys.accepts_bool(path)
    ]


def _schema_problems(error: ValidationError, tree: Tree, keys: Keys, source: str) -> list[Problem]:
    problems: dict[KeyPath, Problem] = {}
    for entry in error.errors(include_url=False, include_context=False):
        path: KeyPath = entry["loc"]
        if entry["type"] == "extra_forbidden":
            where = tree.keys.get(path) or tree.where(path, source)
            kind = "unknown section" if len(path) == 1 and isinstance(tree.at(path), dict) else "unknown key"
            problems[path] = Problem(where, dotted(path), kind, next_step=keys.suggestion(path))
            continue
        path = keys.known_part(path)  # the members of a union report one problem
        problems.setdefault(path, _wrong_value(tree, keys, path, tree.where(path, source)))
    return list(problems.values())


def _wrong_value(tree: Tree, keys: Keys, path: KeyPath, where: str) -> Problem:
    value, wanted = tree.at(path), keys.wanted(path)
    next_step = None
    if isinstance(value, str) and wanted is not None and wanted.startswith("a list"):
        next_step = f"write {dotted(path)}=[{value}]" if where == COMMAND_LINE else f"write [{value}]"
    elif isinstance(value, int | float) and not isinstance(value, bool) and (wanted or "").startswith("text"):
        next_step = f"write {dotted(path)}=\"'{value}'\"" if where == COMMAND_LINE else f"put it in quotes: '{value}'"
    elif value is None:
        next_step = "remove the key for its default"
    return Problem(where, dotted(path), "cannot be used", show(value), wanted, next_step)


def _first_of_each_place(problems: list[Problem]) -> list[Problem]:
    return list({(problem.place, problem.found): problem for problem in reversed(problems)}.values())[::-1]
