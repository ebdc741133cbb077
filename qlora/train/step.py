"""One optimizer step: forward and backward over its micro-batches, then one update.

The loss of a step is the sum over the target tokens of all ranks and micro-steps, divided by their global count. That
count is known before the first forward pass, so every micro-step's gradient is already in its final scale: ranks and
accumulation only add up.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora.data.batch import Batch
from qlora.data.loader import StepBatches
from qlora.data.sampler import Position
from qlora.distributed.engine import Engine
from qlora.distributed.runtime import Runtime
from qlora.ops.dropout import Packs, computing

if TYPE_CHECKING:
    from qlora.train.slow_rank import BusyClock


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step was; hooks read it.

    Attributes:
        step: steps done, this one included.
        epoch: epochs done.
        loss: nats per target token over all ranks, before the update.
        grad_norm: over all ranks, before clipping.
        learning_rate: that the update used.
        num_tokens, num_target_tokens: so far, over all ranks and steps.
        step_tokens: of this step, over all ranks.
        step_seconds: wall clock.
        position: where the data stands now.
        stop_requested: some rank was asked to stop.
        skipped: the gradient was not finite, and nothing was updated.
        num_skipped: steps so far of which that is true.
        nonfinite_micro_steps: those of this rank whose loss was not finite.
        busy_seconds: of each rank, its own work before it first waited for the others; see `slow_rank`.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_target_tokens: int
    step_tokens: int
    step_seconds: float
    position: Position
    stop_requested: bool
    skipped: bool = False
    num_skipped: int = 0
    nonfinite_micro_steps: tuple[int, ...] = ()
    busy_seconds: tuple[float, ...] = ()


@dataclass
class Counters:
    """Totals that a run carries along."""

    num_tokens: int = 0
    num_target_tokens: int = 0
    num_skipped: int = 0


def run_step(
    engine: Engine,
    runtime: Runtime,
    batches: StepBatches,
    counters: Counters,
    *,
    learning_rate: float,
    seed: int,
    stop_requested: Callable[[], bool] = lambda: False,
    meanwhile: Callable[[], None] = lambda: None,
    clock: BusyClock | None = None,
) -> StepResult:
    """Do one optimizer step; where a loss or the gradient is not finite, leave everything as it is. Collective.

    Args:
        batches: on the device.
        stop_requested: asked of each rank when its part of the step is done; what one says goes for all.
        meanwhile: called when all of the step is queued and nothing was waited for: there is time for the next one's data.
        clock: times this rank's own work.
    """
    start = time.perf_counter()
    # Ranks average their gradients, so the factor of the number of ranks makes that a sum.
    factor = runtime.world_size / batches.global_num_target_tokens
    # Loss, stops, and a place for each rank's own time.
    totals = torch.zeros(2 + runtime.world_size, dtype=torch.float64, device=runtime.device)
    num_micro_steps = len(batches.micro_batches)
    losses: list[torch.Tensor] = []
    for micro_step, batch in enumerate(batches.micro_batches):
        runtime.tick(f"step {batches.step + 1}, micro-step {micro_step + 1}")
        seed_step(seed, batches.step, micro_step, runtime.rank)
        with engine.micro_step(last=micro_step == num_micro_steps - 1), computing(_packs_of(batch, seed, batches.step)):
            if clock is not None and micro_step == 0:
                clock.forward_begins()
            loss_sum, _ = engine.model(batch)
            if clock is not None and micro_step == 0:
                clock.forward_done()
            runtime.tick()
            engine.backward(loss_sum * factor * _one_if_finite(loss_sum))
        losses.append(loss_sum.detach())
        totals[0] += losses[-1]
    runtime.tick(f"step {batches.step + 1}, update")
    norm = engine.step(learning_rate)
    began = time.perf_counter()
    meanwhile()
    if clock is not None:
        clock.worked_ahead(time.perf_counter() - began)
    grad_norm = float(norm)  # here the host waits for the device, once a step
    totals[1] = float(stop_requested())
    if clock is not None:
        totals[2 + runtime.rank] = clock.seconds()
    loss_of_all, stops, *busy_seconds = runtime.sum(totals).tolist()
    if clock is not None:
        clock.restart()
    runtime.tick(f"the end of step {batches.step + 1}")
    loss = loss_of_all / batches.global_num_target_tokens
    skipped = not math.isfinite(grad_norm)
    counters.num_skipped += skipped
    counters.num_tokens += batches.global_num_tokens
    counters.num_target_tokens += batches.global_num_target_tokens
    return StepResult(
        step=batches.step + 1,
        epoch=batches.epoch,
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_tokens=counters.num_tokens,
        num_target_tokens=counters.num_target_tokens,
        step_tokens=batches.global_num_tokens,
        step_seconds=time.perf_counter() - start,
        position=batches.position_after,
        stop_requested=stops > 0,
        skipped=skipped,
        num_skipped=counters.num_skipped,
        nonfinite_micro_steps=() if math.isfinite(loss) else tuple(n for n, own in enumerate(losses) if not own.isfinite()),
        busy_seconds=tuple(busy_seconds),
    )


def _one_if_finite(loss_sum: torch.Tensor) -> torch.Tensor:
    """1, or no number: a loss that is infinite may have a gradient that is finite, and must not be learned from either.

    By their gradient all ranks hear of it with no collective of its own.
    """
    return torch.where(loss_sum.detach().isfinite(), 1.0, math.nan)


def _packs_of(batch: Batch, seed: int, step: int) -> Packs | None:
    """What dropout is drawn from: the same for a pack wherever it is computed."""
    numbers, lengths = zip(*batch.packs, strict=True) if batch.packs else ((), ())
    row_length = None if batch.attention_mask_BT is None else batch.input_ids_BT.shape[1]
    return Packs(f"{seed}/{step}", numbers, lengths, row_length) if numbers else None


def seed_step(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Make what else is drawn in a micro-step (a base's own dropout) a function of where it is: a resume draws the same."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro_step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
