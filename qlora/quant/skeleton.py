"""A base before its weights are read: the architecture without storage, and where in the files each tensor lies.

Everything that can be wrong with a base's files short of their bytes is found here: an architecture nobody knows, shapes
that differ from the config's, tensors that are missing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora.config.rules import unused_keys
from qlora.config.schema import QuantizationConfig
from qlora.errors import BaseModelError, ConfigError
from qlora.ops.nf4 import QuantSpec
from qlora.quant import shards
from qlora.quant.fillings import Filling, match_tensors
from qlora.quant.linear import Linear4bit, QuantizedLinear
from qlora.quant.linear8bit import Linear8bit
from qlora.quant.pickled import read_pickled_entries
from qlora.quant.prequantized import as_stored, entries_beside, find_prequantized, stated_quantization
from qlora.quant.shards import TensorEntry
from qlora.quant.source import BaseSource


@dataclass
class Skeleton:
    """A base whose tensors have been found but not read.

    Attributes:
        model: without storage, its linear layers replaced where they are or are to be quantized.
        fillings: parameter or buffer -> which tensors of the files make it.
        quantization: as asked for, or as it was found.
        came_quantized: the files are.
        unquantized, unexpected: see `load.BaseRecord`.
    """

    model: Any
    fillings: dict[str, Filling]
    quantization: QuantizationConfig | None
    came_quantized: bool
    unquantized: dict[str, str]
    unexpected: list[str]

    def dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """What each tensor is held in, by its key: the model's own, or fp32 where transformers never lowers it.

        Args:
            dtype: that the model was built in.
        """
        model = self.model
        kept_in_fp32 = model._get_dtype_plan(dtype) if dtype != torch.float32 and hasattr(model, "_get_dtype_plan") else {}
        fp32_patterns = [re.compile(pattern) for pattern in kept_in_fp32]
        return {
            key: torch.float32 if any(p.search(key) for p in fp32_patterns) else model.get_parameter_or_buffer(key).dtype
            for key in self.fillings
        }


def read_skeleton(
    source: BaseSource, dtype: torch.dtype, quantization: QuantizationConfig | None, *, attention: str = "auto"
) -> Skeleton:
    """Build the architecture and find its tensors in the files. Rank-local.

    Raises:
        BaseModelError: unknown architecture, remote code needed, another quantization method, missing tensors, shapes
            that differ from the config's, damaged files.
        ConfigError: keys of 4 bits that 8 bits would ignore.
    """
    unused = unused_keys(quantization)
    if unused:
        raise ConfigError(
            "in 8 bits a row has one scale, so this would change nothing",
            place=f"model.quantization.{unused[0]}",
            found=getattr(quantization, unused[0]),
            next_step="remove it, or quantize to 4 bits",
        )
    found = stated_quantization(source)
    model = _build(source, dtype, attention)
    pickled = source.fingerprint is None
    entries = read_pickled_entries(source.folder) if pickled else shards.read_entries(source.folder)
    fillings, unexpected = match_tensors(model, entries)
    unquantized: dict[str, str] = {}
    if found is not None:
        unexpected = _place_prequantized(model, fillings, entries, unexpected, dtype)
        found = as_stored(found, source, [filling.came for filling in fillings.values() if filling.came is not None])
    elif quantization is not None:
        unquantized = _place_quantized(model, quantization, dtype)
    _check_shapes(model, fillings)
    _refuse_lost(model, fillings, source)
    return Skeleton(model, fillings, found or quantization, found is not None, unquantized, unexpected)


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
        if attention != "auto":
            _build(source, dtype, "auto")  # raises where it is not the attention
            raise ConfigError(
                f"the model cannot be built with this attention: {' '.join(str(error).split())}",
                place="model.attention",
                found=attention,
                next_step="install what it needs, or set model.attention to auto",
            ) from error
        raise BaseModelError(
            f"transformers cannot build this architecture: {' '.join(str(error).split())}",
            place=str(source.folder / "config.json"),
            wanted="a causal language model that transformers knows without remote code",
        ) from error


def _place_quantized(model: Any, config: QuantizationConfig, dtype: torch.dtype) -> dict[str, str]:
    """Put a quantized layer without storage where a linear layer is to be quantized. Returns what was left, and why."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    storage = torch.uint8 if config.quant_storage == "auto" else getattr(torch, config.quant_storage)
    spec = QuantSpec(config.quant_type, config.block_size, config.double_quant, storage) if config.bits == 4 else None
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
            layer = _without_storage(in_features, out_features, module.bias is not None, spec, dtype)
            layer.transposed_in_files = isinstance(module, Conv1D)
            model.set_submodule(name, layer)
    return left


def _place_prequantized(
    model: Any, fillings: dict[str, Filling], entries: dict[str, TensorEntry], unexpected: list[str], dtype: torch.dtype
) -> list[str]:
    """Put a quantized layer without storage where the files hold what bitsandbytes writes of one. Returns what is left."""
    from transformers.pytorch_utils import Conv1D

    beside = entries_beside(entries)
    used: set[str] = set()
    for key, filling in fillings.items():
        stored = filling.entries[-1]
        own = beside.get(stored.name, {})
        filling.came = find_prequantized(stored, own)
        if filling.came is None:
            continue
        used |= {entry.name for entry in own.values()}
        path = key.removesuffix(".weight")
        linear: Any = model.get_submodule(path)
        wanted = tuple(linear.weight.shape)
        check_shape(stored, key, filling.came.shape, wanted[::-1] if isinstance(linear, Conv1D) else wanted)
        out_features, in_features = filling.came.shape
        layer = _without_storage(in_features, out_features, linear.bias is not None, filling.came.spec, dtype)
        layer.transposed_in_files = isinstance(linear, Conv1D)  # in files that hold it unquantized
        model.set_submodule(path, layer)
    return [name for name in unexpected if name not in used]


def _without_storage(
    in_features: int, out_features: int, bias: bool, spec: QuantSpec | None, dtype: torch.dtype
) -> QuantizedLinear:
    """A layer in 4 bits, or in 8 where there is no spec."""
    if spec is None:
        return Linear8bit(in_features, out_features, bias, dtype, device="meta")
    return Linear4bit(in_features, out_features, bias, spec, dtype, device="meta")


def _check_shapes(model: Any, fillings: dict[str, Filling]) -> None:
    for key, filling in fillings.items():
        path, _, own_name = key.rpartition(".")
        module = model.get_submodule(path)
        entry = filling.entries[-1]
        if not isinstance(module, QuantizedLinear) or own_name != "weight":
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
    made = {f"{path}.statistics" for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    wanted = [name for name in model.state_dict() if name not in there | made]
    lost = [name for name in wanted if not any(pattern.search(name) for pattern in ignored)]
    if lost:
        raise BaseModelError(
            f"{len(lost)} tensors of the model are in none of its files",
            place=str(source.folder),
            found=", ".join(lost[:5]),
            next_step="check that config.json and the weights belong together",
        )
