"""`qlora export`: an adapter as readers of a narrower format take it. From files to files, rank-local, on the CPU.

vLLM (`vllm/lora/peft_helper.py`, `lora_model.py`) and SGLang (`srt/lora/lora_config.py`) know one r and one lora_alpha
for all layers and nothing but A and B. What a config says by layer is folded into the tensors, without changing s B A:

    B *= s_of_the_layer / s_of_all,        A and B filled up with zeros to one r

Everything else is refused, because these readers would refuse it later, or leave it out without a word.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora.adapter.config_file import CONFIG_NAME, as_text, plain
from qlora.adapter.folder import read_json
from qlora.adapter.keys import PARTS_A, PARTS_B, AdapterKey
from qlora.adapter.merge_report import read_text
from qlora.adapter.new_tokens import files_beside
from qlora.adapter.read import METADATA_KEY, TEMPLATE_NAME, WEIGHTS_NAME, AdapterFile, open_adapter, refuse
from qlora.adapter.residual import unfold_initial
from qlora.adapter.tensor_file import weights_file
from qlora.adapter.unfolding import Remaining, measure, write_plain
from qlora.config.schema import QuantizationConfig
from qlora.errors import AdapterError
from qlora.lora.target import ends_with
from qlora.lora.token_rows import ROWS
from qlora.lora.update import Update
from qlora.quant.model_folder import new_folder
from qlora.quant.source import resolve_base

Reader = Literal["vllm", "sglang", "peft"]
# What vLLM's --max-lora-rank may be; an adapter's r may not be above it.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        r: of every layer; None where the adapter's own ranks are kept.
        approximate: the adapter started from the weights of a quantized base, beside which the plain one is not the same.
    """

    folder: Path
    r: int | None
    approximate: bool
    remaining: Remaining | None = None


def run_export(adapter: Path, out: Path, reader: Reader, *, report: str | None = None) -> Exported:
    """Write the folder. Nothing is left where it fails.

    Args:
        report: a text to compare the result with the trained adapter on, where they are not the same; see
            `merge_report.read_text`. Both are run, one after the other, on the base as it was trained on.

    Raises:
        AdapterError: the adapter cannot be read, holds what the reader does not know, or `out` cannot be written; nothing is
            to be measured, and `report` is given.
        QloraError: see `unfolding.measure`.
    """
    found = open_adapter(adapter)
    approximate = found.changes_base and found.described.get("quantization") is not None
    if report is not None and not approximate:
        raise AdapterError(
            "there is nothing to measure: what is written computes the same as the adapter",
            place="--report",
            found=f"{found.folder}, which did not start from the weights of a quantized base",
            next_step="leave --report out",
        )
    remaining = _measure(found, report) if report is not None else None
    try:
        if reader == "peft":
            with new_folder(out) as folder:
                _write_for_peft(found, folder)
            return Exported(out, None, approximate, remaining)
        _check_served(found, reader)
        tensors, config = fold(found)
        with new_folder(out) as folder:
            described = {key: value for key, value in found.described.items() if key != "initial"}
            metadata = {METADATA_KEY: json.dumps(described, sort_keys=True)}
            (folder / CONFIG_NAME).write_text(as_text(config), encoding="utf-8")
            (folder / WEIGHTS_NAME).write_bytes(weights_file(tensors, metadata))
            _write_tokenizer(found, folder)
    except OSError as error:
        raise AdapterError(f"the adapter cannot be written ({error.strerror})", place=str(out)) from error
    return Exported(out, config["r"], approximate, remaining)


def _measure(found: AdapterFile, report: str) -> Remaining:
    """How far the plain adapter is from the trained one, beside the recorded base, quantized as it was."""
    if found.config.base is None:
        raise AdapterError("the adapter does not say which base it is for", place=str(found.folder))
    source = resolve_base(found.config.base, found.config.revision)
    quantization = QuantizationConfig.model_validate(found.described["quantization"])
    dtype = getattr(torch, found.described["dtype"])
    return measure(found, source, quantization, dtype, read_text(report, source.folder, found.folder))


def _write_for_peft(found: AdapterFile, folder: Path) -> None:
    """The adapter for the base as its files hold it: a copy, unless it was trained on what was left of the base."""
    if found.initial is not None:
        write_plain(found, folder)
    else:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(found.folder / name, folder / name)
    _write_tokenizer(found, folder)
    if (found.folder / TEMPLATE_NAME).is_file():
        shutil.copyfile(found.folder / TEMPLATE_NAME, folder / TEMPLATE_NAME)


def _write_tokenizer(found: AdapterFile, folder: Path) -> None:
    """The tokenizer that has the adapter's new tokens."""
    for name, content in files_beside(found).items():
        (folder / name).write_bytes(content)


def _check_served(found: AdapterFile, reader: str) -> None:
    """Raise AdapterError naming all that a server does not apply."""
    config = found.config
    unknown = [key for key in found.entries if key.is_of_update and key.part not in PARTS_A | PARTS_B]
    not_matrices = [key for key, entry in found.entries.items() if key.part in PARTS_A | PARTS_B and len(entry.shape) != 2]
    fused = config.selection.get("target_parameters") or any(".base_layer" in key.path for key in found.entries)
    reasons = {
        "use_dora: a magnitude beside A and B": config.use_dora,
        "lora_bias: a bias of B": config.lora_bias,
        f"modules_to_save: {len(found.trained)} modules that were trained as wholes": found.trained,
        "target_parameters: fused expert weights": fused,
        "layers that are no matrices, such as convolutions": not_matrices,
        "trainable_token_indices: rows of an embedding": any(key.part == ROWS for key in found.entries),
    }
    told = ("lora_magnitude_vector", "lora_B.bias")
    reasons |= {f"tensors called {part}": True for part in sorted({key.part for key in unknown} - {*told})}
    wrong = [reason for reason, there in reasons.items() if there]
    if not wrong and not found.targeted:
        wrong.append("no layer with A and B")
    refuse(
        wrong,
        f"{reader} does not apply what this adapter holds",
        found.folder,
        f"merge it into its base: qlora merge {found.folder} OUT",
    )


def fold(found: AdapterFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter with one r and one lora_alpha, whose s B A are those of every layer before.

    Returns:
        The tensors by their keys in a file, in their own dtypes, and the whole config.

    Raises:
        AdapterError: a rank above what servers take, or a tensor that cannot be used.
    """
    tensors, fields = unfold_initial(found)
    own = found.config.to_lora_config(found.targeted, "float32")
    by_layer = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    config = own.model_copy(update={key: fields[key] for key in by_layer if key in fields})
    updates = {path: Update.of(config, path) for path in found.targeted}
    r = _served_rank(max(update.r for update in updates.values()), found)
    # What most layers have, so that most of B keeps its bytes.
    counts = Counter(update.scaling for update in updates.values())
    scaling = max(counts, key=lambda value: (counts[value], value))
    folded = {}
    for key in found.entries:
        if key.is_of_update:
            folded[key.in_file()] = _fold(key, tensors[key.in_file()], r, updates[key.path].scaling / scaling)
    return dict(sorted(folded.items())), {
        "peft_type": "LORA",
        "task_type": read_json(found.folder, CONFIG_NAME).get("task_type"),
        "base_model_name_or_path": found.config.base,
        "revision": found.config.revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": plain(scaling * r),
        "target_modules": _targets(found),
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def _served_rank(r: int, found: AdapterFile) -> int:
    allowed = next((rank for rank in SERVED_RANKS if rank >= r), None)
    if allowed is None:
        raise AdapterError(
            "the rank is above what servers take",
            place=str(found.folder),
            found=r,
            wanted=f"at most {SERVED_RANKS[-1]}",
            next_step=f"merge it into its base: qlora merge {found.folder} OUT",
        )
    return allowed


def _fold(key: AdapterKey, value: Tensor, r: int, factor: float) -> Tensor:
    """A (r', in) or B (out, r') with r rows or columns; B times a factor, in fp32 and rounded once."""
    if key.part in PARTS_B and factor != 1.0:
        value = (value.float() * factor).to(value.dtype)
    dim = 0 if key.part in PARTS_A else 1
    missing = r - value.shape[dim]
    if missing == 0:
        return value.contiguous()
    shape = list(value.shape)
    shape[dim] = missing
    return torch.cat([value, value.new_zeros(shape)], dim=dim).contiguous()


def _targets(found: AdapterFile) -> list[str]:
    """The config's own names where these alone chose the layers, else whole paths: servers take no regular expression."""
    chosen = found.config.selection
    names = chosen.get("target_modules") or []
    plainly = isinstance(names, list) and not chosen.get("exclude_modules") and not chosen.get("layers_to_transform")
    if plainly and all(any(ends_with(path, name) for name in names) for path in found.targeted):
        return sorted(names)
    return sorted(found.targeted)
