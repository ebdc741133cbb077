"""What one rank keeps, gathers and reads under each way of sharing a job out, in bytes.

All of it is sums over the list of parameters that training holds. N ranks share out what the stage says, tensor by tensor
in pieces of ceil(elements / N) as DeepSpeed cuts them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from qlora.config.schema import JobConfig
from qlora.errors import ConfigError
from qlora.plan.activations import NCCL_BYTES, USABLE, plan_activations
from qlora.plan.gathers import gathered_at_once, gathered_bytes
from qlora.plan.parameters import ITEMSIZE, ROW_SCALE_BYTES, Stored, ZeroSettings, is_quantized, stored_parameters
from qlora.plan.shapes import BaseShapes

Mode = Literal["single", "ddp", "zero1", "zero2", "zero3"]
ADAM_BYTES = {"adamw": 8, "paged_adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}


@dataclass(frozen=True)
class RankPlan:
    """One rank of `ranks` under `mode`; all sizes in bytes.

    Attributes:
        kept: there from the first to the last step, by what it is.
        working: there for a part of a step, at most, by what it is.
        gathered: received from other ranks in a micro-step, at most; weights alone.
        read: from the base's files.
        num_recomputed: layers that are computed again in backward.
    """

    mode: Mode
    ranks: int
    kept: dict[str, int]
    working: dict[str, int]
    gathered: int
    read: int
    num_recomputed: int = 0

    @property
    def kept_bytes(self) -> int:
        return sum(self.kept.values())

    @property
    def total_bytes(self) -> int:
        return self.kept_bytes + sum(self.working.values())


def modes_of(job: JobConfig, ranks: int) -> list[Mode]:
    """The ways a job can be shared out: DeepSpeed shards no optimizer but adamw."""
    plain: Mode = "single" if ranks == 1 else "ddp"
    return [plain, "zero1", "zero2", "zero3"] if job.train.optimizer == "adamw" else [plain]


def plan_rank(
    base: BaseShapes,
    job: JobConfig,
    mode: Mode,
    ranks: int,
    zero: ZeroSettings | None = None,
    memory: int | None = None,
) -> RankPlan:
    """Return what one of `ranks` ranks needs.

    Args:
        memory: bytes of a GPU, for which `train.gradient_checkpointing: auto` chooses; None has all layers computed again.

    Raises:
        ConfigError, AdapterError: training would refuse the job: its targets, or an optimizer that DeepSpeed cannot shard.
    """
    zero = zero or ZeroSettings()
    stage = int(mode[-1]) if mode.startswith("zero") else 0
    if stage and job.train.optimizer != "adamw":
        raise ConfigError(
            f"{job.train.optimizer} needs an optimizer state that is not sharded",
            place="train.optimizer", found=mode, wanted="adamw",
        )  # fmt: skip
    stored = stored_parameters(base, job, zero)
    files = sum(t.num_elements * t.itemsize for t in base.tensors)
    read = -(-files // ranks) if stage == 3 else files
    working = {"one dequantized weight": _dequantized_bytes(base, job)}
    if stage:
        working["reduction buffer"] = 4 * zero.reduce_bucket_size
    elif ranks > 1:
        working["reduction buffer"] = sum(p.num_bytes for p in stored if p.part == "trained")
    if stage == 3:
        working["gathered weights"] = gathered_at_once(stored, zero)
    kept = _kept(stored, stage, ranks, ADAM_BYTES[job.train.optimizer])
    again, stated = base.num_layers, job.train.gradient_checkpointing
    planned = plan_activations(base, job)
    if stated != "auto":
        if type(stated) is int and stated > base.num_layers:
            raise ConfigError(
                "there are not as many layers",
                place="train.gradient_checkpointing",
                found=stated,
                wanted=f"at most {base.num_layers}, or true",
            )
        again = stated if type(stated) is int else again * bool(stated)
    elif memory is not None and planned is not None:
        taken = sum(kept.values()) + sum(working.values()) + (NCCL_BYTES if ranks > 1 else 0)
        again = planned.fewest(int(memory * USABLE) - taken)
    if planned is not None:
        working["activations"] = planned.peak(again)
    else:
        tokens = job.train.per_device_train_batch_size * job.data.max_length
        working["inputs of recomputed layers"] = tokens * base.hidden_size * again * ITEMSIZE[job.model.dtype]
    share = again / max(1, base.num_layers)
    gathered = gathered_bytes(stored, recompute=share) * (ranks - 1) // ranks if stage == 3 else 0
    return RankPlan(mode, ranks, kept, working, gathered, read, again)


def _kept(stored: list[Stored], stage: int, ranks: int, adam_bytes: int) -> dict[str, int]:
    """What stays from step to step, by what it is."""
    trained = [p for p in stored if p.part == "trained"]
    elements = sum(p.elements for p in trained)
    # ZeRO-1 and 2 cut one flat buffer, aligned to two elements a rank; ZeRO-3 cuts each parameter.
    owned = {0: elements, 3: sum(-(-p.elements // ranks) for p in trained)}.get(stage, -(-elements // (2 * ranks)) * 2)
    kept: dict[str, int] = defaultdict(int)
    for parameter in stored:
        kept[parameter.part] += parameter.share_bytes(ranks if stage == 3 else 1)
    if stage == 3:
        kept["kept whole as well"] = sum(p.num_bytes for p in stored if p.stays_whole)
    # Under DeepSpeed gradients are fp32, whatever A and B are.
    kept["gradients"] = 4 * (elements if stage == 1 else owned) if stage else sum(p.num_bytes for p in trained)
    kept["optimizer"] = adam_bytes * owned
    if stage:
        kept["fp32 master copy"] = 4 * owned
    return dict(kept)


def recomputes(job: JobConfig) -> bool:
    """Whether layers may be computed again in the backward pass, on GPUs."""
    return bool(job.train.gradient_checkpointing)


def _dequantized_bytes(base: BaseShapes, job: JobConfig) -> int:
    """The largest quantized weight in the dtype to compute in, and its scales in fp32."""
    config = job.model.quantization
    quantized = [t for t in base.tensors if is_quantized(t, job)]
    counts = [t.num_elements for t in quantized]
    if config is None or not counts:
        return 0
    if config.bits == 8:
        return max(t.num_elements * ITEMSIZE[job.model.dtype] + ROW_SCALE_BYTES * t.num_outputs for t in quantized)
    return max(counts) * ITEMSIZE[job.model.dtype] + 4 * -(-max(counts) // config.block_size)
