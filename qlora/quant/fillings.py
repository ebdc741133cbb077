"""Which tensors of a base's files make which tensor of the model."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qlora.quant.prequantized import Prequantized
from qlora.quant.shards import JoinedEntry, TensorEntry


@dataclass
class Filling:
    """Which tensors of the files make one parameter or buffer of the model.

    Attributes:
        entries: by the order of their names; the last one counts where the tensor is used as it is.
        converter: a transformers WeightConverter that makes the tensor of several; None where it is used as it is.
        joined: the same tensor as its entries one after another, where it is no more than that.
        came: the weight is quantized already.
    """

    entries: list[TensorEntry] = field(default_factory=list)
    converter: Any = None
    joined: JoinedEntry | None = None
    came: Prequantized | None = None


def match_tensors(model: Any, entries: dict[str, TensorEntry]) -> tuple[dict[str, Filling], list[str]]:
    """Assign the files' tensors to the model's, in their natural order. Rank-local.

    Returns:
        What makes each parameter or buffer, and the tensors of the files that have no place.
    """
    from transformers.core_model_loading import dot_natural_key

    wanted = model.state_dict()
    # Where files have all tensors of the model by their names and shapes, but for tied ones that they leave out, there is
    # nothing to rename. Transformers makes its rules for all architectures at once, which takes as long as a small base.
    tied = {name for tie in model.all_tied_weights_keys.items() for name in tie}
    as_named = entries.keys() <= wanted.keys() <= entries.keys() | tied
    if as_named and all(entry.shape == tuple(wanted[name].shape) for name, entry in entries.items()):
        return {name: Filling([entries[name]]) for name in sorted(entries, key=dot_natural_key)}, []
    return match_by_rules(model, entries, wanted)


def match_by_rules(
    model: Any, entries: dict[str, TensorEntry], wanted: dict[str, Tensor]
) -> tuple[dict[str, Filling], list[str]]:
    """As `match_tensors`, by transformers' own renaming rules for this architecture.

    Args:
        wanted: the model's state dict.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    fillings: dict[str, Filling] = {}
    by_source: dict[str, dict[str, list[TensorEntry]]] = {}
    unexpected = []
    for name in sorted(entries, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if key not in wanted:
            plain, _ = rename_source_key(name, [], [], model.base_model_prefix, wanted)
            key, pattern = (plain, None) if plain in wanted else (key, pattern)
        if key not in wanted:
            unexpected.append(name)
            continue
        filling = fillings.setdefault(key, Filling())
        filling.entries.append(entries[name])
        if pattern is not None:
            filling.converter = filling.converter or deepcopy(by_pattern[pattern])
            filling.converter.add_tensor(key, name, pattern, entries[name].read_whole)
            by_source.setdefault(key, {}).setdefault(pattern, []).append(entries[name])
    for key, sources in by_source.items():
        fillings[key].joined = _join(fillings[key].converter, sources, tuple(wanted[key].shape))
    return fillings, unexpected


def _join(converter: Any, sources: dict[str, list[TensorEntry]], shape: tuple[int, ...]) -> JoinedEntry | None:
    """A converted tensor as its sources one after another; None where the converter does something else.

    Stacking experts, and then joining the rows of each one's gate and up projection, is to lay out expert by expert what
    belongs to it, in the order of the sources.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    does = [(type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")]
    known = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    lists = [sources.get(pattern, []) for pattern in converter.source_patterns]
    if len(does) != len(converter.operations) or does not in known or len({len(entries) for entries in lists}) != 1:
        return None
    parts = tuple(entry for expert in zip(*lists, strict=True) for entry in expert)
    whole = sum(part.num_elements for part in parts) == math.prod(shape)
    return JoinedEntry(parts, shape) if whole and len({part.dtype for part in parts}) == 1 else None
