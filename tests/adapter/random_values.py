"""Moving what trains off its start."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def randomize(model: nn.Module, seed: int = 1, size: float = 0.05) -> Any:
    """Add something of a size to every trainable parameter; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model
