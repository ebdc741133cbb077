"""How much memory does loading a base take, through the first training step?

Makes a Llama of about 1.3 GB in bf16 on disk, trains one step on it and one on the embedded base, each in a process of its
own, and subtracts: what is left is the larger base. Resident memory is the kernel's high-water mark (VmHWM), mapped pages
included.

    python benchmarks/load_memory.py [--runs 3] [--results benchmarks/results/load_memory_MACHINE_DATE.md]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe, report
from random_base import make_llama, write_job

ALLOWANCE_BYTES = 150_000_000
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
LORA_RANK = 4


def sizes(folder: Path) -> tuple[int, int, int]:
    """(bytes of the files, bytes of the quantized model, bytes of the largest tensor in 16 bits)."""
    from qlora.model_files import find_weight_files
    from qlora.ops.nf4 import QuantSpec
    from qlora.quant.shards import read_entries

    spec = QuantSpec()
    quantized = largest = 0
    for name, entry in read_entries(folder).items():
        largest = max(largest, entry.num_bytes)
        is_linear = len(entry.shape) == 2 and "embed" not in name and "lm_head" not in name
        count = entry.num_elements
        quantized += count // 2 + spec.statistics_bytes(count) if is_linear else entry.num_bytes
    return sum(file.stat().st_size for file in find_weight_files(folder)), quantized, largest


def peak_of_job(base: str, job: Path, folder: Path) -> int:
    """Peak resident bytes (VmHWM, read after the step) of one `qlora train` of a single step on the files of a job."""
    overrides = [
        f"model.base={base}", f"lora.r={LORA_RANK}", f"data.train=[{job / 'train.jsonl'}]", "data.max_length=128",
        f"data.cache_dir={folder / 'cache'}", f"train.output_dir={folder / 'run'}", "train.max_steps=1",
        "checkpoint.every_steps=null", "checkpoint.resume=none",
    ]  # fmt: skip
    command = [sys.executable, "-m", "qlora", "train", str(job / "job.yaml"), *overrides]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    row = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    peak: int = row["peak_memory_bytes"]
    return peak


def main() -> None:
    """Measure, print, and write the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        base = folder / "base"
        make_llama(base, max_shard_size="500MB", **SHAPE)
        write_job(folder, 8)
        peaks: dict[str, list[int]] = {"builtin:tiny": [], str(base): []}
        for number in range(arguments.runs):
            for name, found in peaks.items():
                work = folder / f"{'tiny' if name.startswith('builtin') else 'large'}{number}"
                work.mkdir()
                found.append(peak_of_job(name, folder, work))
        file_bytes, quantized, largest = sizes(base)
    tiny, large = (statistics.median(found) for found in peaks.values())
    limit = quantized + largest + ALLOWANCE_BYTES
    lines = [
        f"- base on disk, bf16: {file_bytes / 1e6:,.0f} MB; quantized model: {quantized / 1e6:,.0f} MB; "
        f"largest tensor in 16 bits: {largest / 1e6:,.0f} MB",
        f"- peak of the job on the base: {large / 1e6:,.0f} MB; on builtin:tiny: {tiny / 1e6:,.0f} MB "
        f"(medians of {arguments.runs})",
        f"- **added by the base: {(large - tiny) / 1e6:,.0f} MB**; limit (quantized + largest + 150 MB): "
        f"{limit / 1e6:,.0f} MB; share of the bf16 file: {(large - tiny) / file_bytes:.2f}",
        f"- machine: {describe()}",
    ]
    report(arguments.results, "Memory of loading a base, through the first step", __file__, lines)


if __name__ == "__main__":
    main()
