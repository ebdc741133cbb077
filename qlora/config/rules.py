"""What a job must satisfy beyond the type of each key, as far as that is known without a model and without a GPU.

`check_job` looks at combinations of keys and at the paths a verb is going to read, so that a run fails in its first
second and not after the base was loaded. `changed_keys` says what differs between a checkpoint's job and the one that
wants to resume it, and which differences leave the trained result comparable.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora.config.lora_rules import lora_problems
from qlora.config.paths import exists, looks_like_path, missing_hint
from qlora.config.problems import Problem, as_error, show
from qlora.config.schema import JobConfig, QuantizationConfig, Section

Verb = Literal["train", "eval", "plan", "slurm"]
BUILTIN_BASES = ("builtin:tiny",)
RESUME_WORDS = ("auto", "none")
_TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
_BATCH_KEYS = frozenset({"train.per_device_train_batch_size", "train.gradient_accumulation_steps"})
_SAFE_SECTIONS = ("logging.", "eval.", "checkpoint.")
_SAFE_KEYS = frozenset(
    {"train.output_dir", "train.max_nonfinite_steps", "train.silent_rank_seconds", "train.stalled_rank_seconds"}
    # What is computed again, and where it is kept, changes no gradient; auto chooses anew at each start.
    | {"train.gradient_checkpointing", "train.offload_activations"}
)


def check_job(config: JobConfig, verb: Verb, source: str = "") -> None:
    """Raise ConfigError for combinations and paths that cannot work for `verb`, all of them at once.

    `train` and `eval` look at the files they will read; `plan` and `slurm`, which may run on another machine than the
    job, look at the keys alone.

    Args:
        source: the job file's name, put in front of each key.
    """
    problems = [*_combinations(config)]
    if verb in ("train", "eval"):
        problems += [*_base(config), *_data(config, verb)]
    if verb == "train":
        problems += [*_output(config), *_resume(config), *_trackers(config)]
    if problems:
        named = [Problem(source, p.key, p.message, p.found, p.wanted, p.next_step) for p in problems]
        raise as_error(named, source or "the job")


def _combinations(config: JobConfig) -> Iterator[Problem]:
    model, data, train = config.model, config.data, config.train
    if train.warmup_steps is not None and train.max_steps is not None and train.warmup_steps > train.max_steps:
        yield Problem(
            "",
            "train.warmup_steps",
            "the learning rate would never be reached",
            found=f"{train.warmup_steps} warm-up steps of {train.max_steps} steps",
            wanted="at most train.max_steps",
        )
    for name in unused_keys(model.quantization):
        yield Problem(
            "",
            f"model.quantization.{name}",
            "in 8 bits a row has one scale, so this would change nothing",
            found=show(getattr(model.quantization, name)),
            next_step=f"remove {name}, or model.quantization.bits: 4",
        )
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield Problem(
            "",
            "model.attention",
            "flash_attention_2 does not compute in float32",
            next_step="model.dtype: bfloat16, or model.attention: sdpa",
        )
    if config.eval.every_steps is not None and not data.eval:
        yield Problem(
            "",
            "eval.every_steps",
            "there is nothing to evaluate on",
            found="data.eval is empty",
            next_step="name files in data.eval, or eval.every_steps: null",
        )
    if train.offload_activations and not train.gradient_checkpointing:
        yield Problem(
            "",
            "train.offload_activations",
            "the inputs of recomputed layers are what is offloaded, and no layer is recomputed",
            found=f"train.gradient_checkpointing is {show(train.gradient_checkpointing)}",
            next_step="train.gradient_checkpointing: true, or train.offload_activations: false",
        )
    yield from lora_problems(config)


def unused_keys(quantization: QuantizationConfig | None) -> list[str]:
    """Return the keys of a quantization that are not at their defaults and that its number of bits has no use for."""
    if quantization is None or quantization.bits == 4:
        return []
    fields = type(quantization).model_fields
    of_4_bits = ("quant_type", "double_quant", "block_size", "quant_storage")
    return [name for name in of_4_bits if getattr(quantization, name) != fields[name].default]


def _base(config: JobConfig) -> Iterator[Problem]:
    base, key = config.model.base, "model.base"
    if not base.strip():
        yield Problem("", key, "empty", wanted="builtin:tiny, a Hugging Face folder, or a hub id")
        return
    if base.startswith("builtin:"):
        if base not in BUILTIN_BASES:
            yield Problem("", key, "no such built-in base", found=show(base), wanted=" or ".join(BUILTIN_BASES))
        return
    if not looks_like_path(base):
        return
    folder = Path(base)
    if not exists(folder):
        yield Problem("", key, "no such folder", found=show(base), next_step=missing_hint(base))
    elif not folder.is_dir():
        yield Problem("", key, "a folder is wanted, this is a file", found=show(base), next_step=f"{key}: {folder.parent}")
    elif not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        yield Problem(
            "",
            key,
            "this folder holds an adapter, not a base" if adapter else "this folder holds no config.json",
            found=show(base),
            wanted="a model folder as Hugging Face writes it: config.json, *.safetensors, tokenizer files",
        )
    elif config.model.revision is not None:
        yield Problem(
            "",
            "model.revision",
            "a folder has no revisions; they belong to hub ids",
            found=show(config.model.revision),
            next_step="model.revision: null",
        )


def _data(config: JobConfig, verb: Verb) -> Iterator[Problem]:
    data = config.data
    needed = "train" if verb == "train" else "eval"
    if not getattr(data, needed):
        yield Problem(
            "",
            f"data.{needed}",
            f"no data to {verb} on" if verb == "train" else "no data to evaluate on",
            wanted="files, folders or hub dataset ids",
            next_step=f"data: {{{needed}: [my_rows.jsonl]}} in the job file, or data.{needed}=[my_rows.jsonl] behind it",
        )
    lists = {"train": data.train, "eval": data.eval} if verb == "train" else {"eval": data.eval}
    for name, values in lists.items():
        for index, value in enumerate(values):
            yield from _readable(f"data.{name}[{index}]", value)
    if data.chat_template is not None:
        template = data.chat_template
        if not exists(template):
            yield Problem(
                "",
                "data.chat_template",
                "no such Jinja file",
                found=show(template),
                next_step=missing_hint(template, (".jinja", ".jinja2")),
            )
        else:
            yield from _readable("data.chat_template", template)


def _readable(key: str, value: str) -> Iterator[Problem]:
    if not value.strip():
        yield Problem("", key, "empty", wanted="a file, a folder or a hub dataset id")
    elif looks_like_path(value):
        if not exists(value):
            yield Problem("", key, "no such file or folder", found=show(value), next_step=missing_hint(value))
        elif not os.access(value, os.R_OK):
            yield Problem("", key, "may not be read by this user", found=show(value))
    elif "/" not in value:
        wanted = "a file, a folder, or a hub dataset id as user/name"
        yield Problem("", key, "no such file or folder", found=show(value), wanted=wanted, next_step=missing_hint(value))


def _output(config: JobConfig) -> Iterator[Problem]:
    output_dir, key = config.train.output_dir, "train.output_dir"
    if not output_dir.strip():
        yield Problem("", key, "empty", wanted="a folder")
        return
    if output_dir.startswith("~"):
        yield Problem("", key, "~ is not expanded here", found=show(output_dir), next_step=os.path.expanduser(output_dir))
        return
    folder = Path(output_dir).absolute()
    ancestor = folder
    while not exists(ancestor) and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        yield Problem("", key, "a folder is wanted, there is a file", found=str(ancestor))
    elif not os.access(ancestor, os.W_OK | os.X_OK):
        yield Problem("", key, "may not be written by this user", found=str(ancestor))
    elif folder.is_dir() and exists(config.model.base) and os.path.samefile(folder, config.model.base):
        yield Problem("", key, "this is the base's own folder; it is never written to", found=show(output_dir))


def _resume(config: JobConfig) -> Iterator[Problem]:
    resume, key = config.checkpoint.resume, "checkpoint.resume"
    if resume in RESUME_WORDS:
        return
    folder = Path(resume)
    wanted = "auto, none, or the path of a checkpoint"
    if not resume.strip() or not exists(folder):
        words = {"latest": "auto", "last": "auto", "newest": "auto", "true": "auto", "false": "none", "null": "none"}
        word = resume.strip().lower()
        word = words.get(word, word)
        hint = f"did you mean {word}?" if word in RESUME_WORDS else missing_hint(resume) if resume.strip() else None
        yield Problem("", key, "no such checkpoint", found=show(resume), wanted=wanted, next_step=hint)
        return
    if (folder / "COMMITTED").is_file():
        return
    committed = sorted(folder.glob("checkpoints/step-*/COMMITTED"))
    if committed:
        hint = f"checkpoint.resume: {committed[-1].parent}"
        yield Problem("", key, "a run directory, not a checkpoint", found=show(resume), wanted=wanted, next_step=hint)
    else:
        yield Problem("", key, "not a complete checkpoint: it has no file COMMITTED", found=show(resume), wanted=wanted)


def _trackers(config: JobConfig) -> Iterator[Problem]:
    for tracker in dict.fromkeys(config.logging.trackers):
        packages = _TRACKER_PACKAGES.get(tracker, (tracker,))
        if not any(importlib.util.find_spec(package) for package in packages):
            yield Problem(
                "", "logging.trackers", f"{tracker} is not installed", next_step=f"pip install {packages[0]}, or remove it"
            )


@dataclass(frozen=True)
class Change:
    """One key that differs. `safe` tells whether a resume may go on with the new value."""

    key: str
    old: Any
    new: Any
    safe: bool

    def __str__(self) -> str:
        return f"{self.key}: {show(self.old)} -> {show(self.new)}"


def changed_keys(old: JobConfig, new: JobConfig, *, old_global_batch: int, new_global_batch: int) -> list[Change]:
    """Return what differs between a checkpoint's job and the job that resumes it, in the order of the schema.

    Safe are train.output_dir, what says how much is borne and which layers are computed again (_SAFE_KEYS), and all of
    logging, eval and checkpoint.
    per_device_train_batch_size and gradient_accumulation_steps are safe as long as the global batch stays, in packs.
    World size and ZeRO stage, which are not in the job file, are always free to change.
    """
    old_flat, new_flat = _flat(old), _flat(new)
    changes = []
    for key in dict.fromkeys([*old_flat, *new_flat]):
        before, after = old_flat.get(key), new_flat.get(key)
        if before == after and (key in old_flat) == (key in new_flat):
            continue
        safe = key in _SAFE_KEYS or key.startswith(_SAFE_SECTIONS)
        safe = safe or (key in _BATCH_KEYS and old_global_batch == new_global_batch)
        changes.append(Change(key, before, after, safe))
    return changes


def same_batch_keys(old: JobConfig, new: JobConfig) -> bool:
    """Whether two jobs say the same of micro-batches and accumulation."""
    return all(_flat(old)[key] == _flat(new)[key] for key in _BATCH_KEYS)


def global_batch_rows(config: JobConfig, world_size: int) -> int:
    """Return the rows of one optimizer step over all ranks, as a new run takes them."""
    return config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps * world_size


def _flat(config: JobConfig) -> dict[str, Any]:
    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Section):
            for name in type(value).model_fields:
                yield from walk(f"{prefix}.{name}" if prefix else name, getattr(value, name))
        else:
            yield prefix, value

    return dict(walk("", config))
