"""Norms, gated MLPs and rotary embeddings of a transformers model, computed by operations of `qlora.ops` while it trains.

A module of the model keeps its class's attributes, its path and its parameters, and gets a forward of one operation instead
of many passes. Whether a module is one of the known kind is not read off its name: a copy of it with small parameters of its
own computes a few rows, and only where ours are the same bit for bit is it taken. Everything else stays what it was.

An attention layer calls its rotary embedding by a name of its file. It keeps the code of its own forward, which finds our
operation under that name; the file itself, and every other model, finds what was there.

These operations keep the tensors that their outputs can be made from again, and say so (`qlora.ops.remake`): the linear
layers behind a norm, and the down projection of an MLP, then keep nothing of their own.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from qlora.ops.gated import gated_activation
from qlora.ops.norm import rms_norm
from qlora.ops.rotary import apply_rotary

KINDS = ("silu", "gelu", "gelu_tanh")
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")
# Llama's convention, Gemma's, and what is like either with the other's rounding: (offset, late rounding).
NORMS = ((0.0, False), (1.0, True), (0.0, True), (1.0, False))
ROTARY = "apply_rotary_pos_emb"
PROBE_ROWS, PROBE_WIDTH = 5, 8

_classes: dict[tuple[type, type], type] = {}


class FusedNorm(nn.Module):
    """Stands before a norm's own class: the same function, as one operation."""

    weight: Tensor
    qlora_norm: tuple[float, float, bool]  # eps, offset, late rounding

    def forward(self, hidden_states: Tensor) -> Tensor:
        eps, offset, late_rounding = self.qlora_norm
        return rms_norm(hidden_states, self.weight, eps, offset=offset, late_rounding=late_rounding)


class FusedMLP(nn.Module):
    """Stands before a gated MLP's own class: down(act(gate(x)) up(x))."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    qlora_activation: str

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = gated_activation(self.gate_proj(x), self.up_proj(x), self.qlora_activation)
        return self.down_proj(product)


class FusedRotary(nn.Module):
    """Stands before an attention layer's own class, and gets the forward that `_forward_with_our_rotary` makes."""


@dataclass(frozen=True)
class Fused:
    """How many modules of a model are computed by our operations."""

    num_norms: int = 0
    num_mlps: int = 0
    num_rotaries: int = 0


def fuse(model: nn.Module) -> Fused:
    """Have every norm, gated MLP and rotary embedding of a known kind computed by our operations, in place. Rank-local.

    Safe to repeat. Reads no parameter, so that they may be shares of ZeRO-3.
    """
    module: Any
    for module in model.modules():
        if isinstance(module, (FusedNorm, FusedMLP, FusedRotary)):
            continue
        if (norm := _norm_of(module)) is not None:
            module.qlora_norm = norm
            _become(module, FusedNorm)
        elif (activation := _activation_of(module)) is not None:
            module.qlora_activation = activation
            _become(module, FusedMLP)
        elif (forward := _forward_with_our_rotary(type(module))) is not None:
            _become(module, FusedRotary, forward=forward)
    kinds = (FusedNorm, FusedMLP, FusedRotary)
    return Fused(*(sum(isinstance(module, kind) for module in model.modules()) for kind in kinds))


def _become(module: nn.Module, first: type[nn.Module], **attributes: Any) -> None:
    """Give a module a class that is both, of the name of its own, which other code may look at."""
    own = type(module)
    if (first, own) not in _classes:
        _classes[first, own] = type(own.__name__, (first, own), {"__module__": own.__module__, **attributes})
    module.__class__ = _classes[first, own]


def _norm_of(module: nn.Module) -> tuple[float, float, bool] | None:
    """(eps, offset, late rounding) of a root mean square norm, or None for anything else."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or set(module._parameters) != {"weight"} or module._modules or module._buffers:
        return None
    if not _takes_one_tensor(module):
        return None
    twin = _twin(module)
    twin._parameters = {"weight": nn.Parameter(_draw(PROBE_WIDTH), requires_grad=False)}
    x = _draw(PROBE_ROWS, PROBE_WIDTH) * 3
    for offset, late_rounding in NORMS:
        if _computes(twin, x, rms_norm(x, twin.weight, eps, offset=offset, late_rounding=late_rounding)):
            return eps, offset, late_rounding
    return None


def _activation_of(module: nn.Module) -> str | None:
    """The activation of a gated MLP, or None for anything else."""
    layers = [module._modules.get(name) for name in MLP_LAYERS]
    others = [child for name, child in module._modules.items() if name not in MLP_LAYERS]
    if None in layers or any(True for child in others if child is not None for _ in child.parameters()):
        return None
    if module._parameters or module._buffers or any(isinstance(child, nn.Dropout) for child in others):
        return None
    if not _takes_one_tensor(module):
        return None
    twin = _twin(module)
    gate, up, down = (_probe_linear(), _probe_linear(), _probe_linear())
    twin._modules = dict(module._modules) | dict(zip(MLP_LAYERS, (gate, up, down), strict=True))
    x = _draw(PROBE_ROWS, PROBE_WIDTH)
    for kind in KINDS:
        if _computes(twin, x, down(gated_activation(gate(x), up(x), kind))):
            return kind
    return None


def _forward_with_our_rotary(own: type[nn.Module]) -> Callable[..., Any] | None:
    """A class's forward with our rotary embedding in the place of the one it calls; None where it calls none like ours."""
    forward = own.forward
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    theirs = forward.__globals__.get(ROTARY)
    if not callable(theirs) or not _turns_as_ours(theirs):
        return None

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        usual = unsqueeze_dim == 1 and cos.ndim == 3
        return apply_rotary(q, k, cos, sin) if usual else theirs(q, k, cos, sin, unsqueeze_dim)

    names = forward.__globals__ | {ROTARY: turn}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(ours, forward)


def _turns_as_ours(theirs: Callable[..., Any]) -> bool:
    """Whether it gives what `apply_rotary` does, called with four tensors, but for roundings: ours has fewer."""
    q, k = (_draw(1, heads, PROBE_ROWS, PROBE_WIDTH).double() for heads in (2, 1))
    angles = _draw(1, PROBE_ROWS, PROBE_WIDTH // 2).double().repeat(1, 1, 2)
    arguments = (q, k, angles.cos(), angles.sin())
    try:
        found = theirs(*arguments)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    wanted = apply_rotary(*arguments)
    return len(found) == 2 and all(
        a.shape == b.shape and torch.allclose(a.double(), b, rtol=1e-6, atol=1e-6)
        for a, b in zip(found, wanted, strict=True)
    )


def _computes(twin: nn.Module, x: Tensor, ours: Tensor) -> bool:
    """Whether a module makes this of x, bit for bit. One that cannot be run like this is none of the known kinds."""
    try:
        with torch.no_grad():
            theirs = twin.forward(x)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(theirs, Tensor) and torch.equal(theirs, ours)


def _twin(module: nn.Module) -> Any:
    """A copy that shares nothing that is changed here: its parameters and modules are replaced by the caller."""
    twin = copy.copy(module)
    twin.__dict__ = dict(module.__dict__)
    return twin


def _takes_one_tensor(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1


def _probe_linear() -> nn.Linear:
    linear = nn.Linear(PROBE_WIDTH, PROBE_WIDTH, bias=False, device="meta")
    linear.weight = nn.Parameter(_draw(PROBE_WIDTH, PROBE_WIDTH), requires_grad=False)
    return linear


def _draw(*shape: int) -> Tensor:
    """Numbers in bfloat16, in which roundings tell conventions apart, the same ones always."""
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator).to(torch.bfloat16)
