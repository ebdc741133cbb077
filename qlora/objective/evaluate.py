"""Loss and perplexity over a data set, in the same arithmetic as training."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from qlora.data.batch import Batch
from qlora.distributed.runtime import Runtime
from qlora.errors import DataError


def evaluate(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, runtime: Runtime | None = None
) -> dict[str, float]:
    """Mean cross entropy over all target tokens of all ranks. Collective where a runtime is given.

    Args:
        model: a `TrainModel`, or what `prepare` made of one; every rank has the same number of batches.

    Returns:
        eval_loss (nats per target token), eval_perplexity, eval_num_target_tokens.

    Raises:
        DataError: there is no target token at all.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batch in batches:
            loss_sum, num_targets = model(batch.to(device))
            totals[0] += loss_sum
            totals[1] += num_targets
    model.train(was_training)
    if runtime is not None:
        runtime.sum(totals)
    loss_sum, num_targets = totals.tolist()
    if num_targets == 0:
        raise DataError("the evaluation data has no target tokens", place="data.eval")
    loss = loss_sum / num_targets
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),
        "eval_num_target_tokens": int(num_targets),
    }
