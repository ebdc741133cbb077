"""What is computed again in backward, and where it is kept. That it changes no gradient in any mode: e2e/test_stages.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from qlora.config.schema import JobConfig
from qlora.distributed import runtime as processes
from qlora.distributed.runtime import Runtime
from qlora.errors import ConfigError
from qlora.lora.inject import inject_lora
from qlora.objective.train_model import TrainModel
from qlora.train import recompute, room
from qlora.train.offload_inputs import InputsOnHost
from qlora.train.recompute import Recomputed, layers_of, recompute_layers

IDS = torch.arange(12).reshape(1, 12)


@pytest.fixture
def model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """Four layers, whose last linear layers alone are trained."""
    model = make_model("llama", num_hidden_layers=4).requires_grad_(False).train()
    for layer in model.model.layers:
        layer.mlp.down_proj.requires_grad_(True)
    return model


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    """One process."""
    return processes.start(per_device_batch_size=1, gradient_accumulation_steps=1, max_grad_norm=1.0)


def gradients(model: LlamaForCausalLM) -> list[Tensor]:
    model.zero_grad()
    model(IDS, use_cache=False).logits.square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def job(**train: Any) -> JobConfig:
    return JobConfig.model_validate({"model": {"dtype": "float32"}, "data": {"max_length": 64}, "train": train})


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("number", [None, 4, 3, 1, 0])
def test_the_first_layers_are_computed_again_and_gradients_stay(
    model: LlamaForCausalLM, use_reentrant: bool, number: int | None
) -> None:
    want = gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recompute_layers(model, number, use_reentrant)
    passes: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: passes.append(index))
    found = gradients(model)
    again = range(4 if number is None else number)
    assert passes == [0, 1, 2, 3, *reversed(again)]
    assert len(found) == len(want) == 4
    for gradient, wanted in zip(found, want, strict=True):
        assert torch.equal(gradient, wanted)
    # The embeddings are frozen, and only the reentrant kind needs a gradient there.
    assert model.get_input_embeddings()(IDS).requires_grad == use_reentrant


def test_a_model_that_cannot_is_refused(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing: there are not as many layers") as caught:
        recompute_layers(model, 5, use_reentrant=False)
    assert "at most 4" in str(caught.value)
    monkeypatch.setattr(recompute, "layers_of", lambda model: [])
    with pytest.raises(ConfigError, match="all of its layers or none"):
        recompute_layers(model, 1, use_reentrant=False)
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing: LlamaForCausalLM cannot") as caught:
        recompute_layers(model, None, use_reentrant=False)
    assert "set it to false" in str(caught.value)


# What auto makes of the memory that is there


@pytest.fixture
def train_model(make_model: Callable[..., LlamaForCausalLM]) -> TrainModel:
    model = make_model("llama", num_hidden_layers=4)
    inject_lora(model, job().lora)
    return TrainModel(model).train()


def chosen(config: JobConfig, runtime: Runtime, train_model: TrainModel) -> Recomputed:
    """What is chosen, and whether the model has it so."""
    found = recompute.recompute(config, runtime, train_model)
    flags = [layer.gradient_checkpointing for layer in layers_of(train_model.model)]
    assert flags == [index < found.num_recomputed for index in range(4)]
    return found


@pytest.mark.parametrize(
    ("stated", "number"), [(True, 4), (False, 0), (0, 0), (1, 1), (3, 3), ("auto", 0)], ids=lambda value: str(value)
)
def test_what_the_job_says(train_model: TrainModel, runtime: Runtime, stated: object, number: int) -> None:
    """This machine has room for a few kilobytes."""
    assert chosen(job(gradient_checkpointing=stated), runtime, train_model).num_recomputed == number


def test_auto_computes_as_few_layers_again_as_fit(
    train_model: TrainModel, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = recompute.plan_activations(job(), train_model, runtime.device)
    assert planned is not None
    taken = room.training_bytes(train_model, runtime)
    trained = sum(p.numel() for p in train_model.parameters() if p.requires_grad)
    assert taken == 16 * trained  # nothing is quantized
    for number in range(5):
        enough = planned.peak(number)
        for spare in (0, -1):
            free = int((enough + spare + taken) / room.USABLE) + 1
            monkeypatch.setattr(room, "free_bytes", lambda device, free=free: free)
            assert int(free * room.USABLE) - taken in (enough + spare, enough + spare + 1)
            if spare == -1 and int(free * room.USABLE) - taken != enough - 1:
                continue
            found = chosen(job(), runtime, train_model)
            assert found.num_recomputed == planned.fewest(enough + spare)
            assert (found.num_recomputed == number) == (spare == 0 or planned.fewest(0) <= number)
    assert "does not seem to fit" in chosen(job(), runtime, train_model).why


def test_auto_where_nothing_is_known(train_model: TrainModel, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda device: None)
    assert chosen(job(), runtime, train_model).num_recomputed == 0
    monkeypatch.setattr(recompute, "plan_activations", lambda *args, **kwargs: None)
    assert "is not known" in chosen(job(), runtime, train_model).why


def test_all_ranks_take_what_the_neediest_takes(
    train_model: TrainModel, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest over ranks comes from the collective, whatever this rank would need."""
    monkeypatch.setattr(type(runtime), "max", lambda self, values: values.clamp(min=torch.tensor([3, -(10**12)])))
    assert chosen(job(), runtime, train_model).num_recomputed == 3


# Inputs in the host's memory


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("number", [4, 2])
def test_offloaded_inputs_give_the_same_gradients(model: LlamaForCausalLM, use_reentrant: bool, number: int) -> None:
    want = gradients(model)
    recompute_layers(model, number, use_reentrant)
    inputs = InputsOnHost(torch.device("cpu"), least_bytes=0)
    for layer in layers_of(model)[:number]:
        own = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *args, own=own: inputs(own, *args)
    for step in (1, 2):
        found = gradients(model)
        assert inputs.num_moved == step * number
        for gradient, wanted in zip(found, want, strict=True):
            assert torch.equal(gradient, wanted)


def test_a_storage_is_moved_once_and_changes_are_not_mixed_up() -> None:
    inputs = InputsOnHost(torch.device("cpu"), least_bytes=8)

    def save(*tensors: Tensor) -> list[Any]:
        found: list[Any] = []

        def keep() -> None:
            weights = [torch.ones(t.shape, requires_grad=True) for t in tensors]
            found.extend((w * t.detach()).sum() for w, t in zip(weights, tensors, strict=True))

        inputs(keep)
        return found

    x = torch.arange(6.0)
    first, view = save(x, x.view(2, 3))
    assert inputs.num_moved == 1
    # Part of a larger storage, and what is small, stay where they are.
    save(torch.zeros(100)[:3], torch.zeros(1))
    assert inputs.num_moved == 1
    x.add_(1)
    (second,) = save(x)
    assert inputs.num_moved == 2
    # Its memory may be given to another one.
    del x
    others = [save(torch.full((6,), float(n)))[0] for n in range(20)]
    assert inputs.num_moved == 22
    for loss, wanted in [
        (first, range(6)),
        (view, range(6)),
        (second, range(1, 7)),
        *((o, [n] * 6) for n, o in enumerate(others)),
    ]:
        weight = loss.grad_fn.next_functions[0][0].next_functions[0][0].variable
        loss.backward()
        assert weight.grad.flatten().tolist() == list(wanted)


def test_on_a_cpu_there_is_nothing_to_move(train_model: TrainModel, runtime: Runtime) -> None:
    found = chosen(job(gradient_checkpointing=2, offload_activations=True), runtime, train_model)
    assert not found.offloaded
    assert "in the host's memory anyway" in str(found)
