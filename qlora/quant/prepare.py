"""`qlora prepare`: a base quantized once, from files to files, one tensor at a time.

What is written is what loading with the same quantization would hold: every quantized weight as bitsandbytes stores it, the
rest in the dtype it would be loaded in, all under the names of the base's own files. transformers opens the folder as it
opens one that it has saved itself, and of what is quantized a rank reads its share of a quarter of the bytes, or of a half.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config.schema import ModelConfig, QuantizationConfig
from qlora.distributed.sharding import Sharding
from qlora.errors import BaseModelError
from qlora.files import write_file
from qlora.model_files import find_weight_files
from qlora.ops import int8, nf4, nf4_format
from qlora.quant import shards
from qlora.quant.fill import quantize_rows_run, quantize_run, quantize_transpose
from qlora.quant.linear import Linear4bit, QuantizedLinear
from qlora.quant.model_folder import copy_rest, new_folder
from qlora.quant.shards import TensorEntry
from qlora.quant.skeleton import Skeleton, read_skeleton
from qlora.quant.source import ORIGIN_NAME, BaseSource, Origin, resolve_base
from qlora.quant.write import Planned, write_model
from qlora.version import __version__

# The text of a weight's state holds a number whose digits are not known before the weight is quantized.
_LONGEST_NUMBER = 24


def run_prepare(
    base: str,
    out: Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantization: QuantizationConfig | None = None,
) -> Path:
    """Write a base in 4 or 8 bits. Rank-local, on the CPU. Returns the folder; nothing is left where it fails.

    Memory is that of two of the largest tensors that stay unquantized, or of a quarter of a larger one (8 bits: a half).

    Args:
        base: `builtin:tiny`, a Hugging Face folder, or a hub id; not quantized already.
        out: a folder that does not exist or is empty.
        dtype: of what stays unquantized, and what weights are rounded to before they are quantized; None is the default
            of `model.dtype`.
        quantization: None is the default of `model.quantization`.

    Raises:
        BaseModelError: the base cannot be read or is quantized already, there is nothing to quantize or no room to write,
            or transformers would take other layers for quantized.
    """
    quantization = quantization or QuantizationConfig()
    wanted = getattr(torch, dtype or ModelConfig().dtype)
    source = resolve_base(base, revision)
    skeleton = read_skeleton(source, wanted, quantization)
    _check_unquantized(source, skeleton)
    _check_skipped(skeleton, quantization)
    stated = quantization_config(skeleton, wanted)
    tensors = [*_plan(skeleton, wanted)]
    try:
        with new_folder(out) as folder:
            _check_disk(folder, tensors, out)
            write_model(folder, tensors)
            copy_rest(source, folder, _name(wanted), stated)
            write_file(folder / ORIGIN_NAME, _origin(source, folder, wanted, quantization))
    except OSError as error:
        raise BaseModelError(
            f"the prepared base cannot be written ({error.strerror})",
            place=str(out),
            next_step="make room, or choose a folder elsewhere",
        ) from error
    return out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_unquantized(source: BaseSource, skeleton: Skeleton) -> None:
    if skeleton.came_quantized:
        origin = source.origin
        raise BaseModelError(
            f"the base is in {skeleton.quantization.bits if skeleton.quantization else 4} bits already"
            + (f", prepared from {origin.name}" if origin else ""),
            place=str(source.folder),
            wanted="an unquantized base",
            next_step=f"train on it as it is, or prepare {origin.name if origin else 'the unquantized base'}",
        )


def _check_skipped(skeleton: Skeleton, quantization: QuantizationConfig) -> None:
    unused = [name for name in quantization.skip_modules if f"skip_modules: {name}" not in skeleton.unquantized.values()]
    if unused:
        raise BaseModelError(
            "no linear layer that would be quantized has this name",
            place="--skip-module",
            found=", ".join(unused),
            wanted="a path, or the end of one",
        )


def quantization_config(skeleton: Skeleton, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers is told of it, in its own words.

    Raises:
        BaseModelError: no layer is quantized, or transformers' way of naming layers cannot tell those that are.
    """
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = skeleton.model
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    kept = [path for path, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, Conv1D)]
    if not layers:
        raise BaseModelError(
            "there is nothing to quantize",
            place="model.base",
            found=f"{len(kept)} linear layers, all of them left as they are",
        )
    # transformers reads a name as a pattern, and the end of a path as the whole; some it never quantizes.
    patterns = [*kept, *(model._keep_in_fp32_modules or ())]
    wrong = [path for path in layers if not should_convert_module(path, patterns)]
    if wrong:
        raise BaseModelError(
            "transformers would take these layers for unquantized",
            place="model.quantization.skip_modules",
            found=", ".join(wrong[:5]),
            next_step="skip them with --skip-module, or skip less",
        )
    first = next(iter(layers.values()))
    if not isinstance(first, Linear4bit):
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept).to_dict()
    spec = first.spec
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quant_type,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=spec.storage,
        llm_int8_skip_modules=kept,
    ).to_dict()


def _plan(skeleton: Skeleton, dtype: torch.dtype) -> Iterator[Planned]:
    """Every tensor of the result. Each begins at a multiple of its dtype's size, which some readers need."""
    model = skeleton.model
    dtypes = skeleton.dtypes(dtype)
    first: list[Planned] = []
    rest: list[Planned] = []
    for key, filling in skeleton.fillings.items():
        path, _, own_name = key.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QuantizedLinear) and own_name == "weight":
            entry = filling.entries[-1]
            own_parts = plan_quantized(module, entry.name, dtype, partial(_quantize, module, entry, dtype))
            (first if keeps_alignment(own_parts) else rest).extend(own_parts)
            continue
        for entry in filling.entries if filling.converter is not None else filling.entries[-1:]:
            own = dtypes[key] if entry.dtype.is_floating_point else entry.dtype
            rest.append(Planned(entry.name, entry.shape, own, _reader(entry, own)))
    yield from [*first, *sorted(rest, key=lambda planned: -planned.dtype.itemsize)]


def _reader(entry: TensorEntry, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: entry.read_whole().to(dtype)


def keeps_alignment(parts: list[Planned]) -> bool:
    """Whether what follows these tensors begins at a multiple of 8 bytes if they do."""
    return sum(planned.num_bytes for planned in parts) % 8 == 0


def plan_quantized(
    layer: QuantizedLinear, name: str, dtype: torch.dtype, quantize: Callable[[], tuple[Tensor, Tensor]]
) -> list[Planned]:
    """One weight as bitsandbytes stores it, to be written in this order, or among others by the size of dtypes.

    Args:
        quantize: gives packed bytes and statistics when the weight's turn comes.
    """
    if isinstance(layer, Linear4bit):
        return _plan_4bit(layer, name, dtype, quantize)
    return _plan_8bit(layer, name, quantize)


def _plan_8bit(layer: QuantizedLinear, name: str, quantize: Callable[[], tuple[Tensor, Tensor]]) -> list[Planned]:
    """Scales, and rows of int8. The format, a single byte, is left out: where it is missing, it is rows."""
    shape = (layer.out_features, layer.in_features)
    scales_name = f"{name.removesuffix('weight')}{int8.SCALES}"
    made: dict[str, Tensor] = {}

    def make(part: str) -> Tensor:
        if part not in made:
            packed, statistics = quantize()
            made.update({scales_name: int8.unpack_absmax(statistics), name: packed})
        value = made.pop(part)
        if not together:
            made.clear()  # the other one's turn comes after many others
        return value

    parts = [
        Planned(scales_name, shape[:1], torch.float32, partial(make, scales_name)),
        Planned(name, shape, torch.int8, partial(make, name)),
    ]
    together = keeps_alignment(parts)
    return parts


def _plan_4bit(
    layer: Linear4bit, name: str, dtype: torch.dtype, quantize: Callable[[], tuple[Tensor, Tensor]]
) -> list[Planned]:
    """Packed bytes, scales, tables and state; together a multiple of 8 bytes."""
    shape, spec = (layer.out_features, layer.in_features), layer.spec
    made: dict[str, Tensor] = {}

    def render(packed: Tensor, statistics: Tensor) -> dict[str, Tensor]:
        parts = {"": packed, **nf4_format.to_bitsandbytes(statistics, spec, shape, dtype)}
        return dict(sorted(parts.items(), key=lambda part: -part[1].dtype.itemsize))

    def make(suffix: str, num_elements: int) -> Tensor:
        if not made:
            made.update(render(*quantize()))
        part = made.pop(suffix)
        # Blanks at the end of a JSON text say nothing.
        blanks = torch.full((num_elements - part.numel(),), ord(" "), dtype=part.dtype)
        return torch.cat([part, blanks]) if len(blanks) else part

    num_elements = layer.out_features * layer.in_features
    blank = render(
        torch.empty(spec.packed_shape(num_elements), dtype=spec.storage, device="meta"),
        torch.zeros(spec.statistics_bytes(num_elements), dtype=torch.uint8),
    )
    num_bytes = sum(part.numel() * part.element_size() for part in blank.values())
    parts = []
    for suffix, part in blank.items():
        size = tuple(part.shape)
        if suffix.startswith(".quant_state."):
            size = (part.numel() + _LONGEST_NUMBER + -(num_bytes + _LONGEST_NUMBER) % 8,)
        parts.append(Planned(name + suffix, size, part.dtype, partial(make, suffix, size[0])))
    return parts


def _quantize(layer: QuantizedLinear, entry: TensorEntry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed weight and statistics, the same bytes as `load_model` holds."""
    alone, cpu = Sharding(), torch.device("cpu")
    if layer.transposed_in_files:
        return quantize_transpose(layer, entry, cpu, dtype)
    if not isinstance(layer, Linear4bit):
        packed, absmax = quantize_rows_run(entry, alone, cpu, dtype)
        return packed, int8.pack_statistics(absmax)
    packed, scales = quantize_run(entry, layer.spec, alone, cpu, dtype)
    return packed, nf4.pack_statistics(scales, layer.spec)


def _check_disk(folder: Path, tensors: list[Planned], out: Path) -> None:
    """Say before the work what would be said after hours of it."""
    wanted, free = sum(planned.num_bytes for planned in tensors), shutil.disk_usage(folder).free
    if wanted > free:
        gib = 1 << 30
        raise BaseModelError(
            "the prepared base does not fit onto the disk",
            place=str(out),
            found=f"{free / gib:.1f} GiB free",
            wanted=f"{wanted / gib:.1f} GiB",
            next_step="make room, or choose a folder elsewhere",
        )


def _origin(source: BaseSource, folder: Path, dtype: torch.dtype, quantization: QuantizationConfig) -> bytes:
    """The content of the record of where the folder comes from."""
    origin = Origin(
        name=source.name,
        revision=source.revision,
        fingerprint=str(source.fingerprint),
        dtype=_name(dtype),
        quantization=quantization,
        prepared=shards.fingerprint(folder, find_weight_files(folder)),
        qlora=__version__,
    )
    return (origin.model_dump_json(indent=2) + "\n").encode()
