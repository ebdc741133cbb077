"""Where PEFT keeps the updates of fused expert weights in an adapter file, and which of our layers that is.

PEFT wraps an experts module once for each adapted weight, one wrapper in the other, in the order in which the module
registers its parameters (0.21, `_inject_parameters`). So the last one is outermost: of a block's n adapted weights the i-th
is n - i times `base_layer` below the module, and only the config's `target_parameters` says how many there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from qlora.adapter.keys import AdapterKey
from qlora.adapter.read import WEIGHTS_NAME, AdapterFile, refuse
from qlora.lora.expert_paths import fused_weights, matching
from qlora.lora.experts import own_parameters
from qlora.lora.target import ends_with, shortest_suffixes

INSIDE = ".base_layer"


def paths_in_file(model: nn.Module, targeted: Iterable[str]) -> dict[str, str]:
    """Path of each targeted layer -> where PEFT has it, which is another one for fused weights alone."""
    paths = {path: path for path in targeted}
    return paths | _nested([path for path in fused_weights(model) if path in paths])


def target_parameters(model: nn.Module, fused: Iterable[str], own: Sequence[str]) -> list[str]:
    """What a config says so that PEFT adapts exactly these fused weights: its own words where they do, else the shortest.

    Args:
        own: what the adapter's config says already.
    """
    chosen = set(fused)
    every = [path for path, *_ in own_parameters(model)]
    if {path for path in every if matching(path, own) is not None} == chosen:
        return list(own)
    return shortest_suffixes(chosen, every)


def in_model(model: nn.Module, found: AdapterFile) -> AdapterFile:
    """The adapter with the paths that its layers have in a model, with or without LoRA layers. Rank-local.

    Raises:
        AdapterError: the config names a parameter that the model has not, or fused weights of which the file holds nothing.
    """
    entries: Sequence[str] = found.config.selection.get("target_parameters", ())
    every = [path for path, *_ in own_parameters(model)]
    wrong = [
        f"target_parameters: the model has no parameter {entry}"
        for entry in entries
        if not any(ends_with(path, entry) for path in every)
    ]
    adapted = set(found.targeted)
    nested = _nested(path for path in fused_weights(model) if matching(path, entries) is not None)
    lost = [path for path, there in nested.items() if there not in adapted]
    wrong += [f"target_parameters: the file holds no update of {path}" for path in lost]
    refuse(wrong, "the adapter's config does not fit its tensors or the model", found.folder / WEIGHTS_NAME)
    ours = {there: path for path, there in nested.items()}
    renamed = {
        AdapterKey(ours[key.path], key.part) if key.is_of_update and key.path in ours else key: entry
        for key, entry in found.entries.items()
    }
    return replace(found, entries=renamed)


def _nested(fused: Iterable[str]) -> dict[str, str]:
    """Path of a fused weight -> where PEFT has it, of all that are adapted, in the order in which they are registered."""
    blocks: dict[str, list[str]] = {}
    for path in fused:
        blocks.setdefault(path.rpartition(".")[0], []).append(path)
    return {path: owner + INSIDE * depth for owner, paths in blocks.items() for depth, path in enumerate(reversed(paths))}
