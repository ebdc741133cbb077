"""The other side's arm: TRL's SFTTrainer with PEFT and bitsandbytes.

`best` is what makes it fastest here and changes nothing of what is learned: packs instead of padding, no recomputation,
and no autocast around what is bfloat16 already. `defaults` are its own: rows padded to the longest of a batch of 8,
recomputation and autocast on. In both, the loss is TRL's own, fused with the head, which makes no whole logits. `whole
logits` is `best` with the loss of transformers' own models instead, by a subclass with another `compute_loss`, as TRL would
have it done.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from peers import measure, ours, workload


def open_base(base: Path) -> Any:
    """The base in NF4 with double quantization, computing in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=quantization)


def make_trainer(base: Path, settings: dict[str, Any], folder: Path, rows: Any, callbacks: list[Any]) -> Any:
    """SFTTrainer as `settings["theirs"]` says: best, whole logits, autocast or defaults."""
    from peft import LoraConfig
    from transformers import AutoTokenizer, Trainer
    from trl import SFTConfig, SFTTrainer

    class WholeLogits(SFTTrainer):  # type: ignore[misc]
        """With the loss of transformers' models, over logits made whole."""

        compute_loss = Trainer.compute_loss

    best = settings["theirs"] != "defaults"
    chosen: dict[str, Any] = {}
    if best:
        chosen = {
            "packing": True, "max_length": settings["length"], "gradient_checkpointing": False,
            "per_device_train_batch_size": settings["packs"], "per_device_eval_batch_size": 1,
            "bf16": settings["theirs"] == "autocast",
        }  # fmt: skip
    if isinstance(rows, list):  # tokens already
        from datasets import Dataset

        rows = Dataset.from_list(rows)
        chosen |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "train_sampling_strategy": "sequential"}
        if best:
            chosen["per_device_train_batch_size"] = 1  # a row is a step's packs
    else:
        # In their order: packs are sorted by how full they are, and a first step over the last one would be a short one.
        chosen |= {"assistant_only_loss": True, "train_sampling_strategy": "sequential"}
    arguments = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=settings["steps"], learning_rate=workload.LEARNING_RATE,
        lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        seed=workload.SEED, dataloader_pin_memory=False, disable_tqdm=True, **chosen,
    )  # fmt: skip
    return (WholeLogits if settings["theirs"] == "whole logits" else SFTTrainer)(
        model=open_base(base),
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            r=workload.RANK, lora_alpha=workload.ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=callbacks,
    )


def watcher(settings: dict[str, Any], found: dict[str, Any]) -> Any:
    """A callback that notes what every step was."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.clock = measure.StepClock()
            self.tokens: list[int] = []
            self.first_step_at = (0.0, 0.0)
            self.memory: measure.PeakMemory | None = None
            self.saved: measure.SavedForBackward | None = None

        def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            if settings["what"] == "saved":
                self.saved = measure.SavedForBackward(model)
            if settings["what"] == "memory":
                self.memory = measure.PeakMemory()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.clock.tick()
            if len(self.clock.wall) == 1:
                self.first_step_at = time.time(), time.process_time()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            if self.memory is not None:
                found.update(peak_bytes=self.memory.above_bytes(), level_bytes=self.memory.level_bytes)

    return Watch()


def train(base: Path, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same steps by SFTTrainer, measured as `settings["what"]` says: train, memory, saved, first_step, eval, save."""
    found: dict[str, Any] = {}
    watch = watcher(settings, found)
    steps = workload.read_steps(Path(settings["steps_file"])) if settings["what"] != "first_step" else []
    rows: Any = steps
    if settings["theirs"] == "defaults":
        rows = workload.documents(steps)
    if settings["what"] == "first_step":
        from datasets import load_dataset

        rows = load_dataset("json", data_files=str(settings["data"]), split="train", cache_dir=str(folder / "datasets"))
    trainer = make_trainer(base, settings, folder, rows, [watch])
    if settings["what"] == "eval":
        return evaluate(trainer, rows, settings["warmup"])
    if settings["what"] == "save":
        return ours.saving(trainer.model.save_pretrained, folder)
    collate = trainer.data_collator

    def counting(features: list[dict[str, Any]]) -> Any:
        watch.tokens.append(sum(len(feature["input_ids"]) for feature in features))
        return collate(features)

    trainer.data_collator = counting
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    watch.tokens = watch.tokens[: settings["steps"]]  # the loader may look one batch ahead
    found |= {
        "losses": [float(entry["loss"]) for entry in logs],
        "norms": [float(entry["grad_norm"]) for entry in logs],
        "tokens": watch.tokens,
        **ours.speed(watch, settings["warmup"]),
    }
    if watch.saved is not None:
        found["saved_bytes"] = watch.saved.bytes_per_token_and_layer(watch.tokens[0])
    if settings["what"] == "first_step":
        wall, found["first_step_cpu_seconds"] = watch.first_step_at
        found["first_step_seconds"] = wall - float(os.environ["QLORA_BENCH_STARTED"])
    return found


def evaluate(trainer: Any, rows: list[Any], warmup: int) -> dict[str, Any]:
    """Evaluation of the same packs."""
    from datasets import Dataset

    timed = rows[warmup:]
    trainer.evaluate(Dataset.from_list(rows[:warmup]))
    start = time.perf_counter()
    result = trainer.evaluate(Dataset.from_list(timed))
    seconds = time.perf_counter() - start
    tokens = sum(len(row["input_ids"]) for row in timed)
    return {"eval_tokens_per_second": tokens / seconds, "losses": [result["eval_loss"]]}


def load(base: Path, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Loading a base, quantized: seconds, and the peak of memory above what was there when all was imported."""
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    memory = measure.PeakMemory()
    start = time.perf_counter()
    model = open_base(base)
    AutoTokenizer.from_pretrained(base)
    seconds = time.perf_counter() - start
    assert model is not None
    return {"load_seconds": seconds, "peak_bytes": memory.above_bytes()}


def loss(base: Path, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Head and loss as transformers' models compute them: all logits, their fp32 copy, and the gradients of both."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    head, hidden, targets = ours.loss_inputs(settings)

    def run(hidden_ND: Any, targets_N: Any) -> Any:
        logits = head(hidden_ND)[None]
        return ForCausalLMLoss(logits, None, head.out_features, shift_labels=targets_N[None])

    return ours.measured_loss(run, hidden, targets)
