"""Distributed QLoRA training: a 4-bit base, LoRA layers of our own, sharded training, adapters that load everywhere.

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qlora.version import __version__

if TYPE_CHECKING:
    from qlora.adapter.base import load_base
    from qlora.adapter.files import delete_adapter, load_adapter, save_adapter
    from qlora.adapter.hotswap import hotswap_adapter
    from qlora.config.schema import JobConfig, LoraConfig, QuantizationConfig
    from qlora.errors import QloraError
    from qlora.lora.from_inputs import start_from_inputs
    from qlora.lora.inject import inject_lora
    from qlora.lora.layer import LoraLayer, disable_adapter, merge_adapter, unmerge_adapter
    from qlora.lora.linear import LoraLinear
    from qlora.lora.mix import mix_adapters
    from qlora.lora.switch import adapters_by_row, set_adapter

_HOMES = {
    "load_base": "qlora.adapter.base",
    "delete_adapter": "qlora.adapter.files",
    "load_adapter": "qlora.adapter.files",
    "save_adapter": "qlora.adapter.files",
    "JobConfig": "qlora.config.schema",
    "LoraConfig": "qlora.config.schema",
    "QuantizationConfig": "qlora.config.schema",
    "QloraError": "qlora.errors",
    "start_from_inputs": "qlora.lora.from_inputs",
    "inject_lora": "qlora.lora.inject",
    "LoraLayer": "qlora.lora.layer",
    "LoraLinear": "qlora.lora.linear",
    "adapters_by_row": "qlora.lora.switch",
    "hotswap_adapter": "qlora.adapter.hotswap",
    "mix_adapters": "qlora.lora.mix",
    "set_adapter": "qlora.lora.switch",
    "disable_adapter": "qlora.lora.layer",
    "merge_adapter": "qlora.lora.layer",
    "unmerge_adapter": "qlora.lora.layer",
}
__all__ = [
    "JobConfig",
    "LoraConfig",
    "LoraLayer",
    "LoraLinear",
    "QloraError",
    "QuantizationConfig",
    "__version__",
    "adapters_by_row",
    "delete_adapter",
    "disable_adapter",
    "hotswap_adapter",
    "inject_lora",
    "load_adapter",
    "load_base",
    "merge_adapter",
    "mix_adapters",
    "save_adapter",
    "set_adapter",
    "start_from_inputs",
    "unmerge_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlora' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
