"""Choosing modules: lists, patterns, types; and the suffixes an adapter's config is written with, against PEFT's rule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError, ConfigError
from qlora.lora.target import (
    Candidate,
    choose,
    ends_with,
    refuse_unused_patterns,
    select,
    shortest_suffixes,
    summarize,
)

LINEAR = ("Linear",)
LINEAR_4BIT = ("Linear4bit", "Linear")


def module(path: str, classes: tuple[str, ...] = LINEAR, *, is_head: bool = False) -> Candidate:
    return Candidate(path, classes, supported="Linear" in classes, is_head=is_head)


def make_model() -> list[Candidate]:
    """Two decoder layers with a norm each, an embedding and a head."""
    found = [module("model", ("Model",)), module("model.embed_tokens", ("Embedding",))]
    for layer in range(2):
        found += [module(f"model.layers.{layer}", ("Layer",)), module(f"model.layers.{layer}.norm", ("RMSNorm",))]
        found += [module(f"model.layers.{layer}.attn.{name}_proj", LINEAR_4BIT) for name in "qkvo"]
        found += [module(f"model.layers.{layer}.mlp.{name}_proj") for name in ("up", "down")]
    return [*found, module("lm_head", is_head=True)]


def chosen(target: str | Sequence[str], exclude: str | Sequence[str] = ()) -> list[str]:
    return list(select(make_model(), target, exclude).targeted)


def of_layers(*names: str, layers: Sequence[int] = (0, 1)) -> list[str]:
    """Paths in the model's order."""
    wanted = {f"model.layers.{layer}.{name}_proj" for layer in layers for name in names}
    return [candidate.path for candidate in make_model() if candidate.path in wanted]


NAMES = st.sampled_from(["a", "b", "q", "proj", "0", "1"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(".".join)
ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")
MLP = ("mlp.up", "mlp.down")


@pytest.mark.parametrize(
    ("target", "want"),
    [
        ("all-linear", of_layers(*ATTENTION, *MLP)),
        (["q_proj"], of_layers("attn.q")),
        (["v_proj", "q_proj"], of_layers("attn.q", "attn.v")),
        (["attn.q_proj"], of_layers("attn.q")),
        (["model.layers.1.mlp.up_proj"], of_layers("mlp.up", layers=[1])),
        (["layers.0.attn.k_proj", "down_proj"], [*of_layers("attn.k", layers=[0]), *of_layers("mlp.down")]),
        ([r"q_proj", "Linear4bit"], of_layers(*ATTENTION)),
        (["Linear"], of_layers(*ATTENTION, *MLP)),
        (["lm_head"], ["lm_head"]),
        (r".*\.(q|v)_proj", of_layers("attn.q", "attn.v")),
        (r"model\.layers\.1\..*proj", of_layers(*ATTENTION, *MLP, layers=[1])),
        (r"lm_head", ["lm_head"]),
    ],
    ids=str,
)
def test_every_form_of_target(target: str | list[str], want: list[str]) -> None:
    assert chosen(target) == sorted(want, key=[c.path for c in make_model()].index)


def test_a_name_is_no_part_of_a_longer_name() -> None:
    candidates = [module("a.q_proj"), module("a.xq_proj"), module("a.q_proj_2"), module("q_proj")]
    assert list(select(candidates, ["q_proj"]).targeted) == ["a.q_proj", "q_proj"]


def test_a_pattern_must_match_a_whole_path() -> None:
    with pytest.raises(ConfigError, match="matches no module"):
        chosen("q_proj")


@pytest.mark.parametrize(
    ("target", "exclude", "want"),
    [
        ("all-linear", ["q_proj", "o_proj"], of_layers("attn.k", "attn.v", *MLP)),
        ("all-linear", r".*\.0\..*", of_layers(*ATTENTION, *MLP, layers=[1])),
        ("all-linear", ["Linear4bit"], of_layers(*MLP)),
        (["q_proj"], ["layers.1.attn.q_proj"], of_layers("attn.q", layers=[0])),
        # A pattern may run over modules that are no linear layers where these are excluded.
        (r"model\.layers\.0\..*", ["norm"], of_layers(*ATTENTION, *MLP, layers=[0])),
    ],
    ids=str,
)
def test_exclusions(target: str | list[str], exclude: str | list[str], want: list[str]) -> None:
    assert chosen(target, exclude) == want


def test_each_layer_is_accounted_for() -> None:
    selection = select(make_model(), ["q_proj", "Linear4bit"], ["layers.1.attn.k_proj"])
    assert selection.targeted["model.layers.0.attn.q_proj"] == "q_proj"
    assert selection.targeted["model.layers.0.attn.v_proj"] == "Linear4bit"
    assert selection.skipped["model.layers.1.attn.k_proj"] == "excluded by layers.1.attn.k_proj"
    assert selection.skipped["model.layers.0.mlp.up_proj"] == "not in target_modules"
    assert selection.skipped["lm_head"] == "output head"
    linear = {c.path for c in make_model() if c.supported}
    assert selection.targeted.keys() | selection.skipped.keys() == linear
    assert not selection.targeted.keys() & selection.skipped.keys()


@pytest.mark.parametrize(
    ("target", "exclude", "message"),
    [
        (["q_prj"], (), "'q_prj' matches no module"),
        (["q_proj", "nowhere"], (), "'nowhere' matches no module"),
        (["proj"], (), "'proj' matches no module"),
        (["q_proj"], ["nowhere"], "'nowhere' matches no module"),
        ([""], (), "matches no module"),
        ([], (), "target_modules matches no module"),
        ("", (), "target_modules matches no module"),
        (".*nowhere.*", (), "target_modules matches no module"),
        (["q_proj"], ["q_proj"], "target_modules matches no module"),
        ("(", (), "not a regular expression"),
        ("all-linear", "*", "not a regular expression"),
    ],
    ids=str,
)
def test_a_selection_of_nothing_is_refused(target: str | list[str], exclude: str | Sequence[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        select(make_model(), target, exclude)
    place = "lora.exclude_modules" if exclude in (["nowhere"], "*") else "lora.target_modules"
    assert error.value.place == place


def test_an_error_shows_names_that_would_have_matched() -> None:
    with pytest.raises(ConfigError) as error:
        chosen(["c_attn"])
    assert "q_proj, k_proj, v_proj, o_proj, up_proj, down_proj" in str(error.value)
    assert "lm_head" not in str(error.value.wanted)


@pytest.mark.parametrize("target", [["norm"], ["embed_tokens"], ["layers.0"], r".*norm", r"model.*"])
def test_modules_that_can_carry_no_layer_are_refused(target: str | list[str]) -> None:
    with pytest.raises(AdapterError, match="cannot carry a LoRA layer") as error:
        chosen(target)
    assert any(name in str(error.value.found) for name in ("RMSNorm", "Embedding", "Layer", "Model"))


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(ConfigError, match="has no linear layer"):
        select([module("conv", ("Conv2d",))], "all-linear")


def test_summaries_count_by_last_name_and_reason() -> None:
    paths = {"a.0.q": "x", "a.1.q": "x", "a.1.k": "x", "b.q": "y"}
    assert summarize(paths) == {("q", "x"): 2, ("k", "x"): 1, ("q", "y"): 1}


# Blocks by number.


@pytest.mark.parametrize(
    ("target", "layers", "pattern", "want"),
    [
        (["q_proj", "up_proj"], [1], None, of_layers("attn.q", "mlp.up", layers=[1])),
        ("all-linear", [0], None, of_layers(*ATTENTION, *MLP, layers=[0])),
        ("all-linear", [0, 1], ["layers"], of_layers(*ATTENTION, *MLP)),
        (["Linear4bit"], [1], ["h", "layers"], of_layers(*ATTENTION, layers=[1])),
        # A whole path says by itself which block it is in.
        (["q_proj", "model.layers.0.attn.k_proj", "lm_head"], [1], None,
         ["model.layers.0.attn.k_proj", *of_layers("attn.q", layers=[1]), "lm_head"]),
    ],
    ids=str,
)  # fmt: skip
def test_blocks_by_number(target: str | list[str], layers: list[int], pattern: list[str] | None, want: list[str]) -> None:
    if pattern == ["h", "layers"]:
        with pytest.raises(ConfigError, match=r"lora\.layers_pattern: no targeted module is in a list 'h'"):
            select(make_model(), target, layers=layers, layers_pattern=pattern)
        pattern = ["layers"]
    selection = select(make_model(), target, layers=layers, layers_pattern=pattern)
    assert list(selection.targeted) == want
    rest = {why for path, why in selection.skipped.items() if path.startswith("model.layers")}
    assert rest <= {"not in layers_to_transform", "not in target_modules"}


@pytest.mark.parametrize(
    ("config", "place", "message"),
    [
        ({"layers": [0, 2]}, "lora.layers_to_transform", "in a block of the number 2"),
        ({"layers": [0], "target": ["lm_head"]}, "lora.layers_to_transform", "in a block of the number 0"),
        ({"layers": [0], "target": r".*q_proj"}, "lora.layers_to_transform", "says of itself which blocks"),
        ({"layers": [0], "layers_pattern": ["h"]}, "lora.layers_pattern", "in a list 'h'"),
        ({"layers": [0], "layers_pattern": ["("]}, "lora.layers_pattern", "not a regular expression"),
    ],
    ids=str,
)
def test_blocks_that_are_none_are_refused(config: dict[str, Any], place: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        select(make_model(), **({"target": "all-linear"} | config))
    assert error.value.place == place
    if place == "lora.layers_to_transform" and config.get("target") is None:
        assert error.value.wanted == "of 0, 1"


@given(
    st.lists(PATHS, max_size=25, unique=True),
    st.lists(st.sampled_from(["a", "b", "q", "proj", "q.proj"]), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True),
    st.sampled_from([None, ["a"], ["b", "a"], ["a", "b"], ["[ab]"]]),
)
def test_blocks_are_those_of_peft(paths: list[str], target: list[str], layers: list[int], pattern: list[str] | None) -> None:
    # Something in every block and list that is named, so that nothing is refused as a name of nothing.
    named = [f"m.{blocks}.{layer}.x.{name}" for blocks in "ab" for layer in layers for name in target]
    paths = list(dict.fromkeys([*paths, *named]))
    config = PeftLoraConfig(target_modules=target, layers_to_transform=layers, layers_pattern=pattern)
    want = [path for path in paths if check_target_module_exists(config, path)]
    assume(not any(path.startswith(f"{other}.") for path in want for other in want))  # refused, see below
    found = select([module(path) for path in paths], target, layers=layers, layers_pattern=pattern)
    assert list(found.targeted) == want
    assert set(named) & set(want)


def test_what_is_inside_a_target_is_no_target() -> None:
    candidates = [module("a"), module("a.b"), module("a.b.c"), module("ab.c")]
    with pytest.raises(ConfigError, match=r"inside another one(.|\n)*a\.b\.c, inside a\n"):
        select(candidates, ["a", "c"])
    assert list(select(candidates, ["ab.c", "a.b"]).targeted) == ["a.b", "ab.c"]


# A whole config.


def test_a_config_may_target_nothing_where_it_trains_something_else() -> None:
    selection = choose(make_model(), LoraConfig(target_modules=[], train_norms=True))
    assert selection.targeted == {}
    assert set(selection.skipped) == {c.path for c in make_model() if c.supported}
    with pytest.raises(ConfigError, match="target_modules matches no module"):
        choose(make_model(), LoraConfig(target_modules=[]))
    with pytest.raises(ConfigError, match="target_modules matches no module"):
        choose(make_model(), LoraConfig(target_modules="nothing", train_norms=True))


def test_a_config_says_which_blocks() -> None:
    config = LoraConfig(layers_to_transform=[1], layers_pattern=["layers"], exclude_modules=["o_proj"])
    assert list(choose(make_model(), config).targeted) == of_layers("attn.q", "attn.k", "attn.v", *MLP, layers=[1])


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_of_nothing_is_refused(key: str) -> None:
    paths = of_layers("attn.q", "mlp.up")
    for pattern in ("q_proj", "attn.q_proj", r"layers\.0\..*", r"model\.layers\.1\.mlp\.up_proj", "q_proj|nothing"):
        refuse_unused_patterns(LoraConfig(**{key: {pattern: 4}}), paths)
    for pattern in ("proj", "k_proj", r"layers\.2\..*", "q"):
        with pytest.raises(ConfigError, match=f"the entry {re.escape(repr(pattern))} matches no targeted") as error:
            refuse_unused_patterns(LoraConfig(**{key: {"q_proj": 4, pattern: 4}}), paths)
        assert error.value.place == f"lora.{key}"
        assert "q_proj, up_proj" in str(error.value)
    with pytest.raises(ConfigError, match=rf"lora\.{key}: not a regular expression"):
        refuse_unused_patterns(LoraConfig(**{key: {"(": 4}}), paths)


# Suffixes.


def peft_selects(path: str, target_modules: Sequence[str]) -> bool:
    return bool(check_target_module_exists(PeftLoraConfig(target_modules=list(target_modules)), path))


@given(st.dictionaries(PATHS, st.booleans(), min_size=1, max_size=25))
def test_suffixes_select_exactly_what_was_targeted(modules: dict[str, bool]) -> None:
    targeted = [path for path, is_targeted in modules.items() if is_targeted]
    # Where a whole path ends another, untargeted one, no list can tell them apart.
    ambiguous = any(ends_with(other, path) for path in targeted for other in modules if not modules[other])
    if ambiguous:
        with pytest.raises(AdapterError, match="cannot be told from another module"):
            shortest_suffixes(targeted, modules)
        return
    suffixes = shortest_suffixes(targeted, modules)
    assert [path for path in modules if peft_selects(path, suffixes)] == targeted
    assert suffixes == sorted(set(suffixes))


@given(st.dictionaries(PATHS, st.booleans(), min_size=1, max_size=15))
def test_no_suffix_is_longer_than_it_must_be(modules: dict[str, bool]) -> None:
    targeted = [path for path, is_targeted in modules.items() if is_targeted]
    assume(not any(ends_with(other, path) for path in targeted for other in modules if not modules[other]))
    others = [path for path in modules if not modules[path]]
    for suffix in shortest_suffixes(targeted, modules):
        shorter = suffix.partition(".")[2]
        assert not shorter or any(ends_with(other, shorter) for other in others)


def test_suffixes_of_a_usual_model() -> None:
    paths = [c.path for c in make_model()]
    assert shortest_suffixes(of_layers("attn.q", "attn.v"), paths) == ["q_proj", "v_proj"]
    assert shortest_suffixes(of_layers("attn.q", layers=[1]), paths) == ["1.attn.q_proj"]
