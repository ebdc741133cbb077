"""Which modules get an adapter: names, patterns and layer types in, paths out. Torch-free.

A selection (`target_modules` or `exclude_modules`) is one of
- `all-linear`: every linear layer but the output head;
- a string: a regular expression that must match a module's whole path;
- a list: each entry is a module path or the end of one at a dot ("q_proj", "self_attn.q_proj"), and an entry that is
  neither for any module is tried as a class name anywhere in a layer's ancestry ("Linear", "Linear4bit").

Of what all-linear or a list finds, `layers_to_transform` keeps the blocks of these numbers, as PEFT does: a block's number
is the first one in a path behind a list's name, and an entry that is a module's whole path is always kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qlora.config.lora_rules import trains_more
from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError, ConfigError
from qlora.lora.update import pattern_of

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Candidate:
    """A module as selection sees it.

    Attributes:
        path: dotted path in the model.
        classes: names of its class and all its ancestors, nearest first.
        supported: a LoRA layer of ours can wrap it.
        is_linear: it is what all-linear means, if it is not the head.
        is_head: it is the model's output head.
    """

    path: str
    classes: tuple[str, ...]
    supported: bool
    is_linear: bool = True
    is_head: bool = False

    @property
    def is_inner_linear(self) -> bool:
        """Whether all-linear means it."""
        return self.supported and self.is_linear and not self.is_head


@dataclass(frozen=True)
class Selection:
    """What was selected.

    Attributes:
        targeted: path -> the entry that matched it, in the model's order.
        skipped: path -> why a layer that could carry an adapter does not.
    """

    targeted: dict[str, str]
    skipped: dict[str, str]


def choose(candidates: Sequence[Candidate], config: LoraConfig) -> Selection:
    """What a config targets. Nothing, where its list is empty and it trains something else.

    Raises:
        ConfigError, AdapterError: see `select`.
    """
    if config.target_modules == [] and trains_more(config):
        return Selection({}, {c.path: "not in target_modules" for c in candidates if c.supported})
    layers, named = config.layers_to_transform, config.layers_pattern
    return select(candidates, config.target_modules, config.exclude_modules, layers=layers, layers_pattern=named)


def select(
    candidates: Sequence[Candidate],
    target: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    *,
    layers: Sequence[int] | None = None,
    layers_pattern: Sequence[str] | None = None,
) -> Selection:
    """Choose the modules to adapt.

    Args:
        layers: numbers of the blocks to adapt; None is all.
        layers_pattern: names of lists of blocks, or regular expressions for them; None is any list.

    Raises:
        ConfigError: nothing matches, an entry matches nothing, a number or a list's name is no block's, a regular expression
            is not one, or a module is inside another one.
        AdapterError: an entry names modules that no LoRA layer can wrap.
    """
    matches = _matches(candidates, target, "lora.target_modules")
    excluded = _matches(candidates, exclude, "lora.exclude_modules") if exclude else {}
    other_blocks = _outside(matches, target, layers, layers_pattern or ()) if layers is not None else set()
    targeted, skipped, unsupported = {}, {}, []
    for candidate in candidates:
        path = candidate.path
        if path in matches and path in excluded:
            skipped[path] = f"excluded by {excluded[path]}"
        elif path in other_blocks:
            skipped[path] = "not in layers_to_transform"
        elif path in matches and candidate.supported:
            targeted[path] = matches[path]
        elif path in matches:
            unsupported.append(candidate)
        elif candidate.supported:
            skipped[path] = "output head" if candidate.is_head else "not in target_modules"
            if target == ALL_LINEAR and not candidate.is_linear:
                skipped[path] = f"{candidate.classes[0]}, not a linear layer"
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
    refuse_nested(targeted)
    return Selection(targeted, skipped)


def refuse_nested(targeted: Iterable[str]) -> None:
    """Raise ConfigError where one targeted path is inside another: what is inside a LoRA layer is its base's own."""
    paths = set(targeted)
    for path in targeted:
        parts = path.split(".")
        outer = next((above for end in range(1, len(parts)) if (above := ".".join(parts[:end])) in paths), None)
        if outer is not None:
            raise ConfigError(
                "a targeted module is inside another one",
                place="lora.target_modules",
                found=f"{path}, inside {outer}",
                next_step="name one of the two, or exclude the other (lora.exclude_modules)",
            )


def block_of(path: str, layers_pattern: Sequence[str] = ()) -> int | None:
    """The number of the block that a module is in, by PEFT's rule (0.21, `check_target_module_exists`); None outside."""
    # Lazy, so that an expert's number behind the block's own is not taken.
    lists = [rf"(?:^|.*?\.){name}\.(?P<number>\d+)\." for name in layers_pattern] or [r".*?\.[^.]*\.(?P<number>\d+)\."]
    found = next((match for pattern in lists if (match := re.match(pattern, path))), None)
    return int(found["number"]) if found and found["number"] else None


def _outside(
    matches: Mapping[str, str], target: str | Sequence[str], layers: Sequence[int], layers_pattern: Sequence[str]
) -> set[str]:
    """Of the matched paths those in no block of these numbers. Raises ConfigError."""
    place = "lora.layers_to_transform"
    if isinstance(target, str) and target != ALL_LINEAR:
        raise ConfigError(
            "a regular expression says of itself which blocks it means (as in PEFT)",
            place=place,
            found=f"target_modules {target!r}",
            next_step="put the numbers into the expression, or name the modules in a list",
        )
    for name in layers_pattern:
        try:
            none = not any(block_of(path, [name]) is not None for path in matches)
        except re.error as error:
            raise ConfigError(f"not a regular expression: {error}", place="lora.layers_pattern", found=name) from error
        if none:
            raise ConfigError(f"no targeted module is in a list {name!r}", place="lora.layers_pattern")
    numbers = {path: block_of(path, layers_pattern) for path in matches}
    known = sorted({number for number in numbers.values() if number is not None})
    unknown = [number for number in layers if number not in known]
    if unknown:
        raise ConfigError(
            f"no targeted module is in a block of the number {unknown[0]}",
            place=place,
            found=", ".join(map(str, layers)),
            wanted=f"of {', '.join(map(str, known))}" if known else "null: the targeted modules are in no list of blocks",
            next_step=None if known else "or name the list in lora.layers_pattern",
        )
    whole_paths = () if isinstance(target, str) else target
    return {path for path, number in numbers.items() if number not in layers and path not in whole_paths}


def refuse_unused_patterns(config: LoraConfig, paths: Collection[str]) -> None:
    """Raise ConfigError where an entry of rank_pattern or alpha_pattern matches none of these, or is no expression."""
    for key, table in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in table:
            try:
                used = any(pattern_of([pattern], path) is not None for path in paths)
            except re.error as error:
                raise ConfigError(f"not a regular expression: {error}", place=f"lora.{key}", found=pattern) from error
            if not used:
                raise ConfigError(
                    f"the entry {pattern!r} matches no targeted module",
                    place=f"lora.{key}",
                    wanted="the end of a targeted module's path, or a regular expression for it",
                    next_step=f"targeted are {', '.join(dict.fromkeys(path.rpartition('.')[2] for path in paths))}",
                )


def _matches(candidates: Sequence[Candidate], selection: str | Sequence[str], place: str) -> dict[str, str]:
    """Path -> the entry that matches it."""
    if selection == ALL_LINEAR:
        return {c.path: ALL_LINEAR for c in candidates if c.is_inner_linear}
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
    names = {c.path.rpartition(".")[2]: None for c in candidates if c.is_inner_linear}
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
