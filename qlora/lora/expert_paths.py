"""Fused expert weights by their paths: which a config means, and the LoRA layers at them.

A fused weight is a parameter, not a module, so that what selects modules does not see it: it has a selection of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from qlora.config.schema import LoraConfig
from qlora.errors import ConfigError
from qlora.lora.experts import ExpertWeight, LoraExperts, LoraExpertWeight, own_parameters, why_not
from qlora.lora.target import Selection, block_of, ends_with

PLACE = "lora.target_parameters"
# Initial values that need no weight and no inputs.
INITS = ("default", "gaussian")


def select_parameters(model: nn.Module, config: LoraConfig) -> dict[str, str]:
    """The fused weights that `lora.target_parameters` means: path -> the entry that matches it, in the model's order.

    An entry is a parameter's path or the end of one at a dot (PEFT's rule).

    Raises:
        ConfigError: an entry that matches nothing, or a weight that can carry no update; an initialization that needs the
            weights or their inputs.
    """
    entries, place = config.target_parameters, PLACE
    if entries and config.init_lora_weights not in INITS:
        raise ConfigError(
            "the updates of fused experts cannot start from their weights or inputs",
            place="lora.init_lora_weights",
            found=config.init_lora_weights,
            wanted=" or ".join(INITS),
        )
    known = list(own_parameters(model))
    found: dict[str, str] = {}
    for path, module, name in known:
        entry = matching(path, entries)
        if entry is None:
            continue
        reason = why_not(module, name)
        if reason is not None:
            raise ConfigError(
                f"the entry {entry!r} means a weight that can carry no update", place=place, found=f"{path}: {reason}"
            )
        found[path] = entry
    unused = [entry for entry in entries if not any(ends_with(path, entry) for path, *_ in known)]
    if unused:
        fused = {".".join(path.split(".")[-3:]): None for path, module, name in known if why_not(module, name) is None}
        raise ConfigError(
            f"the entry {unused[0]!r} matches no parameter",
            place=place,
            wanted=", ".join(fused) or "none: this model has no fused experts that can carry an update",
        )
    return found


def with_parameters(model: nn.Module, config: LoraConfig, selection: Selection, trained: Collection[str]) -> Selection:
    """Add the fused weights that a config targets to the layers that it targets, in the model's order.

    Args:
        trained: paths of the modules that are trained as wholes.

    Raises:
        ConfigError: see `select_parameters`; also a weight of a module that is trained as a whole, or of no chosen block.
    """
    found = select_parameters(model, config)
    if not found:
        return selection
    if config.layers_to_transform is not None:
        numbers = {path: block_of(path, config.layers_pattern or ()) for path in found}
        found = {path: entry for path, entry in found.items() if numbers[path] in config.layers_to_transform}
        if not found:
            blocks = sorted({number for number in numbers.values() if number is not None})
            raise ConfigError(
                "no targeted parameter is in one of these blocks",
                place="lora.layers_to_transform",
                found=config.layers_to_transform,
                wanted=f"some of {blocks}",
            )
    both = [path for path in found if path.rpartition(".")[0] in trained]
    if both:
        raise ConfigError("a parameter is both targeted and trained as a whole", place=PLACE, found=", ".join(both[:5]))
    place_of = {path: index for index, (path, _) in enumerate(model.named_modules())}
    every = selection.targeted | found
    order = sorted(every, key=lambda path: place_of[path.rpartition(".")[0] if path in found else path])
    return Selection({path: every[path] for path in order}, selection.skipped)


def matching(path: str, entries: Sequence[str]) -> str | None:
    """The first entry that means a parameter."""
    return next((entry for entry in entries if ends_with(path, entry)), None)


def fused_weights(model: nn.Module) -> list[str]:
    """Paths of the parameters that can carry an update."""
    return [path for path, module, name in own_parameters(model) if why_not(module, name) is None]


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; of a fused weight, which is no module, a layer that stands for it. Raises AttributeError."""
    owner, _, name = path.rpartition(".")
    holder: Any = model.get_submodule(owner)
    if isinstance(holder, LoraExperts) and name not in holder.weights:
        holder = holder.base_layer
    if name in dict(holder.named_parameters(recurse=False)):
        return ExpertWeight(holder, name)
    return model.get_submodule(path)


def wrap_weight(model: nn.Module, path: str) -> LoraExpertWeight:
    """The LoRA layer of a fused weight, put there where there is none."""
    owner, _, name = path.rpartition(".")
    holder = model.get_submodule(owner)
    if not isinstance(holder, LoraExperts):
        holder = LoraExperts(holder).train(holder.training)
        model.set_submodule(owner, holder)
    return holder.layer(name)


def why_untargeted(module: Any, name: str) -> str:
    """What a report says of a weight of three dimensions that no layer's selection reaches."""
    reason = why_not(module, name)
    return "fused experts, adapted by lora.target_parameters alone" if reason is None else f"3-D weight: {reason}"
