"""What is planned to be kept for backward, against the storages that autograd really keeps, and the choice of layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qlora.config.schema import JobConfig, LoraConfig
from qlora.data.batch import Batch, collate_packed
from qlora.lora.inject import inject_lora
from qlora.objective.train_model import TrainModel
from qlora.ops import cross_entropy, softmax_loss
from qlora.plan import activations as plan
from qlora.plan.activations import Activations, Remade, layer_shapes, saved_terms
from qlora.plan.shapes import read_shapes
from qlora.train.recompute import plan_activations, recompute_layers

LENGTH = 256  # above what is computed with scores made whole on a CPU


def saved_storages(compute: Callable[[], Any], known: set[int]) -> dict[int, int]:
    """Address and bytes of every storage that autograd keeps for backward, but for parameters and buffers."""
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return {address: num_bytes for address, (num_bytes, _) in found.items()}


def train_model_of(make_model: Callable[..., Any], name: str, dtype: str, **changes: Any) -> TrainModel:
    model = make_model(name, dtype, max_position_embeddings=512, **changes)
    inject_lora(model, LoraConfig(r=4))
    made = TrainModel(model).train()
    made.settle()
    return made


def batch_of(length: int) -> Batch:
    row = np.random.default_rng(0).integers(3, 300, length)
    return collate_packed([(row, np.ones(length, dtype=np.uint8))])


def bytes_a_layer(make_model: Callable[..., Any], name: str, dtype: str, **changes: Any) -> tuple[float, TrainModel]:
    """What one layer more keeps, a token."""
    found = []
    for num_layers in (2, 3):
        model = train_model_of(make_model, name, dtype, num_hidden_layers=num_layers, **changes)
        known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        found.append(sum(saved_storages(lambda m=model: m(batch_of(LENGTH)), known).values()))
    return (found[1] - found[0]) / LENGTH, model


# Windows are wider than the row: a narrower one has a mask of its own.
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "llama": ({}, 0),
    "qwen2": ({}, 0),
    "qwen3": ({}, 0),
    "mistral": ({"sliding_window": 300}, 0),
    "granite": ({}, 0),
    "phi3": ({}, 0),
    "gemma2": ({"sliding_window": 300}, 0.01),
    "gemma3_text": ({"sliding_window": 300}, 0.08),  # its attention's output is copied into another order
    "mixtral": ({}, 0.01),
    "qwen2_moe": ({"use_sliding_window": False, "max_window_layers": 9}, 0.03),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in MODELS), ("llama", "float32"), ("gemma2", "float32")]
)
def test_a_layer_keeps_what_is_planned(make_model: Callable[..., Any], name: str, dtype: str) -> None:
    changes, tolerance = MODELS[name]
    kept, model = bytes_a_layer(make_model, name, dtype, **changes)
    job = JobConfig.model_validate({"model": {"dtype": dtype}, "data": {"max_length": LENGTH}})
    planned = plan_activations(job, model, torch.device("cpu"))
    assert planned is not None
    assert planned.num_layers == 3
    assert planned.saved / LENGTH == pytest.approx(kept, rel=tolerance, abs=0.5)  # a mask or a table is a little more


def test_what_is_planned_without_a_model_is_the_same(make_model: Callable[..., Any], make_base: Callable[..., Any]) -> None:
    """`qlora plan` takes the norms from the headers of the files, training from the modules."""
    for name in ("llama", "qwen3", "gemma3_text", "mixtral"):
        job = JobConfig.model_validate({"data": {"max_length": 100}, "train": {"per_device_train_batch_size": 3}})
        trained = plan_activations(job, train_model_of(make_model, name, "bfloat16"), torch.device("cuda"))
        folder = make_base(name, max_position_embeddings=512)
        assert plan.plan_activations(read_shapes(folder), job) == trained
        assert trained is not None
        assert trained.num_tokens == 300


def test_transformers_own_norms_and_mlps_keep_more(make_model: Callable[..., Any]) -> None:
    """The terms of a model whose modules are none of ours, against that model before ours take their places."""
    found = []
    for num_layers in (2, 3):
        model = make_model("llama", "bfloat16", num_hidden_layers=num_layers).train()
        inject_lora(model, LoraConfig(r=4))
        known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        ids = torch.arange(LENGTH)[None]
        found.append(sum(saved_storages(lambda m=model, x=ids: m.model(x, use_cache=False), known).values()) / LENGTH)
    shapes = layer_shapes(model.config.to_dict(), [("input_layernorm", 64), ("post_attention_layernorm", 64)])
    assert shapes is not None
    terms = saved_terms(shapes, 2, LENGTH, Remade(norms=False, mlps=False))
    assert sum(terms.values()) == found[1] - found[0]


def test_recomputed_layers_keep_their_inputs_alone(make_model: Callable[..., Any]) -> None:
    found = []
    for number in (0, 1, 2, 3):
        model = train_model_of(make_model, "llama", "bfloat16", num_hidden_layers=3)
        recompute_layers(model.model, number, use_reentrant=False)
        known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        found.append(sum(saved_storages(lambda m=model: m(batch_of(LENGTH)), known).values()))
    job = JobConfig.model_validate({"data": {"max_length": LENGTH}})
    planned = plan_activations(job, model, torch.device("cpu"))
    assert planned is not None
    saved = planned.saved - planned.kept_input
    tables = 2 * 16 * 2 * LENGTH  # sines and cosines, which all layers share and the last one takes along
    assert [before - after for before, after in itertools.pairwise(found)] == [saved, saved, saved + tables]


def test_8b_by_hand() -> None:
    """Llama-3.1-8B's layer: two pieces of the residual stream, q, k, v, attention's output, gate and up, in bfloat16."""
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    shapes = layer_shapes(config, [("input_layernorm", 4096), ("post_attention_layernorm", 4096)])
    assert shapes is not None
    terms = saved_terms(shapes, 2, 4096, Remade())
    statistics = [terms.pop(f"statistics of {what}") for what in ("norms", "attention")]
    assert sum(terms.values()) == 2 * (2 * 4096 + 4096 + 2 * 1024 + 4096 + 2 * 14336) == 94_208
    assert statistics == [8, 128]
    assert layer_shapes(config | {"model_type": "mamba"}, []) is None
    assert layer_shapes({"model_type": "llama"}, []) is None


@pytest.mark.parametrize("where", ["first", "last"])
def test_the_peak_is_what_a_walk_through_the_layers_finds(where: str) -> None:
    """Forward keeps; backward goes through the layers from the last, and a recomputed one has all of it for its turn."""
    for layers, saved, kept, loss, working in itertools.product((1, 2, 5), (10, 12), (0, 1, 3), (0, 7, 40), (2, 9)):
        planned = Activations(layers, 1, saved, kept, 5, working, loss)
        for number in range(layers + 1):
            again = set(range(number) if where == "first" else range(layers - number, layers))
            held = [kept if layer in again else saved for layer in range(layers)]
            most = sum(held) + loss
            for layer in reversed(range(layers)):
                most = max(most, sum(held[:layer]) + saved + working)
            assert (planned.peak if where == "first" else planned.peak_of_last)(number) == most + 5
            assert planned.peak(number) <= planned.peak_of_last(number)


def test_as_few_layers_as_fit() -> None:
    planned = Activations(num_layers=4, num_tokens=1, saved=100, kept_input=10, around=0, working=20, loss=5)
    assert [planned.peak(n) for n in range(5)] == [420, 330, 240, 150, 150]
    assert [planned.fewest(room) for room in (1000, 420, 419, 330, 200, 150)] == [0, 0, 1, 1, 3, 3]
    # The last layer is never computed again where its turn comes at once.
    assert planned.fewest(10) == 3
    # But where the loss needs the room before.
    assert Activations(4, 1, 100, 10, 0, 20, loss=500).fewest(545) == 4


def test_the_loss_is_cut_as_in_training() -> None:
    assert plan.LOSS_CHUNK_TOKENS == cross_entropy.CHUNK_TOKENS
    assert plan.LOSS_BLOCK_LOGITS == softmax_loss.BLOCK_ELEMENTS
