"""Putting LoRA layers into a model, in place, and saying what was done.

Works on any `nn.Module`. Everything that was there is frozen; what trains is A and B of the targeted layers and, where
asked for, norms, embeddings or the output head as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config.schema import LoraConfig
from qlora.distributed.collectives import widen
from qlora.errors import AdapterError, ConfigError
from qlora.lora.layer import LoraLayer, LoraLinear, lora_layers, refuse_merged
from qlora.lora.target import ALL_LINEAR, Candidate, Selection, select, summarize
from qlora.ops import nf4
from qlora.quant.linear import Linear4bit


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter of a model, kept in the model's `qlora_adapters` by name.

    Attributes:
        config: as asked for.
        targeted: paths of the layers it adapts, in the model's order.
        trained: paths of modules that are trained as a whole.
    """

    config: LoraConfig
    targeted: tuple[str, ...]
    trained: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoraReport:
    """What an injection did. Counts are of weights: a 4-bit layer counts its weights, not its bytes.

    Attributes:
        targeted: path -> the entry of target_modules that matched it.
        skipped: path -> why a layer that could carry an adapter does not.
        trained: modules trained as a whole.
        num_trainable, num_total: parameters.
    """

    targeted: dict[str, str]
    skipped: dict[str, str]
    trained: tuple[str, ...]
    num_trainable: int
    num_total: int
    untargetable: dict[str, str] = field(default_factory=dict)

    @property
    def percent(self) -> float:
        """Share of the parameters that train, in percent."""
        return 100.0 * self.num_trainable / self.num_total

    def __str__(self) -> str:
        lines = [f"LoRA on {len(self.targeted)} layers"]
        lines += [f"  {name}: {count} x, by {entry}" for (name, entry), count in summarize(self.targeted).items()]
        if self.trained:
            lines.append(f"trained as a whole: {', '.join(self.trained[:6])}{' ...' if len(self.trained) > 6 else ''}")
        for title, table in (("left without", self.skipped), ("cannot carry one", self.untargetable)):
            lines += [f"  {title}: {name}, {count} x ({why})" for (name, why), count in summarize(table).items()]
        lines.append(f"trainable {self.num_trainable:,} of {self.num_total:,} parameters ({self.percent:.4g}%)")
        return "\n".join(lines)


def inject_lora(model: nn.Module, config: LoraConfig, name: str = "default", *, seed: int = 0) -> LoraReport:
    """Wrap the targeted layers with LoRA layers, in place, and freeze everything else. Rank-local, same on every rank.

    Args:
        model: any module. bitsandbytes' Linear4bit layers are all taken over, without copying their weights.
        name: of the adapter. Injecting a second name adds to the same layers and makes the new one active.
        seed: A's values depend on it and on each module's path.

    Raises:
        ConfigError, AdapterError: see `lora.target.select`, `check_can_add`; also a name that exists.
        Nothing is changed then.
    """
    adapters: dict[str, AdapterRecord] = model.__dict__.setdefault("qlora_adapters", {})
    if name in adapters:
        raise AdapterError(f"the model has an adapter {name!r} already", next_step="choose another name, or delete it first")
    candidates, untargetable = list_candidates(model)
    selection = _without_narrow_layers(model, config, select(candidates, config.target_modules, config.exclude_modules))
    trained = _modules_to_train(model, config, set(selection.targeted))
    check_can_add(model, name, trained)
    take_over_bitsandbytes(model)
    for path in selection.targeted:
        wrap(model, path).add_adapter(name, config, path, seed)
    activate(model, name, trained)
    adapters[name] = AdapterRecord(config, tuple(selection.targeted), tuple(trained))
    trainable = count_parameters(model, trainable_only=True)
    return LoraReport(
        selection.targeted, selection.skipped, tuple(trained), trainable, count_parameters(model), untargetable
    )


def check_can_add(model: nn.Module, name: str, trained: Collection[str]) -> None:
    """Raise, before anything is changed, what adding an adapter would raise half way.

    Raises:
        AdapterError: a name that is none, an adapter that is merged, or modules trained as wholes beside another adapter:
            they have one value, so that the other one would silently compute something else.
        BaseModelError: a bitsandbytes layer that is not quantized yet, or repacked.
    """
    if not name or "." in name or hasattr(nn.ParameterDict, name):
        raise AdapterError("an adapter cannot have this name", found=name, wanted="a word, for example default")
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
            nf4.check_linear4bit(module, path)


def take_over_bitsandbytes(model: nn.Module) -> None:
    """Replace every bitsandbytes Linear4bit by ours, without copying its weight; also those that get no adapter.

    Of bitsandbytes' own, one evaluation on some CPUs would cut the gradient off for all layers before it.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, nf4.BnbLinear4bit):
            stored: Any = module.weight
            dtype = module.compute_dtype or stored.quant_state.dtype
            model.set_submodule(path, Linear4bit.from_bitsandbytes(module, dtype, path))


def _without_narrow_layers(model: nn.Module, config: LoraConfig, selection: Selection) -> Selection:
    """Leave out what all-linear found but r does not fit, such as a gate of one output. Raises ConfigError."""
    targeted, skipped = dict(selection.targeted), dict(selection.skipped)
    for path, entry in selection.targeted.items():
        layer: Any = model.get_submodule(path)
        limit = min(layer.in_features, layer.out_features)
        if config.r <= limit:
            continue
        del targeted[path]
        skipped[path] = f"a side of {limit}, below r = {config.r}"
        if entry != ALL_LINEAR or not targeted:
            raise ConfigError(
                f"the rank exceeds the smaller dimension of {path}",
                place="lora.r",
                found=config.r,
                wanted=f"at most {limit}",
            )
    return Selection(targeted, skipped)


def list_candidates(model: nn.Module) -> tuple[list[Candidate], dict[str, str]]:
    """The modules that selection may see, and why some weights can carry no LoRA layer of today."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    found: list[Candidate] = []
    inside: list[str] = []
    untargetable: dict[str, str] = {}
    for path, module in model.named_modules():
        if not path or any(path.startswith(prefix) for prefix in inside):
            continue
        base = module
        if isinstance(module, LoraLayer):
            inside.append(path + ".")
            base = module.base_layer
        classes = tuple(cls.__name__ for cls in type(base).__mro__ if cls not in (nn.Module, object))
        found.append(Candidate(path, classes, is_supported(base), is_head=module is head or base is head))
        if not is_supported(base) and ("Linear" in classes or "Conv1D" in classes):
            untargetable[path] = f"{classes[0]} is not torch's Linear"
        for own, parameter in base.named_parameters(recurse=False):
            if parameter.ndim == 3:
                untargetable[f"{path}.{own}"] = "3-D expert weight"
    return found, untargetable


def is_supported(module: nn.Module) -> bool:
    """Whether a LoRA layer of ours can wrap this module: torch's Linear, our or bitsandbytes' 4-bit one.

    Other subclasses of Linear may compute something else in their forward, which a LoRA layer would leave out, or are
    never called, as the one in torch's MultiheadAttention, whose weight alone is used.
    """
    return type(module) in (nn.Linear, Linear4bit) or isinstance(module, nf4.BnbLinear4bit)


def wrap(model: nn.Module, path: str) -> LoraLayer:
    """The LoRA layer at a path, put there around what was there where it is not one already."""
    module: Any = model.get_submodule(path)
    if isinstance(module, LoraLayer):
        return module
    if not is_supported(module) or not isinstance(module, nn.Linear):
        raise AdapterError("not a linear layer that can carry one", place=path, found=type(module).__name__)
    layer = LoraLinear(module).train(module.training)
    model.set_submodule(path, layer)
    return layer


def activate(model: nn.Module, name: str, trained: tuple[str, ...] | list[str]) -> None:
    """Make one adapter active and it, with the wholly trained modules, all that is trainable."""
    model.requires_grad_(False)
    for _, layer in lora_layers(model):
        layer.set_active(name if name in layer.lora_A else None)
    train_wholly(model, trained)


def train_wholly(model: nn.Module, paths: Iterable[str]) -> None:
    """Make all parameters of these modules trainable in fp32, while they go on giving out the dtype they gave out before."""
    wanted = {id(p): p for path in paths for p in model.get_submodule(path).parameters(recurse=False)}
    # Of all modules: a tied weight has a second owner.
    for module in model.modules():
        own = [p.dtype for p in module.parameters(recurse=False) if id(p) in wanted]
        narrow = next((dtype for dtype in own if dtype in (torch.bfloat16, torch.float16)), None)
        if narrow is not None:
            _keep_output_dtype(module, narrow)
    for parameter in wanted.values():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            widen(parameter)
        parameter.requires_grad_(True)


def _keep_output_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Let a module whose parameters become fp32 be used as before. Norms of transformers widen their input themselves."""

    def widen(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(a.float() if a.is_floating_point() else a for a in args)

    def narrow_output(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.to(dtype)

    if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
        module.register_forward_pre_hook(widen)
    module.register_forward_hook(narrow_output)


def _modules_to_train(model: nn.Module, config: LoraConfig, targeted: set[str]) -> list[str]:
    """Paths of the norms, embeddings and head that the config asks to train as a whole."""
    paths = {id(module): path for path, module in model.named_modules()}
    chosen: list[str] = []
    if config.train_norms:
        norms = [path for path, module in model.named_modules() if is_norm(module)]
        if not norms:
            raise ConfigError("the model has no normalisation layers", place="lora.train_norms")
        chosen += norms
    get_input, get_output = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    embedding = get_input() if callable(get_input) else None
    head = get_output() if callable(get_output) else None
    for asked, module, key in (
        (config.train_embeddings, embedding, "train_embeddings"),
        (config.train_head, head, "train_head"),
    ):
        if asked and module is None:
            raise ConfigError("the model does not say which module that is", place=f"lora.{key}")
        if asked:
            chosen.append(paths[id(module)])
    tied = embedding is not None and head is not None and embedding.weight is head.weight
    if tied and config.train_embeddings != config.train_head:
        raise ConfigError(
            "the base ties its embeddings to its head, so they can only be trained together",
            place="lora.train_embeddings, lora.train_head",
            next_step="set both to true, or both to false",
        )
    both = targeted & set(chosen)
    if both:
        raise ConfigError("a module is both targeted and trained as a whole", place="lora", found=", ".join(sorted(both)))
    return chosen


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer with parameters: torch's own, or a class named ...Norm."""
    known = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) or type(module).__name__.endswith("Norm")
    return known and any(True for _ in module.parameters(recurse=False))


def count_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of weights. 4-bit layers count their weights, not their bytes; ZeRO-3 shares count as the whole."""
    packed = {id(p): 0 for m in model.modules() if isinstance(m, Linear4bit) for p in (m.weight, m.statistics)}
    for module in model.modules():
        if isinstance(module, (Linear4bit, nf4.BnbLinear4bit)):
            packed[id(module.weight)] = module.in_features * module.out_features
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad or not trainable_only:
            whole = getattr(parameter, "ds_numel", parameter.numel())
            total += packed.get(id(parameter), whole)
    return total
