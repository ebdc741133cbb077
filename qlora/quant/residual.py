"""A base of which the principal part of some weights is taken out before they are quantized.

PiSSA (Meng et al. 2024), OLoRA (Buyukakyuz 2024) and LoftQ (Li et al. 2023) start training from factors of the weight
itself, and freeze what is left of it, W - s B' A'. This needs the original weight, so it is done while a base is loaded:

    1. each targeted weight is read whole by one rank, which finds its factors and tells them to the others;
    2. every rank reads its own run of every weight, as always, and what it reads is W - s B' A'.

The second step is computed element by element, in an order that does not depend on where a run is cut, by operations that
round once each: the same factors give the same bits on any number of ranks and on any device. So a base that was changed
is rebuilt from its files and the factors, and neither is it stored, nor are the factors found a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from qlora.distributed.sharding import Sharding
from qlora.errors import BaseModelError, ConfigError
from qlora.quant.linear import QuantizedLinear
from qlora.quant.shards import TensorEntry
from qlora.quant.skeleton import Skeleton

Pair = tuple[Tensor, Tensor]
# What is taken out of a weight: the factors that training starts from, other ones, or nothing.
Subtracts = Literal["start", "other", "nothing"]


@dataclass(frozen=True)
class Factors:
    """What is taken out of one weight (out, in), and what its update starts from. All fp32, on the CPU.

    Attributes:
        start: A (r, in) and B (out, r) that training starts from.
        subtracted: A' (r, in) and B' (out, r); None where the weight stays as it is.
        scaling: s of W - s B' A'.
    """

    start: Pair
    subtracted: Pair | None
    scaling: float


@dataclass(frozen=True)
class InitialFactors:
    """How the update of a model starts, kept on the model as `qlora_initial`.

    Attributes:
        method: as `lora.init_lora_weights` names it.
        seed: of what is drawn at random.
        factors: by path of the layer.
        errors: path -> |W - Q| / |W|, and |W - (Q + s B A)| / |W| with this start, Q being what is kept of the weight.
    """

    method: str
    seed: int
    factors: dict[str, Factors]
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def changes_base(self) -> bool:
        """Whether the base is another one than its files hold: no adapter but this one's fits it."""
        return any(own.subtracted is not None for own in self.factors.values())


class Method(Protocol):
    """Finds factors. `qlora.lora.from_weights.FromWeights` is one."""

    name: str
    seed: int
    subtracts: Subtracts

    def targets(self, model: Any, tied: set[str]) -> dict[str, tuple[int, float]]:
        """Rank and scaling by path of the layers that factors are wanted for. Rank-local. Raises ConfigError.

        Args:
            model: without storage, quantized layers in their places.
            tied: the names of parameters that are tied to another.
        """

    def factors(self, path: str, weight: Tensor, r: int, scaling: float, held: Callable[[Tensor], Tensor]) -> Factors:
        """Factors of a weight (out, in), fp32. Rank-local.

        Args:
            held: a weight (out, in) to the fp32 weight that the layer computes with once it holds it.
        """


def change_base(
    skeleton: Skeleton, how: Method | InitialFactors, sharding: Sharding, device: torch.device, dtype: torch.dtype
) -> InitialFactors:
    """Make the base's weights come as W - s B' A' when they are read, and return what that is. Collective.

    Args:
        how: a method by which factors are found, or factors that were found before.

    Raises:
        ConfigError, BaseModelError: the base came quantized, a targeted layer is of another kind or tied, its weight is
            made of several tensors, or the factors do not fit it. The same on every rank, before a weight is read.
    """
    if isinstance(how, InitialFactors):
        changed = {path: own for path, own in how.factors.items() if own.subtracted is not None}
        sharding.together(lambda: [_entry(skeleton, path, own.start) for path, own in changed.items()])
        initial = how
    else:
        initial = _find(skeleton, how, sharding, device, dtype)
    for path, own in initial.factors.items():
        if own.subtracted is None:
            continue
        filling = skeleton.fillings[f"{path}.weight"]
        entry = filling.entries[-1]
        left, right = _as_stored(own, _is_transposed(skeleton.model.get_submodule(path)))
        filling.entries[-1] = ResidualEntry(
            entry.name, entry.file, entry.dtype, entry.shape, entry.offset, entry, left, right, device
        )
    return initial


@dataclass(frozen=True)
class ResidualEntry(TensorEntry):
    """A tensor of the files of which a product of two factors is taken away while it is read.

    Attributes:
        entry: the tensor as it lies in the files.
        left, right: fp32 (rows, r) and (r, columns).
        device: where it is computed.
    """

    entry: TensorEntry
    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    device: torch.device

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened difference, flat, fp32, on the device. Raises BaseModelError."""
        stop = self.num_elements if stop is None else stop
        flat = self.entry.read(start, stop).to(device=self.device, dtype=torch.float32)
        subtract_product(flat, start, self.left.to(self.device), self.right.to(self.device))
        return flat


def subtract_product(flat: Tensor, start: int, left: Tensor, right: Tensor) -> None:
    """Take the product of left (rows, r) and right (r, columns) from a run of a flattened weight, in place. Rank-local.

    An element's value depends on nothing but its own operands: r times a product that is rounded, and a difference that is
    rounded. One fused operation would round once on one device, and twice on another or at the end of a run.

    Args:
        flat: fp32, the elements from `start` on.
    """
    columns = right.shape[1]
    first, stop = start, start + flat.numel()
    while first < stop:
        row, column = divmod(first, columns)
        if column or stop - first < columns:
            num_rows, width = 1, min(columns - column, stop - first)
        else:
            num_rows, width = (stop - first) // columns, columns
        block = flat[first - start : first - start + num_rows * width].view(num_rows, width)
        product = torch.empty_like(block)
        for k in range(right.shape[0]):
            torch.mul(left[row : row + num_rows, k : k + 1], right[k, column : column + width], out=product)
            block -= product
        first += num_rows * width


def _as_stored(factors: Factors, transposed: bool) -> Pair:
    """What is taken from the tensor as it lies in the files: (out, r) and (r, in), or of its transpose."""
    assert factors.subtracted is not None
    A, B = factors.subtracted
    left, right = B * factors.scaling, A
    return (right.T.contiguous(), left.T.contiguous()) if transposed else (left.contiguous(), right.contiguous())


def _entry(skeleton: Skeleton, path: str, fits: Pair | None = None) -> TensorEntry:
    """The one tensor of the files that a layer's weight is. Raises BaseModelError."""
    filling = skeleton.fillings.get(f"{path}.weight")
    if filling is None:
        raise BaseModelError("no weight of its own is in the base's files", place=path)
    if filling.came is not None:
        raise BaseModelError(
            "the base came quantized: nothing can be taken out of a weight that is rounded already",
            place=path,
            next_step="give the unquantized base, which is quantized while it is read, or another lora.init_lora_weights",
        )
    if filling.converter is not None:
        raise BaseModelError("the weight is made of several tensors of the files, and is not read as one", place=path)
    entry = filling.entries[-1]
    transposed = _is_transposed(skeleton.model.get_submodule(path))
    if fits is not None and (shape := (fits[1].shape[0], fits[0].shape[1])) != entry.shape[:: -1 if transposed else 1]:
        raise BaseModelError("the factors are of another shape than the weight", place=path, found=shape, wanted=entry.shape)
    return entry


def _is_transposed(module: Any) -> bool:
    """Whether the files hold a layer's weight as (in, out): transformers' Conv1D."""
    return module.transposed_in_files if isinstance(module, QuantizedLinear) else type(module).__name__ == "Conv1D"


def _find(
    skeleton: Skeleton, method: Method, sharding: Sharding, device: torch.device, dtype: torch.dtype
) -> InitialFactors:
    """Find all factors, as many weights at a time as there are ranks, and tell them to all. Collective."""

    def check() -> dict[str, tuple[int, float]]:
        if skeleton.came_quantized:
            raise ConfigError(
                "the base came quantized, and this start needs the original weights",
                place="lora.init_lora_weights",
                found=method.name,
                next_step="give the unquantized base, which is quantized while it is read",
            )
        pairs = skeleton.model.all_tied_weights_keys.items()
        targets = method.targets(skeleton.model, {name for pair in pairs for name in pair})
        for path in targets:
            _entry(skeleton, path)
        return targets

    targets = sharding.together(check)
    entries = {path: _entry(skeleton, path) for path in targets}
    # The largest first, so that ranks which work at the same time have like work.
    order = sorted(targets, key=lambda path: (-entries[path].num_elements, path))
    num_pairs = 2 if method.subtracts == "other" else 1
    found: dict[str, Factors] = {}
    errors: dict[str, tuple[float, float]] = {}

    def work(path: str | None) -> Tensor | None:
        if path is None:
            return None
        r, scaling = targets[path]
        module = skeleton.model.get_submodule(path)
        weight = entries[path].read_whole().to(device=device, dtype=torch.float32)
        weight = weight.T.contiguous() if _is_transposed(module) else weight
        held = partial(_held, module, dtype=dtype)
        own = method.factors(path, weight, r, scaling, held)
        before, after = _errors(weight, own, held)
        pairs = [own.start] if num_pairs == 1 else [own.start, own.subtracted or own.start]
        numbers = torch.tensor([before, after], device=device)
        return torch.cat([numbers, *(part.to(device).reshape(-1) for pair in pairs for part in pair)])

    for first in range(0, len(order), sharding.num_workers):
        group = order[first : first + sharding.num_workers]
        own = group[sharding.worker] if sharding.worker < len(group) else None
        mine = sharding.together(partial(work, own))
        for worker, path in enumerate(group):
            (r, scaling), shape = targets[path], entries[path].shape
            num_outputs, num_inputs = shape[:: -1 if _is_transposed(skeleton.model.get_submodule(path)) else 1]
            size = 2 + num_pairs * r * (num_inputs + num_outputs)
            told = mine if path == own and mine is not None else torch.empty(size, device=device)
            told = sharding.broadcast(told, worker).cpu()
            errors[path] = (float(told[0]), float(told[1]))
            pairs = [_pair(part, r, num_inputs, num_outputs) for part in told[2:].chunk(num_pairs)]
            found[path] = Factors(pairs[0], None if method.subtracts == "nothing" else pairs[-1], scaling)
    by_path = sorted(found)
    return InitialFactors(
        method.name, method.seed, {path: found[path] for path in by_path}, {path: errors[path] for path in by_path}
    )


def _pair(flat: Tensor, r: int, num_inputs: int, num_outputs: int) -> Pair:
    A, B = flat.split([r * num_inputs, r * num_outputs])
    return A.reshape(r, num_inputs).clone(), B.reshape(num_outputs, r).clone()


def _held(module: Any, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The fp32 weight that a layer computes with once it holds this one (out, in)."""
    if isinstance(module, QuantizedLinear):
        return module.unpack(*module.quantize(weight.to(dtype)), torch.float32)
    return weight.to(dtype).float()


def _errors(weight: Tensor, own: Factors, held: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """|W - Q| / |W| of the plain base, and |W - (Q + s B A)| / |W| of this one at its start."""
    norm = float(torch.linalg.vector_norm(weight)) or math.inf
    before = float(torch.linalg.vector_norm(weight - held(weight))) / norm
    residual = weight.clone()
    if own.subtracted is not None:
        A, B = (part.to(weight.device) for part in own.subtracted)
        subtract_product(residual.view(-1), 0, B * own.scaling, A)
    A, B = (part.to(weight.device) for part in own.start)
    after = torch.linalg.vector_norm(weight - held(residual) - own.scaling * (B @ A))
    return before, float(after) / norm
