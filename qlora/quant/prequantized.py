"""A base that comes in 4 or 8 bits, from bitsandbytes or `qlora prepare`: how it was quantized, where its weights lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora.config.schema import QuantizationConfig
from qlora.distributed.sharding import Sharding
from qlora.errors import BaseModelError
from qlora.model_files import read_config
from qlora.ops import int8, nf4_format
from qlora.ops.nf4 import QuantSpec
from qlora.quant.shards import TensorEntry
from qlora.quant.source import ORIGIN_NAME, BaseSource


@dataclass(frozen=True)
class Prequantized:
    """Where the bytes and the scales of a weight that came quantized lie.

    Attributes:
        shape: of the weight, (out, in).
        spec: how it is kept in 4 bits; None in 8 bits.
    """

    packed: TensorEntry
    statistics: tuple[Tensor | TensorEntry, ...]
    shape: tuple[int, ...]
    spec: QuantSpec | None

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


def stated_quantization(source: BaseSource) -> QuantizationConfig | None:
    """How a base that comes quantized was quantized, or None. Refuses methods other than bitsandbytes' 4 and 8 bits."""
    stated = read_config(source.folder).get("quantization_config")
    if stated is None:
        return None
    method = stated.get("quant_method")
    in_8_bits = bool(stated.get("load_in_8bit")) and not stated.get("llm_int8_has_fp16_weight")
    if method != "bitsandbytes" or not (stated.get("load_in_4bit") or in_8_bits):
        raise BaseModelError(
            "the base comes quantized in a way that is not supported",
            place=str(source.folder / "config.json"),
            found=method if method != "bitsandbytes" else "bitsandbytes, its weights in 16 bits (llm_int8_has_fp16_weight)",
            wanted="an unquantized base, or bitsandbytes in 4 or 8 bits",
            next_step="use the original, unquantized model: it is quantized while it is read",
        )
    if in_8_bits:
        return QuantizationConfig(bits=8)
    return QuantizationConfig(
        quant_type=stated.get("bnb_4bit_quant_type", "fp4"), double_quant=bool(stated.get("bnb_4bit_use_double_quant"))
    )


def as_stored(found: QuantizationConfig, source: BaseSource, weights: Sequence[Prequantized]) -> QuantizationConfig:
    """What config.json does not say: the block size, and of a prepared base everything that was asked for.

    Raises:
        BaseModelError: none of the weights is quantized, or the record of a prepared base says something else than they.
    """
    if not weights:
        raise BaseModelError(
            "config.json says that the base is quantized, and none of its weights is",
            place=str(source.folder),
            found=f"no weight in {found.bits} bits",
            next_step="remove quantization_config from config.json: the base is quantized while it is read",
        )
    spec = weights[0].spec
    stored: dict[str, Any] = {"bits": 4 if spec is not None else 8}
    if spec is not None:
        stored |= {"quant_type": spec.quant_type, "block_size": spec.block_size, "double_quant": spec.double_quant}
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


def entries_beside(entries: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """What lies beside each weight: name of the weight -> suffix to it, or 8 bits' own name -> entry."""
    beside: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        path, found, suffix = name.rpartition(".weight.")
        if found:
            beside.setdefault(f"{path}.weight", {})[f".{suffix}"] = entry
        path, _, own_name = name.rpartition(".")
        if own_name in (int8.SCALES, int8.FORMAT):
            beside.setdefault(f"{path}.weight", {})[own_name] = entry
    return beside


def find_prequantized(packed: TensorEntry, beside: Mapping[str, TensorEntry]) -> Prequantized | None:
    """The weight that an entry and what lies beside it are; None where it is not quantized. Reads tables and state.

    Raises:
        BaseModelError: see `nf4_format.read_state`, `int8.check_stored`.
    """
    place = f"{packed.file}: {packed.name}"
    if not any(suffix.startswith(".quant_state.") for suffix in beside):
        if packed.dtype != torch.int8 and int8.SCALES not in beside:
            return None
        int8.check_stored(packed, beside, lambda name: beside[name].read_whole(), place)
        return Prequantized(packed, (beside[int8.SCALES],), packed.shape, None)
    state = nf4_format.read_state(packed, beside, lambda suffix: beside[suffix].read_whole(), place)
    return Prequantized(packed, tuple(nf4_format.statistics_parts(state, beside)), state.shape, state.spec)
