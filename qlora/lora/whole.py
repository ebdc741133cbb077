"""Modules that are trained as wholes beside the LoRA layers: norms, embeddings, head, and what `modules_to_save` names.

Their parameters become fp32, which are their own master copy, while what the module gives out keeps its dtype. They have
one value, so that a model that trains any holds one adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora.config.schema import LoraConfig
from qlora.distributed.collectives import widen
from qlora.errors import ConfigError
from qlora.lora.target import ALL_LINEAR, Selection, ends_with
from qlora.ops import nf4
from qlora.quant.linear import QuantizedLinear

NARROW = (torch.bfloat16, torch.float16)


def modules_to_train(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the modules with parameters of their own that a config asks to train as wholes. Rank-local.

    Raises:
        ConfigError: there is no such module, it is quantized, or it shares a weight with one that is not asked for.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    chosen: dict[str, str] = {}  # path -> the key that asks for it
    if config.train_norms:
        chosen |= {path: "train_norms" for path, module in model.named_modules() if is_norm(module)}
        if not chosen:
            raise ConfigError("the model has no normalisation layers", place="lora.train_norms")
    sides: dict[str, str] = {}
    for key, side in (("train_embeddings", "input"), ("train_head", "output")):
        get = getattr(model, f"get_{side}_embeddings", None)
        module = get() if callable(get) else None
        if module is not None:
            sides[key] = paths[id(module)]
        if getattr(config, key):
            if module is None:
                raise ConfigError("the model does not say which module that is", place=f"lora.{key}")
            chosen.setdefault(sides[key], key)
    for entry in config.modules_to_save:
        for path in _with_parameters(model, entry):
            chosen.setdefault(path, "modules_to_save")
    for path, key in chosen.items():
        _refuse_quantized(path, model.get_submodule(path), key)
    _refuse_half_of_tied(model, chosen, sides)
    return list(chosen)


def _with_parameters(model: nn.Module, entry: str) -> list[str]:
    """The modules that hold the parameters of those that an entry names. Raises ConfigError."""
    named = dict(model.named_modules())
    roots = [path for path in named if path and ends_with(path, entry)]
    if not roots:
        raise ConfigError(
            f"the entry {entry!r} matches no module",
            place="lora.modules_to_save",
            wanted="a module's name, or the end of its path, for example " + ", ".join(_examples(model)),
        )
    inside = (p for p in named if any(p == root or p.startswith(f"{root}.") for root in roots))
    found = [path for path in inside if any(True for _ in named[path].parameters(recurse=False))]
    if not found:
        raise ConfigError(f"{roots[0]} has no parameters to train", place="lora.modules_to_save", found=entry)
    return found


def _examples(model: nn.Module) -> list[str]:
    """Names of modules of which there is one, as a head or a classifier is."""
    names = [p.rpartition(".")[2] for p, m in model.named_modules() if p and any(True for _ in m.parameters())]
    return [name for name in dict.fromkeys(names) if names.count(name) == 1 and not name.isdigit()][:6]


def _refuse_quantized(path: str, module: nn.Module, key: str) -> None:
    packed = isinstance(module, (QuantizedLinear, nf4.BnbLinear4bit, nf4.BnbLinear8bit))
    if packed or not all(p.is_floating_point() for p in module.parameters(recurse=False)):
        raise ConfigError(
            "a quantized weight cannot be trained: its steps are larger than an update",
            place=f"lora.{key}",
            found=f"{path} ({type(module).__name__})",
            next_step=f"add {path.rpartition('.')[2]} to model.quantization.skip_modules, which loads it unquantized",
        )


def _refuse_half_of_tied(model: nn.Module, chosen: Mapping[str, str], sides: Mapping[str, str]) -> None:
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    for together in owners.values():
        asked = together & set(chosen)
        if not asked or asked == together:
            continue
        if together <= set(sides.values()):
            by_name = "modules_to_save" in {chosen[path] for path in asked}
            raise ConfigError(
                "the base ties its embeddings to its head, so they can only be trained together",
                place="lora.modules_to_save" if by_name else "lora.train_embeddings, lora.train_head",
                found=f"{min(asked)}, without {min(together - asked)}",
                next_step="name both, or neither" if by_name else "set both to true, or both to false",
            )
        raise ConfigError(
            "these modules share a weight, so they can only be trained together",
            place="lora.modules_to_save",
            found=f"{min(asked)}, without {min(together - asked)}",
            next_step="name all of them, or none",
        )


def without_trained(model: nn.Module, selection: Selection, trained: Iterable[str]) -> Selection:
    """Leave out what all-linear found in modules that are trained as wholes. Raises ConfigError where it was named."""
    wholly = set(trained)
    weights = {id(p) for path in wholly for p in model.get_submodule(path).parameters(recurse=False)}
    targeted, skipped, named = dict(selection.targeted), dict(selection.skipped), []
    for path, entry in selection.targeted.items():
        module = model.get_submodule(path)
        if path not in wholly and not any(id(p) in weights for p in module.parameters()):
            continue
        del targeted[path]
        skipped[path] = "trained as a whole"
        if entry != ALL_LINEAR:
            named.append(path)
    if named:
        raise ConfigError(
            "a module is both targeted and trained as a whole",
            place="lora",
            found=", ".join(sorted(named)),
            next_step="exclude it (lora.exclude_modules), or do not train it as a whole",
        )
    if selection.targeted and not targeted:
        raise ConfigError(
            "all that target_modules finds is trained as a whole", place="lora.target_modules", next_step="set it to []"
        )
    return Selection(targeted, skipped)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer with parameters: torch's own, or a class named ...Norm."""
    known = _is_torch_norm(module) or type(module).__name__.endswith("Norm")
    return known and any(True for _ in module.parameters(recurse=False))


def _is_torch_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))


def train_wholly(model: nn.Module, paths: Iterable[str]) -> None:
    """Make all parameters of these modules trainable in fp32, while they go on giving out the dtype they gave out before."""
    wanted = {id(p): p for path in paths for p in model.get_submodule(path).parameters(recurse=False)}
    # Of all modules: a tied weight has a second owner.
    for module in model.modules():
        own = [p.dtype for p in module.parameters(recurse=False) if id(p) in wanted]
        narrow = next((dtype for dtype in own if dtype in NARROW), None)
        if narrow is not None:
            _keep_output_dtype(module, narrow)
    for parameter in wanted.values():
        if parameter.dtype in NARROW:
            widen(parameter)
        parameter.requires_grad_(True)


def _keep_output_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Let a module whose parameters become fp32 be used as before. Norms of transformers widen their input themselves."""

    def widen_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _cast(args, torch.float32), _cast(kwargs, torch.float32)

    def narrow_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _cast(output, dtype)

    if _is_torch_norm(module) or not is_norm(module):
        module.register_forward_pre_hook(widen_input, with_kwargs=True)
    module.register_forward_hook(narrow_output)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A value with its floating-point tensors in this dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(inner, dtype) for inner in value)
    if type(value) is dict:
        return {key: _cast(inner, dtype) for key, inner in value.items()}
    return value
