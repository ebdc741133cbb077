"""A base before its weights are read: the architecture without storage, and where in the files each tensor lies.

Everything that can be wrong with a base's files short of their bytes is found here: an architecture nobody knows, shapes
that differ from the config's, tensors that are missing.
"""

from __future__ import annotations

import math
import re
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config.schema import QuantizationConfig
from qlora.distributed.sharding import Sharding
from qlora.errors import BaseModelError
from qlora.ops import nf4
from qlora.ops.nf4 import QuantSpec, StoredState
from qlora.quant import shards
from qlora.quant.linear import Linear4bit
from qlora.quant.pickled import read_pickled_entries
from qlora.quant.shards import JoinedEntry, TensorEntry
from qlora.quant.source import ORIGIN_NAME, BaseSource


@dataclass
class Filling:
    """Which tensors of the files make one parameter or buffer of the model.

    Attributes:
        entries: by the order of their names; the last one counts where the tensor is used as it is.
        converter: a transformers WeightConverter that makes the tensor of several; None where it is used as it is.
        joined: the same tensor as its entries one after another, where it is no more than that.
        came: the weight is in 4 bits already.
    """

    entries: list[TensorEntry] = field(default_factory=list)
    converter: Any = None
    joined: JoinedEntry | None = None
    came: Prequantized | None = None


@dataclass(frozen=True)
class Prequantized:
    """Where the bytes and the scales of a weight that came in 4 bits lie."""

    packed: TensorEntry
    statistics: tuple[Tensor | TensorEntry, ...]
    state: StoredState

    def read(self, sharding: Sharding, device: torch.device) -> tuple[Tensor, Tensor]:
        """Packed weight and statistics, in full size, with this rank's runs of both filled. Rank-local."""
        packed = torch.empty(self.packed.shape, dtype=self.packed.dtype, device=device)
        start, stop = sharding.run(packed.numel())
        packed.view(-1)[start:stop] = self.packed.read(start, stop).to(device)
        parts = [part if isinstance(part, Tensor) else part.as_bytes() for part in self.statistics]
        sizes = [part.numel() * part.element_size() if isinstance(part, Tensor) else part.num_elements for part in parts]
        statistics = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        start, stop = sharding.run(statistics.numel())
        offset = 0
        for part, size in zip(parts, sizes, strict=True):
            first, last = max(start - offset, 0), min(stop - offset, size)
            if first < last:
                own = part.view(torch.uint8)[first:last] if isinstance(part, Tensor) else part.read(first, last)
                statistics[offset + first : offset + last] = own.to(device)
            offset += size
        return packed, statistics


@dataclass
class Skeleton:
    """A base whose tensors have been found but not read.

    Attributes:
        model: without storage, its linear layers replaced where they are or are to be in 4 bits.
        fillings: parameter or buffer -> which tensors of the files make it.
        quantization: as asked for, or as it was found.
        came_quantized: the files are in 4 bits.
        unquantized, unexpected: see `load.BaseRecord`.
    """

    model: Any
    fillings: dict[str, Filling]
    quantization: QuantizationConfig | None
    came_quantized: bool
    unquantized: dict[str, str]
    unexpected: list[str]


def read_skeleton(
    source: BaseSource, dtype: torch.dtype, quantization: QuantizationConfig | None, *, attention: str = "auto"
) -> Skeleton:
    """Build the architecture and find its tensors in the files. Rank-local.

    Raises:
        BaseModelError: unknown architecture, remote code needed, another quantization method, missing tensors, shapes
            that differ from the config's, damaged files.
    """
    found = _bitsandbytes_config(source)
    model = _build(source, dtype, attention)
    pickled = source.fingerprint is None
    entries = read_pickled_entries(source.folder) if pickled else shards.read_entries(source.folder)
    fillings, unexpected = _match(model, entries)
    unquantized: dict[str, str] = {}
    if found is not None:
        unexpected = _place_prequantized(model, fillings, entries, unexpected, dtype)
        found = _as_stored(found, source, fillings)
    elif quantization is not None:
        unquantized = _place_linear4bit(model, quantization, dtype)
    _check_shapes(model, fillings)
    _refuse_lost(model, fillings, source)
    return Skeleton(model, fillings, found or quantization, found is not None, unquantized, unexpected)


def _bitsandbytes_config(source: BaseSource) -> QuantizationConfig | None:
    """How a base that comes quantized was quantized, or None. Refuses methods other than bitsandbytes' 4 bits."""
    stated = shards.read_config(source.folder).get("quantization_config")
    if stated is None:
        return None
    method = stated.get("quant_method")
    if method != "bitsandbytes" or not stated.get("load_in_4bit"):
        raise BaseModelError(
            "the base comes quantized in a way that is not supported",
            place=str(source.folder / "config.json"),
            found=method if method != "bitsandbytes" else "bitsandbytes, 8 bits",
            wanted="an unquantized base, or bitsandbytes in 4 bits",
            next_step="use the original, unquantized model: it is quantized while it is read",
        )
    return QuantizationConfig(
        quant_type=stated.get("bnb_4bit_quant_type", "fp4"), double_quant=bool(stated.get("bnb_4bit_use_double_quant"))
    )


def _as_stored(found: QuantizationConfig, source: BaseSource, fillings: dict[str, Filling]) -> QuantizationConfig:
    """What config.json does not say: the block size, and of a prepared base everything that was asked for.

    Raises:
        BaseModelError: the record of a prepared base says something else than its weights.
    """
    states = [filling.came.state.spec for filling in fillings.values() if filling.came is not None]
    if not states:
        return found
    spec = states[0]
    stored = {"quant_type": spec.quant_type, "block_size": spec.block_size, "double_quant": spec.double_quant}
    if source.origin is None:
        return found.model_copy(update=stored)
    recorded = source.origin.quantization
    if any(getattr(recorded, name) != value for name, value in stored.items()):
        raise BaseModelError(
            "the record of what this base was prepared from does not fit its weights",
            place=str(source.folder / ORIGIN_NAME),
            found=recorded.model_dump(include=set(stored)),
            wanted=stored,
            next_step="prepare the base again, or delete the record",
        )
    return recorded


def _build(source: BaseSource, dtype: torch.dtype, attention: str) -> Any:
    """The architecture on the meta device."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=None if attention == "auto" else attention,
                trust_remote_code=False,
            )
    except (ValueError, KeyError, ImportError, StrictDataclassError) as error:
        raise BaseModelError(
            f"transformers cannot build this architecture: {' '.join(str(error).split())}",
            place=str(source.folder / "config.json"),
            wanted="a causal language model that transformers knows without remote code",
        ) from error


def _match(model: Any, entries: dict[str, TensorEntry]) -> tuple[dict[str, Filling], list[str]]:
    """Assign the files' tensors to the model's, by transformers' own renaming rules for this architecture."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    wanted = model.state_dict()
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


def _place_linear4bit(model: Any, config: QuantizationConfig, dtype: torch.dtype) -> dict[str, str]:
    """Put a Linear4bit without storage where a linear layer is to be quantized. Returns what was left, and why."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    storage = torch.uint8 if config.quant_storage == "auto" else getattr(torch, config.quant_storage)
    spec = QuantSpec(config.quant_type, config.block_size, config.double_quant, storage)
    kept = dict.fromkeys(get_keys_to_not_convert(model), "output head or tied weight")
    left: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            out_features, in_features = module.weight.shape
        elif isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
        else:
            if isinstance(module, nn.Linear):
                left[name] = f"{type(module).__name__} is a linear layer with arithmetic of its own"
            left |= {
                f"{name}.{own}": "3-D expert weight" for own, p in module.named_parameters(recurse=False) if p.ndim == 3
            }
            continue
        skipped = next((s for s in config.skip_modules if name == s or name.endswith("." + s)), None)
        if skipped is not None:
            left[name] = f"skip_modules: {skipped}"
        elif name in kept:
            left[name] = kept[name]
        else:
            layer = Linear4bit(in_features, out_features, module.bias is not None, spec, dtype, device="meta")
            layer.transposed_in_files = isinstance(module, Conv1D)
            model.set_submodule(name, layer)
    return left


def _place_prequantized(
    model: Any, fillings: dict[str, Filling], entries: dict[str, TensorEntry], unexpected: list[str], dtype: torch.dtype
) -> list[str]:
    """Put a Linear4bit without storage where the files hold what bitsandbytes writes of one. Returns what is left over."""
    from transformers.pytorch_utils import Conv1D

    beside: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        path, found, suffix = name.rpartition(".weight.")
        if found:
            beside.setdefault(f"{path}.weight", {})[f".{suffix}"] = entry
    used: set[str] = set()
    for key, filling in fillings.items():
        stored = filling.entries[-1]
        own = beside.get(stored.name, {})
        if not any(suffix.startswith(".quant_state.") for suffix in own):
            continue
        state = nf4.read_state(stored, own, partial(_read_whole, own), f"{stored.file}: {stored.name}")
        filling.came = Prequantized(stored, tuple(nf4.statistics_parts(state, own)), state)
        used |= {entry.name for entry in own.values()}
        path = key.removesuffix(".weight")
        linear: Any = model.get_submodule(path)
        wanted = tuple(linear.weight.shape)
        check_shape(stored, key, state.shape, wanted[::-1] if isinstance(linear, Conv1D) else wanted)
        out_features, in_features = state.shape
        layer = Linear4bit(in_features, out_features, linear.bias is not None, state.spec, dtype, device="meta")
        layer.transposed_in_files = isinstance(linear, Conv1D)  # in files that hold it unquantized
        model.set_submodule(path, layer)
    return [name for name in unexpected if name not in used]


def _read_whole(entries: dict[str, TensorEntry], suffix: str) -> Tensor:
    return entries[suffix].read_whole()


def _check_shapes(model: Any, fillings: dict[str, Filling]) -> None:
    for key, filling in fillings.items():
        path, _, own_name = key.rpartition(".")
        module = model.get_submodule(path)
        entry = filling.entries[-1]
        if not isinstance(module, Linear4bit) or own_name != "weight":
            if filling.converter is None:
                check_shape(entry, key, entry.shape, tuple(getattr(module, own_name).shape))
            continue
        if filling.converter is not None:
            raise BaseModelError(
                "this linear weight is made of several tensors, which cannot be quantized while they are read",
                place=f"{entry.file}: {entry.name}",
                next_step="add the layer's name to model.quantization.skip_modules",
            )
        shape = (module.out_features, module.in_features)
        if filling.came is None:
            check_shape(entry, key, entry.shape, shape[::-1] if module.transposed_in_files else shape)


def check_shape(entry: TensorEntry, key: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise BaseModelError where a tensor of the files has another shape than the model's."""
    if found != wanted:
        raise BaseModelError(
            f"{key} has another shape than config.json says", place=str(entry.file), found=found, wanted=wanted
        )


def _refuse_lost(model: Any, fillings: dict[str, Filling], source: BaseSource) -> None:
    """Refuse tensors of the model that are in no file, nor tied to one that is."""
    there = set(fillings)
    ties = [{target, origin} for target, origin in model.all_tied_weights_keys.items()]
    while any(tie & there and not tie <= there for tie in ties):
        there |= {name for tie in ties if tie & there for name in tie}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or []]
    made = {f"{path}.statistics" for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    wanted = [name for name in model.state_dict() if name not in there | made]
    lost = [name for name in wanted if not any(pattern.search(name) for pattern in ignored)]
    if lost:
        raise BaseModelError(
            f"{len(lost)} tensors of the model are in none of its files",
            place=str(source.folder),
            found=", ".join(lost[:5]),
            next_step="check that config.json and the weights belong together",
        )
