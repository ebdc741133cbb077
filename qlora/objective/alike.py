"""Layers that are built alike, of which the first can speak for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.lora.layer import LoraLayer
from qlora.quant.linear import QuantizedLinear

# In what layers may differ: their number, and how they are called, and recomputed where they train.
_OWN = {"layer_idx", "forward", "gradient_checkpointing"}
_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def alike_layers_left_out(model: Any) -> Iterator[None]:
    """Inside the context the second and later of a model's layers hand on the hidden states that they are given.

    Only where all layers are alike: of the same classes, with the same settings, and with nothing in the model's config
    that has an entry for each layer. Otherwise, and where a layer gives more than hidden states, all of them compute.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if len(layers) < 2 or _differs_by_layer(model.config, len(layers)) or len({_built(layer) for layer in layers}) > 1:
        yield
        return
    outputs: list[Any] = []
    handle = layers[0].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with ExitStack() as stack:
            for layer in layers[1:]:
                stack.enter_context(forward_replaced(layer, _handing_on(layer.forward, outputs)))
            yield
    finally:
        handle.remove()


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A module computes something else inside the context; its hooks stay."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _handing_on(forward: Any, outputs: list[Any]) -> Any:
    def hand_on(*args: Any, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs.get("hidden_states")
        alike = outputs and isinstance(outputs[-1], Tensor) and isinstance(hidden_states, Tensor)
        return hidden_states if alike else forward(*args, **kwargs)

    return hand_on


def _built(module: nn.Module) -> Any:
    """What a module is made of, but for values of tensors. Linear layers act token by token, whatever their settings."""
    if isinstance(module, LoraLayer):
        return type(module), _built(module.base_layer)
    if isinstance(module, (nn.Linear, QuantizedLinear)):
        return type(module)
    own = []
    for name, value in vars(module).items():
        if name.startswith(("_", "ds_")) or name in _OWN:  # DeepSpeed numbers modules
            continue
        own.append((name, repr(value) if isinstance(value, (*_PLAIN, tuple, list, dict)) else type(value)))
    return type(module), tuple(own), tuple((name, _built(child)) for name, child in module.named_children())


def _differs_by_layer(config: Any, num_layers: int) -> bool:
    """Whether a list of the config has an entry for each layer, and not always the same."""
    stated = config.get_text_config().to_dict().values()
    lists = (value for value in stated if isinstance(value, (list, tuple)) and len(value) == num_layers)
    return any(entry != value[0] for value in lists for entry in value)
