"""Loading a base: a skeleton without storage, filled tensor by tensor, each quantized while it is read.

At no time is more than one tensor held in 16 bits, and of a tensor that is quantized only a piece. The bytes are those
of transformers' own loading with BitsAndBytesConfig.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config.schema import QuantizationConfig
from qlora.errors import BaseModelError
from qlora.ops import nf4
from qlora.ops.nf4 import QuantSpec
from qlora.quant import shards
from qlora.quant.linear import Linear4bit
from qlora.quant.pickled import read_pickled_entries
from qlora.quant.shards import TensorEntry
from qlora.quant.source import BaseSource


@dataclass(frozen=True)
class BaseRecord:
    """What a loaded base is, kept on the model as `qlora_base`.

    Attributes:
        source: where it came from.
        dtype: of unquantized weights and of 4-bit arithmetic.
        quantization: as asked for; of a base that came in 4 bits, as it was found; None for none.
        quantized: paths of the 4-bit layers.
        unquantized: path -> why it was left, for linear layers and expert weights that stay as they are.
        unexpected: tensors in the files that the architecture has no place for.
    """

    source: BaseSource
    dtype: torch.dtype
    quantization: QuantizationConfig | None
    quantized: tuple[str, ...]
    unquantized: dict[str, str]
    unexpected: tuple[str, ...]


@dataclass
class Filling:
    """Which tensors of the files make one parameter or buffer of the model."""

    entries: list[TensorEntry] = field(default_factory=list)
    converter: Any = None  # a transformers WeightConverter; None where the tensor is used as it is


def load_model(
    source: BaseSource,
    *,
    dtype: str | torch.dtype = "bfloat16",
    quantization: QuantizationConfig | None = None,
    device: torch.device | str | None = None,
    attention: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Load a causal language model, frozen and in eval mode. Rank-local: every rank that calls it holds the whole base.

    Args:
        source: from `resolve_base`.
        dtype: of unquantized weights, and of what 4-bit layers compute in.
        quantization: None leaves the base as it is (a base that comes in 4 bits stays so either way).
        device: None is the current GPU, or the CPU where there is none.
        attention: a name transformers' attention interface knows; auto leaves the choice to transformers.
        progress: called with (parameters done, parameters in all).

    Raises:
        BaseModelError: unknown architecture, remote code needed, another quantization method, missing tensors, shapes
            that differ from the config's, damaged files.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    device = torch.device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
    skeleton = read_skeleton(source, dtype, quantization, device=device, attention=attention)
    model = skeleton.model
    _fill(model, skeleton.fillings, device, dtype, progress)
    _tie(model, source)
    _restore_computed_buffers(model, device)
    _load_generation_config(model, source)
    quantized = tuple(name for name, module in model.named_modules() if isinstance(module, Linear4bit))
    model.requires_grad_(False).eval()
    model.qlora_base = BaseRecord(
        source, dtype, skeleton.quantization, quantized, skeleton.unquantized, tuple(skeleton.unexpected)
    )
    return model


@dataclass
class Skeleton:
    """A base whose tensors have been found but not read.

    Attributes:
        model: without storage, its linear layers replaced where they are to be in 4 bits. Layers of a base that came
            in 4 bits are filled already.
        fillings: parameter or buffer -> which tensors of the files make it.
        quantization: as asked for, or as it was found.
        came_quantized: the files are in 4 bits.
        unquantized, unexpected: see `BaseRecord`.
    """

    model: Any
    fillings: dict[str, Filling]
    quantization: QuantizationConfig | None
    came_quantized: bool
    unquantized: dict[str, str]
    unexpected: list[str]


def read_skeleton(
    source: BaseSource,
    dtype: torch.dtype,
    quantization: QuantizationConfig | None,
    *,
    device: torch.device | str = "cpu",
    attention: str = "auto",
) -> Skeleton:
    """Build the architecture and find its tensors in the files. Raises BaseModelError; see `load_model`."""
    found = _bitsandbytes_config(source)
    model = _build_skeleton(source, dtype, attention)
    pickled = source.fingerprint is None
    entries = read_pickled_entries(source.folder) if pickled else shards.read_entries(source.folder)
    fillings, unexpected = _match(model, entries)
    unquantized: dict[str, str] = {}
    if found is not None:
        _place_prequantized(model, entries, dtype, torch.device(device))
        unexpected = [name for name in unexpected if ".weight." not in name]
    elif quantization is not None:
        unquantized = _place_linear4bit(model, quantization, dtype)
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


def _build_skeleton(source: BaseSource, dtype: torch.dtype, attention: str) -> Any:
    """The architecture on the meta device."""
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
    except (ValueError, KeyError, ImportError) as error:
        raise BaseModelError(
            f"transformers cannot build this architecture: {str(error).splitlines()[0]}",
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
    return fillings, unexpected


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


def _place_prequantized(model: Any, entries: dict[str, TensorEntry], dtype: torch.dtype, device: torch.device) -> None:
    """Build the 4-bit layers of a base that comes in 4 bits from the entries bitsandbytes wrote for them."""
    for name in [name for name in entries if ".weight.quant_state.bitsandbytes__" in name]:
        weight_name = name.split(".quant_state.")[0]
        path = weight_name.removesuffix(".weight")
        own = {key.removeprefix(weight_name): entry for key, entry in entries.items() if key.startswith(weight_name + ".")}
        packed, statistics, spec, shape = nf4.from_bitsandbytes(
            entries[weight_name].read_whole(),
            {suffix: entry.read_whole() for suffix, entry in own.items()},
            f"{entries[weight_name].file}: {weight_name}",
        )
        linear = model.get_submodule(path)
        layer = Linear4bit(shape[1], shape[0], linear.bias is not None, spec, dtype, device="meta")
        layer.set_packed(packed.to(device), statistics.to(device), dtype)
        model.set_submodule(path, layer)


def _fill(
    model: Any,
    fillings: dict[str, Filling],
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Read every parameter and buffer that the files hold."""
    kept_in_fp32 = model._get_dtype_plan(dtype) if dtype != torch.float32 and hasattr(model, "_get_dtype_plan") else {}
    fp32_patterns = [re.compile(pattern) for pattern in kept_in_fp32]
    for done, (key, filling) in enumerate(fillings.items()):
        path, _, own_name = key.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, Linear4bit) and own_name == "weight":
            if module.weight.is_meta:
                packed, statistics = _read_quantized(filling, module, device, dtype)
                module.set_packed(packed, statistics, dtype)
        else:
            target = getattr(module, own_name)
            kept_dtype = torch.float32 if any(p.search(key) for p in fp32_patterns) else target.dtype
            value = _read_converted(filling, key, model) if filling.converter else filling.entries[-1].read_whole()
            _check_shape(filling.entries[-1], key, tuple(value.shape), tuple(target.shape))
            value = value.to(device=device, dtype=kept_dtype)
            if isinstance(target, nn.Parameter):
                setattr(module, own_name, nn.Parameter(value, requires_grad=False))
            else:
                setattr(module, own_name, value)
        if progress is not None:
            progress(done + 1, len(fillings))


def _read_quantized(filling: Filling, layer: Linear4bit, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Read one weight piece by piece and quantize each piece as it comes."""
    entry, spec = filling.entries[-1], layer.spec
    shape = (layer.out_features, layer.in_features)
    if filling.converter is not None:
        raise BaseModelError(
            "this linear weight is made of several tensors, which cannot be quantized while they are read",
            place=f"{entry.file}: {entry.name}",
            next_step="add the layer's name to model.quantization.skip_modules",
        )
    if layer.transposed_in_files:
        _check_shape(entry, entry.name, entry.shape, shape[::-1])
        return nf4.quantize(entry.read_whole().to(device=device, dtype=dtype).T.contiguous(), spec)
    _check_shape(entry, entry.name, entry.shape, shape)
    packed = torch.empty((entry.num_elements + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(spec.num_blocks(entry.num_elements), dtype=torch.float32, device=device)
    for start in range(0, entry.num_elements, nf4.CHUNK_ELEMENTS):
        piece = entry.read(start, min(start + nf4.CHUNK_ELEMENTS, entry.num_elements)).to(device=device, dtype=dtype)
        piece_packed, piece_absmax = nf4.quantize_blocks(piece, spec)
        packed[start // 2 :][: piece_packed.numel()] = piece_packed
        absmax[start // spec.block_size :][: piece_absmax.numel()] = piece_absmax
    return packed.view(spec.storage).reshape(spec.packed_shape(entry.num_elements)), nf4.pack_statistics(absmax, spec)


def _read_converted(filling: Filling, key: str, model: Any) -> Tensor:
    """A parameter that transformers makes of several tensors of the files, such as fused experts."""
    made = filling.converter.convert(key, model=model, config=model.config)
    filling.converter = None
    value = made[key]
    return value[0] if isinstance(value, list) else value


def _check_shape(entry: TensorEntry, key: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise BaseModelError(
            f"{key} has another shape than config.json says", place=str(entry.file), found=found, wanted=wanted
        )


def _tie(model: Any, source: BaseSource) -> None:
    """Point tied parameters at the one that was read, and refuse to go on with parameters that nothing filled."""
    # Twice, because of three that are tied the one in the files may come last.
    for target, origin in [*model.all_tied_weights_keys.items()] * 2:
        here, there = (model.get_parameter_or_buffer(name) for name in (target, origin))
        if here.is_meta and not there.is_meta:
            _set_parameter(model, target, there)
        elif there.is_meta and not here.is_meta:
            _set_parameter(model, origin, here)
        elif here is not there and not here.is_meta:
            # As transformers does: files may hold both, and if these differ then nothing is tied.
            if torch.equal(here, there):
                _set_parameter(model, target, there)
            else:
                model.all_tied_weights_keys.pop(target, None)
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or []]
    lost = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    lost += [name for name in model.state_dict() if name not in lost and model.get_parameter_or_buffer(name).is_meta]
    made = {f"{path}.statistics" for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    lost = [name for name in lost if name not in made and not any(pattern.search(name) for pattern in ignored)]
    if lost:
        raise BaseModelError(
            f"{len(lost)} tensors of the model are in none of its files",
            place=str(source.folder),
            found=", ".join(lost[:5]),
            next_step="check that config.json and the weights belong together",
        )


def _set_parameter(model: Any, name: str, parameter: Tensor) -> None:
    path, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(path), own_name, parameter)


def _restore_computed_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no file holds (rotary frequencies and the like), as transformers does after loading."""
    owners = set()
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, own_name = name.rpartition(".")
        owner = model.get_submodule(path)
        owners.add(owner)
        owner.register_buffer(own_name, torch.empty_like(buffer, device=device), persistent=False)
    for tensor in (*model.parameters(), *(b for m in model.modules() if m not in owners for b in m.buffers(False))):
        setattr(tensor, "_is_hf_initialized", True)  # noqa: B010  transformers initializes only what does not carry this mark
    for module in model.modules():
        module._is_hf_initialized = module not in owners
    model.initialize_weights()


def _load_generation_config(model: Any, source: BaseSource) -> None:
    from transformers import GenerationConfig

    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
