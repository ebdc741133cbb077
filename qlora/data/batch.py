"""What one rank computes on in one micro-step: a `Batch` that checks itself.

Shape suffixes: B rows, T tokens a row.

There are two forms. Packed: all documents of all the rank's packs stand in one row (B = 1) one after another, with no
padding at all, and `document_lengths` says where each ends. Padded: one document a row, padded on the right, and
`attention_mask_BT` says what is padding. In both, targets are already shifted: `targets_BT[b, t]` is the token to be
predicted from position t, so nobody downstream shifts again, and no document's last token looks into the next document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

IGNORE = -100
"""The target where nothing is to be predicted, as `torch.nn.functional.cross_entropy` has it."""

_EMPTY_LENGTH = 2  # like any short row: a single token would take other paths, as in generation

Row = tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]
"""A document: token ids and target flags, both (T,)."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens and what is to be predicted from them.

    Args:
        input_ids_BT: int64.
        position_ids_BT: int64, from 0 in every document.
        targets_BT: int64, shifted; `IGNORE` where nothing is to be predicted, always at a document's last token.
        document_lengths: packed form: tokens of each document, summing up to T; None in the padded form.
        attention_mask_BT: padded form: bool, True where there is a token; None in the packed form.
        num_tokens: tokens that are not padding; 0 marks an empty batch, which only keeps a rank in step.
        num_target_tokens: places of targets_BT other than `IGNORE`.
        packs: number and tokens of each pack, in the order of tokens; () where it is not known.
    """

    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    targets_BT: torch.Tensor
    document_lengths: tuple[int, ...] | None
    attention_mask_BT: torch.Tensor | None
    num_tokens: int
    num_target_tokens: int
    packs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        shape = self.input_ids_BT.shape
        for name in ("input_ids_BT", "position_ids_BT", "targets_BT"):
            tensor = getattr(self, name)
            if tensor.shape != shape or tensor.dtype != torch.int64 or len(shape) != 2:
                raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, wanted (B, T) int64 like input_ids_BT")
        if (self.document_lengths is None) == (self.attention_mask_BT is None):
            raise ValueError("a batch is packed (document_lengths) or padded (attention_mask_BT), not both or neither")
        if self.document_lengths is not None and (
            shape[0] != 1 or sum(self.document_lengths) != shape[1] or min(self.document_lengths, default=0) < 1
        ):
            raise ValueError(f"documents of {self.document_lengths} tokens in a row of {tuple(shape)}")
        mask = self.attention_mask_BT
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
            raise ValueError(f"attention_mask_BT is {tuple(mask.shape)} {mask.dtype}, wanted {tuple(shape)} bool")
        if self.packs and sum(length for _, length in self.packs) != self.num_tokens:
            raise ValueError(f"packs {self.packs} of {self.num_tokens} tokens")
        if self.is_empty and self.num_target_tokens:
            raise ValueError(f"an empty batch with {self.num_target_tokens} targets")
        # Values are looked at where the batch is made; on an accelerator it would make the device wait.
        if self.input_ids_BT.device.type == "cpu":
            self._check_values()

    def _check_values(self) -> None:
        has_target_BT = self.targets_BT != IGNORE
        if int(has_target_BT.sum()) != self.num_target_tokens:
            raise ValueError(f"{int(has_target_BT.sum())} targets, said to be {self.num_target_tokens}")
        if self.attention_mask_BT is None:
            assert self.document_lengths is not None
            ends = torch.tensor(self.document_lengths).cumsum(0) - 1
            last_has_target = has_target_BT[0, ends]
            starts = self.position_ids_BT[0, ends + 1 - torch.tensor(self.document_lengths)]
            restarts = int((self.position_ids_BT == 0).sum()) == len(self.document_lengths) and not starts.any()
            num_tokens = self.input_ids_BT.shape[1]
        else:
            lengths = self.attention_mask_BT.sum(1)
            if (self.attention_mask_BT[:, 1:] > self.attention_mask_BT[:, :-1]).any() or (lengths == 0).any():
                raise ValueError("attention_mask_BT is not padding on the right of at least one token")
            # From the last token on, through all padding.
            last_has_target = has_target_BT & (torch.arange(self.input_ids_BT.shape[1]) >= lengths[:, None] - 1)
            restarts = not self.position_ids_BT[:, 0].any()
            num_tokens = int(lengths.sum())
        if last_has_target.any():
            raise ValueError("a document's last token or padding has a target")
        if not restarts:
            raise ValueError("position_ids_BT do not restart at every document")
        if not self.is_empty and num_tokens != self.num_tokens:
            raise ValueError(f"{num_tokens} tokens, said to be {self.num_tokens}")

    @property
    def is_empty(self) -> bool:
        """Whether this batch only keeps a rank in step: its tokens mean nothing and are not counted."""
        return self.num_tokens == 0

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device. From a CPU to a GPU nobody waits for the copies."""
        device = torch.device(device)

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device.type == "cpu" and device.type == "cuda":
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        mask = self.attention_mask_BT
        return replace(
            self,
            input_ids_BT=move(self.input_ids_BT),
            position_ids_BT=move(self.position_ids_BT),
            targets_BT=move(self.targets_BT),
            attention_mask_BT=None if mask is None else move(mask),
        )


def collate_packed(rows: Sequence[Row]) -> Batch:
    """Put documents into one row without padding. Rank-local.

    Args:
        rows: at least one; each the ids and target flags of a document.
    """
    lengths = tuple(len(input_ids) for input_ids, _ in rows)
    targets = np.concatenate([_shifted_targets(*row) for row in rows])
    return Batch(
        input_ids_BT=_row_tensor([input_ids for input_ids, _ in rows]),
        position_ids_BT=_row_tensor([np.arange(length) for length in lengths]),
        targets_BT=torch.from_numpy(targets)[None],
        document_lengths=lengths,
        attention_mask_BT=None,
        num_tokens=sum(lengths),
        num_target_tokens=int((targets != IGNORE).sum()),
    )


def collate_padded(rows: Sequence[Row], pad_token_id: int) -> Batch:
    """Put documents into rows of the longest one's length, padded on the right. Rank-local.

    Args:
        rows: at least one; each the ids and target flags of a document.
        pad_token_id: fills the padding; it may be a token with a meaning, for masks alone say what is padding.
    """
    lengths = [len(input_ids) for input_ids, _ in rows]
    shape = (len(rows), max(lengths))
    input_ids_BT = np.full(shape, pad_token_id, dtype=np.int64)
    targets_BT = np.full(shape, IGNORE, dtype=np.int64)
    mask_BT = np.zeros(shape, dtype=bool)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        input_ids_BT[index, :length] = row[0]
        targets_BT[index, :length] = _shifted_targets(*row)
        mask_BT[index, :length] = True
    return Batch(
        input_ids_BT=torch.from_numpy(input_ids_BT),
        position_ids_BT=torch.arange(shape[1]).repeat(shape[0], 1),
        targets_BT=torch.from_numpy(targets_BT),
        document_lengths=None,
        attention_mask_BT=torch.from_numpy(mask_BT),
        num_tokens=sum(lengths),
        num_target_tokens=int((targets_BT != IGNORE).sum()),
    )


def empty_batch(pad_token_id: int, *, is_packed: bool) -> Batch:
    """A tiny batch without targets, for a rank that has no packs left while others still do. Rank-local.

    Its forward and backward call the same collectives as any other's and add nothing to loss, gradients or counts.
    """
    shape = (1, _EMPTY_LENGTH)
    return Batch(
        input_ids_BT=torch.full(shape, pad_token_id),
        position_ids_BT=torch.arange(_EMPTY_LENGTH)[None],
        targets_BT=torch.full(shape, IGNORE),
        document_lengths=(_EMPTY_LENGTH,) if is_packed else None,
        attention_mask_BT=None if is_packed else torch.ones(shape, dtype=torch.bool),
        num_tokens=0,
        num_target_tokens=0,
    )


def _shifted_targets(input_ids: npt.NDArray[np.integer], is_target: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    targets = np.full(len(input_ids), IGNORE, dtype=np.int64)
    targets[:-1] = np.where(is_target[1:] != 0, input_ids[1:], IGNORE)
    return targets


def _row_tensor(parts: Sequence[npt.NDArray[np.integer]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))[None]
