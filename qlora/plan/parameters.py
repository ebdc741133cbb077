"""The parameters that training holds of a base, from its shapes and a job: packed bytes and statistics of each 4-bit weight,
what stays in 16 bits, A and B, modules trained as wholes; and what ZeRO-3 keeps whole and gathers together of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from qlora.config.schema import JobConfig, QuantizationConfig
from qlora.distributed.zero_config import LAYER_BYTES
from qlora.errors import ConfigError
from qlora.lora.target import ALL_LINEAR, Candidate, choose, ends_with, refuse_unused_patterns
from qlora.lora.update import Update, pattern_of
from qlora.plan.shapes import BaseShapes, TensorShape

Part = Literal["packed weights", "statistics", "unquantized", "trained"]
ITEMSIZE = {"auto": 1, "uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
NESTED_BLOCK_SIZE = 256  # scales that share an fp32 scale under double quantization
ROW_SCALE_BYTES = 4  # of a row in 8 bits


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
    return by_hook(_within_budget(stored, zero.model_persistence_threshold))


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


def is_quantized(tensor: TensorShape, job: JobConfig) -> bool:
    """Whether loading quantizes this tensor."""
    config = job.model.quantization
    skipped = config is not None and any(ends_with(tensor.module, name) for name in config.skip_modules)
    return tensor.kind == "linear" and config is not None and not skipped


def is_saved(module: str, job: JobConfig) -> bool:
    """Whether `lora.modules_to_save` names this module, or one that it is in."""
    return any(f".{name}." in f".{module}." for name in job.lora.modules_to_save)


def statistics_bytes(num_weights: int, config: QuantizationConfig) -> int:
    """Bytes of the scales of a 4-bit weight; the layout is described in `qlora.ops.nf4`."""
    num_blocks = -(-num_weights // config.block_size)
    return 4 + 4 * -(-num_blocks // NESTED_BLOCK_SIZE) + num_blocks if config.double_quant else 4 * num_blocks


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


def by_hook(stored: list[Stored]) -> list[Stored]:
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
