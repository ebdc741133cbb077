"""EVA's start from the first of the training data, before the model is prepared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from qlora.config.schema import JobConfig
from qlora.data.batch import IGNORE, Batch, Row, collate_padded
from qlora.data.packing import PackPlan
from qlora.data.sampler import permutation
from qlora.data.token_store import TokenizedDataset
from qlora.distributed.runtime import Runtime
from qlora.lora.from_inputs import start_from_inputs
from qlora.lora.kinds import WRAPPERS
from qlora.objective.train_model import LossHead, TrainModel
from qlora.train.preempt import until_stopped


def start_from_data(
    config: JobConfig,
    runtime: Runtime,
    train_model: TrainModel,
    rows: TokenizedDataset,
    plan: PackPlan,
    pad_token_id: int,
    global_batch_size: int,
) -> None:
    """Set A of the layers of a model that is not prepared yet. Collective.

    It sees what the first `lora.eva_batches` optimizer steps will see, all of it on every rank, so that what is found does
    not depend on how many ranks there are, nor on how a global batch is shared out.

    Raises:
        ConfigError: see `start_from_inputs`.
    """
    model = train_model.model

    def runs() -> Iterator[tuple[Callable[[], object], torch.Tensor]]:
        num_packs = config.lora.eva_batches * global_batch_size
        for batch in until_stopped(first_batches(config, rows, plan, pad_token_id, num_packs), runtime):
            on_device = batch.to(runtime.device)
            yield partial(_run, model, on_device), on_device.targets_BT != IGNORE

    unused = start_from_inputs(
        model, runs(), seed=config.train.seed, sharding=runtime.sharding(), leaves=(*WRAPPERS, LossHead)
    )
    if runtime.is_main:
        for line in describe_unused(model, unused):
            print(f"eva       {line}", flush=True)


def describe_unused(model: Any, unused: Sequence[str]) -> list[str]:
    """What is said of the layers that keep their default A. The output head is among them: no batch is run through it."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    heads = [path for path in unused if head is not None and model.get_submodule(path) is head]
    others = [path for path in unused if path not in heads]
    lines = [f"the output head keeps A's default start: {path}" for path in heads]
    if others:
        lines.append(f"{len(others)} layers saw none of the data, and start as by default: {others[0]} ...")
    return lines


def _run(model: Any, batch: Batch) -> None:
    """The model's layers on a batch; the output head, whose logits nobody looks at, is left out."""
    inside = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        position_ids=batch.position_ids_BT,
        use_cache=False,
    )


def first_batches(
    config: JobConfig, rows: TokenizedDataset, plan: PackPlan, pad_token_id: int, num_packs: int
) -> Iterator[Batch]:
    """The documents of the first packs, one a row, at most so many tokens at a time as a pack has, but for one document.

    Rank-local, the same on every rank. An epoch has no more packs than it has.
    """
    for pack in permutation(len(plan), config.train.seed, 0)[:num_packs].tolist():
        documents: list[Row] = [rows.row(int(document)) for document in plan[pack]]
        for group in _of_like_length(documents, config.data.max_length):
            yield collate_padded(group, pad_token_id)


def _of_like_length(documents: list[Row], most_tokens: int) -> Iterator[list[Row]]:
    """Groups that take at most so many tokens with their padding, or hold one document."""
    group: list[Row] = []
    for document in sorted(documents, key=lambda row: -len(row[0])):
        if group and (len(group) + 1) * len(group[0][0]) > most_tokens:
            yield group
            group = []
        group.append(document)
    if group:
        yield group
