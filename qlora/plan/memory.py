"""What one rank keeps, gathers and reads under each way of sharing a job out, in bytes.

A base is turned into the list of parameters that training holds: packed bytes and statistics of each 4-bit weight, what
stays in 16 bits, A and B, modules trained as wholes. All else is sums over that list. N ranks share out what the stage
says, tensor by tensor in pieces of ceil(elements / N) as DeepSpeed cuts them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qlora.config.schema import JobConfig, QuantizationConfig
from qlora.distributed.zero_config import LAYER_BYTES, PREFETCH_BUCKET
from qlora.errors import ConfigError
from qlora.lora.target import ALL_LINEAR, Candidate, choose, ends_with, refuse_unused_patterns
from qlora.lora.update import Update, pattern_of
from qlora.plan.activations import NCCL_BYTES, USABLE, plan_activations
from qlora.plan.shapes import BaseShapes, TensorShape

Mode = Literal["single", "ddp", "zero1", "zero2", "zero3"]
Part = Literal["packed weights", "statistics", "unquantized", "trained"]

ITEMSIZE = {"auto": 1, "uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
NESTED_BLOCK_SIZE = 256  # scales that share an fp32 scale under double quantization
ADAM_BYTES = {"adamw": 8, "paged_adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}


@dataclass(frozen=True)
class ZeroSettings:
    """DeepSpeed's own names without `stage3_`, in elements; the defaults are what a run uses.

    `prefetch_bucket_size` is by default `PREFETCH_BUCKET`, or the largest layer that is gathered as one;
    `max_live_parameters` the largest gather and one bucket.
    """

    prefetch_bucket_size: int | None = None
    max_live_parameters: int | None = None
    param_persistence_threshold: int = 1_000_000
    model_persistence_threshold: int = 100_000_000
    reduce_bucket_size: int = 50_000_000


@dataclass(frozen=True)
class Stored:
    """One parameter as training holds it.

    Attributes:
        module: whose it is; a LoRA layer has the path of the linear layer it wraps.
        elements, itemsize: of the stored tensor; a packed 4-bit weight has half as many elements as weights.
        uses: times it is gathered in a micro-step without recomputation, at most.
        in_layer: it is in one, and gathered once more where that is recomputed, unless the layer is gathered as one.
        stays_whole: small enough, and of a kind, to be kept whole under ZeRO-3.
        gathered_with: what ZeRO-3 gathers by one hook, a layer or a module; "" before that is known.
    """

    module: str
    part: Part
    elements: int
    itemsize: int
    uses: int
    in_layer: bool
    stays_whole: bool
    gathered_with: str = ""

    @property
    def num_bytes(self) -> int:
        return self.elements * self.itemsize

    def share_bytes(self, ranks: int) -> int:
        """Bytes of one rank's piece."""
        return -(-self.elements // ranks) * self.itemsize


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


ROW_SCALE_BYTES = 4  # of a row in 8 bits


def statistics_bytes(num_weights: int, config: QuantizationConfig) -> int:
    """Bytes of the scales of a 4-bit weight; the layout is described in `qlora.ops.nf4`."""
    num_blocks = -(-num_weights // config.block_size)
    return 4 + 4 * -(-num_blocks // NESTED_BLOCK_SIZE) + num_blocks if config.double_quant else 4 * num_blocks


def is_quantized(tensor: TensorShape, job: JobConfig) -> bool:
    """Whether loading quantizes this tensor."""
    config = job.model.quantization
    skipped = config is not None and any(ends_with(tensor.module, name) for name in config.skip_modules)
    return tensor.kind == "linear" and config is not None and not skipped


def adapted(base: BaseShapes, job: JobConfig) -> set[str]:
    """Paths of the layers that get A and B. Raises ConfigError, AdapterError as training would."""
    bits = job.model.quantization.bits if job.model.quantization is not None else 4
    classes = {True: (f"Linear{bits}bit", "QuantizedLinear", "Linear"), False: ("Linear",)}
    candidates = [
        Candidate(t.module, classes[is_quantized(t, job)], supported=True, is_head=t.kind == "head")
        for t in base.tensors
        if t.kind in ("linear", "head")
    ]
    targeted = choose(candidates, job.lora).targeted
    targeted = {path: entry for path, entry in targeted.items() if entry != ALL_LINEAR or not is_saved(path, job)}
    refuse_unused_patterns(job.lora, targeted)
    sides = {t.module: min(t.shape) for t in base.tensors if t.kind in ("linear", "head")}
    for path, r in {path: Update.of(job.lora, path).r for path in targeted}.items():
        if r > sides[path] and (targeted.pop(path) != ALL_LINEAR or not targeted):
            raise ConfigError(
                f"the rank exceeds the smaller dimension of {path}",
                place="lora.r" if pattern_of(job.lora.rank_pattern, path) is None else "lora.rank_pattern",
                found=r, wanted=f"at most {sides[path]}",
            )  # fmt: skip
    return set(targeted)


def is_saved(module: str, job: JobConfig) -> bool:
    """Whether `lora.modules_to_save` names this module, or one that it is in."""
    return any(f".{name}." in f".{module}." for name in job.lora.modules_to_save)


def stored_parameters(base: BaseShapes, job: JobConfig, zero: ZeroSettings | None = None) -> list[Stored]:
    """Return every parameter of the model in training, in the order of a forward pass. Raises as `adapted` does."""
    zero, lora, targets = zero or ZeroSettings(), job.lora, adapted(base, job)
    wholly = {"norm": lora.train_norms, "embedding": lora.train_embeddings, "head": lora.train_head}
    if base.tied and lora.train_embeddings != lora.train_head:
        raise ConfigError(
            "the base ties its embeddings to its head, so they can only be trained together",
            place="lora.train_embeddings, lora.train_head",
            next_step="set both to true, or both to false",
        )
    stored = []
    for tensor in base.tensors:
        whole = wholly.get(tensor.kind, False) or is_saved(tensor.module, job)
        trains = whole or tensor.module in targets
        # Nothing asks for a frozen embedding in backward, and a frozen head's gradient is made in forward.
        uses = 2 if trains or tensor.kind not in ("embedding", "head") else 1
        uses *= 2 if tensor.kind == "embedding" and base.tied else 1
        for part, elements, itemsize in _parts(tensor, job, whole, tensor.module in targets):
            may_stay = part == "trained" or (part == "unquantized" and len(tensor.shape) == 1)
            stays = may_stay and elements <= zero.param_persistence_threshold
            stored.append(Stored(tensor.module, part, elements, itemsize, uses, tensor.in_layer, stays))
    return _by_hook(_within_budget(stored, zero.model_persistence_threshold))


def _by_hook(stored: list[Stored]) -> list[Stored]:
    """With what each is gathered: layers as one where that is no more than the largest module, as a run has it."""
    modules: dict[str, int] = defaultdict(int)
    layers: dict[str | None, int] = defaultdict(int)
    for parameter in stored:
        modules[parameter.module] += parameter.num_bytes
        layers[layer_of(parameter.module)] += parameter.num_bytes
    limit = min(LAYER_BYTES, max(modules.values(), default=0))
    hooks = {path: layer_of(path) for path in modules}
    hooks = {path: layer if layer is not None and layers[layer] <= limit else path for path, layer in hooks.items()}
    return [replace(p, gathered_with=hooks[p.module] or "") for p in stored]


def layer_of(path: str) -> str | None:
    """`model.layers.7` of `model.layers.7.mlp.up_proj`, None outside of layers."""
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])


def _within_budget(stored: list[Stored], budget: int) -> list[Stored]:
    """Of what may stay whole, as much does as the budget (elements) allows: what is frozen first, then what trains."""
    chosen = set()
    for parameter in sorted((p for p in stored if p.stays_whole), key=lambda p: p.part == "trained"):
        if parameter.elements <= budget:
            budget -= parameter.elements
            chosen.add(id(parameter))
    return [p if id(p) in chosen else replace(p, stays_whole=False) for p in stored]


def _parts(tensor: TensorShape, job: JobConfig, wholly: bool, is_target: bool) -> Iterator[tuple[Part, int, int]]:
    """What training makes of one tensor: (part, elements, bytes an element), with the A and B of its layer."""
    count, quantization = tensor.num_elements, job.model.quantization
    if quantization is not None and quantization.bits == 8 and is_quantized(tensor, job):
        yield "packed weights", count, 1
        yield "statistics", ROW_SCALE_BYTES * tensor.num_outputs, 1
    elif quantization is not None and is_quantized(tensor, job):
        itemsize = ITEMSIZE[quantization.quant_storage]
        yield "packed weights", -(-count // 2) // itemsize, itemsize
        yield "statistics", statistics_bytes(count, quantization), 1
    elif wholly:
        yield "trained", count, 4
    else:
        yield "unquantized", count, ITEMSIZE[job.model.dtype]
    if is_target and tensor.kind in ("linear", "head"):
        update = Update.of(job.lora, tensor.module)
        for side in reversed(tensor.shape):
            yield "trained", update.r * side, ITEMSIZE[job.lora.dtype]
        if update.use_dora:
            yield "trained", tensor.num_outputs, 4
        if update.lora_bias:
            yield "trained", tensor.num_outputs, ITEMSIZE[job.lora.dtype]


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


def largest_gather(stored: Iterable[Stored]) -> int:
    """Bytes of the most that ZeRO-3 gathers by one hook: a layer, a LoRA layer with its A and B, embedding or head."""
    modules: dict[str, int] = defaultdict(int)
    for parameter in stored:
        modules[parameter.gathered_with] += 0 if parameter.stays_whole else parameter.num_bytes
    return max(modules.values(), default=0)


def max_live(stored: Sequence[Stored], zero: ZeroSettings) -> int:
    """Elements that DeepSpeed lets be there before it stops gathering ahead."""
    modules: dict[str, int] = defaultdict(int)
    for parameter in stored:
        modules[parameter.gathered_with] += parameter.elements
    stated, largest = zero.max_live_parameters, max(modules.values(), default=0)
    return largest + prefetch_bucket(stored, zero) if stated is None else stated


def prefetch_bucket(stored: Iterable[Stored], zero: ZeroSettings) -> int:
    """Elements that DeepSpeed gathers ahead at each hook."""
    if zero.prefetch_bucket_size is not None:
        return zero.prefetch_bucket_size
    layers: dict[str, int] = defaultdict(int)
    for parameter in stored:
        if parameter.gathered_with != parameter.module:
            layers[parameter.gathered_with] += parameter.elements
    return max(PREFETCH_BUCKET, *layers.values(), 0)


def gathered_at_once(stored: Sequence[Stored], zero: ZeroSettings) -> int:
    """Bytes of gathered parameters that one rank holds at one time, at most.

    DeepSpeed starts another bucket of gathers at every module, in the order of use, as long as less than `max_live`
    elements are there; the last tensor may pass the limit. Buckets are unpacked by copying.
    """
    cut = [p for p in stored if not p.stays_whole]
    now, bucket = largest_gather(cut), prefetch_bucket(stored, zero)
    ahead = largest_run(cut, max_live(stored, zero)) if bucket else 0
    return max(now, ahead) + max(now, largest_run(cut, bucket))


def largest_run(stored: Sequence[Stored], elements: int) -> int:
    """Bytes of neighbouring parameters, of which one more is taken as long as there are less than `elements`, at most."""
    most = 0
    for run in (stored, stored[::-1]):  # the forward and the backward pass
        first = held = num_bytes = 0
        for parameter in run:
            while held >= elements > 0:
                held, num_bytes, first = held - run[first].elements, num_bytes - run[first].num_bytes, first + 1
            held, num_bytes = held + parameter.elements, num_bytes + parameter.num_bytes
            most = max(most, num_bytes if elements > 0 else 0)
    return most


def gathered_bytes(stored: Iterable[Stored], *, recompute: float) -> int:
    """Bytes of all gathers of a micro-step, own pieces included, at most: forward, backward, and recomputed layers.

    A layer that is gathered as one is there for its recomputation and its backward pass together.

    Args:
        recompute: share of the layers that are computed again; True is all of them.
    """
    cut = [p for p in stored if not p.stays_whole]
    return sum(int(p.num_bytes * (p.uses + (p.in_layer and p.gathered_with == p.module) * recompute)) for p in cut)


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
