"""More rows in a base's embedding and head than its files hold, for tokens that were added.

The skeleton grows before anything is read, so that every rank reads and keeps its run of the larger tensors as of any
other. A new row is the mean of the old ones (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
Models"), so that a new token starts as likely as an average one and does not outshine the known ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import BaseModelError
from qlora.quant.linear import QuantizedLinear
from qlora.quant.shards import JoinedEntry, TensorEntry
from qlora.quant.skeleton import Skeleton

# Elements that are summed at one time: bounds what is made in float64.
SUM_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class GrownEntry(JoinedEntry):
    """A tensor of the files with rows behind it that are all the same.

    Attributes:
        row: the new row, flat, in the dtype of the files.
    """

    row: Tensor

    def read(self, start: int, stop: int) -> Tensor:
        old = self.parts[0]
        first, size = max(start, old.num_elements), self.row.numel()
        new = self.row.repeat((max(stop - first, 0) + 2 * size) // size + 1)[first % size :][: max(stop - first, 0)]
        return torch.cat([old.read(min(start, old.num_elements), min(stop, old.num_elements)), new])


def grow_vocabulary(skeleton: Skeleton, num_rows: int) -> None:
    """Make a base's embedding and head as large as `num_rows`; nothing happens where they are. Rank-local; reads the rows.

    Raises:
        BaseModelError: the embedding or the head is quantized or not made of one tensor, or their sizes differ.
    """
    model = skeleton.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or embedding.weight.shape[0] >= num_rows:
        return
    old_rows = embedding.weight.shape[0]
    grown: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in (embedding, head):
        if module is None:
            continue
        path = next(path for path, other in model.named_modules() if other is module)
        if isinstance(module, QuantizedLinear) or not isinstance(module, (nn.Embedding, nn.Linear)):
            raise _cannot_grow(path, f"a {type(module).__name__}")
        for own_name, parameter in list(module.named_parameters(recurse=False)):
            key = f"{path}.{own_name}"
            if parameter.shape[0] != old_rows:
                raise _cannot_grow(key, f"{parameter.shape[0]} rows, and the embedding has {old_rows}")
            shape = (num_rows, *parameter.shape[1:])
            if id(parameter) not in grown:
                made = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
                grown[id(parameter)] = nn.Parameter(made, requires_grad=parameter.requires_grad)
            setattr(module, own_name, grown[id(parameter)])
            filling = skeleton.fillings.get(key)
            if filling is None:
                continue
            if filling.converter is not None:
                raise _cannot_grow(key, "made of several tensors of the files")
            entry = filling.entries[-1]
            filling.joined = GrownEntry((entry,), shape, mean_row(entry))
        if isinstance(module, nn.Embedding):
            module.num_embeddings = num_rows
        else:
            module.out_features = num_rows
    config: Any = model.config.get_text_config()
    config.vocab_size = num_rows
    for owner in (model, model.get_decoder() if hasattr(model, "get_decoder") else None):
        if owner is not None and isinstance(getattr(owner, "vocab_size", None), int):
            owner.vocab_size = num_rows


def mean_row(entry: TensorEntry) -> Tensor:
    """The mean of a tensor's rows, flat, summed in float64 and rounded to its dtype. Raises BaseModelError."""
    num_rows, size = entry.shape[0], math.prod(entry.shape[1:])
    total = torch.zeros(size, dtype=torch.float64)
    step = max(1, SUM_ELEMENTS // size)
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        total += entry.read(first * size, last * size).reshape(-1, size).to(torch.float64).sum(0)
    return (total / num_rows).to(entry.dtype)


def _cannot_grow(path: str, found: str) -> BaseModelError:
    return BaseModelError(
        "the base has no rows for new tokens, and this module cannot be given more",
        place=path,
        found=found,
        next_step="use tokens that the base has (lora.trainable_token_indices), or a base with room in its vocabulary",
    )
