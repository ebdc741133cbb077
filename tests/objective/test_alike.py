"""Which layers compute when a model is looked at, and that all of them do afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qlora.config.schema import LoraConfig
from qlora.lora.inject import inject_lora
from qlora.objective.alike import alike_layers_left_out
from qlora.objective.train_model import TrainModel

MakeModel = Callable[..., Any]
IDS = torch.arange(3, 13)[None]


def attentions_that_compute(model: Any, work: Callable[[], Any]) -> list[int]:
    """The layers whose attention runs while `work` does."""
    seen: list[int] = []
    layers = model.model.layers
    handles = [
        layer.self_attn.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
        for number, layer in enumerate(layers)
    ]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_the_first_of_alike_layers_speaks_for_all(make_model: MakeModel) -> None:
    model = make_model("llama", num_hidden_layers=3)
    inject_lora(model, LoraConfig(r=2))
    train_model = TrainModel(model)
    before = model(input_ids=IDS).logits
    assert attentions_that_compute(model, train_model.settle) == [0]
    assert train_model.packing_refused is None
    assert train_model.loss_head is not None
    assert attentions_that_compute(model, lambda: model(input_ids=IDS)) == [0, 1, 2]
    assert torch.equal(model(input_ids=IDS).logits, before)


def give_one_another_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.Tanh()


def give_one_another_setting(model: Any) -> None:
    model.model.layers[2].self_attn.scaling = 0.5


def give_one_another_convolution(model: Any) -> None:
    for number, layer in enumerate(model.model.layers):
        layer.mix = nn.Conv1d(4, 4, 1 + 2 * number)
    inject_lora(model, LoraConfig(r=2, target_modules=["mix"]))


def state_a_list(model: Any) -> None:
    model.config.no_rope_layers = [1, 0, 1]


@pytest.mark.parametrize(
    "change", [give_one_another_activation, give_one_another_setting, give_one_another_convolution, state_a_list]
)
def test_layers_that_differ_all_compute(make_model: MakeModel, change: Callable[[Any], None]) -> None:
    model = make_model("llama", num_hidden_layers=3)
    change(model)
    with alike_layers_left_out(model):
        assert attentions_that_compute(model, lambda: model(input_ids=IDS)) == [0, 1, 2]


def test_forwards_are_put_back_after_an_error(make_model: MakeModel) -> None:
    model = make_model("llama", num_hidden_layers=3)
    layers = model.model.layers
    layers[1].forward = own = layers[1].forward
    with pytest.raises(KeyError), alike_layers_left_out(model):
        raise KeyError
    assert vars(layers[1])["forward"] is own
    assert "forward" not in vars(layers[2])
