"""`adapter_config.json` in PEFT's form: written from what was injected, read with nothing silently left out.

A field that would change the mathematics and that is not applied here refuses the file by the field's name. A field
that holds its off value, or one that only says how training went, is let through.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError
from qlora.lora.target import shortest_suffixes

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 10_000_000
# Fields that do not change what a loaded adapter computes. Which modules it adapts is read from the tensors' names.
HARMLESS = {
    "alora_invocation_tokens": None,
    "auto_mapping": ...,
    "base_model_name_or_path": ...,
    "ensure_weight_tying": ...,
    "eva_config": ...,
    "exclude_modules": ...,
    "fan_in_fan_out": ...,  # says how the base stores its weight; A and B are the same either way
    "inference_mode": ...,
    "layers_pattern": ...,
    "layers_to_transform": ...,
    "lora_alpha": ...,
    "lora_dropout": ...,
    "megatron_core": ...,
    "modules_to_save": ...,
    "peft_type": ...,
    "peft_version": ...,
    "qalora_group_size": ...,
    "r": ...,
    "revision": ...,
    "runtime_config": ...,
    "target_modules": ...,
    "task_type": ...,
    "use_rslora": ...,
}
# Initialisations that train a changed base; the others leave the base as it is.
INITS_ON_THE_BASE = ("gaussian", "eva", "orthogonal", True, False, None)


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's config says that matters for loading it."""

    r: int
    lora_alpha: float
    use_rslora: bool
    lora_dropout: float
    modules_to_save: tuple[str, ...]
    ties_weights: bool  # a weight that the base ties stays tied where it was trained as a whole
    base: str | None
    revision: str | None

    @property
    def scaling(self) -> float:
        """s in h = W x + s B A x."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def to_lora_config(self, target_modules: list[str], dtype: str) -> LoraConfig:
        """The injection that this adapter is the result of."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            use_rslora=self.use_rslora,
            lora_dropout=self.lora_dropout,
            target_modules=target_modules,
            dtype=dtype,
        )


def render(
    config: LoraConfig,
    *,
    targeted: tuple[str, ...],
    trained: tuple[str, ...],
    all_paths: list[str],
    base: str | None,
    revision: str | None,
    task_type: str | None,
) -> str:
    """The text of the file: indent 2, sorted keys."""
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": _target_modules(targeted, all_paths),
        "modules_to_save": shortest_suffixes(trained, all_paths) if trained else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "lora_bias": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "trainable_token_indices": None,
        "target_parameters": None,
    }
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _target_modules(targeted: tuple[str, ...], all_paths: list[str]) -> list[str] | str:
    """Suffixes, or a regular expression where a targeted path is the end of one that is not targeted."""
    try:
        return shortest_suffixes(targeted, all_paths)
    except AdapterError:
        return "|".join(re.escape(path) for path in sorted(targeted))


def read(folder: Path) -> AdapterConfig:
    """Read and check a config.

    Raises:
        AdapterError: missing, not JSON, not LoRA, or a field that would change the mathematics and is not applied here.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(f"no {CONFIG_NAME} in the folder", place=str(folder), wanted="an adapter or checkpoint folder")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError("the config is too large to be one", place=str(path), found=f"{path.stat().st_size} bytes")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise TypeError("not a JSON object")
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterError(f"not JSON: {error}", place=str(path)) from error
    if str(fields.get("peft_type", "")).upper() != "LORA":
        raise AdapterError("not a LoRA adapter", place=str(path), found=fields.get("peft_type"), wanted="peft_type LORA")
    for key, value in fields.items():
        _check_field(key, value, path)
    for key in ("r", "lora_alpha"):
        value = fields.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise AdapterError(f"{key} is not a positive number", place=str(path), found=value)
    if fields["r"] != int(fields["r"]):
        raise AdapterError("r is not a whole number", place=str(path), found=fields["r"])
    dropout = fields.get("lora_dropout") or 0.0
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise AdapterError("lora_dropout is not a number from 0 to below 1", place=str(path), found=dropout)
    saved = fields.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise AdapterError("modules_to_save is not a list of names", place=str(path), found=saved)
    return AdapterConfig(
        r=int(fields["r"]),
        lora_alpha=float(fields["lora_alpha"]),
        use_rslora=bool(fields.get("use_rslora")),
        lora_dropout=float(dropout),
        modules_to_save=tuple(saved),
        ties_weights=bool(fields.get("ensure_weight_tying")),
        base=fields.get("base_model_name_or_path"),
        revision=fields.get("revision"),
    )


def _check_field(key: str, value: Any, path: Path) -> None:
    if key == "init_lora_weights":
        harmless = value in INITS_ON_THE_BASE
    elif key == "bias":
        harmless = value in ("none", None)
    else:
        # An unknown field is let through where it is off: false, null, or empty.
        harmless = HARMLESS.get(key) is ... or value in (None, False, [], {}, "")
    if not harmless:
        raise AdapterError(
            f"{key} changes what the adapter computes, and this version does not apply it", place=str(path), found=value
        )
