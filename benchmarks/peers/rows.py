"""The rows of the comparison: what both arms do, which figure counts, and what makes a pair valid.

A row has two arms. The first is this project; the second TRL with PEFT, or, where ranks are compared, this project on one
process. `derived` rows are read off the pairs of another row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from peers import workload

OURS, THEIRS, ONE = "qlora", "trl", "one process"
QUESTIONS = {"data": "questions", "length": 1024, "packs": 1, "train_on": "assistant", "warmup": 2, "steps": 6}
LONG = QUESTIONS | {"data": "long", "length": 2048, "train_on": "all"}
RANKS = QUESTIONS | {"length": 512, "what": "gathered", "steps": 8}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: as `--rows` takes it.
        title: as the table has it.
        metric: the figure, by its name in what an arm finds.
        unit: of the figure: tokens/s, s, MiB, bytes, share.
        settings: of both arms; `arms` has what is an arm's own.
        arms: name -> settings of that arm: `side` (ours, theirs), `run` (a function of it), `launch`, `ranks`, `threads`.
        gate: which losses have to agree: of every step, of the first one (before any update), of the evaluation, or none.
            Where there are steps, no gradient may be zero.
        min_pairs: below that a row is not shown.
        is_time: whether other jobs on the machine spoil it.
        source: the row whose pairs this one is derived from, by `derive`.
    """

    name: str
    title: str
    metric: str
    unit: str
    settings: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    gate: Literal["each step", "first step", "evaluation", "none"] = "each step"
    loss_tolerance: float = 0.01
    min_pairs: int = 5
    is_time: bool = True
    source: str | None = None
    derive: Callable[[dict[str, Any]], tuple[float, float]] | None = field(default=None, compare=False)


def _both(run: str = "train", theirs: str = "best") -> dict[str, dict[str, Any]]:
    return {OURS: {"side": "ours", "run": run}, THEIRS: {"side": "theirs", "run": run, "theirs": theirs}}


def _ranks(launch: str) -> dict[str, dict[str, Any]]:
    return {
        f"two ranks, {launch}": {"side": "ours", "run": "train", "launch": launch, "ranks": 2, "threads": 1},
        ONE: {"side": "ours", "run": "train", "launch": "single", "packs": 2},
    }


def share_of_product(record: dict[str, Any]) -> tuple[float, float]:
    """Operations a second of both arms' steps, over the rate of the matrix product around them; the second value is 1.

    The rate is the best that was measured beside the pair. Operations are those that have to be done (`step_flop`).
    """
    arm = record["arms"][OURS]
    return record["step_flop"] / arm["step_seconds"] / max(record["product_rates"]), 1.0


def share_gathered(record: dict[str, Any]) -> tuple[float, float]:
    """Bytes that the first step gathers of quantized weights and their statistics, and what the weights are in bfloat16.

    Both twice: in the first step DeepSpeed keeps nothing from forward to backward. Later it does where all of a small
    base fits into its bucket, which would be no property of the format.
    """
    arm = next(arm for name, arm in record["arms"].items() if name != ONE)
    shape = workload.shape_of(record["layers"])
    width, ffn = shape["hidden_size"], shape["intermediate_size"]
    kept = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    weights = shape["num_hidden_layers"] * (2 * width * width + 2 * width * kept + 3 * width * ffn)
    return arm["gathered_bytes"], 2.0 * 2 * weights


_ALL = (
    Row(
        "packed", "packed questions, against TRL without recomputation", "tokens_per_second", "tokens/s",
        QUESTIONS | {"what": "train"}, _both(),
    ),
    Row(
        "whole_logits", "packed questions, against TRL without recomputation, with transformers' loss",
        "tokens_per_second", "tokens/s", QUESTIONS | {"what": "train"}, _both(theirs="whole logits"),
    ),
    Row(
        "padded", "questions, against TRL at its defaults: padded batches of 8, recomputation", "tokens_per_second",
        "tokens/s", QUESTIONS | {"what": "train"}, _both(theirs="defaults"), gate="first step",
    ),
    Row(
        "long2k", "one document of 2,048 tokens a step, against TRL without recomputation", "tokens_per_second", "tokens/s",
        LONG | {"what": "train"}, _both(),
    ),
    Row(
        "long8k", "one document of 8,192 tokens a step, against TRL without recomputation", "tokens_per_second", "tokens/s",
        LONG | {"what": "train", "length": 8192, "steps": 4}, _both(),
    ),
    Row(
        "memory", "peak memory above the loaded base, 1,024 packed tokens a step", "peak_bytes", "MiB",
        QUESTIONS | {"what": "memory", "steps": 4}, _both(), is_time=False,
    ),
    Row(
        "memory2k", "peak memory above the loaded base, a document of 2,048 tokens a step", "peak_bytes", "MiB",
        LONG | {"what": "memory", "steps": 4}, _both(), is_time=False,
    ),
    Row(
        "saved_bytes", "saved for backward, bytes a token and layer", "saved_bytes", "bytes",
        QUESTIONS | {"what": "saved", "warmup": 0, "steps": 1}, _both(), min_pairs=1, is_time=False,
    ),
    Row(
        "vocabulary", "peak memory of head and loss, 2,048 tokens, vocabulary of 150,000, against logits made whole",
        "peak_bytes", "MiB",
        {"length": 2048, "vocabulary": workload.LARGE_VOCABULARY}, _both("loss"), is_time=False,
    ),
    Row(
        "first_step", "from the start of the process to the end of the first step", "first_step_seconds", "s",
        QUESTIONS | {"what": "first_step", "warmup": 0, "steps": 1},
        {OURS: {"side": "ours", "run": "first_step"}, THEIRS: {"side": "theirs", "run": "train", "theirs": "best"}},
        gate="first step", loss_tolerance=0.02,
    ),
    Row("load", "loading and quantizing the base", "load_seconds", "s", {}, _both("load"), gate="none"),
    Row(
        "load_memory", "peak memory of loading and quantizing the base", "peak_bytes", "MiB", {}, _both("load"), gate="none",
        is_time=False, source="load",
    ),
    Row(
        "save", "writing an adapter", "save_seconds", "s", QUESTIONS | {"what": "save", "warmup": 0, "steps": 1}, _both(),
        gate="none",
    ),
    Row(
        "save_bytes", "an adapter's files", "adapter_bytes", "bytes", {}, _both(), gate="none", min_pairs=1, is_time=False,
        source="save",
    ),
    Row(
        "eval", "evaluating packed questions", "eval_tokens_per_second", "tokens/s",
        QUESTIONS | {"what": "eval", "warmup": 1, "steps": 7}, _both(), gate="evaluation",
    ),
    Row(
        "mfu_packed", "the training step, share of the measured bf16 product's rate: questions", "", "share", {}, _both(),
        source="packed", derive=share_of_product,
    ),
    Row(
        "mfu_long2k", "the training step, share of the measured bf16 product's rate: 2,048 tokens", "", "share", {},
        _both(), source="long2k", derive=share_of_product,
    ),
    Row(
        "zero3", "two ranks under ZeRO-3, a thread each, against one process with two", "tokens_per_second", "tokens/s",
        RANKS, _ranks("zero3"),
    ),
    Row(
        "zero1", "two ranks under ZeRO-1, a thread each, against one process with two", "tokens_per_second", "tokens/s",
        RANKS, _ranks("zero1"),
    ),
    Row(
        "gathered", "bytes that ZeRO-3 gathers for quantized linears in forward and backward, against bf16", "", "MiB", {},
        _ranks("zero3"), min_pairs=1, is_time=False, source="zero3", derive=share_gathered,
    ),
)  # fmt: skip
ROWS = {row.name: row for row in _ALL}
MEASURED = tuple(row.name for row in _ALL if row.source is None)
QUICK = (
    "packed",
    "whole_logits",
    "padded",
    "long2k",
    "memory",
    "saved_bytes",
    "vocabulary",
    "first_step",
    "load",
    "save",
    "eval",
)
