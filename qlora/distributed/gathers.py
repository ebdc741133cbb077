"""What ZeRO-3 gathers by one hook: a layer of the model as one, a LoRA layer, or a module's own parameters.

DeepSpeed's hooks cost about the same whatever they gather, in Python, at every module of every pass. A model has seven
linear layers in each of its layers, so gathering a whole layer at once costs a seventh, and sends fewer and longer
messages. It is done where a layer is no larger than the largest gather that there is anyway, mostly the embedding or the
head, nor than `LAYER_BYTES`, and where DeepSpeed can know when a layer's backward pass is over: it takes the gradient of the
hidden states for that, so nothing else that has a gradient may come into a layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.distributed.zero_config import LAYER_BYTES

# What comes into a layer and has no gradient, as transformers calls it.
WITHOUT_GRADIENT = {
    "attention_mask", "causal_mask", "position_ids", "position_embeddings", "cache_position", "past_key_values",
    "past_key_value", "layer_past", "cache_params", "use_cache", "output_attentions", "cu_seqlens", "kwargs",
}  # fmt: skip


def gathered_as_one(model: nn.Module, leaves: Sequence[type[nn.Module]]) -> list[nn.Module]:
    """The outermost modules that are gathered with all that is in them: leaves, and layers where it pays. Rank-local.

    Args:
        leaves: classes of modules that always are.
    """
    single = [_own(module, tuple(leaves)) for module in model.modules()]
    limit = min(LAYER_BYTES, max(map(num_bytes, single), default=0))
    found = (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    layers: set[nn.Module] = {layer for layer in found if _takes_hidden_states_alone(layer)}
    if _share_weights(model, _outermost(model, layers)):
        layers = set()  # who is done with them first cannot let go of them
    layers = {layer for layer in layers if num_bytes(layer.parameters()) <= limit}
    return _outermost(model, layers | {m for m in model.modules() if isinstance(m, tuple(leaves))})


def gathers(model: nn.Module, leaves: Sequence[type[nn.Module]]) -> list[list[nn.Parameter]]:
    """The parameters that are gathered by one hook, hook by hook. Rank-local."""
    as_one = gathered_as_one(model, leaves)
    inside = {id(inner) for module in as_one for inner in module.modules()}
    others = [list(m.parameters(recurse=False)) for m in model.modules() if id(m) not in inside]
    return [list(module.parameters()) for module in as_one] + others


def prefetched_elements(model: nn.Module, leaves: Sequence[type[nn.Module]], stated: int) -> int:
    """How much is to be on its way at once: what is stated, or the largest layer that is gathered as one. Rank-local.

    DeepSpeed (0.19.8) starts a bucket of gathers at each module that it enters, which is then once a layer.
    """
    layers = (module for module in gathered_as_one(model, leaves) if not isinstance(module, tuple(leaves)))
    return max([stated, *(sum(getattr(p, "ds_numel", p.numel()) for p in layer.parameters()) for layer in layers)])


def num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of parameters as wholes."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters)


def hand_over_hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A hook before a layer that is gathered as one: DeepSpeed looks for the hidden states among positional arguments.

    Raises:
        RuntimeError: something else has a gradient too, which would be reduced before it is there.
    """
    if not args and "hidden_states" in kwargs:
        kwargs = dict(kwargs)
        args = (kwargs.pop("hidden_states"),)
    others = [y for x in (*args[1:], *kwargs.values()) for y in (x if isinstance(x, tuple | list) else (x,))]
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in others):
        raise RuntimeError(f"{type(module).__name__} is gathered as one and takes more with a gradient than hidden states")
    return args, kwargs


def _own(module: nn.Module, leaves: tuple[type[nn.Module], ...]) -> list[nn.Parameter]:
    return list(module.parameters(recurse=isinstance(module, leaves)))


def _takes_hidden_states_alone(layer: nn.Module) -> bool:
    first, *others = inspect.signature(layer.forward).parameters
    return first == "hidden_states" and WITHOUT_GRADIENT.issuperset(others)


def _share_weights(model: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Whether a weight of a layer is another layer's as well, or of a module outside of them."""
    inside = [id(parameter) for layer in layers for parameter in layer.parameters()]
    modules = {id(module) for layer in layers for module in layer.modules()}
    outside = {id(p) for m in model.modules() if id(m) not in modules for p in m.parameters(recurse=False)}
    return len(set(inside)) < len(inside) or not outside.isdisjoint(inside)


def _outermost(model: nn.Module, chosen: set[nn.Module]) -> list[nn.Module]:
    found: list[nn.Module] = []
    inside = None
    for path, module in model.named_modules():
        if (inside is None or not path.startswith(inside)) and module in chosen:
            found.append(module)
            inside = f"{path}." if path else ""
    return found
