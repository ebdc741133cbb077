"""The processes of a job: who I am, how many we are, and the prepared model. The only file that imports accelerate.

The launch configuration decides how ranks are started and sharded (single, data parallel, ZeRO-1/2/3); this file makes
the same job work under each of them, on GPUs or over gloo on CPUs, and checks that the ranks really see one another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from qlora.distributed import attempt
from qlora.distributed.engine import Engine, PlainEngine
from qlora.distributed.ranks import Ranks
from qlora.distributed.sharding import Sharding
from qlora.distributed.zero_config import fill_config
from qlora.errors import LaunchError

TIMEOUT = timedelta(minutes=30)


@dataclass
class Runtime(Ranks):
    """One process of the job.

    Attributes:
        rank, world_size, local_rank: of this process.
        device: where this rank computes.
        mode: single, ddp, zero1, zero2 or zero3.
        stop_requested: whether this rank was asked to stop; `together` lets the ranks agree on it.
        tick: told of every place that all ranks pass in one order, with a name for what is done from there on.
        move: told that this rank gets on with work of its own, from any thread.
        waited_seconds: how long this rank has waited for others here so far.
    """

    accelerator: Accelerator
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    mode: str
    stop_requested: Callable[[], bool] = lambda: False
    tick: Callable[..., None] = lambda doing=None: None
    move: Callable[[], None] = lambda: None
    waited_seconds: float = 0.0

    @property
    def is_zero(self) -> bool:
        return self.mode.startswith("zero")

    @property
    def is_sharded(self) -> bool:
        """Whether each rank keeps a share of the base alone, so that forward passes are collectives."""
        return self.mode == "zero3"

    def sharding(self) -> Sharding:
        """How a base is loaded under this launch. Rank-local."""
        if self.mode != "zero3":
            return Sharding(together=self.together, worker=self.rank, num_workers=self.world_size)
        from qlora.distributed import zero

        return zero.ZeroSharding(self.rank, self.world_size, self.together, self.accelerator.state.deepspeed_plugin)

    def share_out(self, micro_batch_size: int, gradient_accumulation_steps: int) -> None:
        """Go on with another split of the global batch than the job file's. Rank-local; before anything is prepared."""
        self.accelerator.gradient_accumulation_steps = gradient_accumulation_steps if self.is_zero else 1
        if self.is_zero:
            self.accelerator.state.deepspeed_plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": micro_batch_size,
                "gradient_accumulation_steps": gradient_accumulation_steps,
                "train_batch_size": micro_batch_size * gradient_accumulation_steps * self.world_size,
            }

    def end(self) -> None:
        """Leave the process group."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def start(
    *, per_device_batch_size: int, gradient_accumulation_steps: int, max_grad_norm: float, trackers: Sequence[str] = (),
    logging_dir: str | None = None, optimizer: str = "adamw", trains: bool = True, timeout: timedelta = TIMEOUT,
) -> Runtime:  # fmt: skip
    """Join the job's process group as the launcher set it up. Collective.

    Args:
        trains: False lets the launch configuration say what it will about batches and gradients.
        timeout: how long a collective may take.

    Raises:
        LaunchError: the ranks do not see one another, or the launch configuration contradicts the job file.
    """
    under_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    arguments: dict[str, Any] = {"log_with": list(trackers) or None, "project_dir": logging_dir}
    meeting: dict[str, Any] = {"timeout": timeout, "init_method": attempt.init_method()}
    handlers: list[Any] = [InitProcessGroupKwargs(**meeting)]
    if not torch.cuda.is_available():
        if under_deepspeed:
            # With cpu=True Accelerate 1.15 goes around DeepSpeed without a word; without a backend it believes that it
            # is one process and every rank trains alone.
            handlers = [InitProcessGroupKwargs(backend="gloo", **meeting)]
        else:
            arguments["cpu"] = True
    if under_deepspeed:
        if not torch.cuda.is_available():
            # Said before DeepSpeed is imported, which otherwise writes about it on standard output, from every rank.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from qlora.distributed import zero

        zero.prepare_environment()
    accelerator = Accelerator(kwargs_handlers=handlers, gradient_accumulation_steps=1, mixed_precision="no", **arguments)
    mode = "single" if accelerator.num_processes == 1 else "ddp"
    if under_deepspeed:
        stage = fill_config(
            accelerator.state.deepspeed_plugin,
            micro_batch_size=per_device_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            gradient_clipping=max_grad_norm,
            world_size=accelerator.num_processes,
            optimizer=optimizer,
            trains=trains,
        )
        accelerator.gradient_accumulation_steps = gradient_accumulation_steps
        mode = f"zero{stage}" if stage else mode
    runtime = Runtime(
        accelerator,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        local_rank=accelerator.local_process_index,
        device=accelerator.device,
        mode=mode,
    )
    _check_world(runtime)
    return runtime


def _check_world(runtime: Runtime) -> None:
    """All ranks add one: the sum must be what the launcher promised."""
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    counted = int(runtime.sum(torch.ones(1, device=runtime.device)).item())
    if counted != promised or runtime.world_size != promised:
        raise LaunchError(
            "the ranks do not see one another: each would train alone",
            place="launch",
            found=f"{counted} ranks answer",
            wanted=f"WORLD_SIZE is {promised}",
            next_step="start with `accelerate launch --config_file launch/accelerate/ddp.yaml ...`",
        )


def prepare(
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float,
    scale_loss: bool,
    leaves: Sequence[type],
) -> Engine:
    """Hand model and optimizer to Accelerate and, where it is on, to DeepSpeed. Collective.

    Args:
        scale_loss: keep fp16 gradients from underflowing by a dynamic loss scale (not under DeepSpeed).
        leaves: module classes that ZeRO-3 gathers as one.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if runtime.is_zero:
        from qlora.distributed import zero

        zero.mark_leaves(model, leaves, runtime.accelerator.state.deepspeed_plugin)
        engine, _ = runtime.accelerator.prepare(model, optimizer)
        return zero.ZeroEngine(engine, parameters)
    # DDP would broadcast the frozen base at start.
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    model._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]
    prepared = runtime.accelerator.prepare_model(model)
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
    if runtime.world_size > 1:
        no_sync = partial(runtime.accelerator.no_sync, prepared)
    return PlainEngine(prepared, parameters, optimizer, max_grad_norm, scale_loss, runtime.device, no_sync)


def start_inference() -> Runtime:
    """Join the process group of a launch that trains nothing. Collective. Raises LaunchError: see `start`."""
    return start(per_device_batch_size=1, gradient_accumulation_steps=1, max_grad_norm=1.0, trains=False)


def for_inference(runtime: Runtime, model: nn.Module, *, leaves: Sequence[type]) -> AbstractContextManager[None]:
    """A model computes inside the context, without an optimizer. Collective.

    Where ranks keep shares of the base, every forward pass inside is a collective, so that all ranks make the same
    number of them, and the model is empty afterwards. Elsewhere each rank's model is whole and stays as it is.

    Args:
        model: what will be called, with its adapter in it: nothing can be added inside the context.
        leaves: module classes that ZeRO-3 gathers as one.
    """
    if not runtime.is_sharded:
        return nullcontext()
    from qlora.distributed import zero

    return zero.for_inference(model, runtime.accelerator.state.deepspeed_plugin, leaves)
