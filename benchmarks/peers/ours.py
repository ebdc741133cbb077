"""This project's arm: the job that a user would start, by the command line's own entry, watched from a hook.

The one thing that is put in from outside is a hook of the loop (`Recorder`), which is told of every step as any other hook
is; it is added where the loop is entered, the model being loaded and prepared by then.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

from peers import measure, workload


class Recorder:
    """A hook of the loop that notes what every step was."""

    def __init__(self, settings: dict[str, Any], gathered: dict[str, float] | None = None) -> None:
        self.settings, self.gathered = settings, gathered
        self.gathered_after: list[float] = []
        self.clock = measure.StepClock()
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.tokens: list[int] = []

    def start(self, num_steps: int, first: int) -> None:
        """Nothing to do."""

    def after_step(self, result: Any, *, is_last: bool) -> None:
        """A step is over."""
        self.clock.tick()
        self.losses.append(float(result.loss))
        self.norms.append(float(result.grad_norm))
        self.tokens.append(int(result.step_tokens))
        if self.gathered is not None:
            self.gathered_after.append(self.gathered["bytes"])

    def finish(self, result: Any, outcome: str) -> None:
        """Nothing to do."""

    def found(self) -> dict[str, Any]:
        """What there is to say of the run."""
        return {"losses": self.losses, "norms": self.norms, "tokens": self.tokens, **speed(self, self.settings["warmup"])}


def speed(recorder: Any, warmup: int) -> dict[str, float]:
    """Useful tokens a second after the warm-up steps, where there are steps after them."""
    if len(recorder.tokens) <= warmup or warmup == 0:
        return {}
    taken = recorder.clock.after(warmup)
    tokens = sum(recorder.tokens[warmup:])
    return {
        "tokens_per_second": tokens / taken["seconds"],
        "tokens_per_cpu_second": tokens / taken["cpu_seconds"],
        "step_seconds": taken["seconds"] / len(recorder.tokens[warmup:]),
    }


def _run_job(base: Path, settings: dict[str, Any], folder: Path, loop: Any) -> None:
    """`qlora train` with `loop` in place of the loop of training. Raises SystemExit where the command fails."""
    from qlora.cli.main import main
    from qlora.train import setup

    setup.train = loop
    job_file = folder / "job.yaml"
    job_file.write_text("{}\n")
    # Ranks that share a cache: the token rows are made by whoever is first.
    code = main(["train", str(job_file), *workload.overrides(base, settings, folder / "run", folder / "cache")])
    if code:
        raise SystemExit(code)


def train(base: Path, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`qlora train`, measured as `settings["what"]` says: train, memory, saved, first_step, eval, save."""
    from qlora.train import setup

    what = settings["what"]
    gathered = count_gathered() if what == "gathered" else None
    recorder = Recorder(settings, gathered)
    found: dict[str, Any] = {}
    loop = setup.train

    def watched_loop(job: Any) -> Any:
        model = job.engine.model.model if hasattr(job.engine.model, "model") else None
        if what == "eval":
            found.update(evaluate(job, settings))
            return "done"
        if what == "save":
            found.update(save(model, folder))
            return "done"
        saved = measure.SavedForBackward(model) if what == "saved" else None
        before = gathered["bytes"] if gathered is not None else 0.0  # by the probe of the model
        job.hooks = [*job.hooks, recorder]
        memory = measure.PeakMemory() if what == "memory" else None
        outcome = loop(job)
        if memory is not None:
            found.update(peak_bytes=memory.above_bytes(), level_bytes=memory.level_bytes)
        if saved is not None:
            found["saved_bytes"] = saved.bytes_per_token_and_layer(recorder.tokens[0])
        if gathered is not None:
            marks = [before, *recorder.gathered_after]
            found["gathered_bytes"], found["gathered_bytes_of_last_step"] = marks[1] - marks[0], marks[-1] - marks[-2]
        return outcome

    _run_job(base, settings, folder, watched_loop)
    return {**recorder.found(), **found}


def first_step(base: Path, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds from the start of the process to the end of the first step."""
    from qlora.cli.loading import modules_that_stay

    with modules_that_stay():  # as the command imports it
        from qlora.train import setup

    loop = setup.train
    at: list[tuple[float, float]] = []

    class Stamp(Recorder):
        def after_step(self, result: Any, *, is_last: bool) -> None:
            at.append((time.time(), time.process_time()))
            super().after_step(result, is_last=is_last)

    recorder = Stamp(settings)

    def watched_loop(job: Any) -> Any:
        job.hooks = [*job.hooks, recorder]
        return loop(job)

    _run_job(base, settings, folder, watched_loop)
    wall, cpu = at[0]
    started = float(os.environ["QLORA_BENCH_STARTED"])
    return {**recorder.found(), "first_step_seconds": wall - started, "first_step_cpu_seconds": cpu}


def evaluate(job: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Evaluation of the packs that training would take, after those of the warm-up."""
    from qlora.objective.evaluate import evaluate as evaluate_batches

    batches = []
    for step in job.loader.batches(job.position):
        batches += step.micro_batches
        if len(batches) == settings["steps"]:
            break
    warmup, timed = batches[: settings["warmup"]], batches[settings["warmup"] :]
    evaluate_batches(job.engine.model, warmup, job.runtime.device)
    start = time.perf_counter()
    result = evaluate_batches(job.engine.model, timed, job.runtime.device)
    seconds = time.perf_counter() - start
    return {"eval_tokens_per_second": sum(b.num_tokens for b in timed) / seconds, "losses": [result["eval_loss"]]}


def save(model: Any, folder: Path) -> dict[str, Any]:
    """Seconds that an adapter's files take, the median of five after one, and their bytes."""
    import qlora

    return saving(lambda out: qlora.save_adapter(model, out), folder)


def saving(write: Any, folder: Path) -> dict[str, Any]:
    """Time a function that writes an adapter into a folder."""
    seconds = []
    for number in range(6):
        out = folder / f"adapter_{number}"
        start = time.perf_counter()
        write(out)
        seconds.append(time.perf_counter() - start)
    size = sum(path.stat().st_size for path in out.iterdir() if path.name.startswith("adapter_"))
    return {"save_seconds": statistics.median(seconds[1:]), "adapter_bytes": size}


def load(base: Path, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Loading a base, quantized: seconds, and the peak of memory above what was there when all was imported."""
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401  (as on the other side)

    import qlora
    import qlora.adapter.base  # what would be imported at the first use

    memory = measure.PeakMemory()
    start = time.perf_counter()
    model, _ = qlora.load_base(str(base))
    seconds = time.perf_counter() - start
    assert model is not None
    return {"load_seconds": seconds, "peak_bytes": memory.above_bytes()}


def loss(base: Path, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Head and loss alone, forward and backward, over a large vocabulary."""
    from qlora.objective.train_model import LossHead
    from qlora.ops.cross_entropy import with_gradients

    head, hidden, targets = loss_inputs(settings)
    loss_head = LossHead(head, 1.0, None)

    def run(hidden_ND: Any, targets_N: Any) -> Any:
        value, gradient = loss_head(hidden_ND, targets_N)
        return with_gradients(value, [hidden_ND], [gradient]) / targets_N.numel()

    return measured_loss(run, hidden, targets)


def loss_inputs(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A frozen head, hidden states and targets, all random, from one seed."""
    import torch

    torch.manual_seed(workload.SEED)
    width = workload.SHAPE["hidden_size"]
    head = torch.nn.Linear(width, settings["vocabulary"], bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(settings["length"], width, dtype=torch.bfloat16).requires_grad_()
    return head, hidden, torch.randint(0, settings["vocabulary"], (settings["length"],))


def measured_loss(run: Any, hidden: Any, targets: Any) -> dict[str, Any]:
    """Peak of memory and seconds of one pass over all targets, after one over a few."""
    run(hidden[:8].detach().requires_grad_(), targets[:8]).backward()
    memory = measure.PeakMemory()
    start = time.perf_counter()
    value = run(hidden, targets)
    value.backward()
    seconds = time.perf_counter() - start
    norm = float(hidden.grad.float().norm())
    return {
        "peak_bytes": memory.above_bytes(), "loss_seconds": seconds, "losses": [float(value)], "norms": [norm],
    }  # fmt: skip


def count_gathered() -> dict[str, float]:
    """Count the bytes of what ranks gather as uint8, which are packed weights and their statistics, from now on.

    Called before DeepSpeed is started, which looks the function up then.
    """
    import torch.distributed as dist

    counted = {"bytes": 0.0}
    gather = dist.all_gather_into_tensor

    def counting(output_tensor: Any, input_tensor: Any, *arguments: Any, **keywords: Any) -> Any:
        if str(output_tensor.dtype) == "torch.uint8":
            counted["bytes"] += output_tensor.numel()
        return gather(output_tensor, input_tensor, *arguments, **keywords)

    dist.all_gather_into_tensor = counting
    return counted
