"""A prepared model with its optimizer: what training asks of it, and the engine of a launch without DeepSpeed.

`zero.ZeroEngine` is the other one; `runtime.prepare` makes the one that the launch needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MASTER = "master"
# Of a GradScaler's state, what changes.
LOSS_SCALE_KEYS = ("scale", "_growth_tracker")


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

    def optimizer_states(self, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The whole optimizer state of trainable parameters, one by one, on every rank; of those alone that have one.

        None has before the first step. Where a parameter is not fp32, with its fp32 copy that the optimizer updates, under
        `MASTER`. A state is to be copied before the next step, or the next state, is asked for.
        """

    def load_optimizer_state(self, states: dict[str, dict[str, Tensor]], step: int) -> None:
        """Set the whole optimizer state by parameter name, and the number of steps it has seen."""

    def loss_scale(self) -> dict[str, float] | None:
        """What the dynamic loss scale of fp16 has come to; None where there is none. Rank-local, equal on all ranks."""

    def load_loss_scale(self, state: dict[str, float]) -> None:
        """Go on with a loss scale."""


class PlainEngine:
    """One process, or data parallel: every rank holds everything. Implements `Engine`.

    Parameters that are not fp32 get an fp32 copy, which the optimizer updates in their place, as ZeRO has it: in bf16 an
    update below 1/256 of a weight would be lost.

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
        self._masters = {
            name: nn.Parameter(parameter.detach().float())
            for name, parameter in parameters.items()
            if parameter.dtype != torch.float32
        }
        # What the optimizer updates, by name.
        self._updated = parameters | self._masters
        replaced = {id(parameters[name]): master for name, master in self._masters.items()}
        self._is_fused = all(group.get("fused") for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["params"] = [replaced.get(id(parameter), parameter) for parameter in group["params"]]

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._no_sync()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, learning_rate: float) -> Tensor:
        for name, master in self._masters.items():
            gradient = self.parameters[name].grad
            master.grad = None if gradient is None else gradient.float()
            self.parameters[name].grad = None
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._updated.values(), self.max_grad_norm, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
        if self.skips_overflow:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self._is_fused:
            # The kernel leaves everything as it is where this is 1: nobody has to wait for the norm.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, (~norm.isfinite()).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._copy_masters()
        return norm.detach().float()

    def _copy_masters(self) -> None:
        with torch.no_grad():
            for name, master in self._masters.items():
                self.parameters[name].copy_(master)

    def optimizer_states(self, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name in names:
            state = self.optimizer.state.get(self._updated[name], {})
            found = {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "step"}
            if found and name in self._masters:
                found[MASTER] = self._masters[name].detach()
            if found:
                yield name, found

    def load_optimizer_state(self, states: dict[str, dict[str, Tensor]], step: int) -> None:
        counts_in_tensors = type(self.optimizer).__module__.startswith("torch.")
        for name, state in states.items():
            updated = self._updated[name]
            own = {key: value.to(updated.device) for key, value in state.items() if key != MASTER}
            if MASTER in state and name in self._masters:
                with torch.no_grad():
                    updated.copy_(state[MASTER])
            if own:
                counts_on = updated.device if self._is_fused else "cpu"
                counter: Any = torch.tensor(float(step), device=counts_on) if counts_in_tensors else step
                self.optimizer.state[updated] = {"step": counter, **own}
        self._copy_masters()

    def loss_scale(self) -> dict[str, float] | None:
        return {key: self.scaler.state_dict()[key] for key in LOSS_SCALE_KEYS} if self.skips_overflow else None

    def load_loss_scale(self, state: dict[str, float]) -> None:
        if self.skips_overflow:
            self.scaler.load_state_dict(self.scaler.state_dict() | state)
