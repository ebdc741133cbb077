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

from machine import describe, write_results

from qlora.assets import tiny_path

ALLOWANCE_BYTES = 150_000_000
HIDDEN, LAYERS, FFN, VOCABULARY = 2048, 10, 5632, 32000
LORA_RANK = 4


def make_base(folder: Path) -> None:
    """A random Llama in bf16 with the embedded base's tokenizer, in shards of at most 500 MB."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=VOCABULARY, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(folder)


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


def peak_of_job(base: str, data: Path, folder: Path) -> int:
    """Peak resident bytes (VmHWM, read after the step) of one `qlora train` of a single step."""
    overrides = [
        f"model.base={base}", f"lora.r={LORA_RANK}", f"data.train=[{data}]", "data.max_length=128",
        f"data.cache_dir={folder / 'cache'}", f"train.output_dir={folder / 'run'}", "train.max_steps=1",
        "checkpoint.every_steps=null", "checkpoint.resume=none",
    ]  # fmt: skip
    job = folder / "job.yaml"
    job.write_text("{}\n")
    subprocess.run([sys.executable, "-m", "qlora", "train", str(job), *overrides], stdout=subprocess.DEVNULL, check=True)
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
        make_base(base)
        data = folder / "train.jsonl"
        row = {"prompt": "What is it?", "completion": "A short answer."}
        data.write_text((json.dumps(row) + "\n") * 8)
        peaks: dict[str, list[int]] = {"builtin:tiny": [], str(base): []}
        for number in range(arguments.runs):
            for name, found in peaks.items():
                work = folder / f"{'tiny' if name.startswith('builtin') else 'large'}{number}"
                work.mkdir()
                found.append(peak_of_job(name, data, work))
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
    print("\n".join(lines))
    if arguments.results:
        write_results(arguments.results, "Memory of loading a base, through the first step", __file__, lines)


if __name__ == "__main__":
    main()
