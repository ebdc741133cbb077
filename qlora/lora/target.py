"""Which modules get an adapter: names, patterns and layer types in, paths out. Torch-free.

A selection (`target_modules` or `exclude_modules`) is one of
- `all-linear`: every linear layer but the output head;
- a string: a regular expression that must match a module's whole path;
- a list: each entry is a module path or the end of one at a dot ("q_proj", "self_attn.q_proj"), and an entry that is
  neither for any module is tried as a class name anywhere in a layer's ancestry ("Linear", "Linear4bit").
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qlora.errors import AdapterError, ConfigError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Candidate:
    """A module as selection sees it.

    Attributes:
        path: dotted path in the model.
        classes: names of its class and all its ancestors, nearest first.
        supported: a LoRA layer of ours can wrap it.
        is_head: it is the model's output head.
    """

    path: str
    classes: tuple[str, ...]
    supported: bool
    is_head: bool = False


@dataclass(frozen=True)
class Selection:
    """What was selected.

    Attributes:
        targeted: path -> the entry that matched it, in the model's order.
        skipped: path -> why a layer that could carry an adapter does not.
    """

    targeted: dict[str, str]
    skipped: dict[str, str]


def select(candidates: Sequence[Candidate], target: str | Sequence[str], exclude: str | Sequence[str] = ()) -> Selection:
    """Choose the modules to adapt.

    Raises:
        ConfigError: nothing matches, an entry matches nothing, or a regular expression is not one.
        AdapterError: an entry names modules that no LoRA layer can wrap.
    """
    matches = _matches(candidates, target, "lora.target_modules")
    excluded = _matches(candidates, exclude, "lora.exclude_modules") if exclude else {}
    targeted, skipped, unsupported = {}, {}, []
    for candidate in candidates:
        path = candidate.path
        if path in matches and path in excluded:
            skipped[path] = f"excluded by {excluded[path]}"
        elif path in matches and candidate.supported:
            targeted[path] = matches[path]
        elif path in matches:
            unsupported.append(candidate)
        elif candidate.supported:
            skipped[path] = "output head" if candidate.is_head else "not in target_modules"
    if unsupported:
        first = unsupported[0]
        raise AdapterError(
            f"{len(unsupported)} of the targeted modules cannot carry a LoRA layer",
            place="lora.target_modules",
            found=f"{first.path} ({first.classes[0]})",
            wanted="linear layers",
            next_step="name the linear layers themselves, or use all-linear",
        )
    if not targeted:
        raise ConfigError(
            "target_modules matches no module",
            place="lora.target_modules",
            found=target,
            wanted=f"for example {_examples(candidates)}",
        )
    return Selection(targeted, skipped)


def _matches(candidates: Sequence[Candidate], selection: str | Sequence[str], place: str) -> dict[str, str]:
    """Path -> the entry that matches it."""
    if selection == ALL_LINEAR:
        return {c.path: ALL_LINEAR for c in candidates if c.supported and not c.is_head}
    if isinstance(selection, str):
        try:
            pattern = re.compile(selection)
        except re.error as error:
            raise ConfigError(f"not a regular expression: {error}", place=place, found=selection) from error
        return {c.path: selection for c in candidates if pattern.fullmatch(c.path)}
    found: dict[str, str] = {}
    for entry in selection:
        paths = [c.path for c in candidates if ends_with(c.path, entry)]
        paths = paths or [c.path for c in candidates if c.supported and not c.is_head and entry in c.classes]
        if not paths:
            raise ConfigError(
                f"the entry {entry!r} matches no module",
                place=place,
                wanted=f"a module's name, the end of its path, or a layer class, for example {_examples(candidates)}",
            )
        for path in paths:
            found.setdefault(path, entry)
    return found


def ends_with(path: str, suffix: str) -> bool:
    """Whether a dotted path is the suffix or ends with it at a dot (PEFT's rule for lists)."""
    return path == suffix or path.endswith("." + suffix)


def _examples(candidates: Iterable[Candidate]) -> str:
    names = {c.path.rpartition(".")[2]: None for c in candidates if c.supported and not c.is_head}
    return ", ".join(list(names)[:8]) or "none: this model has no linear layer"


def shortest_suffixes(targeted: Collection[str], all_paths: Iterable[str]) -> list[str]:
    """The shortest list of path ends that selects exactly the targeted modules. This is what an adapter's config says."""
    others = [path for path in all_paths if path not in targeted]
    found: list[str] = []
    for path in sorted(targeted):
        if any(ends_with(path, suffix) for suffix in found):
            continue
        parts = path.split(".")
        for start in range(len(parts) - 1, -1, -1):
            suffix = ".".join(parts[start:])
            if not any(ends_with(other, suffix) for other in others):
                found.append(suffix)
                break
        else:
            raise AdapterError(f"{path} cannot be told from another module by its path")
    return sorted(found)


def summarize(paths: Mapping[str, str]) -> dict[tuple[str, str], int]:
    """Counts by (last part of the path, reason), for reports."""
    counts: dict[tuple[str, str], int] = {}
    for path, reason in paths.items():
        key = (path.rpartition(".")[2], reason)
        counts[key] = counts.get(key, 0) + 1
    return counts
