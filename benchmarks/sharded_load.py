"""What does a rank read, hold and keep of a base under ZeRO-3, beside the usual way?

Makes a Llama of about 4 GB in bf16 on disk, then

- `--part loading` loads it with 1, 2 and 4 ranks and prints for each: bytes read, seconds, peak resident memory, bytes kept;
- `--part training` trains one step on two ranks, here and with transformers + PEFT + DeepSpeed ZeRO-3, where each rank first
  holds the whole model, and prints the peak resident memory of the whole job.

Memory is the kernel's high-water mark (VmHWM, mapped pages included) less that of the same job on the embedded base; each
job is a launch of its own, in the order A B B A, one thread a rank.

    python benchmarks/sharded_load.py [--part training] [--layers 17] [--runs 3] [--results benchmarks/results/NAME.md]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import describe, report
from random_base import write_job

from qlora.assets import tiny_path

ROOT = Path(__file__).parents[1]
ALLOWANCE_BYTES = 150_000_000
HIDDEN, FFN, VOCABULARY, HEADS = 3072, 8192, 32000, 24
LORA_RANK = 8


# Making the base


def make_base(folder: Path, layers: int) -> None:
    """A Llama of random weights in bf16, written tensor by tensor in files of at most 1 GB, with the tiny tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig

    from qlora.quant.write import Planned, write_model

    folder.mkdir()
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=VOCABULARY, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield f"{prefix}self_attn.{name}.weight", (HIDDEN, HIDDEN)
            for name in ("gate_proj", "up_proj"):
                yield f"{prefix}mlp.{name}.weight", (FFN, HIDDEN)
            yield f"{prefix}mlp.down_proj.weight", (HIDDEN, FFN)
            yield f"{prefix}input_layernorm.weight", (HIDDEN,)
            yield f"{prefix}post_attention_layernorm.weight", (HIDDEN,)
        yield "model.norm.weight", (HIDDEN,)
        yield "lm_head.weight", (VOCABULARY, HIDDEN)

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        scaled = torch.randn(shape, generator=generator).mul_(0.02)
        return (scaled if len(shape) == 2 else scaled.add_(1.0)).bfloat16()

    planned = [Planned(name, shape, torch.bfloat16, lambda shape=shape: make(shape)) for name, shape in shapes()]
    write_model(folder, planned, shard_bytes=1_000_000_000)


def sizes(folder: Path) -> tuple[int, int, int]:
    """(bytes of the files, bytes of the quantized base, bytes of its largest tensor as it is kept)."""
    from qlora.model_files import find_weight_files
    from qlora.ops.nf4 import QuantSpec
    from qlora.quant.shards import read_entries

    spec, kept = QuantSpec(), []
    for name, entry in read_entries(folder).items():
        if len(entry.shape) == 2 and "embed" not in name and "lm_head" not in name:
            kept += [(entry.num_elements + 1) // 2, spec.statistics_bytes(entry.num_elements)]
        else:
            kept.append(entry.num_bytes)
    return sum(file.stat().st_size for file in find_weight_files(folder)), sum(kept), max(kept)


# What runs in the ranks


def peak_bytes() -> int:
    """VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def bytes_read() -> int:
    """What this process has asked of read(), from the disk or from the page cache."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def load_here(base: str) -> dict[str, Any]:
    """Load a base in shares and say what it took."""
    from qlora.config.schema import QuantizationConfig
    from qlora.distributed import runtime as processes
    from qlora.quant.load import load_model
    from qlora.quant.source import resolve_base

    runtime = processes.start(per_device_batch_size=1, gradient_accumulation_steps=1, max_grad_norm=1.0)
    # What Python reads to import transformers' modules is not the base's.
    load_model(resolve_base("builtin:tiny"), device=runtime.device)
    source = resolve_base(base)
    sharding = runtime.sharding()
    runtime.barrier()
    before, start = bytes_read(), time.perf_counter()
    model = load_model(source, quantization=QuantizationConfig(), device=runtime.device, sharding=sharding)
    runtime.barrier()
    seconds = time.perf_counter() - start
    kept = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.parameters())
    return {"seconds": seconds, "read": bytes_read() - before, "kept": kept, "peak": peak_bytes(), "rank": runtime.rank}


def train_here(base: str, folder: Path) -> dict[str, Any]:
    """`qlora train` of one step."""
    from qlora.cli.main import main

    overrides = [
        f"model.base={base}", f"lora.r={LORA_RANK}", f"data.train=[{folder / 'train.jsonl'}]", "data.max_length=128",
        f"data.cache_dir={folder / 'cache'}", f"train.output_dir={folder / 'run'}", "train.max_steps=1",
        "checkpoint.every_steps=null", "checkpoint.resume=none",
    ]  # fmt: skip
    start = time.perf_counter()
    code = main(["train", str(folder / "job.yaml"), *overrides])
    if code:
        sys.exit(code)
    return {"seconds": time.perf_counter() - start, "peak": peak_bytes(), "rank": int(os.environ["RANK"])}


def train_usual(base: str) -> dict[str, Any]:
    """The same with transformers' 4-bit loading, PEFT's LoRA and Accelerate's DeepSpeed plugin."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    start = time.perf_counter()
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    folder = tiny_path() if base == "builtin:tiny" else base
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    loaded = time.perf_counter() - start
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.randint(0, 1000, (1, 128))
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    optimizer.step()
    return {
        "seconds": time.perf_counter() - start,
        "load_seconds": loaded,
        "peak": peak_bytes(),
        "rank": accelerator.process_index,
    }


# Starting them


def launch(kind: str, base: str, num_ranks: int, folder: Path) -> list[dict[str, Any]]:
    """One launch; what its ranks said, by rank."""
    out = folder / "said"
    out.mkdir(exist_ok=True)
    for file in out.iterdir():
        file.unlink()
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/zero3.yaml",
        "--num_processes", str(num_ranks), "--main_process_port", "0", __file__, "--worker", kind, "--base", base,
        "--folder", str(folder),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(f"{kind} on {num_ranks} ranks failed:\n{done.stdout.decode(errors='replace')[-3000:]}")
    return sorted((json.loads(file.read_text()) for file in out.iterdir()), key=lambda said: said["rank"])


def work(kind: str, base: str, folder: Path) -> None:
    """What a rank does; its answer goes into a file."""
    said = {"load": load_here, "usual": train_usual}[kind](base) if kind != "ours" else train_here(base, folder)
    (folder / "said" / f"{said['rank']}.json").write_text(json.dumps(said))


def measure_loading(base: Path, folder: Path, runs: int) -> list[str]:
    """Loading alone on 1, 2 and 4 ranks, as lines of Markdown."""
    file_bytes, whole, largest = sizes(base)
    lines = [
        f"- base on disk, bf16: {file_bytes / 1e6:,.0f} MB; quantized: {whole / 1e6:,.0f} MB with its statistics; "
        f"its largest tensor as kept: {largest / 1e6:,.0f} MB",
        "",
        "Loading alone, one thread a rank, the files in the page cache (medians over runs, the worst rank of each):",
        "",
        "| ranks | read, MB | of the files | kept, MB | of the base x ranks | peak added, MB | limit, MB | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    said: dict[tuple[int, str], list[list[dict[str, Any]]]] = {}
    for _ in range(runs):
        for num_ranks in (1, 2, 4):
            for name in ("builtin:tiny", str(base)):
                said.setdefault((num_ranks, name), []).append(launch("load", name, num_ranks, folder))

    def worst(num_ranks: int, name: str, key: str) -> float:
        return statistics.median(max(rank[key] for rank in run) for run in said[num_ranks, name])

    for num_ranks in (1, 2, 4):
        read, kept, seconds = (worst(num_ranks, str(base), key) for key in ("read", "kept", "seconds"))
        added = worst(num_ranks, str(base), "peak") - worst(num_ranks, "builtin:tiny", "peak")
        limit = kept + 2 * largest + ALLOWANCE_BYTES
        cells = [
            f"{num_ranks}", f"{read / 1e6:,.0f}", f"{read / file_bytes:.3f}", f"{kept / 1e6:,.0f}",
            f"{kept * num_ranks / whole:.4f}", f"{added / 1e6:,.0f}", f"{limit / 1e6:,.0f}", f"{seconds:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    ratio = worst(2, str(base), "seconds") / worst(1, str(base), "seconds")
    return [
        *lines,
        "",
        f"- **load time at 2 ranks: {ratio:.2f} of that at 1 rank**",
        f"- {runs} runs; machine: {describe()}",
    ]


def measure_training(base: Path, folder: Path, runs: int) -> list[str]:
    """A whole job of one step on two ranks, here and the usual way, as lines of Markdown."""
    peaks: dict[tuple[str, str], list[int]] = {}
    times: dict[str, list[float]] = {}
    for number in range(runs):
        for kind in ("ours", "usual") if number % 2 == 0 else ("usual", "ours"):
            for name in ("builtin:tiny", str(base)):
                ranks = launch(kind, name, 2, folder)
                peaks.setdefault((kind, name), []).append(max(rank["peak"] for rank in ranks))
                if name == str(base):
                    times.setdefault(kind, []).append(ranks[0]["seconds"])
    added = {
        kind: statistics.median(peaks[kind, str(base)]) - statistics.median(peaks[kind, "builtin:tiny"])
        for kind in ("ours", "usual")
    }
    return [
        "One training step on two ranks under ZeRO-3, a rank's peak resident memory above the same job on builtin:tiny:",
        "",
        f"- here {added['ours'] / 1e6:,.0f} MB, transformers + PEFT {added['usual'] / 1e6:,.0f} MB: "
        f"**{added['ours'] / added['usual']:.2f} of the usual way**",
        f"- seconds from start to the end of the step: here {statistics.median(times['ours']):.0f}, "
        f"transformers + PEFT {statistics.median(times['usual']):.0f}",
        f"- {runs} runs; machine: {describe()}",
    ]


def main() -> None:
    """Measure, print, and write the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--part", choices=("loading", "training"), default="loading")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--base", help="a base made before (--worker: the base to load)")
    parser.add_argument("--worker", choices=("load", "ours", "usual"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.base, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        base = Path(arguments.base) if arguments.base else folder / "base"
        if not base.exists():
            make_base(base, arguments.layers)
        write_job(folder, 8)
        parts = {"loading": measure_loading, "training": measure_training}
        lines = parts[arguments.part](base, folder, arguments.runs)
    report(arguments.results, "Loading in shares, beside the usual way", __file__, lines)


if __name__ == "__main__":
    main()
