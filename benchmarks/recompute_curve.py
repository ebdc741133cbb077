"""Tokens a second against peak memory, by the number of layers that are computed again in backward.

A Llama of 135M parameters' shape (30 layers, D = 576, F = 1536, 9 and 3 heads, vocabulary 49,152, random weights) in NF4,
r = 16 on all linear layers, one row of 1,024 tokens that are one document, all of them targets. 0, 1/4, 1/2, 3/4 and all of
the layers are computed again, and, for comparison, the MLP of every layer alone.

One process takes a step with each setting in turn, forwards and backwards through the list, so that all see the same
neighbours on the machine. In the first round, which warms up, torch's profiler counts what tensors take at most during a
step, beside what `qlora.plan.activations` says. With `--resident` a process for each setting measures by how much resident
memory rises above the level before a step (VmHWM).

    python benchmarks/recompute_curve.py [--rounds 4] [--resident] [--results benchmarks/results/FILE.md]
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from machine import describe, report
from random_base import make_llama

LAYERS, VOCABULARY, TOKENS = 30, 49152, 1024
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": LAYERS, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
}  # fmt: skip
MLPS = "the MLPs alone"
LEARNING_RATE = 1e-12  # so that every step is the same step, whatever was before it
SETTINGS: tuple[int | str, ...] = (0, LAYERS // 4, LAYERS // 2, 3 * LAYERS // 4, LAYERS, MLPS)


class Trainer:
    """The product's own step on one batch."""

    def __init__(self, base: Path) -> None:
        import numpy as np

        from qlora.config.schema import JobConfig
        from qlora.data.batch import collate_packed
        from qlora.data.loader import StepBatches
        from qlora.data.sampler import Position
        from qlora.distributed import runtime as processes
        from qlora.train.build import build_model, prepare_engine

        self.job = JobConfig.model_validate(
            {
                "model": {"base": str(base)},
                "data": {"max_length": TOKENS},
                "train": {"gradient_checkpointing": False, "learning_rate": LEARNING_RATE},
            }
        )
        self.runtime = processes.start(per_device_batch_size=1, gradient_accumulation_steps=1, max_grad_norm=1.0)
        self.model, self.train_model, _ = build_model(self.job, self.runtime)
        self.engine = prepare_engine(self.job, self.runtime, self.train_model)
        self.mlps: list[Callable[..., Any]] = [layer.mlp.forward for layer in self.model.model.layers]
        row = np.random.default_rng(0).integers(0, VOCABULARY, TOKENS)
        batch = collate_packed([(row, np.ones(TOKENS, dtype=np.uint8))])
        self.batches = StepBatches(0, 0.0, (batch,), Position(0), TOKENS, batch.num_target_tokens)

    def set(self, setting: int | str) -> None:
        """Choose what is computed again from the next step on."""
        from torch.utils.checkpoint import checkpoint

        from qlora.train.recompute import recompute_layers

        recompute_layers(self.model, setting if isinstance(setting, int) else 0, use_reentrant=False)
        for layer, forward in zip(self.model.model.layers, self.mlps, strict=True):
            layer.mlp.forward = partial(checkpoint, forward, use_reentrant=False) if setting == MLPS else forward

    def step(self) -> dict[str, float]:
        """One step: its loss and gradient norm, and the seconds it took, of the clock and of the processor."""
        from qlora.train.step import Counters, run_step

        clock, processor = time.perf_counter(), time.process_time()
        done = run_step(
            self.engine,
            self.runtime,
            self.batches.to(self.runtime.device),
            Counters(),
            learning_rate=self.job.train.learning_rate,
            seed=0,
        )
        found = {"loss": done.loss, "grad_norm": done.grad_norm}
        return found | {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}

    def planned_bytes(self, setting: int | str) -> int | None:
        """What the plan says of activations. At the peak, as backward begins, there are hardly any gradients beside them."""
        from qlora.train.recompute import plan_activations

        planned = plan_activations(self.job, self.train_model, self.runtime.device)
        return None if planned is None or not isinstance(setting, int) else planned.peak(setting)


def measure_all(base: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Memory of a step with each setting, then seconds of steps, in turn."""
    trainer = Trainer(base)
    trainer.step()  # what is made once, such as buffers and the optimizer's state
    found: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        trainer.set(setting)
        found[str(setting)] = measure_tensors(trainer) | {"planned": trainer.planned_bytes(setting), "times": []}
        print(setting, found[str(setting)], flush=True)
    for number in range(rounds):
        for setting in reversed(SETTINGS) if number % 2 else SETTINGS:
            trainer.set(setting)
            found[str(setting)]["times"].append(trainer.step())
    return found


def measure_tensors(trainer: Trainer) -> dict[str, Any]:
    """Bytes that the tensors of a step take at most, beside what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step = trainer.step()
    held = most = 0
    results: Any = profiled.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return {"tensors": most, "loss": step["loss"], "grad_norm": step["grad_norm"]}


def measure_resident(base: Path, setting: int | str) -> int:
    """Bytes by which resident memory rises in a second step."""
    trainer = Trainer(base)
    trainer.set(setting)
    trainer.step()
    level = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    trainer.step()
    return _status_bytes("VmHWM") - level


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def in_process(*arguments: str) -> Any:
    """What a part of this script finds, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out.json", Path(folder) / "log"
        with log.open("w") as stream:
            command = [sys.executable, __file__, *arguments, "--out", str(out)]
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{log.read_text()[-3000:]}")
        return json.loads(out.read_text())


def rows_of(found: dict[str, dict[str, Any]]) -> list[str]:
    """The table. Raises SystemExit where settings do not compute the same."""
    steps = [step for entry in found.values() for step in entry["times"]]
    losses, norms = ([step[key] for step in steps] for key in ("loss", "grad_norm"))
    if min(norms) <= 0 or max(losses) > min(losses) * 1.00001 or max(norms) > min(norms) * 1.001:
        raise SystemExit(f"the settings do not train the same: losses {losses}, norms {norms}")
    with_resident = all("resident" in entry for entry in found.values())
    head = ["layers computed again", "tokens/s", "tokens a CPU second", "tensors at most", "planned", "error"]
    lines = [head + ["resident"] * with_resident, ["---"] + ["---:"] * (5 + with_resident)]
    for name, entry in found.items():
        seconds, cpu = (statistics.median(step[key] for step in entry["times"]) for key in ("seconds", "cpu_seconds"))
        planned = entry["planned"]
        lines.append([name, f"{TOKENS / seconds:,.0f}", f"{TOKENS / cpu:,.0f}", _mib(entry["tensors"])])
        lines[-1] += ["", ""] if planned is None else [_mib(planned), f"{planned / entry['tensors'] - 1:+.1%}"]
        lines[-1] += [_mib(entry["resident"])] if with_resident else []
    return ["| " + " | ".join(line) + " |" for line in lines]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def main() -> None:
    """Measure, print, and write the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--resident", action="store_true", help="resident memory too, in a process for each setting")
    parser.add_argument("--results", type=Path)
    for name in ("--base", "--setting", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out:
        base, setting = Path(arguments.base), arguments.setting
        if setting is not None:
            part: Any = measure_resident(base, int(setting) if setting.isdigit() else setting)
        else:
            part = measure_all(base, arguments.rounds)
        Path(arguments.out).write_text(json.dumps(part))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        make_llama(base, **SHAPE)
        found = in_process("--base", str(base), "--rounds", str(arguments.rounds))
        for name, entry in found.items() if arguments.resident else ():
            entry["resident"] = in_process("--base", str(base), "--setting", name)
    lines = [
        *rows_of(found),
        "",
        f"Tokens a second: median of {arguments.rounds} steps of each setting, taken in turn. Tensors: beside the base, A "
        "and B and the optimizer's state; planned: the same by arithmetic.",
        "",
        f"Machine: {describe()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
    ]
    report(arguments.results, "Tokens a second against memory, by layers computed again", __file__, lines)


if __name__ == "__main__":
    main()
