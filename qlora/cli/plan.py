"""`qlora plan`: does a job fit, and what travels between ranks, before a GPU is taken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qlora.cli.failures import DebugOption
from qlora.cli.job import ConfigArgument, OverridesArgument, read_job
from qlora.cli.rows import print_json, print_rows, size_text
from qlora.errors import BaseModelError, ConfigError

if TYPE_CHECKING:
    from qlora.config.schema import JobConfig
    from qlora.plan.memory import RankPlan
    from qlora.plan.shapes import BaseShapes

NOT_COUNTED = "what CUDA, NCCL and the allocator take; `qlora train --dry-run` measures all of it"
NOT_KNOWN = "activations but for what is named above, CUDA and NCCL; `qlora train --dry-run` measures all of it"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_CELL = 11


def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs in all, a rank on each.")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes that the GPUs are spread over.")] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", help="Memory of a GPU, as 80GiB; says what fits.", show_default=False)
    ] = None,
    mode: Annotated[
        Literal["single", "ddp", "zero1", "zero2", "zero3"] | None,
        typer.Option("--mode", help="One way of sharing; all where not given.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
    debug: DebugOption = False,
) -> None:
    """Say what a rank keeps, gathers and reads, for each way of sharing a job out.

    Arithmetic from the shapes of the base, not a measurement: from the headers of its safetensors files, or from
    config.json alone for models built like Llama. Nothing is loaded.
    """
    job = read_job(config, overrides, "plan")
    memory = None if gpu_memory is None else parse_size(gpu_memory)
    if gpus % nodes:
        raise ConfigError("GPUs are not spread evenly", place="--nodes", found=f"{gpus} GPUs on {nodes} nodes")
    if mode == "single" and gpus > 1:
        raise ConfigError(
            "one process takes one GPU", place="--mode", found=f"single on {gpus} GPUs", wanted="ddp, zero1, ..."
        )
    from qlora.plan.memory import modes_of, plan_rank
    from qlora.plan.shapes import read_shapes

    base = read_shapes(base_folder(job.model.base))
    ranks = [plan_rank(base, job, one, gpus, memory=memory) for one in ([mode] if mode else modes_of(job, gpus))]
    facts = describe(base, job, ranks, gpus=gpus, nodes=nodes, gpu_memory=memory)
    if as_json:
        print_json(facts)
    else:
        print_rows(_rows(facts))


def parse_size(text: str) -> int:
    """Return `80GiB` or `80 GB` as bytes. Raises ConfigError, also where there is no unit."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or not float(found[1]):
        raise ConfigError("not a size", place="--gpu-memory", found=text, wanted="a number and KiB, MiB, GiB or TiB: 80GiB")
    return int(float(found[1]) * unit)


def base_folder(name: str) -> Path:
    """Return the folder of `model.base`. Raises BaseModelError for a hub id: a plan fetches nothing."""
    from qlora.assets import tiny_path
    from qlora.config.paths import looks_like_path, missing_hint

    folder = tiny_path() if name == "builtin:tiny" else Path(name).expanduser()
    if not folder.is_dir():
        raise BaseModelError(
            "no such folder" if looks_like_path(name) else "a plan fetches nothing from the hub",
            place="model.base",
            found=name,
            wanted="a folder with config.json",
            next_step=missing_hint(name) if looks_like_path(name) else "fetch config.json alone: model.base=FOLDER",
        )
    return folder


def describe(
    base: BaseShapes, job: JobConfig, ranks: list[RankPlan], *, gpus: int, nodes: int, gpu_memory: int | None
) -> dict[str, Any]:
    """Return what `--json` prints; sizes are bytes, of one rank."""
    from qlora.plan.activations import plan_activations
    from qlora.plan.memory import recomputes
    from qlora.plan.parameters import is_quantized, stored_parameters

    num_quantized = sum(t.num_elements for t in base.tensors if is_quantized(t, job))
    bits = job.model.quantization.bits if job.model.quantization is not None else 4
    modes = {}
    for rank in ranks:
        modes[rank.mode] = {
            "kept": rank.kept,
            "kept_bytes": rank.kept_bytes,
            "working": rank.working,
            "total_bytes": rank.total_bytes,
            "left_bytes": None if gpu_memory is None else gpu_memory - rank.total_bytes,
            "gathered_bytes_a_micro_step": rank.gathered,
            "gathered_from_other_nodes": rank.gathered * (gpus - gpus // nodes) // max(1, gpus - 1),
            "read_bytes": rank.read,
            "num_layers_recomputed": rank.num_recomputed,
        }
    planned = plan_activations(base, job)
    tokens = job.train.per_device_train_batch_size * job.data.max_length
    activations = {"num_layers": base.num_layers, "num_tokens": tokens}
    if planned is not None:
        activations |= {
            "saved_bytes_a_token_a_layer": planned.saved // tokens,
            "none_recomputed_bytes": planned.peak(0),
            "all_recomputed_bytes": planned.peak(planned.num_layers),
        }
    return {
        "gpus": gpus,
        "nodes": nodes,
        "gpu_memory": gpu_memory,
        "gradient_checkpointing": job.train.gradient_checkpointing,
        "base": job.model.base,
        "shapes_from": base.source,
        "num_weights": sum(t.num_elements for t in base.tensors),
        "num_weights_in_4_bits": num_quantized if bits == 4 else 0,
        "num_weights_in_8_bits": num_quantized if bits == 8 else 0,
        "num_trained": sum(p.elements for p in stored_parameters(base, job) if p.part == "trained"),
        "recomputation": recomputes(job),
        "activations": activations,
        "modes": modes,
        "not_counted": NOT_KNOWN if planned is None else NOT_COUNTED,
    }


def _quantized(facts: dict[str, Any]) -> str:
    in_4_bits, in_8_bits = (facts[f"num_weights_in_{bits}_bits"] for bits in (4, 8))
    return f"{in_8_bits:,} in 8 bits" if in_8_bits else f"{in_4_bits:,} in 4 bits"


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    modes: dict[str, dict[str, Any]] = facts["modes"]
    memory = facts["gpu_memory"]

    def sizes(label: str, values: list[int | None]) -> tuple[str, str]:
        return label, "".join(f"{'-' if not value else size_text(value):>{_CELL}}" for value in values)

    rows = [
        ("base", f"{facts['base']}: {facts['num_weights']:,} weights, {_quantized(facts)}"),
        ("shapes from", facts["shapes_from"]),
        ("trained", f"{facts['num_trained']:,} parameters"),
        ("ranks", f"{facts['gpus']} on {facts['nodes']} node" + "s" * (facts["nodes"] > 1)),
        ("", ""),
        ("a rank keeps", "".join(f"{mode:>{_CELL}}" for mode in modes)),
    ]
    for group, total, title in (("kept", "kept_bytes", "together"), ("working", "total_bytes", "at most, together")):
        labels = dict.fromkeys(label for entry in modes.values() for label in entry[group])
        rows += [sizes(f"  {label}", [entry[group].get(label) for entry in modes.values()]) for label in labels]
        rows.append(sizes(title, [entry[total] for entry in modes.values()]))
        if group == "kept":
            rows.append(("for a part of a step", ""))
    known, layers = facts["activations"], facts["activations"]["num_layers"]
    again = [entry["num_layers_recomputed"] for entry in modes.values()]
    rows.append((f"layers recomputed, of {layers}", "".join(f"{count:>{_CELL}}" for count in again)))
    if facts["gradient_checkpointing"] == "auto" and memory is None:
        rows.append(("  auto is counted as all", "give --gpu-memory to see how many a run takes"))
    if memory is not None:
        left = [entry["left_bytes"] for entry in modes.values()]
        verdict = "".join(f"{'fits' if value >= 0 else 'too large':>{_CELL}}" for value in left)
        rows += [(f"in {size_text(memory)}", verdict), sizes("  left for what is not counted", [max(0, v) for v in left])]
    rows += [("", "")]
    rows.append(sizes("gathered a micro-step", [entry["gathered_bytes_a_micro_step"] for entry in modes.values()]))
    if facts["nodes"] > 1:
        rows.append(sizes("  from other nodes", [entry["gathered_from_other_nodes"] for entry in modes.values()]))
    rows.append(sizes("read from the files", [entry["read_bytes"] for entry in modes.values()]))
    if "saved_bytes_a_token_a_layer" in known:
        none, every = (size_text(known[f"{name}_recomputed_bytes"]) for name in ("none", "all"))
        words = f"{known['saved_bytes_a_token_a_layer']:,} bytes a token and layer; of {known['num_tokens']:,} tokens {none}"
        rows += [("", ""), ("activations", f"{words} with no layer recomputed, {every} with all")]
    return [*rows, ("", ""), ("not counted", facts["not_counted"])]
