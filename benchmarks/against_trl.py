"""Packed QLoRA training on the quickstart's data: useful tokens a second, this project against TRL + PEFT.

Both train the embedded base in NF4 with double quantization, bf16 compute, r=16 on all linear layers, rows of 512 tokens
packed, loss on the answers alone, no recomputation, one process with all cores, the same allocator settings. Each arm is a
fresh process, in the order A B B A, two warm-up steps left out. Useful tokens are those that are not padding. An arm whose
gradient norm is zero, or whose mean loss is 5% away from the other's, does not count.

    python benchmarks/against_trl.py [--pairs 5] [--steps 20] [--results benchmarks/results/against_trl_MACHINE_DATE.md]
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
from itertools import pairwise
from pathlib import Path
from typing import Any

from machine import describe, write_results

from qlora.assets import tiny_path

ROWS, LENGTH, RANK, ALPHA, LEARNING_RATE, WARMUP_STEPS = 2, 512, 16, 32, 2e-4, 2
# With glibc's defaults large buffers go back to the kernel at every free and come back as fresh pages.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def train_qlora(data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """This project's arm."""
    from qlora.cli.main import main

    overrides = [
        f"data.train=[{data}]", f"data.max_length={LENGTH}", f"data.cache_dir={folder / 'cache'}", f"lora.r={RANK}",
        f"lora.lora_alpha={ALPHA}", f"train.output_dir={folder / 'run'}", f"train.max_steps={steps}",
        f"train.per_device_train_batch_size={ROWS}", f"train.learning_rate={LEARNING_RATE}", "train.warmup_steps=0",
        "train.lr_scheduler_type=constant", "train.gradient_checkpointing=false", "checkpoint.every_steps=null",
    ]  # fmt: skip
    job = folder / "job.yaml"
    job.write_text("{}\n")
    code = main(["train", str(job), *overrides])
    if code:
        raise SystemExit(code)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    tokens = [b["num_tokens"] - a["num_tokens"] for a, b in pairwise(rows)]
    timed = list(zip(rows[1:], tokens, strict=True))[WARMUP_STEPS - 1 :]
    return {
        "tokens_per_second": sum(n for _, n in timed) / sum(row["step_seconds"] for row, _ in timed),
        "loss": statistics.mean(row["loss"] for row in rows),
        "smallest_norm": min(row["grad_norm"] for row in rows),
        "peak_memory_bytes": rows[-1]["peak_memory_bytes"],
    }


def train_trl(data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """The peer's arm: SFTTrainer with PEFT and BitsAndBytesConfig, packing on, recomputation off."""
    import resource

    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.bfloat16, quantization_config=quantization)
    seconds: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    arguments = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", warmup_steps=0, packing=True, max_length=LENGTH, assistant_only_loss=True,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=True, seed=0,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(data), split="train"),
        processing_class=AutoTokenizer.from_pretrained(tiny_path()),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    collate = trainer.data_collator

    def counting(features: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(feature["input_ids"]) for feature in features))
        return collate(features)

    trainer.data_collator = counting
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    used = tokens[:steps]  # the loader may look one batch ahead
    return {
        "tokens_per_second": sum(used[WARMUP_STEPS:]) / sum(seconds[WARMUP_STEPS:]),
        "loss": statistics.mean(entry["loss"] for entry in logs),
        "smallest_norm": min(float(entry["grad_norm"]) for entry in logs),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


ARMS = {"qlora": train_qlora, "trl": train_trl}


def run_arm(name: str, data: Path, steps: int) -> dict[str, Any]:
    """One arm in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, __file__, "--arm", name, "--data", str(data), "--out", str(out), "--steps", str(steps)]
        log = Path(folder) / "log"
        with open(log, "w") as stream:
            code = subprocess.run(
                command, env=os.environ | ALLOCATOR, stdout=stream, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code:
            raise SystemExit(f"the arm {name} failed:\n{log.read_text()[-3000:]}")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def main() -> None:
    """Run pairs, print, and write the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        result = ARMS[arguments.arm](arguments.data, arguments.out.parent, arguments.steps)
        arguments.out.write_text(json.dumps(result))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "qlora.assets.quickstart", "data", folder], check=True)
        data = Path(folder) / "train.jsonl"
        for pair in range(arguments.pairs):
            for name in ("qlora", "trl") if pair % 2 == 0 else ("trl", "qlora"):
                found[name].append(run_arm(name, data, arguments.steps))
                last = found[name][-1]
                print(f"{name:6} {last['tokens_per_second']:9,.0f} tokens/s  loss {last['loss']:.4f}", flush=True)
    if min(run["smallest_norm"] for runs in found.values() for run in runs) <= 0:
        raise SystemExit("a gradient norm is zero: this arm trains nothing")
    losses = {name: statistics.median(run["loss"] for run in runs) for name, runs in found.items()}
    if abs(losses["qlora"] / losses["trl"] - 1) > 0.05:
        raise SystemExit(f"the arms do not train the same thing: {losses}")
    ratios = sorted(
        ours["tokens_per_second"] / theirs["tokens_per_second"]
        for ours, theirs in zip(found["qlora"], found["trl"], strict=True)
    )
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    lines = [
        "| | useful tokens/s | mean loss | peak memory |",
        "|---|---|---|---|",
        *(
            f"| {name} | {statistics.median(r['tokens_per_second'] for r in runs):,.0f} | {losses[name]:.3f} | "
            f"{statistics.median(r['peak_memory_bytes'] for r in runs) / 2**20:,.0f} MiB |"
            for name, runs in found.items()
        ),
        "",
        f"**Ratio of useful tokens/s: {statistics.median(ratios):.2f}** (median of {len(ratios)} pairs, quartiles "
        f"{quartiles[0]:.2f} to {quartiles[2]:.2f})",
        "",
        f"Machine: {describe()}",
    ]
    print("\n".join(lines))
    if arguments.results:
        write_results(arguments.results, "Packed QLoRA training against TRL + PEFT", __file__, lines)


if __name__ == "__main__":
    main()
