"""A training step on a GPU: the CPU's numbers, optimizers, adapter files, no waiting for the device, memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.adapter.files import load_adapter, save_adapter
from qlora.assets import tiny_path
from qlora.config.schema import JobConfig, QuantizationConfig
from qlora.data.batch import Batch
from qlora.objective.train_model import TrainModel
from qlora.plan.memory import plan_rank
from qlora.plan.shapes import read_shapes
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base
from qlora.train.recompute import recompute_layers
from tests.gpu.conftest import R, train

NO_GPU = "torch.cuda.is_available() is false here"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]
CPU = torch.device("cpu")
ROUNDING_BYTES = 512  # the allocator's


def loss_and_gradients(model: Any, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    train_model = TrainModel(model).train()
    loss, _ = train_model(batch)
    loss.backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_the_cpus(
    device: torch.device, make_model: Callable[..., Any], batch: Batch, recompute: bool
) -> None:
    """In fp32, same bytes of the base, same adapter: what is left is the order of sums."""
    model = make_model(CPU)
    other = copy.deepcopy(model).to(device)
    if recompute:
        recompute_layers(other, None, use_reentrant=False)
    want_loss, want = loss_and_gradients(model, batch)
    found_loss, found = loss_and_gradients(other, batch.to(device))
    assert found_loss == pytest.approx(want_loss, rel=1e-5)
    assert found.keys() == want.keys()
    assert len(want) > 0
    for name, value in want.items():
        size = float(value.abs().max())
        assert size > 0, name
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4 * size, msg=lambda m, n=name: f"{n}: {m}")


def test_bfloat16_is_near_float32(device: torch.device, make_model: Callable[..., Any], batch: Batch) -> None:
    want, _ = loss_and_gradients(make_model(CPU), batch)
    found, _ = loss_and_gradients(make_model(device, "bfloat16"), batch.to(device))
    assert found == pytest.approx(want, rel=2e-2)


def test_dequantizing_is_the_cpus(device: torch.device) -> None:
    model = load_model(resolve_base("builtin:tiny"), dtype="float32", quantization=QuantizationConfig(), device=CPU)
    layer = model.model.layers[0].mlp.down_proj
    want = layer.dequantize()
    torch.testing.assert_close(layer.to(device).dequantize().cpu(), want, rtol=1e-6, atol=1e-7)


def test_a_base_loads_on_the_device(device: torch.device) -> None:
    """Quantized there, it is within a step of the 16 values of what the CPU makes of it."""
    source = resolve_base("builtin:tiny")
    loaded = [load_model(source, quantization=QuantizationConfig(), device=where) for where in (device, CPU)]
    assert {p.device.type for p in loaded[0].parameters()} == {"cuda"}
    here, there = (model.model.layers[0].self_attn.q_proj.dequantize(torch.float32).cpu() for model in loaded)
    assert (here != there).float().mean() < 1e-3
    assert float((here - there).abs().max()) <= 0.3 * float(there.abs().max())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_training_in_bfloat16_lowers_the_loss(
    device: torch.device, make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch, optimizer: str
) -> None:
    engine = make_engine(make_model(device, "bfloat16", moved=False), optimizer)
    losses = train(engine, batch.to(device), 15)
    assert losses[-1] < 0.8 * losses[0], losses


def test_adapter_files_are_the_same_from_everywhere(
    device: torch.device, make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch, tmp_path: Path
) -> None:
    """Trained on the GPU, saved; loaded on the CPU and on the GPU again, saved: the same bytes."""
    model = make_model(device, "bfloat16")
    train(make_engine(model), batch.to(device), 2)
    first = save_adapter(model, tmp_path / "first")
    for name, where in (("cpu", CPU), ("cuda", device)):
        other = load_model(resolve_base("builtin:tiny"), quantization=QuantizationConfig(), device=where)
        load_adapter(other, first)
        again = save_adapter(other, tmp_path / name)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (again / file).read_bytes() == (first / file).read_bytes(), (name, file)


@pytest.mark.parametrize("recompute", [False, True])
def test_forward_and_backward_never_wait_for_the_device(
    device: torch.device, make_model: Callable[..., Any], batch: Batch, recompute: bool
) -> None:
    model = make_model(device, "bfloat16")
    if recompute:
        recompute_layers(model, None, use_reentrant=False)
    train_model = TrainModel(model).train()
    there = batch.to(device)
    for _ in range(2):  # looks at the model, compiles kernels, fills caches
        train_model(there)[0].backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = train_model(there)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


def test_memory_is_what_the_plan_says(
    device: torch.device, make_model: Callable[..., Any], make_engine: Callable[..., Any], batch: Batch
) -> None:
    """What stays is planned to the byte, but for the allocator's rounding; the peak adds what is planned for a part of a
    step, one layer's activations and the loss's pieces."""
    job = JobConfig.model_validate({"lora": {"r": R}, "data": {"max_length": batch.num_tokens}})
    base = read_shapes(Path(tiny_path()))
    plan = plan_rank(base, job, "single", 1)
    warm = make_engine(make_model(device, "bfloat16"))
    train(warm, batch.to(device), 2)  # cuBLAS keeps its room from now on
    del warm
    there = batch.to(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    model = make_model(device, "bfloat16")
    recompute_layers(model, None, use_reentrant=False)
    engine = make_engine(model)
    train(engine, there, 1)
    num_tensors = len(list(model.parameters())) + len(list(model.buffers())) + 3 * len(engine.parameters)
    stays = torch.cuda.memory_allocated(device) - before
    planned = plan.kept_bytes - plan.kept["gradients"]  # given back after the update
    assert planned <= stays <= planned + num_tensors * ROUNDING_BYTES + (1 << 20)
    torch.cuda.reset_peak_memory_stats(device)
    train(engine, there, 1)
    peak = torch.cuda.max_memory_allocated(device) - before
    config = model.config
    one_layer = 4 * batch.num_tokens * (16 * config.hidden_size + 8 * config.intermediate_size)
    loss = 16 * batch.num_target_tokens * config.vocab_size
    assert plan.kept_bytes <= peak <= plan.total_bytes + one_layer + loss + num_tensors * ROUNDING_BYTES + (8 << 20)
