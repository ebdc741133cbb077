"""`qlora merge`: base and adapter into one model folder, from files to files, one tensor at a time.

    dequantized   W' = dequantize(quantize(W)) + s B A: the function that was trained, also in layers without an adapter
    original      W' = W + s B A: the base as it was before it was quantized

Names, layout and sharing of the base's files are kept, so that whatever opened the base opens the result.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.adapter.files import TEMPLATE_NAME, AdapterFile, open_adapter
from qlora.adapter.keys import AdapterKey
from qlora.config.schema import QuantizationConfig
from qlora.distributed.sharding import Sharding
from qlora.errors import AdapterError
from qlora.ops import nf4
from qlora.quant.linear import Linear4bit
from qlora.quant.model_folder import copy_rest, new_folder
from qlora.quant.shards import TensorEntry
from qlora.quant.skeleton import Prequantized, Skeleton, read_skeleton
from qlora.quant.source import BaseSource, fingerprints_of, resolve_base
from qlora.quant.write import Planned, write_model


def run_merge(
    adapter: Path, out: Path, *, onto: str = "dequantized", dtype: str | None = None, base: str | None = None
) -> Path:
    """Write the merged model. Rank-local, on the CPU. Returns the folder; nothing is left where it fails.

    Args:
        onto: "dequantized" or "original".
        dtype: of the result; None is what the adapter was trained in.
        base: in place of the recorded one.

    Raises:
        AdapterError: no base is recorded, another base, `original` of a base that came quantized, or shapes that differ.
    """
    found = open_adapter(adapter)
    name = base or found.config.base
    if name is None:
        raise AdapterError("the adapter does not say which base it is for", place=str(adapter), next_step="give --base")
    source = resolve_base(name, None if base else found.config.revision)
    _check_base(found, source)
    stated = found.described.get("quantization", QuantizationConfig().model_dump())
    quantization = None if stated is None else QuantizationConfig.model_validate(stated)
    trained_dtype = getattr(torch, found.described.get("dtype", "bfloat16"))
    skeleton = read_skeleton(source, trained_dtype, quantization)
    if onto == "original" and skeleton.came_quantized:
        unquantized = f"{source.origin.name}, which it was prepared from," if source.origin else "the unquantized base"
        raise AdapterError(
            "the base came in 4 bits, so there are no original weights in its folder",
            place=str(source.folder),
            next_step=f"merge onto dequantized, or give {unquantized} with --base",
        )
    wanted = getattr(torch, dtype) if dtype else trained_dtype
    try:
        with new_folder(out) as folder:
            write_model(folder, _plan(skeleton, found, onto, wanted))
            copy_rest(source, folder, str(wanted).removeprefix("torch."))
            if (adapter / TEMPLATE_NAME).is_file():
                shutil.copyfile(adapter / TEMPLATE_NAME, folder / TEMPLATE_NAME)
    except OSError as error:
        raise AdapterError(f"the merged model cannot be written ({error.strerror})", place=str(out)) from error
    return out


def _check_base(found: AdapterFile, source: BaseSource) -> None:
    recorded = found.described.get("base") or {}
    theirs, ours = fingerprints_of(recorded), fingerprints_of(source.record())
    if theirs and ours and not theirs & ours:
        raise AdapterError(
            "the adapter was trained on another base",
            place=str(found.folder),
            found=f"{recorded['name']} ({str(recorded.get('fingerprint'))[:12]})",
            wanted=f"{source.name} ({str(source.fingerprint)[:12]})",
        )


def _plan(skeleton: Skeleton, found: AdapterFile, onto: str, dtype: torch.dtype) -> Iterator[Planned]:
    """Every tensor of the result under its name in the base's files."""
    scaling = found.config.scaling
    unused = set(found.targeted) | set(found.trained)
    own = {key: AdapterKey(*_split(key)) for key in skeleton.fillings}
    for key, filling in skeleton.fillings.items():
        path = own[key].path
        module = skeleton.model.get_submodule(path)
        is_weight = own[key].part == "weight"
        replaced = found.entries.get(own[key])
        low_rank = is_weight and AdapterKey(path, "lora_A") in found.entries
        if (low_rank or replaced is not None) and filling.converter is not None:
            raise AdapterError(f"{path} is made of several tensors of the base's files and cannot be merged into")
        for entry in filling.entries:
            if low_rank or replaced is not None:
                unused.discard(path)
            low_rank_path = path if low_rank else None
            make = _maker(module if is_weight else None, entry, filling.came, replaced, found, low_rank_path, scaling, onto)
            shape = entry.shape
            if filling.came is not None:
                shape = filling.came.state.shape[:: -1 if module.transposed_in_files else 1]
            target = dtype if filling.came is not None or entry.dtype.is_floating_point else entry.dtype
            yield Planned(entry.name, shape, target, _cast(make, target))
    unused -= _stored_with_their_twin(skeleton, found, unused)
    if unused:
        raise AdapterError(
            f"{len(unused)} layers of the adapter are not in the base's files (a tied head has no weight of its own)",
            place=str(found.folder),
            found=", ".join(sorted(unused)[:5]),
        )


def _stored_with_their_twin(skeleton: Skeleton, found: AdapterFile, unused: set[str]) -> set[str]:
    """Paths of tied parameters, trained as wholes, whose value was written under the other's name."""
    stored = set()
    for pair in skeleton.model.all_tied_weights_keys.items():
        keys = [AdapterKey(*_split(name)) for name in pair]
        here = [key for key in keys if key.path not in unused]
        values = [found.entries[key].read_whole() for key in keys if key in found.entries]
        if len(here) == 1 and len(values) == 2 and torch.equal(*values):
            stored |= {key.path for key in keys}
    return stored


def _split(key: str) -> tuple[str, str]:
    path, _, part = key.rpartition(".")
    return path, part


def _cast(make: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: make().to(dtype)


def _maker(
    module: Any,
    entry: TensorEntry,
    came: Prequantized | None,
    replaced: TensorEntry | None,
    found: AdapterFile,
    low_rank_path: str | None,
    scaling: float,
    onto: str,
) -> Callable[[], Tensor]:
    """How one tensor of the result is made."""

    def make() -> Tensor:
        if replaced is not None:
            return replaced.read_whole()
        quantized = isinstance(module, Linear4bit)
        transposed = quantized and module.transposed_in_files
        if came is not None:
            packed, statistics = came.read(Sharding(), torch.device("cpu"))
            weight = nf4.dequantize(packed, statistics, came.state.spec, came.state.shape, torch.float32)
        else:
            weight = entry.read_whole()
            weight = weight.T.contiguous() if transposed else weight
            if quantized and onto == "dequantized":
                packed, statistics = nf4.quantize(weight.to(module.compute_dtype), module.spec)
                weight = nf4.dequantize(packed, statistics, module.spec, tuple(weight.shape), module.compute_dtype)
        if low_rank_path is not None:
            A, B = (found.entries[AdapterKey(low_rank_path, part)].read_whole().float() for part in ("lora_A", "lora_B"))
            if (B.shape[0], A.shape[1]) != tuple(weight.shape):
                raise AdapterError(
                    f"{low_rank_path} has another shape", found=(B.shape[0], A.shape[1]), wanted=tuple(weight.shape)
                )
            weight = weight.float() + (B @ A) * scaling
        return weight.T.contiguous() if transposed else weight

    return make
