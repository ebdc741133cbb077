"""A prepared model with its optimizer: what training asks of it, and the engine of a launch without DeepSpeed.

`zero.ZeroEngine` is the other one; `runtime.prepare` makes the one that the launch needs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """A prepared model with its optimizer. Every method is a collective.

    Attributes:
        model: what to call with a batch.
        parameters: the trainable parameters by name, as they were named before anything was wrapped.
        skips_overflow: an infinite gradient lowers the loss scale and skips the update, instead of being an error.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    skips_overflow: bool

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds the forward and backward pass of one micro-step; on the last of a step gradients are averaged."""

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to what the step has gathered so far."""

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update, clear the gradients. Returns the gradient norm before clipping, fp32 scalar.

        Where the norm is not finite, on all ranks alike, parameters and optimizer stay as they are.

        Args:
            learning_rate: of this step; a parameter group with an `lr_ratio` takes it times that.
        """

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        """The whole optimizer state of one trainable parameter, on every rank; {} before the first step."""

    def load_optimizer_state(self, states: dict[str, dict[str, Tensor]], step: int) -> None:
        """Set the whole optimizer state by parameter name, and the number of steps it has seen."""


class PlainEngine:
    """One process, or data parallel: every rank holds everything. Implements `Engine`.

    Args:
        scale_loss: keep fp16 gradients from underflowing by a dynamic loss scale.
        device: where the model computes.
        no_sync: makes a context in which backward passes average nothing over ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        scale_loss: bool,
        device: torch.device,
        no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model, self.parameters = model, parameters
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        self.skips_overflow = scale_loss
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale_loss)
        self._no_sync = no_sync

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._no_sync()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, learning_rate: float) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
        if self.skips_overflow:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach().float()

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        state = self.optimizer.state.get(self.parameters[name], {})
        return {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "step"}

    def load_optimizer_state(self, states: dict[str, dict[str, Tensor]], step: int) -> None:
        for name, state in states.items():
            if not state:
                continue
            parameter = self.parameters[name]
            own: dict[str, Any] = {}
            for key, value in state.items():
                # Moments of a bf16 parameter are fp32 where ZeRO kept them, and torch wants the parameter's own dtype.
                is_moment = value.is_floating_point() and value.shape == parameter.shape
                own[key] = value.to(device=parameter.device, dtype=parameter.dtype if is_moment else value.dtype)
            counter = torch.tensor(float(step)) if type(self.optimizer).__module__.startswith("torch.") else step
            self.optimizer.state[parameter] = {"step": counter, **own}
