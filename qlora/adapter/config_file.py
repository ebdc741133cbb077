"""`adapter_config.json` in PEFT's form: written from what was injected, read with nothing silently left out.

A field that would change the mathematics and that is not applied here refuses the file by the field's name. A field
that holds its off value, or one that only says how training went, is let through.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.adapter import selection
from qlora.adapter.folder import read_json, short
from qlora.adapter.patterns import refuse_slow, texts_in
from qlora.adapter.residual import INITIAL_NAME
from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError
from qlora.lora.target import ends_with, shortest_suffixes

CONFIG_NAME = "adapter_config.json"
WITH_PATTERNS = (
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "modules_to_save",
)
MAX_NUMBER = 2**31  # of a rank or lora_alpha: what is above overflows in other readers
# Fields that are applied, or do not change what a loaded adapter computes. Any other must be off, also one that is not
# known yet. Which modules are adapted is read from the tensors' names.
HARMLESS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",  # this and the other initialisations: `init_lora_weights` says whether one was used
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",  # says how the base stores its weight; A and B are the same either way
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",  # of use_qalora
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    }
)
# Initialisations that leave the base as it is; the others train a changed base.
# Of the latter, those that PEFT finds again exactly on an unquantized base. Of others it would find something else without
# a word, so that they are written under a name that it refuses.
INITS_PEFT_REDOES = ("pissa", "olora")
INITS_ON_THE_BASE = ("gaussian", "eva", "orthogonal", "mica", True, False, None)


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's config says that matters for loading it.

    Attributes:
        selection: the keys of `LoraConfig` that chose its modules, to be written again where PEFT reads them alike.
        token_ids: tokens whose rows it holds, by the end of their module's path; "" is the input embedding.
        began: how A began, where that did not change the base; kept to be written again.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    lora_dropout: float
    use_dora: bool
    lora_bias: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    modules_to_save: tuple[str, ...]
    ties_weights: bool  # a weight that the base ties stays tied where it was trained as a whole
    base: str | None
    revision: str | None
    selection: dict[str, Any] = field(default_factory=dict)
    token_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    began: str = "default"

    def ids_of(self, path: str, folder: Path) -> tuple[int, ...]:
        """The token ids of the rows at a path. Raises AdapterError where the config names none."""
        for name, ids in self.token_ids.items():
            if not name or ends_with(path, name):
                return ids
        place = str(folder / CONFIG_NAME)
        raise AdapterError(f"trainable_token_indices does not say which tokens have the rows of {path}", place=place)

    def to_lora_config(self, target_modules: list[str], dtype: str) -> LoraConfig:
        """The injection that this adapter is the result of."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            use_rslora=self.use_rslora,
            lora_dropout=self.lora_dropout,
            use_dora=self.use_dora,
            lora_bias=self.lora_bias,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            target_modules=target_modules,
            init_lora_weights=self.began,
            dtype=dtype,
        )


def render(
    config: LoraConfig,
    *,
    targeted: Collection[str],
    trained: Collection[str],
    token_rows: Mapping[str, tuple[int, ...]],
    all_paths: Sequence[str],
    base: str | None,
    revision: str | None,
    task_type: str | None,
    fan_in_fan_out: bool = False,
    initial: str | None = None,
    target_parameters: Sequence[str] = (),
) -> str:
    """The text of the file: indent 2, sorted keys.

    Args:
        initial: the start that changed the base; None where the base is as its files hold it.
    """
    return as_text(
        {
            "peft_type": "LORA",
            "task_type": task_type,
            "base_model_name_or_path": base,
            "revision": revision,
            "inference_mode": True,
            "r": config.r,
            "lora_alpha": plain(config.lora_alpha),
            # PEFT refuses a file of fused experts with dropout, which says nothing of what the adapter computes.
            "lora_dropout": 0.0 if target_parameters else config.lora_dropout,
            "use_rslora": config.use_rslora,
            **selection.fields(config, targeted, trained, all_paths),
            "bias": "none",
            "fan_in_fan_out": fan_in_fan_out,
            "init_lora_weights": _init(config.init_lora_weights, initial),
            "use_dora": config.use_dora,
            "lora_bias": config.lora_bias,
            "rank_pattern": config.rank_pattern,
            "alpha_pattern": {key: plain(alpha) for key, alpha in config.alpha_pattern.items()},
            "trainable_token_indices": _token_indices(token_rows, all_paths),
            "target_parameters": list(target_parameters) or None,
        }
    )


def _init(own: str, initial: str | None) -> str | bool:
    """What the file says of the start."""
    if initial is None:
        return own if own in INITS_ON_THE_BASE else True
    return initial if initial in INITS_PEFT_REDOES else f"qlora:{initial}"


def _token_indices(rows: Mapping[str, tuple[int, ...]], all_paths: Sequence[str]) -> Any:
    """A list for the input embedding alone, else lists by the end of a path (both are PEFT's)."""
    if len(rows) < 2:
        return next((list(ids) for ids in rows.values()), None)
    return {shortest_suffixes([path], all_paths)[0]: list(ids) for path, ids in sorted(rows.items())}


def as_text(fields: dict[str, Any]) -> str:
    """A config file's text. Patterns keep their order: the first that matches counts."""
    return json.dumps(dict(sorted(fields.items())), indent=2) + "\n"


def plain(number: float) -> float:
    """A whole number as an int, as people write it."""
    return int(number) if float(number).is_integer() else number


def read(folder: Path) -> AdapterConfig:
    """Read and check a config.

    Raises:
        AdapterError: missing, not JSON, not LoRA, or a field that would change the mathematics and is not applied here.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(f"no {CONFIG_NAME} in the folder", place=str(folder), wanted="an adapter or checkpoint folder")
    fields = read_json(folder, CONFIG_NAME)
    if str(fields.get("peft_type", "")).upper() != "LORA":
        raise AdapterError("not a LoRA adapter", place=str(path), found=fields.get("peft_type"), wanted="peft_type LORA")
    for key, value in fields.items():
        _check_field(key, value, path)
    for key in WITH_PATTERNS:
        refuse_slow(texts_in(fields.get(key)), key, path)
    dropout = fields.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise AdapterError("lora_dropout is not a number from 0 to below 1", place=str(path), found=short(dropout))
    return AdapterConfig(
        r=_rank(fields.get("r"), "r", path),
        lora_alpha=_positive(fields.get("lora_alpha"), "lora_alpha", path),
        use_rslora=_flag(fields, "use_rslora", path),
        lora_dropout=float(dropout),
        use_dora=_flag(fields, "use_dora", path),
        lora_bias=_flag(fields, "lora_bias", path),
        rank_pattern={
            key: _rank(value, f"rank_pattern.{key}", path) for key, value in _pattern(fields, "rank_pattern", path)
        },
        alpha_pattern={
            key: _positive(value, f"alpha_pattern.{key}", path) for key, value in _pattern(fields, "alpha_pattern", path)
        },
        modules_to_save=tuple(_names(fields, "modules_to_save", path)),
        ties_weights=_flag(fields, "ensure_weight_tying", path),
        base=_text(fields, "base_model_name_or_path", path),
        revision=_text(fields, "revision", path),
        selection=_selection(fields, path),
        token_ids=_token_ids(fields, path),
        began=began if (began := fields.get("init_lora_weights")) in ("gaussian", "eva") else "default",
    )


def _selection(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """What chose the modules, as keys of `LoraConfig`; without target_modules, what is left would mean nothing."""
    chosen: dict[str, Any] = {key: _names(fields, key, path) for key in ("modules_to_save", "target_parameters")}
    for key in ("target_modules", "exclude_modules"):
        value = fields.get(key)
        chosen[key] = value if isinstance(value, str) else _names(fields, key, path)
    layers = fields.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise AdapterError("layers_to_transform is not a list of block numbers", place=str(path), found=short(layers))
    pattern = fields.get("layers_pattern")
    names = [pattern] if isinstance(pattern, str) else _names(fields, "layers_pattern", path)
    return {**chosen, "layers_to_transform": numbers or None, "layers_pattern": [name for name in names if name] or None}


def _names(fields: dict[str, Any], key: str, path: Path) -> list[str]:
    value = fields.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise AdapterError(f"{key} is not a list of names", place=str(path), found=short(value))
    return value


def _token_ids(fields: dict[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    value = fields.get("trainable_token_indices") or {}
    table = {"": value} if isinstance(value, list) else value
    for name, ids in table.items() if isinstance(table, dict) else [("", None)]:
        if not isinstance(name, str) or not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
            raise AdapterError("trainable_token_indices is no list of token ids", place=str(path), found=short(value))
    return {name: tuple(ids) for name, ids in table.items()}


def _flag(fields: dict[str, Any], key: str, path: Path) -> bool:
    value = fields.get(key)
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"{key} is neither true nor false", place=str(path), found=short(value))
    return bool(value)


def _text(fields: dict[str, Any], key: str, path: Path) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise AdapterError(f"{key} is not a text", place=str(path), found=short(value))
    return value


def _positive(value: Any, key: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_NUMBER:
        raise AdapterError(
            f"{key} is not a positive number",
            place=str(path),
            found=short(value),
            wanted=f"above 0 and at most {MAX_NUMBER}",
        )
    return float(value)


def _rank(value: Any, key: str, path: Path) -> int:
    number = _positive(value, key, path)
    if not number.is_integer():
        raise AdapterError(f"{key} is not a whole number", place=str(path), found=value)
    return int(number)


def _pattern(fields: dict[str, Any], key: str, path: Path) -> list[tuple[str, Any]]:
    """The entries of a table by regular expression."""
    table = fields.get(key) or {}
    if not isinstance(table, dict):
        raise AdapterError(f"{key} is not a table", place=str(path), found=short(table))
    for pattern in table:
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"{key} holds what is not a regular expression: {error}", place=str(path), found=short(pattern)
            ) from error
    return list(table.items())


def _check_field(key: str, value: Any, path: Path) -> None:
    if key == "init_lora_weights":
        # Of a start that changed the base, this project's own record says how.
        harmless = (value.lower() if isinstance(value, str) else value) in INITS_ON_THE_BASE
        harmless = harmless or (path.parent / INITIAL_NAME).is_file()
    elif key == "bias":
        harmless = value in ("none", None)
    else:
        # An unknown field is let through where it is off: false, null, or empty.
        harmless = key in HARMLESS or value in (None, False, [], {}, "")
    if not harmless:
        raise AdapterError(
            f"{key} changes what the adapter computes, and this version does not apply it",
            place=str(path),
            found=short(value),
        )
