"""What tests on a GPU share: the embedded base on a device, a batch, an engine without a launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from qlora.config.schema import LoraConfig, QuantizationConfig, TrainConfig
from qlora.data.batch import Batch, collate_packed
from qlora.distributed.engine import PlainEngine
from qlora.lora.inject import inject_lora
from qlora.objective.train_model import TrainModel
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base
from qlora.train.optim import build_optimizer

R = 8


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU, left without what a test put there."""
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """Makes the embedded base in NF4 with LoRA layers whose B is not zero: make_model(device, dtype)."""

    def make(where: torch.device | str, dtype: str = "float32", *, moved: bool = True) -> Any:
        # Quantized on the CPU, so that both sides of a comparison have the same bytes.
        model = load_model(resolve_base("builtin:tiny"), dtype=dtype, quantization=QuantizationConfig(), device="cpu")
        inject_lora(model, LoraConfig(r=R, lora_alpha=2 * R))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and moved:
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        return model.to(where)

    return make


@pytest.fixture
def batch() -> Batch:
    """Packed documents of several lengths, all but a few tokens of them targets; on the CPU."""
    rng = np.random.default_rng(0)
    rows = []
    for length in (130, 7, 64, 1, 200, 33):
        is_target = rng.integers(0, 4, length) > 0
        rows.append((rng.integers(3, 4000, length), is_target.astype(np.uint8)))
    return collate_packed(rows)


@pytest.fixture
def make_engine() -> Callable[..., PlainEngine]:
    """Makes the engine of one process: make_engine(model, optimizer="adamw")."""

    def make(model: Any, optimizer: str = "adamw", learning_rate: float = 2e-3) -> PlainEngine:
        train_model = TrainModel(model).train()
        parameters = {name: p for name, p in train_model.named_parameters() if p.requires_grad}
        where = next(iter(parameters.values())).device
        config = TrainConfig(optimizer=optimizer, learning_rate=learning_rate)
        built = build_optimizer(parameters.values(), config, where, sharded=False)
        return PlainEngine(train_model, parameters, built, config.max_grad_norm, False, where)

    return make


def train(engine: PlainEngine, batch: Batch, steps: int, learning_rate: float = 2e-3) -> list[float]:
    """Losses a target token of steps on one batch."""
    losses = []
    for _ in range(steps):
        loss_sum, _ = engine.model(batch)
        engine.backward(loss_sum / batch.num_target_tokens)
        engine.step(learning_rate)
        losses.append(float(loss_sum.detach()) / batch.num_target_tokens)
    return losses
