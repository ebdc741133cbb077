"""The numbers of a layer's update: patterns against PEFT's own rule, and scaling."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from qlora.adapter.residual import _whole
from qlora.config.schema import LoraConfig
from qlora.lora.update import Update, by_pattern, pattern_of

PATH = "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("patterns", "want"),
    [
        ({}, 16),
        ({"q_proj": 4}, 4),
        ({"self_attn.q_proj": 4}, 4),
        ({PATH: 4}, 4),
        ({"k_proj": 2, "q_proj": 4}, 4),
        ({".*attn.*": 2, "q_proj": 4}, 2),  # the first that matches
        ({"q_proj": 4, ".*attn.*": 2}, 4),
        ({r"layers\.3\..*": 4}, 4),
        ({r"layers\.[012]\..*": 4}, 16),
        ({"proj": 4, "q": 4, "layers.3": 4, "self_attn": 4}, 16),  # neither a whole name nor its end
        ({"k_proj|q_proj": 4}, 4),
    ],
    ids=str,
)
def test_patterns_go_before_the_configs_own(patterns: dict[str, int], want: int) -> None:
    assert Update.of(LoraConfig(r=16, rank_pattern=patterns), PATH).r == want


NAMES = st.sampled_from(["a", "b", "q", "proj", "0", "1", ".*", "[ab]", "a|b"])
PATTERNS = st.lists(st.lists(NAMES, min_size=1, max_size=3).map(r"\.".join), max_size=5, unique=True)


@given(PATTERNS, st.lists(st.sampled_from(["a", "b", "q", "proj", "0", "1"]), min_size=1, max_size=4).map(".".join))
def test_the_pattern_is_the_one_that_peft_takes(patterns: list[str], path: str) -> None:
    theirs = get_pattern_key(patterns, path)  # the path itself where there is none
    ours = pattern_of(patterns, path)
    assert (path if ours is None else ours) == theirs
    table = {pattern: index for index, pattern in enumerate(patterns)}
    assert by_pattern(table, path, -1) == table.get(theirs, -1)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_layers_scaling_is_of_its_own_rank_and_alpha(use_rslora: bool) -> None:
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        use_rslora=use_rslora,
        rank_pattern={"q_proj": 4},
        alpha_pattern={"v_proj": 8.0, "layers.3.*": 6.0},
    )
    divisor = math.sqrt if use_rslora else float
    assert Update.of(config, PATH).scaling == 6 / divisor(4)
    assert Update.of(config, "model.layers.2.self_attn.q_proj").scaling == 32 / divisor(4)
    assert Update.of(config, "model.layers.2.self_attn.v_proj").scaling == 8 / divisor(16)
    assert Update.of(config, "model.layers.2.self_attn.o_proj").scaling == 32 / divisor(16)


def test_an_update_takes_the_rest_from_the_config() -> None:
    assert Update.of(LoraConfig(r=2, lora_alpha=2, lora_dropout=0.25, use_dora=True), "x") == Update(
        2, 1.0, 0.25, use_dora=True
    )
    assert Update.of(LoraConfig(r=2, lora_alpha=2, lora_bias=True), "x") == Update(2, 1.0, lora_bias=True)


def test_a_pattern_of_a_whole_path_matches_no_path_that_ends_with_it() -> None:
    pattern = _whole("layers.0")
    assert pattern_of([pattern], "layers.0") == get_pattern_key([pattern], "layers.0") == pattern
    assert pattern_of([pattern], "encoder.layers.0") is None
    assert get_pattern_key([pattern], "encoder.layers.0") == "encoder.layers.0"  # PEFT's word for none
