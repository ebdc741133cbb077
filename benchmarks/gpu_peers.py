"""The same work by others, for `gpu.py`: TRL + PEFT at its defaults and at its best, with Liger's kernels, and Unsloth.

Every arm opens the same folder, trains the same document again and again (so that the order of rows does not matter), with
the same r, rows, length and learning rate, and is a process of its own. Unsloth and Liger are used where they are installed.
"""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_ours import Say, memory, open_job, random_batch, recomputed_layers, synchronize, time_steps

from qlora.data.batch import collate_packed

LEARNING_RATE = 2e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEEDS = {
    "ours": (), "trl_defaults": ("trl", "peft"), "trl_best": ("trl", "peft"),
    "trl_liger": ("trl", "peft", "liger_kernel"), "unsloth": ("unsloth", "trl"),
}  # fmt: skip


def missing(arm: str) -> list[str]:
    """Packages that an arm needs and that are not installed."""
    return [name for name in NEEDS[arm] if importlib.util.find_spec(name) is None]


def arm(spec: dict[str, Any], say: Say) -> None:
    """One arm, one row."""
    rows, length, vocabulary = spec["rows"], spec["length"], spec["config"]["vocab_size"]
    if spec["arm"] != "ours":
        say({"arm": spec["arm"], **theirs(spec)})
        return
    _, runtime, engine = open_job(spec)
    one = random_batch(1, length, vocabulary)
    row = np.asarray(one.input_ids_BT[0])
    batch = collate_packed([(row, np.ones(length, dtype=np.uint8))] * rows)
    found = time_steps(engine, runtime, batch, spec["warmup"], spec["steps"])
    if "first_step_at" in found:
        found["first_step_seconds"] = found["first_step_at"] - spec["started"]
    say({"arm": "ours", "recomputed_layers": recomputed_layers(engine), **found})


def theirs(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL's SFTTrainer over a model of transformers + PEFT, or of Unsloth."""
    if spec["arm"] == "unsloth":
        import unsloth  # noqa: F401  # before trl, which it changes
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    device, on_gpu = torch.device(spec["device"]), spec["device"] == "cuda"
    model = open_unsloth(spec) if spec["arm"] == "unsloth" else open_transformers(spec)
    first: list[float] = []
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronize(device)
            ends.append(time.perf_counter())
            first.append(time.time() - spec["started"])
            if on_gpu and len(ends) == spec["warmup"]:
                torch.cuda.reset_peak_memory_stats(device)

    # Best: what its own documentation names for speed where memory is there. Rows are full, so packing changes nothing.
    best = {} if spec["arm"] == "trl_defaults" else {"gradient_checkpointing": False}
    if spec["arm"] == "trl_liger":
        best["use_liger_kernel"] = True
    total = spec["warmup"] + spec["steps"]
    settings = SFTConfig(
        output_dir=str(Path(spec["folder"]) / "trl"), max_steps=total, per_device_train_batch_size=spec["rows"],
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0, max_length=spec["length"],
        logging_steps=1, save_strategy="no", report_to=[], seed=0, use_cpu=not on_gpu, bf16=True, **best,
    )  # fmt: skip
    row = random_batch(1, spec["length"], spec["config"]["vocab_size"]).input_ids_BT[0].tolist()
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": [row] * (spec["rows"] * total)}),
        processing_class=AutoTokenizer.from_pretrained(spec["base"]),
        peft_config=None
        if spec["arm"] == "unsloth"
        else LoraConfig(r=spec["r"], lora_alpha=2 * spec["r"], target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = (ends[-1] - ends[spec["warmup"] - 1]) / spec["steps"]
    return {
        "recomputed_layers": spec["config"]["num_hidden_layers"] * bool(trainer.args.gradient_checkpointing),
        "first_step_seconds": first[0], "step_seconds": seconds,
        "tokens_per_second": spec["rows"] * spec["length"] / seconds, "losses": [entry["loss"] for entry in logs],
        "smallest_norm": min(float(entry["grad_norm"]) for entry in logs), "attention": attention_name(), **memory(device),
    }  # fmt: skip


def attention_name() -> str:
    """The fastest attention of transformers that is installed."""
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") is not None else "sdpa"


def open_transformers(spec: dict[str, Any]) -> Any:
    """transformers' own loading; the folder says that it is quantized."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        spec["base"],
        dtype=torch.bfloat16,
        device_map={"": 0} if spec["device"] == "cuda" else None,
        attn_implementation="sdpa" if spec["arm"] == "trl_defaults" else attention_name(),
    )


def open_unsloth(spec: dict[str, Any]) -> Any:
    """Unsloth's loading and LoRA, without recomputation, as its documentation has it for speed."""
    from unsloth import FastLanguageModel

    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    model, _ = FastLanguageModel.from_pretrained(
        model_name=spec["base"], max_seq_length=spec["length"], dtype=torch.bfloat16, load_in_4bit=True
    )
    return FastLanguageModel.get_peft_model(
        model, r=spec["r"], lora_alpha=2 * spec["r"], lora_dropout=0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing=False, random_state=0,
    )  # fmt: skip
