"""How fast are weights quantized to NF4 on CPUs, against bitsandbytes, and what does it do for loading a base?

Both quantize the same random weights in the pieces that a load hands over, in turn, and every result is compared with the
other's: one byte that differs ends the run. Then a Llama of 200 million weights in bf16 is loaded with either. Pairs in
which other processes took more than a twentieth of the cores are left out, unless too few are left; the ratio of the
processor's time, which depends less on others, is given beside that of the clock.

    python benchmarks/quantize.py [--pairs 9] [--threads 2] [--results benchmarks/results/quantize_MACHINE_DATE.md]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe, report
from peers.quiet import MOST_OTHERS, Others

from qlora.config.schema import QuantizationConfig
from qlora.ops import nf4
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base

SPEC = nf4.QuantSpec()
NUM_WEIGHTS = 1 << 24
OUR_REPEATS = 16  # in the time that bitsandbytes takes once, a clock tick more or less matters for ours
FEWEST_PAIRS, MOST_TRIES = 5, 2
HIDDEN, LAYERS, FFN, VOCABULARY = 2048, 4, 5632, 4096


@dataclass
class Pair:
    """Seconds of the clock and of the processor, for bitsandbytes and for the kernel, and what others took meanwhile."""

    theirs: tuple[float, float]
    ours: tuple[float, float]
    others: float


def bitsandbytes_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `nf4.quantize_blocks` comes to without a compiler."""
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weight, SPEC.block_size, SPEC.quant_type, torch.uint8)
    return packed.reshape(-1), absmax.reshape(-1)


def seconds(work: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """A result, and the seconds of clock and processor it took."""
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, (time.perf_counter() - clock, time.process_time() - processor)


def in_pieces(quantize: Callable[..., Any], weight: torch.Tensor, *more: Any, repeats: int = 1) -> Callable[[], Any]:
    """Quantizes a weight as a load does."""
    return lambda: [[quantize(piece, *more) for piece in weight.split(nf4.CHUNK_ELEMENTS)] for _ in range(repeats)][-1]


def quantize_pair(weight: torch.Tensor, ours_first: bool) -> Pair:
    """One pair, whose results are compared. Raises where they differ."""
    arms = [in_pieces(bitsandbytes_blocks, weight), in_pieces(nf4.quantize_blocks, weight, SPEC, repeats=OUR_REPEATS)]
    others = Others()
    took = {index: seconds(arms[index]) for index in ((1, 0) if ours_first else (0, 1))}
    share = others.share()
    for wanted, found in zip(took[0][0], took[1][0], strict=True):
        for one, other in zip(wanted, found, strict=True):
            if not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
                raise SystemExit("the two do not give the same bytes")
    clock, processor = (value / OUR_REPEATS for value in took[1][1])
    return Pair(took[0][1], (clock, processor), share)


def load_pair(folder: Path, ours_first: bool) -> Pair:
    """Load a base with either, and compare the packed bytes."""
    quantizer = nf4._native_quantizer(SPEC.quant_type)

    def load(by_kernel: bool) -> Any:
        quantizer.is_native = by_kernel  # False: as with a bitsandbytes that rounds otherwise
        try:
            return load_model(resolve_base(str(folder)), quantization=QuantizationConfig(), device="cpu")
        finally:
            quantizer.is_native = True

    others = Others()
    took = {by_kernel: seconds(lambda by_kernel=by_kernel: load(by_kernel)) for by_kernel in (ours_first, not ours_first)}
    share = others.share()
    wanted, found = (took[by_kernel][0].state_dict() for by_kernel in (False, True))
    if not all(torch.equal(wanted[name].view(torch.uint8), found[name].view(torch.uint8)) for name in wanted):
        raise SystemExit("the two bases are not the same")
    return Pair(took[False][1], took[True][1], share)


def quiet_pairs(measure: Callable[[bool], Pair], wanted: int) -> tuple[list[Pair], int]:
    """(as many quiet pairs as wanted, how many were tried); all pairs where too few are quiet."""
    measure(True)
    tried: list[Pair] = []
    while sum(pair.others <= MOST_OTHERS for pair in tried) < wanted and len(tried) < MOST_TRIES * wanted:
        tried.append(measure(len(tried) % 2 == 1))
    quiet = [pair for pair in tried if pair.others <= MOST_OTHERS]
    return (quiet if len(quiet) >= FEWEST_PAIRS else tried), len(tried)


def row(name: str, num_weights: int, pairs: list[Pair], tried: int) -> str:
    """A line of the table."""
    theirs, ours = (statistics.median(getattr(pair, arm)[0] for pair in pairs) for arm in ("theirs", "ours"))
    ratios = []
    for kind in (0, 1):
        low, middle, high = statistics.quantiles([pair.theirs[kind] / pair.ours[kind] for pair in pairs], n=4)
        ratios.append(f"{middle:.1f} ({low:.1f} to {high:.1f})")
    others = statistics.median(pair.others for pair in pairs)
    rates = f"{num_weights / theirs / 1e9:.3f} | {num_weights / ours / 1e9:.3f}"
    return f"| {name} | {rates} | {ratios[0]} | {ratios[1]} | {len(pairs)} of {tried} | {others:.0%} |"


def make_base(folder: Path) -> int:
    """A random Llama in bf16, whose number of linear weights is returned."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=VOCABULARY, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)


def main() -> None:
    """Measure, print, and write the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--load-pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    if min(arguments.pairs, arguments.load_pairs) < 2 or arguments.threads < 1:
        parser.error("--pairs and --load-pairs are at least 2, --threads at least 1")
    torch.set_num_threads(arguments.threads)
    if not (quantizer := nf4._native_quantizer(SPEC.quant_type)).is_native:
        raise SystemExit(f"there is nothing to compare: weights are quantized by {quantizer.describe()}")
    lines = [
        "| | bitsandbytes, G weights/s | by the kernel, G weights/s | ratio, clock | ratio, processor | pairs | others |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = (0.02 * torch.randn(NUM_WEIGHTS, generator=torch.Generator().manual_seed(0))).to(dtype)
        name = f"{NUM_WEIGHTS / 1e6:.0f}M weights, {str(dtype).removeprefix('torch.')}"
        lines.append(row(name, NUM_WEIGHTS, *quiet_pairs(lambda first, w=weight: quantize_pair(w, first), arguments.pairs)))
        print(lines[-1], flush=True)
    if arguments.load_pairs:
        with tempfile.TemporaryDirectory() as text:
            num_weights = make_base(Path(text))
            found = quiet_pairs(lambda first: load_pair(Path(text), first), arguments.load_pairs)
        lines.append(row(f"loading a base of {num_weights / 1e6:.0f}M linear weights, bfloat16", num_weights, *found))
    lines += [
        "",
        "- medians, with quartiles of the paired ratios; others: what other processes took of the cores. Where it is much,",
        "  the ratio of the processor's time is the one to read, and both rates are low",
        f"- NF4, blocks of {SPEC.block_size}, pieces of {nf4.CHUNK_ELEMENTS:,}; the bytes of both are equal; files cached",
        f"- {arguments.threads} threads; machine: {describe()}",
    ]
    print()
    report(arguments.results, "Quantizing to NF4 on CPUs, against bitsandbytes", __file__, lines)


if __name__ == "__main__":
    main()
