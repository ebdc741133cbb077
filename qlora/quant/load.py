"""Loading a base: a skeleton without storage, filled tensor by tensor, each quantized while it is read.

At no time is more of a tensor that is quantized held in 16 bits than a piece, and under ZeRO-3 a rank reads, quantizes
and keeps its run of every tensor alone. The bytes are those of transformers' own loading with BitsAndBytesConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config.schema import QuantizationConfig
from qlora.distributed.sharding import Sharding
from qlora.ops import int8, nf4
from qlora.quant import room
from qlora.quant.fill import all_rows, all_scales, quantize_rows_run, quantize_run, quantize_transpose, read_run
from qlora.quant.fillings import Filling
from qlora.quant.grow import grow_vocabulary
from qlora.quant.linear import Linear4bit, QuantizedLinear
from qlora.quant.residual import InitialFactors, Method, change_base
from qlora.quant.skeleton import Skeleton, check_shape, read_skeleton
from qlora.quant.source import BaseSource


@dataclass(frozen=True)
class BaseRecord:
    """What a loaded base is, kept on the model as `qlora_base`.

    Attributes:
        source: where it came from.
        dtype: of unquantized weights, and what quantized layers compute in.
        quantization: as asked for; of a base that came quantized, as it was found; None for none.
        quantized: paths of the quantized layers.
        unquantized: path -> why it was left, for linear layers and expert weights that stay as they are.
        unexpected: tensors in the files that the architecture has no place for.
    """

    source: BaseSource
    dtype: torch.dtype
    quantization: QuantizationConfig | None
    quantized: tuple[str, ...]
    unquantized: dict[str, str]
    unexpected: tuple[str, ...]


def load_model(
    source: BaseSource,
    *,
    dtype: str | torch.dtype = "bfloat16",
    quantization: QuantizationConfig | None = None,
    device: torch.device | str | None = None,
    attention: str = "auto",
    sharding: Sharding | None = None,
    check_room: bool = True,
    progress: Callable[[int, int], None] | None = None,
    initial: Method | InitialFactors | None = None,
    num_rows: int | None = None,
) -> Any:
    """Load a causal language model, frozen and in eval mode.

    Rank-local without a sharding: every rank that calls it holds the whole base. With one it is a collective, and under
    ZeRO-3 a rank reads and keeps its share.

    Args:
        source: from `resolve_base`.
        dtype: of unquantized weights, and of what quantized layers compute in.
        quantization: None leaves the base as it is (a base that comes quantized stays so either way).
        device: None is the current GPU, or the CPU where there is none.
        attention: a name transformers' attention interface knows; auto leaves the choice to transformers.
        sharding: from `Runtime.sharding`.
        check_room: refuse a base that the free memory does not hold.
        progress: called with (parameters done, parameters in all).
        initial: what is taken out of some weights before they are quantized, or how to find it; kept as `qlora_initial`.
        num_rows: of embedding and head, where the files hold less (see `grow.grow_vocabulary`).

    Raises:
        BaseModelError: see `skeleton.read_skeleton`, `room.check_room`; the same on every rank.
        ConfigError: see `residual.change_base`; the same on every rank.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    device = torch.device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
    sharding = sharding or Sharding()
    skeleton = sharding.together(partial(read_skeleton, source, dtype, quantization, attention=attention))
    model = skeleton.model
    if num_rows is not None:
        sharding.together(partial(grow_vocabulary, skeleton, num_rows))
    if check_room:
        sharding.together(partial(room.check_room, skeleton, sharding, device))
    _settle_ties(skeleton, sharding, device)
    if initial is not None:
        model.qlora_initial = change_base(skeleton, initial, sharding, device, dtype)
    _fill(skeleton, sharding, device, dtype, progress)
    _tie(model)
    _restore_computed_buffers(model, device)
    _load_generation_config(model, source)
    quantized = tuple(name for name, module in model.named_modules() if isinstance(module, QuantizedLinear))
    model.requires_grad_(False).eval()
    model.qlora_base = BaseRecord(
        source, dtype, skeleton.quantization, quantized, skeleton.unquantized, tuple(skeleton.unexpected)
    )
    return model


def _settle_ties(skeleton: Skeleton, sharding: Sharding, device: torch.device) -> None:
    """Files may hold both sides of a tie. As transformers has it, equal ones are one tensor, others are not tied."""
    ties, fillings = skeleton.model.all_tied_weights_keys, skeleton.fillings
    for target, origin in list(ties.items()):
        if target not in fillings or origin not in fillings:
            continue
        same = sharding.together(partial(_same_run, fillings[target], fillings[origin], sharding))
        if sharding.exchange(torch.tensor([float(same)], device=device)).all():
            del fillings[target]
        else:
            del ties[target]


def _same_run(one: Filling, other: Filling, sharding: Sharding) -> bool:
    """Whether two fillings are equal within this rank's run. Rank-local."""
    if [entry.shape for entry in one.entries] != [entry.shape for entry in other.entries]:
        return False
    for a, b in zip(one.entries, other.entries, strict=True):
        start, stop = sharding.run(a.num_elements)
        for first in range(start, stop, nf4.CHUNK_ELEMENTS):
            last = min(first + nf4.CHUNK_ELEMENTS, stop)
            if not torch.equal(a.read(first, last), b.read(first, last)):
                return False
    return True


def _fill(
    skeleton: Skeleton,
    sharding: Sharding,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Read this rank's run of every parameter, and every buffer that the files hold. Collective."""
    model, fillings = skeleton.model, skeleton.fillings
    dtypes = skeleton.dtypes(dtype)
    for done, (key, filling) in enumerate(fillings.items()):
        path, _, own_name = key.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QuantizedLinear) and own_name == "weight":
            _fill_quantized(module, filling, sharding, device, dtype)
        else:
            _fill_tensor(model, key, filling, sharding, device, dtypes[key])
        if progress is not None:
            progress(done + 1, len(fillings))


def _fill_quantized(
    layer: QuantizedLinear, filling: Filling, sharding: Sharding, device: torch.device, dtype: torch.dtype
) -> None:
    """Read and quantize this rank's run of one weight, and keep it with its run of the statistics. Collective."""
    entry = filling.entries[-1]
    if filling.came is not None:
        packed, statistics = sharding.together(partial(filling.came.read, sharding, device))
    elif layer.transposed_in_files:
        # A run of rows of the transpose lies all over the file.
        packed, statistics = sharding.together(partial(quantize_transpose, layer, entry, device, dtype))
    elif isinstance(layer, Linear4bit):
        packed, scales = sharding.together(partial(quantize_run, entry, layer.spec, sharding, device, dtype))
        statistics = nf4.pack_statistics(all_scales(scales, entry.num_elements, layer.spec, sharding), layer.spec)
    else:
        packed, absmax = sharding.together(partial(quantize_rows_run, entry, sharding, device, dtype))
        statistics = int8.pack_statistics(all_rows(absmax, entry.shape, sharding))
    layer.set_packed(packed, statistics, dtype)
    sharding.keep(layer.weight)
    sharding.keep(layer.statistics)


def _fill_tensor(
    model: Any, key: str, filling: Filling, sharding: Sharding, device: torch.device, dtype: torch.dtype
) -> None:
    """Read this rank's run of an unquantized parameter and keep it, or a buffer. Collective."""
    path, _, own_name = key.rpartition(".")
    module = model.get_submodule(path)
    target = getattr(module, own_name)
    is_parameter = isinstance(target, nn.Parameter)

    def read() -> Tensor:
        own = sharding if is_parameter else Sharding()
        if filling.joined is not None:
            return read_run(filling.joined, own, device, dtype)
        if filling.converter is not None:
            value = _convert(filling, key, model)
            check_shape(filling.entries[-1], key, tuple(value.shape), tuple(target.shape))
            return value.to(device=device, dtype=dtype)
        return read_run(filling.entries[-1], own, device, dtype)

    value = sharding.together(read)
    if is_parameter:
        parameter = nn.Parameter(value, requires_grad=False)
        setattr(module, own_name, parameter)
        sharding.keep(parameter)
    else:
        setattr(module, own_name, value)


def _convert(filling: Filling, key: str, model: Any) -> Tensor:
    """A parameter that transformers makes of several tensors of the files, such as fused experts."""
    made = filling.converter.convert(key, model=model, config=model.config)
    filling.converter = None
    value = made[key]
    return value[0] if isinstance(value, list) else value


def _tie(model: Any) -> None:
    """Point tied parameters at the one that was read."""
    # Twice, because of three that are tied the one in the files may come last.
    for target, origin in [*model.all_tied_weights_keys.items()] * 2:
        here, there = (model.get_parameter_or_buffer(name) for name in (target, origin))
        if here.is_meta and not there.is_meta:
            _set_parameter(model, target, there)
        elif there.is_meta and not here.is_meta:
            _set_parameter(model, origin, here)


def _set_parameter(model: Any, name: str, parameter: Tensor) -> None:
    path, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(path), own_name, parameter)


def _restore_computed_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no file holds (rotary frequencies and the like), as transformers does after loading."""
    owners = set()
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, own_name = name.rpartition(".")
        owner = model.get_submodule(path)
        owners.add(owner)
        owner.register_buffer(own_name, torch.empty_like(buffer, device=device), persistent=False)
    for tensor in (*model.parameters(), *(b for m in model.modules() if m not in owners for b in m.buffers(False))):
        setattr(tensor, "_is_hf_initialized", True)  # noqa: B010  transformers initializes only what does not carry this mark
    for module in model.modules():
        module._is_hf_initialized = module not in owners
    model.initialize_weights()


def _load_generation_config(model: Any, source: BaseSource) -> None:
    from transformers import GenerationConfig

    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
