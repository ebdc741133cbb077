"""Putting LoRA layers into a model, in place, and saying what was done.

Works on any `nn.Module`. Everything that was there is frozen; what trains is the updates of the targeted layers and, where
asked for, other modules as wholes (`lora.whole`) or rows of the embeddings (`lora.token_rows`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qlora.config.schema import LoraConfig
from qlora.distributed.collectives import whole_shape
from qlora.errors import AdapterError, ConfigError
from qlora.lora.expert_paths import module_at, why_untargeted, with_parameters, wrap_weight
from qlora.lora.experts import ExpertWeight, LoraExpertWeight
from qlora.lora.kinds import KINDS, WRAPPERS, kind_of
from qlora.lora.layer import LoraLayer, lora_layers, refuse_by_row, refuse_merged
from qlora.lora.linear import LoraLinear
from qlora.lora.report import LoraReport, count_parameters, matched_patterns
from qlora.lora.starts import initial_factors, prepared_starts
from qlora.lora.target import ALL_LINEAR, Candidate, Selection, choose, refuse_unused_patterns
from qlora.lora.token_rows import TokenIds, add_token_rows, token_rows
from qlora.lora.update import Update, pattern_of
from qlora.lora.whole import modules_to_train, train_wholly, without_trained
from qlora.ops import int8, nf4, nf4_format
from qlora.quant.linear import Linear4bit
from qlora.quant.linear8bit import Linear8bit


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter of a model, kept in the model's `qlora_adapters` by name.

    Attributes:
        config: as asked for.
        targeted: paths of the layers it adapts, in the model's order.
        trained: paths of modules that are trained as a whole.
        token_rows: ids of the tokens whose rows are trained, by the path of their embedding or head.
    """

    config: LoraConfig
    targeted: tuple[str, ...]
    trained: tuple[str, ...] = ()
    token_rows: TokenIds = field(default_factory=dict)


def inject_lora(model: nn.Module, config: LoraConfig, name: str = "default", *, seed: int = 0) -> LoraReport:
    """Wrap the targeted layers with LoRA layers, in place, and freeze everything else. Rank-local, same on every rank.

    Args:
        model: any module. bitsandbytes' quantized layers are all taken over, without copying their weights.
        name: of the adapter. Injecting a second name adds to the same layers and makes the new one active.
        seed: A's values depend on it and on each module's path.

    Raises:
        ConfigError, AdapterError: see `selection_of`, `lora.whole.modules_to_train`, `check_can_add`; also a name that
            exists. Nothing is changed then.
    """
    adapters: dict[str, AdapterRecord] = model.__dict__.setdefault("qlora_adapters", {})
    if name in adapters:
        raise AdapterError(f"the model has an adapter {name!r} already", next_step="choose another name, or delete it first")
    selection, untargetable = selection_of(model, config)
    trained = modules_to_train(model, config)
    rows = token_rows(model, config, selection.targeted, trained)
    check_can_add(model, name, trained)
    starts = prepared_starts(model, config, selection.targeted)
    take_over_bitsandbytes(model)
    for path in selection.targeted:
        wrap(model, path).add_adapter(name, config, path, seed, start=starts.get(path))
    add_token_rows(model, rows, name, getattr(torch, config.dtype))
    activate(model, name, trained)
    adapters[name] = AdapterRecord(config, tuple(selection.targeted), tuple(trained), rows)
    trainable = count_parameters(model, trainable_only=True)
    prepared = initial_factors(model) if starts else None
    return LoraReport(
        selection.targeted,
        selection.skipped,
        tuple(trained),
        trainable,
        count_parameters(model),
        untargetable,
        prepared.errors if prepared is not None else {},
        matched_patterns(config, selection.targeted),
        rows,
        config.init_lora_weights == "eva" and bool(selection.targeted),
    )


def selection_of(model: nn.Module, config: LoraConfig) -> tuple[Selection, dict[str, str]]:
    """Which layers of a model a config targets, and why some weights can carry no LoRA layer. Rank-local.

    Raises:
        ConfigError, AdapterError: see `lora.target.choose`; also a pattern of no targeted layer, a variant or a rank that a
            targeted layer cannot have, and a layer that is named here and trained as a whole.
    """
    candidates, untargetable = list_candidates(model)
    selection = without_trained(model, choose(candidates, config), modules_to_train(model, config))
    selection = with_parameters(model, config, selection, modules_to_train(model, config))
    refuse_unused_patterns(config, selection.targeted)
    untargetable = {path: why for path, why in untargetable.items() if path not in selection.targeted}
    return _without_narrow_layers(model, config, selection), untargetable


def check_can_add(model: nn.Module, name: str, trained: Collection[str]) -> None:
    """Raise, before anything is changed, what adding an adapter would raise half way.

    Raises:
        AdapterError: a name that is none, an adapter that is merged or used by row, or modules trained as wholes beside
            another adapter: they have one value, so that the other one would silently compute something else.
        BaseModelError: a bitsandbytes layer that is not quantized yet, or repacked.
    """
    if not name or "." in name or hasattr(nn.ParameterDict, name):
        raise AdapterError("an adapter cannot have this name", found=name, wanted="a word, for example default")
    refuse_by_row(model)
    refuse_merged(model)
    others = {own: record for own, record in model.__dict__.get("qlora_adapters", {}).items() if own != name}
    sharing = [own for own, record in others.items() if trained or record.trained]
    if sharing:
        raise AdapterError(
            "modules that are trained as wholes have one value, so no other adapter can be beside them",
            found=f"adapter {sharing[0]!r} beside {name!r}",
            next_step="use one model for each, or train neither norms, embeddings nor head",
        )
    for path, module in model.named_modules():
        if isinstance(module, nf4.BnbLinear4bit):
            nf4_format.check_linear4bit(module, path)
        elif isinstance(module, nf4.BnbLinear8bit):
            int8.check_linear8bit(module, path)


def take_over_bitsandbytes(model: nn.Module) -> None:
    """Replace every quantized layer of bitsandbytes by ours, without copying its weight; also those that get no adapter.

    Of bitsandbytes' own in 4 bits, one evaluation on some CPUs would cut the gradient off for all layers before it. Those in
    8 bits quantize their inputs, so that gradients would not be those of what was computed.
    """
    usual = _usual_dtype(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nf4.BnbLinear4bit):
            stored: Any = module.weight
            dtype = module.compute_dtype or stored.quant_state.dtype
            model.set_submodule(path, Linear4bit.from_bitsandbytes(module, dtype, path))
        elif isinstance(module, nf4.BnbLinear8bit):
            dtype = usual if module.bias is None else module.bias.dtype
            model.set_submodule(path, Linear8bit.from_bitsandbytes(module, dtype, path))


def _usual_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most floating-point parameters, by elements: what an 8-bit layer, which has none, is to compute in."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=counts.__getitem__, default=torch.float32)


def _without_narrow_layers(model: nn.Module, config: LoraConfig, selection: Selection) -> Selection:
    """Leave out what all-linear found but r does not fit, such as a gate of one output. Raises ConfigError."""
    targeted, skipped = dict(selection.targeted), dict(selection.skipped)
    for path, entry in selection.targeted.items():
        update = Update.of(config, path)
        limit = largest_rank(module_at(model, path), update)
        if update.r <= limit:
            continue
        del targeted[path]
        skipped[path] = f"a side of {limit}, below r = {update.r}"
        if entry != ALL_LINEAR or not targeted:
            raise ConfigError(
                f"the rank exceeds the smaller dimension of {path}",
                place="lora.r" if pattern_of(config.rank_pattern, path) is None else "lora.rank_pattern",
                found=update.r,
                wanted=f"at most {limit}",
                next_step="lower it, give the layer a rank of its own (lora.rank_pattern), or exclude it",
            )
    return Selection(targeted, skipped)


def largest_rank(module: nn.Module, update: Update) -> int:
    """The smaller side of the matrix that this module's update is added to. Raises ConfigError: see `LoraLayer.shapes`."""
    kind = kind_of(module)
    assert kind is not None
    A, B = list(kind.shapes(base_of(module), update).values())[:2]
    return min(math.prod(A[1:]), B[0])


def base_of(module: nn.Module) -> nn.Module:
    """The layer that a LoRA layer wraps; any other module itself."""
    return module.base_layer if isinstance(module, WRAPPERS) else module


def list_candidates(model: nn.Module) -> tuple[list[Candidate], dict[str, str]]:
    """The modules that selection may see, and why some weights can carry no LoRA layer of today."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    found: list[Candidate] = []
    inside = None  # modules come before what is inside them, which follows at once
    untargetable: dict[str, str] = {}
    for path, module in model.named_modules():
        if not path or (inside is not None and path.startswith(inside)):
            continue
        base = base_of(module)
        if isinstance(module, WRAPPERS):
            inside = f"{path}."
        classes = tuple(cls.__name__ for cls in type(base).__mro__ if cls not in (nn.Module, object))
        kind = kind_of(base)
        is_head = module is head or base is head
        found.append(Candidate(path, classes, kind is not None, is_linear=kind is LoraLinear, is_head=is_head))
        if kind is None and ("Linear" in classes or "Conv1D" in classes):
            untargetable[path] = f"{classes[0]} is not torch's Linear"
        for own, parameter in base.named_parameters(recurse=False):
            if kind is None and len(whole_shape(parameter)) == 3:
                untargetable[f"{path}.{own}"] = why_untargeted(base, own)
    return found, untargetable


def wrap(model: nn.Module, path: str) -> LoraLayer:
    """The LoRA layer at a path, put there around what was there where it is not one already."""
    module = module_at(model, path)
    if isinstance(module, LoraLayer):
        return module
    if isinstance(module, ExpertWeight):
        return wrap_weight(model, path)
    kind = kind_of(module)
    if kind is None:
        raise AdapterError("not a layer that can carry one", place=path, found=type(module).__name__)
    layer = kind(module).train(module.training)
    model.set_submodule(path, layer)
    return layer


def unwrap_empty(model: nn.Module, keep: Collection[str] = ()) -> None:
    """Put back what layers without any update wrapped, so that another kind can take their place.

    Args:
        keep: paths that are to carry a low-rank update again.
    """
    for path, layer in list(lora_layers(model)):
        if layer.updates or not path or (path in keep and kind_of(layer) in KINDS):
            continue
        owner, _, own = path.rpartition(".")
        if not isinstance(layer, LoraExpertWeight):
            model.set_submodule(path, layer.base_layer)
            continue
        experts: Any = model.get_submodule(owner)
        delattr(experts, own)
        if not experts.weights:
            model.set_submodule(owner, experts.base_layer)


@contextmanager
def without_layers_of(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, the layers that this adapter alone has are not there; for checks of what is to take its place."""
    layers = [
        (path, layer)
        for path, layer in lora_layers(model)
        if path and set(layer.updates) == {name} and not isinstance(layer, LoraExpertWeight)
    ]
    for path, layer in layers:
        model.set_submodule(path, layer.base_layer)
    try:
        yield
    finally:
        for path, layer in layers:
            model.set_submodule(path, layer)


def activate(model: nn.Module, name: str, trained: tuple[str, ...] | list[str]) -> None:
    """Make one adapter active and it, with the wholly trained modules, all that is trainable."""
    model.requires_grad_(False)
    for _, layer in lora_layers(model):
        layer.set_active(name if name in layer.updates else None)
    train_wholly(model, trained)
