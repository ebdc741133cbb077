"""Which modules an adapter's config means to PEFT, and what to write so that PEFT finds exactly those adapted here.

PEFT's rules are its own (0.21.2, `check_target_module_exists` and `_set_trainable`): they know no layer classes, take the
first number in a path for the block's, and compare the ends of `modules_to_save` letter by letter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.adapter.keys import PREFIX
from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError
from qlora.lora.target import ALL_LINEAR, ends_with, shortest_suffixes


@dataclass(frozen=True)
class PeftSelection:
    """The fields of PEFT's config that choose modules."""

    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: Sequence[int] = ()
    layers_pattern: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()

    def targets(self, path: str) -> bool:
        """Whether PEFT would adapt the module at a path. Raises re.error."""
        if self.exclude_modules and _named(path, self.exclude_modules):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save):
            return False
        if not _named(path, self.target_modules):
            return False
        # A whole path in a list is taken as it is.
        if not self.layers_to_transform or path in self.target_modules:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        match = next(filter(None, (re.match(pattern, path) for pattern in patterns)), None)
        return match is not None and int(match[1]) in self.layers_to_transform

    def saves(self, path: str) -> bool:
        """Whether PEFT would train the module at a path as a whole."""
        return any(f"{PREFIX}{path}".endswith(name) for name in self.modules_to_save)


def _named(path: str, names: str | Sequence[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(ends_with(path, name) for name in names)


def fields(
    config: LoraConfig, targeted: Collection[str], trained: Collection[str], all_paths: Sequence[str]
) -> dict[str, Any]:
    """What a config file says of its modules: the config's own words where PEFT understands them so, else the shortest.

    Args:
        targeted, trained: paths of the modules that are adapted, and trained as wholes.
        all_paths: of all modules of the model.
    """
    saved = _modules_to_save(config.modules_to_save, trained, all_paths)
    layers = config.layers_to_transform or ()
    own = PeftSelection(config.target_modules, config.exclude_modules, layers, config.layers_pattern or (), saved)
    # PEFT refuses layers beside a regular expression, and all-linear is not understood by every reader.
    understood = own.target_modules != ALL_LINEAR and not (layers and isinstance(own.target_modules, str))
    if understood and _resolves(own, targeted, all_paths):
        return {
            "target_modules": own.target_modules,
            "exclude_modules": own.exclude_modules or None,
            "layers_to_transform": list(layers) or None,
            "layers_pattern": (list(own.layers_pattern) or None) if layers else None,
            "modules_to_save": saved or None,
        }
    chosen = PeftSelection(_suffixes(targeted, all_paths), modules_to_save=saved)
    if not _resolves(chosen, targeted, all_paths):
        chosen = PeftSelection("|".join(re.escape(path) for path in sorted(targeted)), modules_to_save=saved)
    return {
        "target_modules": chosen.target_modules,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": saved or None,
    }


def _resolves(selection: PeftSelection, targeted: Collection[str], all_paths: Iterable[str]) -> bool:
    """Whether PEFT would adapt exactly these modules."""
    try:
        return {path for path in all_paths if selection.targets(path)} == set(targeted)
    except re.error:
        return False


def _suffixes(targeted: Collection[str], all_paths: Iterable[str]) -> list[str]:
    try:
        return shortest_suffixes(targeted, all_paths)
    except AdapterError:  # a targeted path is the end of one that is not
        return sorted(targeted)


def _modules_to_save(own: Sequence[str], trained: Collection[str], all_paths: Sequence[str]) -> list[str]:
    """Ends of names that PEFT, which compares letters and not parts, finds in the trained modules alone."""
    wanted = set(trained)

    def saves(names: Sequence[str]) -> set[str]:
        return {path for path in all_paths if PeftSelection((), modules_to_save=names).saves(path)}

    if own and saves(own) == wanted:
        return list(own)
    found: list[str] = []
    for path in sorted(trained):
        if not any(path.endswith(name) for name in found):
            parts = f"{PREFIX}{path}".split(".")
            ends = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
            found.append(next((end for end in ends if saves([end]) <= wanted), path))
    return sorted(found)
