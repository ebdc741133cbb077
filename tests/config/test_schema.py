"""Sections made in Python: the same mistakes are refused in the same words as in a job file."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

import qlora
from qlora.config.schema import JobConfig, LoraConfig, TrainConfig
from qlora.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"r": 0}, ["LoraConfig: r: cannot be used", "found: 0", "wanted: a whole number, at least 1"]),
        ({"lora_alpha": 0}, ["LoraConfig: lora_alpha", "found: 0", "wanted: a number, above 0"]),
        ({"lora_alpha": "x"}, ["found: 'x'", "wanted: a number, above 0"]),
        ({"lora_dropout": 1.0}, ["lora_dropout", "at least 0, below 1"]),
        ({"rr": 3}, ["LoraConfig: rr: unknown key", "did you mean r?"]),
        ({"rank": 3}, ["rank: unknown key", "did you mean lora.r?"]),
        ({"lora_target_modules": ["q"]}, ["unknown key", "did you mean target_modules or lora.target_modules?"]),
        ({"zzz": 3}, ["zzz: unknown key", "LoraConfig knows r, lora_alpha"]),
        ({"target_modules": 5}, ["target_modules", "found: 5 (a number)", "text or a list of text"]),
        ({"target_modules": ["q", 5]}, ["target_modules: cannot", "found: a list, ['q', 5 (a number)]"]),
        ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern.q_proj", "found: 0", "a whole number, at least 1"]),
        ({"alpha_pattern": {"layers.0": -1}}, ["alpha_pattern", "found: -1", "a number, above 0"]),
        ({"layers_to_transform": []}, ["layers_to_transform", "found: a list, []"]),
        ({"layers_to_transform": [-1]}, ["layers_to_transform[0]", "found: -1", "a whole number, at least 0"]),
        ({"init_lora_weights": "pisa"}, ["init_lora_weights", "found: 'pisa'", "pissa_niter_N, olora, loftq or eva"]),
        ({"dtype": "float16"}, ["dtype", "one of float32, bfloat16"]),
    ],
    ids=str,
)
def test_a_mistake_is_named(values: dict[str, Any], wanted: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        qlora.LoraConfig(**values)
    message = str(caught.value)
    for part in wanted:
        assert part in message, message
    assert "pydantic" not in message
    assert len(message.splitlines()) <= 3


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(ConfigError, match="3 errors in LoraConfig"):
        LoraConfig(r=0, lora_alpha=-1, alpha=2)


def test_sections_inside_a_job_are_checked_by_whoever_reads_it() -> None:
    """pydantic hears of them all, so that a job file's mistakes can be told together, with their lines."""
    with pytest.raises(ValidationError) as caught:
        JobConfig.model_validate({"lora": {"r": 0}, "train": {"seed": -1}})
    assert {error["loc"] for error in caught.value.errors()} == {("lora", "r"), ("train", "seed")}
    with pytest.raises(ConfigError, match="2 errors in JobConfig"):
        JobConfig(lora={"r": 0}, train={"seed": -1})  # type: ignore[arg-type]


def test_a_section_is_a_value() -> None:
    config = LoraConfig(r=8, lora_alpha="1e1", rank_pattern={"q": 2})  # type: ignore[arg-type]
    assert config.lora_alpha == 10.0
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config.model_copy() == config
    assert TrainConfig() == TrainConfig.model_validate({})
    with pytest.raises(ValidationError, match="frozen"):
        config.r = 4  # type: ignore[misc]
