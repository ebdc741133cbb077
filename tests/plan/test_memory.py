"""Bytes against what is really there: loaded and adapted models, the formulas of other rooms, and counting by hand."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.config.schema import JobConfig, QuantizationConfig
from qlora.distributed.zero_config import fill_config
from qlora.errors import AdapterError, ConfigError
from qlora.lora.inject import inject_lora
from qlora.ops.nf4 import QuantSpec
from qlora.plan.gathers import largest_gather, largest_run
from qlora.plan.memory import modes_of, plan_rank
from qlora.plan.parameters import Stored, ZeroSettings, adapted, by_hook, statistics_bytes, stored_parameters
from qlora.plan.shapes import BaseShapes, TensorShape, read_shapes
from qlora.quant.linear import Linear4bit, QuantizedLinear
from qlora.quant.linear8bit import Linear8bit
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base

ROOT = Path(__file__).parents[2]
TINY = ROOT / "qlora/assets/tiny"


def job_of(**sections: Any) -> JobConfig:
    return JobConfig.model_validate(sections)


def real_model(base: str, job: JobConfig) -> Any:
    """The base as training loads and adapts it, in this process."""
    model = load_model(resolve_base(base), dtype=job.model.dtype, quantization=job.model.quantization, device="cpu")
    inject_lora(model, job.lora)
    return model


def real_bytes(model: Any) -> dict[str, int]:
    """Bytes of a model's parameters by what they are."""
    parts = {id(m.weight): "packed weights" for m in model.modules() if isinstance(m, QuantizedLinear)}
    parts |= {id(m.statistics): "statistics" for m in model.modules() if isinstance(m, QuantizedLinear)}
    found: dict[str, int] = {}
    for parameter in model.parameters():
        part = "trained" if parameter.requires_grad else parts.get(id(parameter), "unquantized")
        found[part] = found.get(part, 0) + parameter.numel() * parameter.element_size()
    return found


def planned_bytes(stored: list[Stored]) -> dict[str, int]:
    found: dict[str, int] = {}
    for parameter in stored:
        found[parameter.part] = found.get(parameter.part, 0) + parameter.num_bytes
    return found


JOBS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "one level of scales": {"model": {"quantization": {"double_quant": False, "block_size": 128}}},
    "wide storage": {"model": {"quantization": {"quant_storage": "bfloat16"}}},
    "in 8 bits": {"model": {"quantization": {"bits": 8, "skip_modules": ["o_proj"]}}},
    "unquantized": {"model": {"quantization": None}},
    "in fp32": {"model": {"dtype": "float32"}},
    "a few layers": {"model": {"quantization": {"skip_modules": ["mlp.up_proj", "q_proj"]}}},
    "narrow A and B": {"lora": {"dtype": "bfloat16", "r": 3, "target_modules": ["q_proj", "mlp.down_proj"]}},
    "norms too": {"lora": {"train_norms": True, "exclude_modules": r".*layers\.0\..*"}},
    "ranks by layer": {"lora": {"rank_pattern": {"q_proj": 3, r"layers\.1\..*": 5}, "use_dora": True, "dtype": "bfloat16"}},
    "some blocks": {
        "lora": {"layers_to_transform": [1], "lora_bias": True, "modules_to_save": ["model.norm", "layers.0"]},
        "model": {"quantization": None},
    },
    "embedding too": {"lora": {"train_embeddings": True, "train_head": True}},
}


@pytest.mark.parametrize("name", JOBS)
def test_one_rank_keeps_what_the_loaded_model_weighs(name: str) -> None:
    job = job_of(**JOBS[name])
    model = real_model("builtin:tiny", job)
    stored = stored_parameters(read_shapes(TINY), job)
    assert planned_bytes(stored) == real_bytes(model)
    kept = plan_rank(read_shapes(TINY), job, "single", 1).kept
    assert sum(kept[part] for part in real_bytes(model)) == sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert kept["optimizer"] == 8 * trained
    assert kept["gradients"] == real_bytes(model)["trained"]


def test_every_architecture_weighs_what_is_planned(make_base: Callable[..., Path], architecture: str) -> None:
    folder, job = make_base(architecture), job_of(lora={"r": 2}, model={"quantization": {"block_size": 32}})
    model = real_model(str(folder), job)
    base = read_shapes(folder)
    assert planned_bytes(stored_parameters(base, job)) == real_bytes(model)
    largest = max(m.in_features * m.out_features for m in model.modules() if isinstance(m, Linear4bit))
    assert plan_rank(base, job, "ddp", 4).working["one dequantized weight"] == largest * 2 + largest // 32 * 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_architectures_in_8_bits_weigh_what_is_planned(make_base: Callable[..., Path], name: str) -> None:
    """GPT-2's files hold the transposes: a scale belongs to an output all the same."""
    folder, job = make_base(name), job_of(lora={"r": 2}, model={"quantization": {"bits": 8}, "dtype": "float32"})
    model = real_model(str(folder), job)
    assert planned_bytes(stored_parameters(read_shapes(folder), job)) == real_bytes(model)
    largest = max((m for m in model.modules() if isinstance(m, Linear8bit)), key=lambda m: m.weight.numel() + m.out_features)
    wanted = 4 * largest.weight.numel() + 4 * largest.out_features
    assert plan_rank(read_shapes(folder), job, "ddp", 4).working["one dequantized weight"] == wanted


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": r".*\.layers\.1\..*proj"},
        {"target_modules": ["Linear4bit"]},
        {"target_modules": ["mlp.up_proj", "v_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
        {"target_modules": ["no_such_layer"]},
        {"target_modules": ".*nothing"},
        {"target_modules": ["q_proj"], "r": 100},
        {"r": 100},
        {"train_head": True},
        {"target_modules": [], "train_norms": True},
    ],
    ids=str,
)
def test_the_same_layers_are_adapted_or_refused_as_in_training(make_base: Callable[..., Path], lora: dict[str, Any]) -> None:
    changes = {"tie_word_embeddings": True} if "train_head" in lora else {}
    folder, job = make_base("llama", **changes), job_of(lora=lora)
    model = load_model(resolve_base(str(folder)), quantization=QuantizationConfig(), device="cpu")
    outcomes: list[Any] = []
    for ask in (lambda: set(inject_lora(model, job.lora).targeted), lambda: _planned(folder, job)):
        try:
            outcomes.append(ask())
        except (ConfigError, AdapterError) as error:
            outcomes.append((type(error), error.place))
    assert outcomes[0] == outcomes[1]


def _planned(folder: Path, job: JobConfig) -> set[str]:
    stored_parameters(read_shapes(folder), job)
    return adapted(read_shapes(folder), job)


@given(
    num_weights=st.integers(1, 10_000_000),
    block_size=st.sampled_from([32, 64, 128, 4096]),
    double_quant=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_statistics_are_those_of_the_format(num_weights: int, block_size: int, double_quant: bool) -> None:
    config = QuantizationConfig.model_validate({"block_size": block_size, "double_quant": double_quant})
    spec = QuantSpec("nf4", block_size, double_quant)
    assert statistics_bytes(num_weights, config) == spec.statistics_bytes(num_weights)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_zero3_cuts_every_parameter_of_the_real_model(ranks: int) -> None:
    """torch's own cutting of each real parameter into `ranks` pieces is the judge; the first piece is the longest."""
    job = job_of(lora={"r": 5, "train_norms": True})
    model = real_model("builtin:tiny", job)
    pieces = [(p.reshape(-1).tensor_split([-(-p.numel() // ranks)])[0], p) for p in model.parameters()]
    kept = plan_rank(read_shapes(TINY), job, "zero3", ranks, ZeroSettings(param_persistence_threshold=3000)).kept
    by_part = sum(piece.numel() * piece.element_size() for piece, _ in pieces)
    assert sum(kept[part] for part in real_bytes(model)) == by_part
    owned = sum(piece.numel() for piece, p in pieces if p.requires_grad)
    assert (kept["gradients"], kept["optimizer"], kept["fp32 master copy"]) == (4 * owned, 8 * owned, 4 * owned)
    small = [p for p in model.parameters() if p.requires_grad and p.numel() <= 3000]
    assert kept["kept whole as well"] == sum(p.numel() * p.element_size() for p in small)


def test_stages_share_out_one_thing_more_each() -> None:
    base, job = read_shapes(TINY), job_of()
    rank = {mode: plan_rank(base, job, mode, 8) for mode in ("ddp", "zero1", "zero2", "zero3")}
    assert rank["zero1"].kept["optimizer"] * 8 == rank["ddp"].kept["optimizer"]
    assert rank["zero1"].kept["gradients"] == rank["ddp"].kept["gradients"] == 8 * rank["zero2"].kept["gradients"]
    assert (
        rank["zero2"].kept["packed weights"]
        == rank["ddp"].kept["packed weights"]
        == 8 * rank["zero3"].kept["packed weights"]
    )
    assert [rank[mode].gathered for mode in ("ddp", "zero1", "zero2")] == [0, 0, 0]
    assert rank["ddp"].read == rank["zero2"].read == sum(t.num_elements * t.itemsize for t in base.tensors)
    assert rank["zero3"].read == -(-rank["ddp"].read // 8)


def test_what_deepspeed_cannot_shard_is_refused_as_in_training() -> None:
    job = job_of(train={"optimizer": "adamw_8bit"})
    assert modes_of(job, 8) == ["ddp"]
    assert plan_rank(read_shapes(TINY), job, "ddp", 8).kept["optimizer"] == 2 * 473_088
    with pytest.raises(ConfigError, match="not sharded"):
        plan_rank(read_shapes(TINY), job, "zero2", 8)


def test_the_settings_are_those_a_run_uses() -> None:
    """What the launch file says, what the project fills in, and DeepSpeed's own defaults for the rest."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    stated = json.loads((ROOT / "launch/deepspeed/zero3.json").read_text())
    plugin = SimpleNamespace(deepspeed_config=stated, dschf=None)
    fill_config(plugin, micro_batch_size=1, gradient_accumulation_steps=1, gradient_clipping=1.0, world_size=1)
    used = DeepSpeedZeroConfig(**stated["zero_optimization"])
    for name, planned in vars(ZeroSettings()).items():
        if planned is not None:  # what depends on the model is seen in test_deepspeed.py
            assert getattr(used, name) == planned, name
    # Nothing is kept for its next use, or more would be there at once.
    assert used.max_reuse_distance == 0
    for stage in (1, 2):
        path = ROOT / f"launch/deepspeed/zero{stage}.json"
        assert json.loads(path.read_text())["zero_optimization"]["reduce_bucket_size"] == used.reduce_bucket_size


def test_the_largest_run_by_trying_all() -> None:
    choose = random.Random(0)
    for _ in range(200):
        stored = [
            Stored(str(i), "unquantized", choose.randint(1, 9), choose.choice((1, 2, 4)), 2, True, False)
            for i in range(choose.randint(1, 7))
        ]
        limit = choose.randint(0, 30)
        most = 0
        for first, end in itertools.combinations(range(len(stored) + 1), 2):
            run = stored[first:end]
            if any(sum(p.elements for p in part) < limit for part in (run[:-1], run[1:])):
                most = max(most, sum(p.num_bytes for p in run))
        assert largest_run(stored, limit) == most


def test_more_layers_than_there_are_cannot_be_computed_again() -> None:
    job = job_of(train={"gradient_checkpointing": 99})
    with pytest.raises(ConfigError, match="not as many layers"):
        plan_rank(read_shapes(resolve_base("builtin:tiny").folder), job, "single", 1)


@pytest.mark.parametrize(("head", "hooks"), [(9, {"m.layers.0", "m.layers.1", "head"}), (7, {"m.layers.0.a", "head"})])
def test_layers_are_gathered_as_one_where_something_else_is_as_large(head: int, hooks: set[str]) -> None:
    """As `distributed.gathers` has it: a layer of 2 x 4 bytes, beside a head of so many."""

    def stored(path: str, elements: int, in_layer: bool = True) -> Stored:
        return Stored(path, "unquantized", elements, 1, 2, in_layer, False)

    layers = [stored(f"m.layers.{layer}.{name}", 4) for layer in range(2) for name in "ab"]
    found = by_hook([*layers, stored("head", head, in_layer=False)])
    assert hooks <= {p.gathered_with for p in found}
    assert largest_gather(found) == head


def test_gathers_by_hand() -> None:
    """A layer of two linear weights, a norm, an embedding and an untied head, which nothing asks for in backward."""
    base = BaseShapes(
        (
            TensorShape("embed_tokens.weight", (10, 4), "embedding", 2),
            TensorShape("layers.0.up.weight", (64, 4), "linear", 2),
            TensorShape("layers.0.norm.weight", (4,), "norm", 2),
            TensorShape("lm_head.weight", (10, 4), "head", 2),
        ),
        tied=False,
        source="",
    )
    job = job_of(lora={"r": 1, "target_modules": ["up"]}, train={"gradient_checkpointing": False})
    nothing_whole = ZeroSettings(param_persistence_threshold=0)
    up = 128 + (4 + 4 + 4) + 4 * (4 + 64)  # packed, statistics of 4 blocks, A and B
    stored = stored_parameters(base, job, nothing_whole)
    assert largest_gather(stored) == up
    assert plan_rank(base, job, "zero3", 4, nothing_whole).gathered == (80 + 2 * (up + 8) + 80) * 3 // 4
    recomputed = job_of(lora=job.lora.model_dump(), data={"max_length": 100}, train={"per_device_train_batch_size": 3})
    rank = plan_rank(base, recomputed, "zero3", 4, nothing_whole)
    assert rank.gathered == (80 + 80 + 3 * (up + 8)) * 3 // 4
    # What these layers keep besides is not known: the base says nothing of its architecture.
    assert rank.working["inputs of recomputed layers"] == 300 * 4 * 2
    assert rank.num_recomputed == 1
    # Small trained parameters and vectors stay whole; packed weights and statistics never do.
    assert plan_rank(base, job, "zero3", 4).gathered == (80 + 2 * (128 + 12) + 80) * 3 // 4
