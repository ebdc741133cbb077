"""Checks of the LoRA section beyond its types: what contradicts itself, and what would silently change nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qlora.config.problems import Problem, show
from qlora.config.schema import JobConfig, LoraConfig


def trains_more(lora: LoraConfig) -> bool:
    """Whether a config trains anything besides the layers that target_modules selects."""
    wholly = lora.train_norms or lora.train_embeddings or lora.train_head or lora.modules_to_save
    return bool(wholly or lora.target_parameters or lora.trainable_token_indices or lora.new_tokens)


def lora_problems(config: JobConfig) -> Iterator[Problem]:
    """Yield what is wrong with `config.lora`."""
    lora = config.lora
    yield from _names(lora)
    yield from _choice(lora)
    if lora.use_dora and lora.lora_bias:
        yield Problem(
            "",
            "lora.lora_bias",
            "DoRA scales directions, and a bias has none (PEFT has no such adapter either)",
            found="true, with lora.use_dora",
            next_step="set one of the two to false",
        )
    if lora.init_lora_weights == "loftq" and config.model.quantization is None:
        yield Problem(
            "",
            "lora.init_lora_weights",
            "loftq starts from what quantization loses, and nothing is quantized",
            found="loftq, with model.quantization: null",
            next_step="set model.quantization, or take pissa",
        )
    for key, method in (("loftq_iterations", "loftq"), ("eva_batches", "eva")):
        if getattr(lora, key) != LoraConfig.model_fields[key].default and lora.init_lora_weights != method:
            yield Problem(
                "",
                f"lora.{key}",
                f"belongs to {method}, and training starts otherwise",
                found=f"lora.init_lora_weights: {lora.init_lora_weights}",
                next_step=f"lora.init_lora_weights: {method}, or remove lora.{key}",
            )


def _names(lora: LoraConfig) -> Iterator[Problem]:
    """Names that are empty, and expressions that are none."""
    for key in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "new_tokens"):
        value = getattr(lora, key)
        if isinstance(value, str):
            yield from _expression(f"lora.{key}", value, "a list takes plain names")
        # A token may be a space.
        elif any(not (name if key == "new_tokens" else name.strip()) for name in value):
            yield Problem("", f"lora.{key}", "a name is empty", found=show(value))
    for key in ("rank_pattern", "alpha_pattern", "layers_pattern"):
        for pattern in getattr(lora, key) or ():
            yield from _expression(f"lora.{key}", pattern)


def _expression(key: str, pattern: str, next_step: str | None = None) -> Iterator[Problem]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield Problem("", key, f"not a regular expression: {error}", found=show(pattern), next_step=next_step)


def _choice(lora: LoraConfig) -> Iterator[Problem]:
    """Which modules train."""
    target = lora.target_modules
    if target == [] and not trains_more(lora):
        yield Problem("", "lora.target_modules", "nothing would be trained", found="an empty list", wanted="all-linear, ...")
    if target and target == lora.exclude_modules:
        yield Problem("", "lora.exclude_modules", "the same as lora.target_modules, so nothing would be trained")
    both = [name for name in lora.modules_to_save if isinstance(target, list) and name in target]
    if both:
        yield Problem("", "lora.modules_to_save", "a module is either adapted or trained fully", found=show(both))
    if lora.layers_pattern is not None and lora.layers_to_transform is None:
        yield Problem(
            "",
            "lora.layers_pattern",
            "says where the numbers of lora.layers_to_transform are found, and there are none",
            found=show(lora.layers_pattern),
            next_step="set lora.layers_to_transform, or lora.layers_pattern: null",
        )
    if lora.layers_to_transform is not None and isinstance(target, str) and target != "all-linear":
        yield Problem(
            "",
            "lora.layers_to_transform",
            "a regular expression says of itself which blocks it means (as in PEFT)",
            found=f"lora.target_modules: {show(target)}",
            next_step="put the numbers into the expression, or name the modules in a list",
        )
