"""A 4-bit weight as bitsandbytes stores it, in files and in its own layer: written from ours, read and checked.

Beside a packed weight lie entries under the weight's key and a suffix: the scales (`.absmax`), with double quantization
their own (`.nested_absmax`), the tables, and a JSON text of everything else, as bytes. All but the tables and the text is
what the statistics of `qlora.ops.nf4` hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.ops.nf4 import NESTED_BLOCK_SIZE, QuantSpec, dynamic_code, four_bit_code, split_statistics, unpack_absmax

E = TypeVar("E")


class Stored(Protocol):
    """A tensor, or where one lies in a file."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class StoredState:
    """What bitsandbytes wrote of one weight besides its bytes and scales.

    Attributes:
        shape: of the weight.
        mean: that was taken off the scales before they were quantized; 0 without double quantization.
    """

    spec: QuantSpec
    shape: tuple[int, ...]
    mean: float


def to_bitsandbytes(statistics: Tensor, spec: QuantSpec, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The entries bitsandbytes writes beside a packed weight, by suffix of the weight's key.

    Args:
        shape, dtype: of the weight before it was quantized.
    """
    num_elements = math.prod(shape)
    state: dict[str, object] = {
        "quant_type": spec.quant_type,
        "blocksize": spec.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    code = four_bit_code(spec.quant_type, statistics.device)
    if spec.double_quant:
        mean, nested, absmax = split_statistics(statistics, spec, num_elements)
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": mean.item()}
        tensors = {
            ".absmax": absmax,
            ".quant_map": code,
            ".nested_absmax": nested,
            ".nested_quant_map": dynamic_code(statistics.device).clone(),
        }
    else:
        tensors = {".absmax": unpack_absmax(statistics, spec, num_elements), ".quant_map": code}
    text = json.dumps(state).encode()
    tensors[f".quant_state.bitsandbytes__{spec.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def from_bitsandbytes(
    packed: Tensor, entries: Mapping[str, Tensor], place: str
) -> tuple[Tensor, Tensor, QuantSpec, tuple[int, ...]]:
    """Read what bitsandbytes wrote beside a packed weight (suffix of the weight's key -> tensor).

    Returns:
        packed, statistics, spec, shape of the weight.

    Raises:
        BaseModelError: see `read_state`.
    """
    state = read_state(packed, entries, entries.__getitem__, place)
    parts = [part.to(packed.device).reshape(-1).view(torch.uint8) for part in statistics_parts(state, entries)]
    return packed, torch.cat(parts) if len(parts) > 1 else parts[0], state.spec, state.shape


def statistics_parts(state: StoredState, entries: Mapping[str, E]) -> list[Tensor | E]:
    """What the statistics tensor is made of, in its order: all but the mean as they were stored."""
    if not state.spec.double_quant:
        return [entries[".absmax"]]
    mean = torch.tensor([state.mean], dtype=torch.float32)
    return [mean, entries[".nested_absmax"], entries[".absmax"]]


def read_state(packed: Stored, entries: Mapping[str, Stored], read: Callable[[str], Tensor], place: str) -> StoredState:
    """Read the state that bitsandbytes wrote beside a packed weight, and make sure that everything fits it.

    Args:
        entries: by suffix of the weight's key.
        read: the tensor behind a suffix; asked for the small ones alone.

    Raises:
        BaseModelError: an entry is missing or damaged, or a table is not the one of the format.
    """
    key = next((name for name in entries if name.startswith(".quant_state.bitsandbytes__")), None)
    if key is None or ".absmax" not in entries:
        raise BaseModelError("the 4-bit weight has no quantization state", place=place, found=sorted(entries))
    try:
        return _check_state(packed, entries, read, json.loads(bytes(read(key).tolist())), place)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BaseModelError(f"damaged quantization state: {type(error).__name__}: {error}", place=place) from error


def _check_state(
    packed: Stored, entries: Mapping[str, Stored], read: Callable[[str], Tensor], state: Mapping[str, Any], place: str
) -> StoredState:
    spec = QuantSpec(state["quant_type"], int(state["blocksize"]), ".nested_absmax" in entries, packed.dtype)
    shape = tuple(int(size) for size in state["shape"])
    num_elements = math.prod(shape)
    if spec.quant_type not in ("nf4", "fp4") or spec.block_size < 1 or min(shape, default=0) < 1:
        raise BaseModelError("unknown kind of 4-bit weight", place=place, found=dict(state), wanted="nf4 or fp4")
    num_bytes = math.prod(packed.shape) * packed.dtype.itemsize
    if num_bytes != (num_elements + 1) // 2:
        raise BaseModelError(
            "the packed weight does not fit its shape",
            place=place,
            found=f"{num_bytes} bytes",
            wanted=f"{(num_elements + 1) // 2} bytes for {shape}",
        )
    tables = [(".quant_map", four_bit_code(spec.quant_type, torch.device("cpu")))]
    parts = [(".absmax", spec.num_blocks(num_elements), torch.uint8 if spec.double_quant else torch.float32)]
    if spec.double_quant:
        tables.append((".nested_quant_map", dynamic_code(torch.device("cpu"))))
        parts.append((".nested_absmax", -(-parts[0][1] // NESTED_BLOCK_SIZE), torch.float32))
        if state["nested_blocksize"] != NESTED_BLOCK_SIZE:
            raise BaseModelError("unknown nested block size", place=place, found=state["nested_blocksize"], wanted=256)
    for suffix, table in tables:
        found = read(suffix).to(table) if suffix in entries and math.prod(entries[suffix].shape) == len(table) else None
        if suffix in entries and (found is None or not torch.allclose(found.reshape(-1), table, atol=1e-6)):
            raise BaseModelError(f"the table {suffix[1:]} is not the one of {spec.quant_type}", place=place)
    for suffix, size, dtype in parts:
        stored = entries[suffix]
        if math.prod(stored.shape) != size or stored.dtype != dtype:
            raise BaseModelError(
                "the 4-bit weight's scales do not fit its shape",
                place=place,
                found=f"{suffix[1:]}: {math.prod(stored.shape)} x {stored.dtype}",
                wanted=f"{size} x {dtype} for {shape}",
            )
    return StoredState(spec, shape, float(state["nested_offset"]) if spec.double_quant else 0.0)


def from_linear4bit(linear: Any, place: str) -> tuple[Tensor, Tensor, QuantSpec, tuple[int, ...]]:
    """Take the weight out of a bitsandbytes Linear4bit: packed, statistics, spec, shape. Copies nothing but scales.

    Raises:
        BaseModelError: not quantized yet, or an evaluation on this CPU has repacked the weight in place
            (bitsandbytes 0.50 does so in Linear4bit.forward where AVX512-BF16 is there).
    """
    check_linear4bit(linear, place)
    state = linear.weight.quant_state
    entries = {f".{name}": value for name, value in state.as_dict(packed=True).items() if isinstance(value, Tensor)}
    return from_bitsandbytes(linear.weight.data, entries, place)


def check_linear4bit(linear: torch.nn.Module, place: str) -> None:
    """Whether `from_linear4bit` can take a layer's weight; raises what it would raise, and copies nothing."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        raise BaseModelError("the 4-bit layer is not quantized yet", place=place, next_step="move the model to its device")
    if getattr(state, "packing_format_for_cpu", False):
        raise BaseModelError(
            "bitsandbytes has repacked this weight for inference, and no gradient passes through it any more",
            place=place,
            next_step="inject LoRA before the model is evaluated, or load the base with qlora.load_base",
        )
