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

SELECTIONS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "modules_to_save",
)
VARIANTS = ("use_rslora", "use_dora", "lora_bias")


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
        "variants": [key for key in VARIANTS if config.get(key)],
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "layers_to_transform": config.get("layers_to_transform"),
        "exclude_modules": config.get("exclude_modules"),
        "target_parameters": config.get("target_parameters"),
        "ranks": folder.sorted.ranks(),
        "num_lora_modules": len(folder.sorted.updates),
        "lora_modules_by_kind": dict(Counter(folder.sorted.kinds.values())),
        "token_rows": folder.sorted.token_rows,
        "num_whole_modules": len(folder.sorted.whole),
        "initial": folder.recorded.get("initial"),
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
    base = str(facts["base_model_name_or_path"])
    ranks = ", ".join(
        f"{count} layers of {'unknown r' if r == 'unknown' else f'r {r}'}" for r, count in facts["ranks"].items()
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in facts["lora_modules_by_kind"].items())
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in facts["dtypes"].items())
    verified = facts["num_verified_files"]
    rows = [
        (facts["kind"], facts["path"]),
        ("base", base + (f" at {facts['revision']}" if facts["revision"] else "")),
        ("trained on", _trained_on(facts["recorded"]) if "dtype" in facts["recorded"] else ""),
        ("r", str(facts["r"]) + (f" ({ranks})" if facts["rank_pattern"] else "")),
        ("lora_alpha", f"{facts['lora_alpha']}" + (f" (scaling {facts['scaling']:g})" if facts["scaling"] else "")),
        ("variants", ", ".join(facts["variants"])),
        ("started from", _started_from(facts["initial"])),
        *[(key, _listed(facts[key])) for key in SELECTIONS],
        (
            "LoRA modules",
            f"{facts['num_lora_modules']}" + (f" ({kinds})" if kinds != f"{facts['num_lora_modules']} linear" else ""),
        ),
        ("rows of tokens", ", ".join(f"{count} of {path}" for path, count in facts["token_rows"].items())),
        ("whole modules", str(facts["num_whole_modules"] or "")),
        ("tensors", f"{facts['num_tensors']} ({dtypes})"),
        ("parameters", f"{facts['num_parameters']:,} ({size_text(facts['num_bytes'])})"),
        *_simple_rows(facts["checkpoint"] or {}),
        ("integrity", "ok" + (f", {verified} files match the manifest" if facts["checkpoint"] is not None else "")),
        *[("note", note) for note in facts["notes"]],
    ]
    return [(name, value) for name, value in rows if value]


def _listed(value: Any) -> str:
    """A list, table or word of the config; nothing where it is off."""
    if isinstance(value, list):
        return ", ".join(sorted(map(str, value)))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {inner}" for key, inner in value.items())
    return "" if value is None else str(value)


def _started_from(initial: Any) -> str:
    if not isinstance(initial, dict):
        return ""
    what = "for what was left of the base" if initial.get("changes_base") else "for the base as it is"
    return f"{initial.get('method')}, {what}"


def _trained_on(recorded: dict[str, Any]) -> str:
    quantization = recorded.get("quantization")
    if not isinstance(quantization, dict):
        return f"the base in {recorded.get('dtype')}, not quantized"
    if quantization.get("bits") == 8:
        return f"the base in int8, one scale a row, computing in {recorded.get('dtype')}"
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
