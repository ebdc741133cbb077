"""What a merged model's files hold: every tensor of the base's files, some of them changed by the adapter.

    dequantized   W' = dequantize(quantize(W)) + s B A: the function that was trained, also in layers without an adapter
    original      W' = W + s B A: the base as it was before it was quantized
    quantized     W' = quantize(W + s B A), of a base that came quantized quantize(dequantize(W) + s B A)

Quantizing again starts from the original weight, because dequantize(quantize(W)) lies on the points that a weight is
rounded to: nearly all of an update that is smaller than half their distance would be rounded away. From W, which lies
anywhere between them, as many weights go over to the next point as the update says on average.

Nothing is read here but headers; everything that cannot be merged is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora.adapter.keys import BASE
from qlora.adapter.merge_changes import Change, changed, changes_of
from qlora.adapter.merge_weight import Rows, equal, of_file, of_tensor
from qlora.adapter.read import WEIGHTS_NAME, AdapterFile, refuse
from qlora.distributed.sharding import Sharding
from qlora.errors import AdapterError
from qlora.quant.fillings import Filling
from qlora.quant.linear import QuantizedLinear
from qlora.quant.prepare import keeps_alignment, plan_quantized
from qlora.quant.shards import TensorEntry
from qlora.quant.skeleton import Skeleton
from qlora.quant.write import Planned

DEQUANTIZED, ORIGINAL, QUANTIZED = "dequantized", "original", "quantized"
FORMS = (DEQUANTIZED, ORIGINAL, QUANTIZED)


@dataclass
class MergePlan:
    """What is to be written.

    Attributes:
        tensors: in the order of the files.
        untied: pairs of parameters that the base ties and of which one is changed alone: each gets its own tensor.
        vocabulary: number of words where tokens were added, else None.
    """

    tensors: list[Planned]
    untied: list[tuple[str, str]]
    vocabulary: int | None = None


def plan_merge(skeleton: Skeleton, found: AdapterFile, onto: str, dtype: torch.dtype, trained: torch.dtype) -> MergePlan:
    """Plan every tensor of the result. Rank-local; reads headers, and compares weights that the base ties.

    Args:
        onto: one of FORMS.
        dtype: of the result; what its architecture keeps in fp32 stays so.
        trained: dtype the base had in training.

    Raises:
        AdapterError: the adapter does not fit the base, or a layer of the result could not hold what it says.
        BaseModelError: a weight cannot be stored in 4 bits.
    """
    changes = changes_of(skeleton.model, found)
    sources, untied = _sources(skeleton, found, changes)
    lost = sorted(key for key in changes if key not in sources)
    refuse(lost, f"{len(lost)} parameters that the adapter changes are not in the base's files", found.folder / WEIGHTS_NAME)
    planner = _Planner(skeleton.model, onto, dtype, trained)
    quantized: list[Planned] = []
    plain: list[Planned] = []
    for key, (name, filling) in sources.items():
        module = skeleton.model.get_submodule(key.rpartition(".")[0])
        is_packed = onto == QUANTIZED and isinstance(module, QuantizedLinear) and key.endswith(".weight")
        parts = [*planner.plan(key, name, filling, changes.get(key))]
        (quantized if is_packed and keeps_alignment(parts) else plain).extend(parts)
    _check_copies(skeleton, found, sources)
    # Every tensor begins at a multiple of its dtype's size, which some readers need.
    tensors = [*quantized, *sorted(plain, key=lambda planned: -planned.dtype.itemsize)]
    grown = [max(c.tokens) + 1 for key, c in changes.items() if c.tokens and max(c.tokens) >= _num_rows(skeleton, key)]
    return MergePlan(tensors, untied, max(grown, default=None))


def _num_rows(skeleton: Skeleton, key: str) -> int:
    num_rows: int = skeleton.model.get_parameter(key).shape[0]
    return num_rows


Sources = dict[str, tuple[str | None, Filling]]


def _sources(skeleton: Skeleton, found: AdapterFile, changes: dict[str, Change]) -> tuple[Sources, list[tuple[str, str]]]:
    """Parameter -> a name for its tensor where the files have none, and what it is made of; and the pairs to untie.

    Of tied parameters files hold one, or the same value several times. Where an adapter changes one side alone, it gets a
    tensor of its own. What was trained as a whole on one side stays tied where the adapter says so.
    """
    sources: Sources = {key: (None, filling) for key, filling in skeleton.fillings.items()}
    untied = []
    for target, origin in skeleton.model.all_tied_weights_keys.items():
        stored = [key for key in (target, origin) if key in skeleton.fillings]
        if not stored or (len(stored) == 2 and not _same(skeleton.fillings[target], skeleton.fillings[origin])):
            continue  # as transformers has it, values that differ are not tied
        if found.config.ties_weights:
            whole = next((c for key in (target, origin) if (c := changes.get(key)) and c.replaced is not None), None)
            if whole is not None:
                changes.setdefault(target, whole)
                changes.setdefault(origin, whole)
        rows = next((c for key in (target, origin) if (c := changes.get(key)) and c.tokens), None)
        if rows is not None:  # a tied head follows the embedding
            changes.setdefault(target, rows)
            changes.setdefault(origin, rows)
        one, other = changes.get(target), changes.get(origin)
        if (one is None and other is None) or (one is not None and one.is_as(other)):
            for key in (target, origin):
                if key not in stored:
                    changes.pop(key, None)
            continue
        untied.append((target, origin))
        for key in (target, origin):
            if key not in stored:
                sources[key] = (key, skeleton.fillings[stored[0]])
    return sources, untied


def _same(one: Filling, other: Filling) -> bool:
    """Whether two fillings have the same bytes."""
    a, b = one.entries[-1], other.entries[-1]
    return a.dtype == b.dtype and equal(of_file(a), of_file(b))


def _check_copies(skeleton: Skeleton, found: AdapterFile, sources: Sources) -> None:
    """Refuse an adapter with a copy of a weight of the base (PEFT writes those of embeddings and heads) that is another."""
    for key, copy in found.entries.items():
        source = sources.get(f"{key.path}.weight")
        twin = skeleton.model.all_tied_weights_keys.get(f"{key.path}.weight")
        if source is None and twin is not None:
            source = sources.get(twin)
        if key.part != BASE or source is None:
            continue
        if not equal(of_file(source[1].entries[-1], copy.dtype), of_file(copy)):
            raise AdapterError("the base weight beside the adapter is not this base's", place=f"{found.folder}: {key.path}")


class _Planner:
    """Turns parameters into tensors of files."""

    def __init__(self, model: Any, onto: str, dtype: torch.dtype, trained: torch.dtype) -> None:
        self.model, self.onto, self.dtype, self.trained = model, onto, dtype, trained
        narrow = torch.bfloat16  # asked for whatever the dtype is: an architecture says what it keeps in fp32
        kept = model._get_dtype_plan(narrow) if hasattr(model, "_get_dtype_plan") else {}
        self.fp32_patterns = [re.compile(pattern) for pattern in kept]

    def plan(self, key: str, name: str | None, filling: Filling, change: Change | None) -> Iterator[Planned]:
        """The tensors of the files that make one parameter."""
        path, _, own_name = key.rpartition(".")
        module = self.model.get_submodule(path)
        if isinstance(module, QuantizedLinear) and own_name == "weight":
            entry = filling.entries[-1]
            shape = (module.out_features, module.in_features)
            if self.onto == QUANTIZED:
                yield from plan_quantized(module, entry.name, self.dtype, partial(self._quantize, module, filling, change))
                return
            shape = shape[::-1] if module.transposed_in_files else shape
            rows = partial(self._weight_rows, module, filling, change, in_files=True)
            yield self._planned(entry.name, shape, self.dtype, rows)
            return
        kept = any(pattern.search(key) for pattern in self.fp32_patterns)
        if change is not None and filling.converter is not None and filling.joined is None:
            raise AdapterError(
                "the layer is made of several tensors of the base's files otherwise than by laying them one after another, "
                "so it cannot be merged into",
                place=key,
            )
        if change is not None and filling.joined is not None and change.replaced is None and change.num_experts is None:
            raise AdapterError(
                "the layer's weight is several tensors of the base's files, of which only experts can be merged into",
                place=key,
                next_step="keep the adapter beside the base",
            )
        entries = filling.entries if filling.converter is not None else filling.entries[-1:]
        offset = 0
        for entry in entries if filling.joined is None else filling.joined.parts:
            dtype = torch.float32 if kept else self.dtype
            target = dtype if entry.dtype.is_floating_point else entry.dtype
            if change is None and not entry.dtype.is_floating_point:
                yield Planned(name or entry.name, entry.shape, target, entry.read_whole)
            else:
                through = None if self.onto == ORIGINAL or kept else self.trained
                rows = partial(self._plain_rows, entry, through, change, offset)
                num_new = sum(token >= entry.shape[0] for token in change.tokens) if change is not None else 0
                stored = (entry.shape[0] + num_new, *entry.shape[1:]) if num_new else entry.shape
                yield self._planned(name or entry.name, stored, target, rows)
            offset += entry.num_elements

    def _planned(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, rows: Callable[[], Rows]) -> Planned:
        return Planned(name, shape, dtype, lambda: rows().pieces(dtype))

    def _plain_rows(self, entry: TensorEntry, through: torch.dtype | None, change: Change | None, offset: int) -> Rows:
        """The rows of a tensor of the result that is no quantized weight, as they lie in files."""
        rows = of_file(entry, through)
        return rows if change is None else changed(rows, change, transposed=change.transposed, offset=offset)

    def _weight_rows(self, layer: QuantizedLinear, filling: Filling, change: Change | None, *, in_files: bool) -> Rows:
        """The rows of a quantized layer's weight: as (out, in), or as they lie in files."""
        transposed = layer.transposed_in_files and in_files
        if change is not None and change.replaced is not None:
            return of_tensor(change.value().T if transposed else change.value())
        if filling.came is None and self.onto != DEQUANTIZED:
            rows = of_file(filling.entries[-1])
            if layer.transposed_in_files and not in_files:
                rows = of_tensor(filling.entries[-1].read_whole().T)
        else:
            weight = layer.unpack(*self._packed(layer, filling), layer.compute_dtype)
            rows = of_tensor(weight.T if transposed else weight)
        return rows if change is None else changed(rows, change, transposed=transposed)

    def _packed(self, layer: QuantizedLinear, filling: Filling) -> tuple[Tensor, Tensor]:
        """The bytes that the base had in training."""
        if filling.came is not None:
            return filling.came.read(Sharding(), torch.device("cpu"))
        entry = filling.entries[-1]
        weight = of_file(entry).whole(layer.compute_dtype)
        return layer.quantize(weight.T.contiguous() if layer.transposed_in_files else weight, entry.name)

    def _quantize(self, layer: QuantizedLinear, filling: Filling, change: Change | None) -> tuple[Tensor, Tensor]:
        """The bytes of the result."""
        if change is None:
            return self._packed(layer, filling)
        weight = self._weight_rows(layer, filling, change, in_files=False).whole(self.dtype)
        return layer.quantize(weight, filling.entries[-1].name)
