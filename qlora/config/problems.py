"""What is wrong with a job file, in the words of the person who wrote it.

Everything that is found is a `Problem`: where it stands, which key, what was found, what was wanted, what to do next.
Problems are collected and raised as one `ConfigError`, so that a file with three mistakes is mended in one go. What is
wanted is read off the JSON Schema of the job, so that no text here can disagree with `schema.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from qlora.errors import ConfigError

KeyPath = tuple[str | int, ...]
MOST_SHOWN = 20

# Names that other trainers use for a key of ours.
OTHER_NAMES = {
    "adapter_r": "lora.r",
    "alpha": "lora.lora_alpha",
    "attn_implementation": "model.attention",
    "base_model": "model.base",
    "batch_size": "train.per_device_train_batch_size",
    "bf16": "model.dtype",
    "bnb_4bit_compute_dtype": "model.dtype",
    "bnb_4bit_quant_storage": "model.quantization.quant_storage",
    "bnb_4bit_quant_type": "model.quantization.quant_type",
    "bnb_4bit_use_double_quant": "model.quantization.double_quant",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "datasets": "data.train",
    "dropout": "lora.lora_dropout",
    "epochs": "train.num_train_epochs",
    "eval_steps": "eval.every_steps",
    "fp16": "model.dtype",
    "grad_accum": "train.gradient_accumulation_steps",
    "load_in_4bit": "model.quantization",
    "logging_steps": "logging.log_every_steps",
    "lora_r": "lora.r",
    "lora_target_modules": "lora.target_modules",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "micro_batch_size": "train.per_device_train_batch_size",
    "model_name_or_path": "model.base",
    "num_epochs": "train.num_train_epochs",
    "optim": "train.optimizer",
    "rank": "lora.r",
    "report_to": "logging.trackers",
    "resume_from_checkpoint": "checkpoint.resume",
    "sample_packing": "data.packing",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "scheduler": "train.lr_scheduler_type",
    "sequence_len": "data.max_length",
    "torch_dtype": "model.dtype",
    "train_file": "data.train",
    "validation_file": "data.eval",
    "val_data": "data.eval",
}
LAUNCH_NAMES = (
    "accelerate",
    "deepspeed",
    "fsdp",
    "num_gpus",
    "num_machines",
    "num_processes",
    "stage",
    "world_size",
    "zero_stage",
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `where` is `file:line:column` or `command line`; empty where neither is known."""

    where: str
    key: str
    message: str
    found: str | None = None
    wanted: str | None = None
    next_step: str | None = None

    @property
    def place(self) -> str | None:
        return ": ".join(part for part in (self.where, self.key) if part) or None

    def line(self) -> str:
        """Return the problem in one line, for a list of several."""
        details = "; ".join(
            f"{label}{value}"
            for label, value in (("found ", self.found), ("wanted ", self.wanted), ("", self.next_step))
            if value is not None
        )
        head = f"{self.place}: {self.message}" if self.place else self.message
        return f"{head}; {details}" if details else head


def as_error(problems: Sequence[Problem], subject: str) -> ConfigError:
    """Return one error for all problems: in full for a single one, a line each for several."""
    if len(problems) == 1:
        only = problems[0]
        return ConfigError(only.message, place=only.place, found=only.found, wanted=only.wanted, next_step=only.next_step)
    lines = [f"{len(problems)} errors in {subject}"]
    lines += [f"  {problem.line()}" for problem in problems[:MOST_SHOWN]]
    if len(problems) > MOST_SHOWN:
        lines.append(f"  and {len(problems) - MOST_SHOWN} more")
    return ConfigError("\n".join(lines))


def explain(error: ValidationError, cls: type[BaseModel]) -> ConfigError:
    """Return what pydantic says of a section that was made in Python, in the words of a job file's mistakes."""
    keys, problems = Keys(cls.model_json_schema()), {}
    for entry in error.errors(include_url=False, include_context=False):
        path: KeyPath = entry["loc"]
        if entry["type"] == "extra_forbidden":
            problems[path] = Problem(cls.__name__, dotted(path), "unknown key", next_step=keys.suggestion(path))
            continue
        path = keys.known_part(path)  # the members of a union report one problem
        found, wanted = show(_at(error, path)), keys.wanted(path)
        problems.setdefault(path, Problem(cls.__name__, dotted(path), "cannot be used", found, wanted))
    return as_error(list(problems.values()), cls.__name__)


def _at(error: ValidationError, path: KeyPath) -> Any:
    """The value that pydantic was given at a path, which is the shortest that begins one of its errors."""
    return next(e["input"] for e in error.errors(include_url=False) if e["loc"][: len(path)] == path)


def dotted(path: KeyPath) -> str:
    """Return `('data', 'train', 0)` as `data.train[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def show(value: Any) -> str:
    """Return a value the way YAML writes it, with its kind where that helps, never longer than a line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"'{_shorten(value)}'"
    if isinstance(value, dict):
        return "a section with " + (_shorten(", ".join(map(str, list(value)[:8]))) if value else "no keys")
    if isinstance(value, list):
        items = [show(item) for item in value[:4]] + ["..."] * (len(value) > 4)
        return f"a list, [{_shorten(', '.join(items))}]"
    return _shorten(repr(value)) + " (a number)" if isinstance(value, int | float) else _shorten(repr(value))


def _shorten(text: str, most: int = 80) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= most else text[: most - 3] + "..."


class Keys:
    """Answers questions about the keys of a job from its JSON Schema: which exist, what each wants, which was meant."""

    def __init__(self, json_schema: dict[str, Any]) -> None:
        self._definitions: dict[str, Any] = json_schema.get("$defs", {})
        self._root = json_schema
        self._name = {"JobConfig": "a job"}.get(json_schema["title"], json_schema["title"])
        self.all: list[KeyPath] = list(self._walk(json_schema, ()))

    def node(self, path: KeyPath) -> dict[str, Any] | None:
        """Return the schema of the value at `path`, None where there is no such key."""
        node: dict[str, Any] | None = self._root
        for part in path:
            node = self._child(node, part)
            if node is None:
                return None
        return self._resolve(node) if node is not None else None

    def known_part(self, path: KeyPath) -> KeyPath:
        """Return the longest beginning of `path` that the schema knows; pydantic adds union members behind it."""
        length = 0
        while length < len(path) and self.node(path[: length + 1]) is not None:
            length += 1
        return path[:length]

    def accepts_bool(self, path: KeyPath) -> bool:
        """Tell whether true and false are values of this key; pydantic alone would read true as the number 1."""
        node = self.node(path)
        return node is None or any(option.get("type") in (None, "boolean") for option in self._options(node))

    def wanted(self, path: KeyPath) -> str | None:
        """Return in words what the key accepts."""
        node = self.node(path)
        if node is None:
            return None
        text = " or ".join(dict.fromkeys(self._in_words(option) for option in self._options(node)))
        return f"{text}: {node['description'].rstrip('.')}" if text == "text" and "description" in node else text

    def suggestion(self, path: KeyPath) -> str:
        """Return what an unknown key may have meant."""
        *parents, last = path
        name = str(last).lower().replace("-", "_")
        if name in LAUNCH_NAMES:
            return "how many processes run, and which ZeRO stage, belongs to the launch configuration: launch/accelerate/"
        here = {str(key[-1]): key for key in self.all if key[:-1] == tuple(parents)}
        candidates = [here[name]] if name in here else []
        candidates += [here[close] for close in difflib.get_close_matches(name, here, n=1, cutoff=0.75)]
        candidates += [key for key in self.all if key[-1] == name]
        if name in OTHER_NAMES:
            candidates.append(tuple(OTHER_NAMES[name].split(".")))
        if not candidates:
            candidates += [here[close] for close in difflib.get_close_matches(name, here, n=1, cutoff=0.6)]
        if not candidates:
            close_names = difflib.get_close_matches(name, {str(key[-1]) for key in self.all}, n=1, cutoff=0.75)
            candidates += [key for key in self.all if key[-1] in close_names]
        if candidates:
            return f"did you mean {' or '.join(dict.fromkeys(map(dotted, candidates[:4])))}?"
        return f"{dotted(tuple(parents)) or self._name} knows {', '.join(here)}"

    def _walk(self, node: dict[str, Any], path: KeyPath) -> list[KeyPath]:
        paths: list[KeyPath] = []
        for option in self._options(self._resolve(node)):
            for key, child in option.get("properties", {}).items():
                paths.append((*path, key))
                paths += self._walk(child, (*path, key))
        return paths

    def _child(self, node: dict[str, Any] | None, part: str | int) -> dict[str, Any] | None:
        for option in self._options(self._resolve(node or {})):
            if isinstance(part, int) and "items" in option:
                return option["items"]
            if isinstance(part, str) and part in option.get("properties", {}):
                return option["properties"][part]
            if isinstance(part, str) and isinstance(option.get("additionalProperties"), dict):
                return option["additionalProperties"]  # a table whose keys are the user's own
        return None

    def _resolve(self, node: dict[str, Any]) -> dict[str, Any]:
        if "$ref" not in node:
            return node
        return {**self._definitions[node["$ref"].rsplit("/", 1)[-1]], **{k: v for k, v in node.items() if k != "$ref"}}

    def _options(self, node: dict[str, Any]) -> list[dict[str, Any]]:
        return [self._resolve(option) for option in node["anyOf"]] if "anyOf" in node else [node]

    def _in_words(self, node: dict[str, Any]) -> str:
        if "const" in node:
            return str(node["const"])
        if "enum" in node:
            return f"one of {', '.join(map(str, node['enum']))}"
        kind = node.get("type")
        if kind in ("integer", "number"):
            limits = [
                f"{word} {node[name]:g}"
                for name, word in (
                    ("minimum", "at least"),
                    ("exclusiveMinimum", "above"),
                    ("maximum", "at most"),
                    ("exclusiveMaximum", "below"),
                )
                if name in node
            ]
            return ", ".join([{"integer": "a whole number", "number": "a number"}[kind], *limits])
        if kind == "array":
            return f"a list of {self._in_words(self._resolve(node.get('items', {}))).removeprefix('a ')}"
        words = {"string": "text", "boolean": "true or false", "null": "null", "object": "a section of `key: value` lines"}
        return words.get(str(kind), "a value")
