"""`qlora inspect`: what an adapter or checkpoint holds, and whether it is whole."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora.cli.adapter_folder import AdapterFolder, read_adapter_folder
from qlora.cli.failures import DebugOption
from qlora.cli.rows import print_json, print_rows, size_text


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Adapter or checkpoint folder.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show what an adapter or checkpoint holds: r, alpha, targets, sizes, base, integrity.

    Reads the tensor file's header, not its tensors, and never opens a pickle file. Of a checkpoint every file is
    compared with its size and sha256 in the manifest. Damage is an error.
    """
    facts = describe(read_adapter_folder(path))
    if as_json:
        print_json(facts)
    else:
        print_rows(_rows(facts))


def describe(folder: AdapterFolder) -> dict[str, Any]:
    """Return what `--json` prints."""
    config = folder.config
    r, lora_alpha = config.get("r"), config.get("lora_alpha")
    scaling = None
    if isinstance(r, int) and isinstance(lora_alpha, int | float) and r > 0:
        scaling = lora_alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    manifest = folder.manifest or {}
    return {
        "path": str(folder.path),
        "kind": folder.kind,
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "recorded": folder.recorded,
        "peft_type": config.get("peft_type"),
        "r": r,
        "lora_alpha": lora_alpha,
        "scaling": scaling,
        "target_modules": config.get("target_modules"),
        "modules_to_save": config.get("modules_to_save"),
        "num_lora_modules": folder.num_lora_modules,
        "num_tensors": len(folder.tensors),
        "num_parameters": sum(tensor.num_parameters for tensor in folder.tensors),
        "num_bytes": sum(tensor.num_bytes for tensor in folder.tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in folder.tensors)),
        "integrity": "ok",
        "checkpoint": {key: value for key, value in manifest.items() if key != "files"} if folder.manifest else None,
        "num_verified_files": folder.num_verified_files,
        "notes": list(folder.notes),
    }


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    targets = facts["target_modules"]
    base = str(facts["base_model_name_or_path"])
    rows = [
        (facts["kind"], facts["path"]),
        ("base", base + (f" at {facts['revision']}" if facts["revision"] else "")),
        *([("trained on", _trained_on(facts["recorded"]))] if facts["recorded"] else []),
        ("r", str(facts["r"])),
        ("lora_alpha", f"{facts['lora_alpha']}" + (f" (scaling {facts['scaling']:g})" if facts["scaling"] else "")),
        ("target_modules", ", ".join(map(str, sorted(targets))) if isinstance(targets, list) else str(targets)),
    ]
    if facts["modules_to_save"]:
        rows.append(("modules_to_save", ", ".join(map(str, facts["modules_to_save"]))))
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in facts["dtypes"].items())
    rows += [
        ("LoRA modules", f"{facts['num_lora_modules']}"),
        ("tensors", f"{facts['num_tensors']} ({dtypes})"),
        ("parameters", f"{facts['num_parameters']:,} ({size_text(facts['num_bytes'])})"),
    ]
    rows += _simple_rows(facts["checkpoint"] or {})
    verified = facts["num_verified_files"]
    rows.append(("integrity", "ok" + (f", {verified} files match the manifest" if facts["checkpoint"] is not None else "")))
    rows += [("note", note) for note in facts["notes"]]
    return rows


def _trained_on(recorded: dict[str, Any]) -> str:
    quantization = recorded.get("quantization")
    if not isinstance(quantization, dict):
        return f"the base in {recorded.get('dtype')}, not quantized"
    double = ", double quantized" if quantization.get("double_quant") else ""
    kind, block = quantization.get("quant_type"), quantization.get("block_size")
    return f"the base in {kind}, blocks of {block}{double}, computing in {recorded.get('dtype')}"


def _simple_rows(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """What a manifest says in a line: plain values, a section of them such as the versions, and those of `identity`."""
    rows = []
    for key, value in manifest.items():
        if key == "identity" and isinstance(value, dict):
            rows += _simple_rows(value)
        elif isinstance(value, str | int | float):
            rows.append((f"saved {key}", str(value)))
        elif isinstance(value, dict) and value and all(isinstance(inner, str | int | float) for inner in value.values()):
            rows.append((f"saved {key}", ", ".join(f"{name} {inner}" for name, inner in value.items())))
    return rows
