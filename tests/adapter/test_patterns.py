"""Regular expressions of a config from anywhere: none keeps a job waiting, and those of real adapters pass."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from qlora.adapter.config_file import WITH_PATTERNS, read
from qlora.adapter.patterns import refuse_slow
from qlora.errors import AdapterError

# Each would take longer than anybody waits, on a path of some forty characters.
SLOW = [
    r"(a+)+$",
    r"([a-z0-9_.]+)+!",
    r"(.*)*x",
    r"(.|..)*x",
    r"(layers|layers\.\d)*!",
    r"([^.]+\.?)*!",
    r"(?:\w?){40}!",
    r"(?P<name>(\w+\.)+)*!",
    r"(?=(\w+)+!)",
    r"((\w{1,9}){1,9}){1,9}!",
    r".*.*.*.*.*.*.*.*.*!",
    "a" * 200_000,
]
USUAL = [
    "q_proj",
    r".*\.(q|k|v|o)_proj",
    r"^(?!.*(visual|audio)).*(q_proj|v_proj).*$",
    r".*layers\.(?:[0-9]|1[0-9]|2[0-3])\..*(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r"model\.layers\.\d+\.mlp\.experts\.\d+\..*",
    r"(?:.*\.)?(?:layers|blocks|h)\.\d{1,3}\.attn",
    "(",  # no expression at all: whoever uses it says so
]
PATH = "model.layers.17.self_attn.rotary.aaaaaaaaaaaaaaaaaaaaaaa"


@pytest.mark.parametrize("pattern", SLOW, ids=range(len(SLOW)))
@pytest.mark.parametrize("key", WITH_PATTERNS)
def test_one_that_takes_for_ever_is_refused_at_once(tmp_path: Path, key: str, pattern: str) -> None:
    value = {pattern: 4} if key.endswith("_pattern") and key != "layers_pattern" else [pattern]
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    began = time.perf_counter()
    with pytest.raises(AdapterError, match=f"{key} holds a regular expression that") as raised:
        read(tmp_path)
    assert time.perf_counter() - began < 5
    assert str(tmp_path) in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("pattern", USUAL)
def test_those_of_real_adapters_pass(pattern: str) -> None:
    refuse_slow([pattern], "target_modules", Path("adapter_config.json"))


@pytest.mark.parametrize("pattern", USUAL[:-1])
def test_and_are_quick(pattern: str) -> None:
    began = time.perf_counter()
    for _ in range(100):
        re.match(rf"(.*\.)?({pattern})$", PATH * 3)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("value", [3, {"q_proj": 8}, ["q_proj", 3]])
def test_values_of_other_kinds_are_left_to_the_other_checks(tmp_path: Path, value: object) -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="target_modules is not a list of names"):
        read(tmp_path)
