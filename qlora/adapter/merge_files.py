"""`qlora merge`: base and adapter into one model folder, from files to files, a few rows of a tensor at a time.

`adapter.merge_plan` says what the folder holds. Names and layout of the base's files are kept. Of weights that the base
ties, one that the adapter changes alone gets a tensor of its own. `qlora_merged.json` says that weights in 16 bits are
merged ones, which quantizing again would take the update from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qlora.adapter import merge_report
from qlora.adapter.expert_keys import in_model
from qlora.adapter.folder import inside
from qlora.adapter.merge_plan import DEQUANTIZED, FORMS, ORIGINAL, QUANTIZED, plan_merge
from qlora.adapter.new_tokens import recorded_tokens
from qlora.adapter.read import TEMPLATE_NAME, WEIGHTS_NAME, AdapterFile, open_adapter
from qlora.config.schema import QuantizationConfig
from qlora.distributed.sharding import Sharding
from qlora.errors import AdapterError, BaseModelError
from qlora.quant.model_folder import copy_rest, new_folder
from qlora.quant.prepare import quantization_config
from qlora.quant.residual import change_base
from qlora.quant.skeleton import Skeleton, read_skeleton
from qlora.quant.source import MERGED_NAME, BaseSource, fingerprints_of, resolve_base
from qlora.quant.write import SHARD_BYTES, Planned, write_model

# What an adapter that added tokens brings along, in place of the base's.
TOKENIZER_NAMES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)


@dataclass(frozen=True)
class Parts:
    """What is merged.

    Attributes:
        found: the adapter, with the paths that its layers have in the model.
        source, quantization, dtype: the base, and how it was quantized and computed while the adapter was trained.
        skeleton: this base without its weights.
    """

    found: AdapterFile
    source: BaseSource
    quantization: QuantizationConfig | None
    dtype: torch.dtype
    skeleton: Skeleton


def run_merge(
    adapter: Path,
    out: Path,
    *,
    onto: str = DEQUANTIZED,
    dtype: str | None = None,
    base: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: str | None = None,
    measure_all: bool = False,
) -> Path:
    """Write the merged model. Rank-local, on the CPU. Returns the folder; nothing is left where it fails.

    Memory is that of about two of the largest tensors. A report loads whole models, one after another.

    Args:
        onto: one of `merge_plan.FORMS`.
        dtype: of the result; None is what the adapter was trained in.
        base: in place of the recorded one.
        shard_bytes: the most a file holds; see `quant.write.write_model`.
        report: a file of text or rows to compare the result with base and adapter on, or `merge_report.BUILTIN`. None is
            no report. See `merge_report.write`.
        measure_all: compare all forms that can be made of this base, not only the one that is written. The report says
            which cannot, and why.

    Raises:
        AdapterError: no base is recorded, another base, a form that cannot be made of it, an adapter that does not fit, or
            no room to write.
        BaseModelError, DataError: the base or the report's text cannot be read.
    """
    parts = _find(adapter, base)
    _refuse_form(parts, onto)
    wanted = getattr(torch, dtype) if dtype else parts.dtype
    text = merge_report.read_text(report, parts.source.folder, adapter) if report is not None else None
    try:
        with new_folder(out) as folder:
            write_form(parts, folder, onto, wanted, shard_bytes, out)
            if text is not None:
                _measure(parts, folder, [onto, *others(onto)] if measure_all else [onto], wanted, text, out)
    except OSError as error:
        raise AdapterError(
            f"the merged model cannot be written ({error.strerror})",
            place=str(out),
            next_step="make room, or choose a folder elsewhere",
        ) from error
    return out


def _find(adapter: Path, base: str | None) -> Parts:
    """Open the adapter, and the base it was trained on. Raises AdapterError, BaseModelError."""
    found = open_adapter(adapter)
    name = base or found.config.base
    if name is None:
        raise AdapterError("the adapter does not say which base it is for", place=str(adapter), next_step="give --base")
    source = resolve_base(name, None if base else found.config.revision)
    recorded = found.described.get("base") or {}
    theirs, ours = fingerprints_of(recorded), fingerprints_of(source.record())
    if theirs and ours and not theirs & ours:
        raise AdapterError(
            "the adapter was trained on another base",
            place=str(found.folder),
            found=f"{recorded['name']} ({str(recorded.get('fingerprint'))[:12]})",
            wanted=f"{source.name} ({str(source.fingerprint)[:12]})",
        )
    stated = found.described.get("quantization", QuantizationConfig().model_dump())
    quantization = None if stated is None else QuantizationConfig.model_validate(stated)
    dtype: torch.dtype = getattr(torch, found.described.get("dtype", "bfloat16"))
    skeleton = read_skeleton(source, dtype, quantization)
    if found.initial is not None:
        # From here on the base's weights are read as what was left of them when the adapter started.
        change_base(skeleton, found.initial.read(), Sharding(), torch.device("cpu"), dtype)
    return Parts(in_model(skeleton.model, found), source, quantization, dtype, skeleton)


def why_not(parts: Parts, form: str) -> AdapterError | None:
    """Why a form cannot be made of this base, or None."""
    source, skeleton = parts.source, parts.skeleton
    if form == ORIGINAL and skeleton.came_quantized:
        unquantized = f"{source.origin.name}, which it was prepared from," if source.origin else "the unquantized base"
        return AdapterError(
            "the base came quantized, so there are no original weights in its folder",
            place=str(source.folder),
            next_step=f"merge onto dequantized, or give {unquantized} with --base",
        )
    if form == QUANTIZED and skeleton.quantization is None:
        return AdapterError(
            "the adapter was trained on a base that was not quantized, so there is no quantization to repeat",
            place=str(parts.found.folder),
            next_step="merge onto original, and quantize the result with `qlora prepare`",
        )
    return None


def others(onto: str) -> list[str]:
    """The forms that are not written."""
    return [form for form in FORMS if form != onto]


def _refuse_form(parts: Parts, form: str) -> None:
    error = why_not(parts, form)
    if error is not None:
        raise error


def write_form(parts: Parts, folder: Path, form: str, dtype: torch.dtype, shard_bytes: int, out: Path) -> None:
    """Write one form into an empty folder, and open what was written without reading its weights.

    Args:
        out: what the folder is going to be called, for errors.

    Raises:
        AdapterError: see `plan_merge`; no room; or the result does not open as what it is to be.
        OSError: the folder cannot be written.
    """
    plan = plan_merge(parts.skeleton, parts.found, form, dtype, parts.dtype)
    stated = quantization_config(parts.skeleton, dtype) if form == QUANTIZED else None
    _check_disk(folder, plan.tensors, out)
    write_model(folder, plan.tensors, shard_bytes)
    copy_rest(parts.source, folder, str(dtype).removeprefix("torch."), stated)
    if plan.untied:
        _edit_config(folder, lambda config: config | {"tie_word_embeddings": False})
    if plan.vocabulary is not None:
        _edit_config(folder, lambda config: config | ({"vocab_size": plan.vocabulary} if "vocab_size" in config else {}))
    if form != QUANTIZED:
        _write_record(parts.found, folder, form, dtype)
    adapter = parts.found.folder
    # New tokens need no new rows where the base's vocabulary is padded.
    adds_tokens = plan.vocabulary is not None or recorded_tokens(parts.found) is not None
    for name in (TEMPLATE_NAME, *(TOKENIZER_NAMES if adds_tokens else ())):
        if (adapter / name).is_file():
            shutil.copyfile(inside(adapter, name), folder / name)
    try:
        written = read_skeleton(resolve_base(str(folder)), dtype, None)
    except BaseModelError as error:
        raise AdapterError(
            f"the merged model does not open: {error.message}", place=str(out), found=error.found, wanted=error.wanted
        ) from error
    still = [pair for pair in plan.untied if written.model.all_tied_weights_keys.get(pair[0]) == pair[1]]
    if still:
        raise AdapterError(
            "the adapter changes one side of weights that this architecture always ties",
            place=str(parts.found.folder),
            found=" and ".join(still[0]),
            next_step="keep the adapter beside the base",
        )


def _write_record(found: AdapterFile, folder: Path, form: str, dtype: torch.dtype) -> None:
    """Write `qlora_merged.json`; see `quant.source.Merged`."""
    digest = hashlib.sha256()
    with (found.folder / WEIGHTS_NAME).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    record = {"onto": form, "dtype": str(dtype).removeprefix("torch."), "adapter": digest.hexdigest()}
    (folder / MERGED_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change config.json, and what it says of the language model in a part of its own."""
    path = folder / "config.json"
    config = change(json.loads(path.read_text(encoding="utf-8")))
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = change(config["text_config"])
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_disk(folder: Path, tensors: list[Planned], out: Path) -> None:
    """Say before the work what would be said after hours of it."""
    wanted, free = sum(planned.num_bytes for planned in tensors), shutil.disk_usage(folder).free
    if wanted > free:
        gib = 1 << 30
        raise AdapterError(
            "the merged model does not fit onto the disk",
            place=str(out),
            found=f"{free / gib:.1f} GiB free",
            wanted=f"{wanted / gib:.1f} GiB",
            next_step="make room, or choose a folder elsewhere",
        )


def _measure(parts: Parts, folder: Path, forms: list[str], dtype: torch.dtype, text: merge_report.Text, out: Path) -> None:
    """Compare base and adapter with the form that was written, the first, and with others made for this alone.

    Of these, one that cannot be made of the base is left out, and the report says why.
    """
    left_out = {form: error.message for form in forms[1:] if (error := why_not(parts, form)) is not None}
    reference = merge_report.run_unmerged(parts.source, parts.quantization, parts.dtype, parts.found.folder, text)
    found = {forms[0]: merge_report.compare(reference, folder, dtype, text)}
    for form in (form for form in forms[1:] if form not in left_out):
        with TemporaryDirectory(prefix=f".{out.name}.", dir=folder.parent) as other:
            write_form(parts, Path(other), form, dtype, SHARD_BYTES, out)
            found[form] = merge_report.compare(reference, Path(other), dtype, text)
    merge_report.write(folder, text, found, parts.dtype, left_out)
