"""Which values an update starts from, of those that were prepared while the base was loaded.

`qlora.quant.residual` prepares them; here they are matched with what is being injected. A base of which something was
taken out fits the adapter that starts from just that, and no other.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError, ConfigError
from qlora.lora.expert_paths import module_at
from qlora.lora.kinds import kind_of
from qlora.lora.layer import LoraLayer
from qlora.lora.linear import LoraLinear
from qlora.lora.update import Update
from qlora.quant.residual import InitialFactors

PLACE = "lora.init_lora_weights"


def needs_weights(config: LoraConfig) -> bool:
    """Whether training starts from factors of the base's original weights."""
    return config.init_lora_weights.partition("_")[0] in ("pissa", "olora", "loftq")


def initial_factors(model: nn.Module) -> InitialFactors | None:
    """What was prepared while a model's base was loaded."""
    found: InitialFactors | None = model.__dict__.get("qlora_initial")
    return found


def prepared_starts(model: nn.Module, config: LoraConfig, targeted: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by path, where they were prepared. Rank-local.

    Raises:
        ConfigError: the config starts from the weights, and nothing, or something else, was prepared.
        AdapterError: the config starts otherwise, and the base was changed for another adapter.
    """
    prepared = initial_factors(model)
    if needs_weights(config) or config.init_lora_weights == "eva":
        refuse_other_kinds(model, targeted, config.init_lora_weights)
    if not needs_weights(config):
        refuse_changed_base(model, "another adapter cannot start from it")
        return {}
    if prepared is None:
        raise ConfigError(
            "this start needs the base's original weights, which are gone once it is loaded",
            place=PLACE,
            found=config.init_lora_weights,
            next_step="load the base with load_base(..., lora=CONFIG), which prepares it",
        )
    paths = list(targeted)
    other = [path for path in prepared.factors if path not in paths]
    if config.init_lora_weights != "loftq":  # which leaves out layers that are not quantized
        other += [path for path in paths if path not in prepared.factors]
    for path, own in prepared.factors.items():
        update = Update.of(config, path)
        if path in paths and (own.start[0].shape[0], own.scaling) != (update.r, update.scaling):
            other.append(path)
    if other or prepared.method != config.init_lora_weights:
        raise ConfigError(
            "the base was prepared for another start than this one",
            place=PLACE,
            found=f"{prepared.method}, {len(prepared.factors)} layers" + (f", not as here: {other[0]}" if other else ""),
            wanted=config.init_lora_weights,
            next_step="load the base again with load_base(..., lora=CONFIG) and inject the same config",
        )
    return {path: own.start for path, own in prepared.factors.items()}


def refuse_other_kinds(model: nn.Module, paths: Iterable[str], method: str) -> None:
    """Raise ConfigError where one of these layers is not linear: a start made for a matrix has no meaning there."""
    for path in paths:
        module = module_at(model, path)
        if kind_of(module) is not LoraLinear:
            what = module.base_layer if isinstance(module, LoraLayer) else module
            raise ConfigError(
                f"{method} is made for linear layers: an embedding is looked up, not multiplied with, and convolutions and "
                "fused experts hold no single matrix",
                place=PLACE,
                found=f"{path} ({type(what).__name__})",
                next_step="exclude it (lora.exclude_modules, lora.target_parameters), or take default or gaussian",
            )


def refuse_changed_base(model: nn.Module, why: str) -> None:
    """Raise AdapterError where something was taken out of the base, for what needs it as its files hold it."""
    prepared = initial_factors(model)
    if prepared is not None and prepared.changes_base:
        raise AdapterError(
            f"the base is the residual that an adapter started from ({prepared.method}), and {why}",
            next_step="load the base again, without that adapter",
        )
