"""Which layers are computed again in backward, and where their inputs are kept meanwhile.

`train.gradient_checkpointing` says all, none or how many. `auto` counts: what the layers save (`qlora.plan.activations`)
against the memory that is free once the base is loaded, less what training takes by itself (`room.py`). It computes as few
layers again as fit, on all ranks the same number, the largest that any needs. It is always the first layers; the plan says
why. Where the arithmetic does not know an architecture, all layers are computed again on GPUs and none on CPUs.

Only whole layers are chosen from. Computing the MLP alone again (torch's checkpoint around it) repeats four fifths of an 8B
layer's arithmetic for half of what it saves; fewer whole layers save as much for less of it (docs/memory.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.config.schema import JobConfig
from qlora.distributed.collectives import whole_shape
from qlora.distributed.runtime import Runtime
from qlora.errors import ConfigError
from qlora.objective.fused import FusedMLP, FusedNorm
from qlora.objective.train_model import TrainModel
from qlora.plan.activations import Activations, Remade, activations, layer_shapes
from qlora.train.offload_inputs import InputsOnHost
from qlora.train.room import room_for_activations

KEY = "train.gradient_checkpointing"
GIB = 1 << 30


@dataclass(frozen=True)
class Recomputed:
    """What was chosen.

    Attributes:
        num_recomputed: of num_layers; the first ones.
        planned: what the arithmetic says of a micro-step; None where it does not know the architecture.
        why: in words.
        offloaded: the inputs of these layers are kept in the host's memory.
    """

    num_recomputed: int
    num_layers: int
    planned: Activations | None
    why: str
    offloaded: bool = False

    def __str__(self) -> str:
        many = {0: "none", self.num_layers: "all"}.get(self.num_recomputed, f"the first {self.num_recomputed}")
        inputs = ", their inputs in the host's memory" if self.offloaded else ""
        return f"{many} of {self.num_layers} layers computed again{inputs}: {self.why}"


def recompute(config: JobConfig, runtime: Runtime, train_model: TrainModel) -> Recomputed:
    """Choose how many layers are computed again in backward, and have them so. Collective; after the base was loaded.

    Raises:
        ConfigError: the model has not as many layers, or is not made of layers that can be computed again.
    """
    model: Any = train_model.model
    stated, device = config.train.gradient_checkpointing, runtime.device
    layers = layers_of(model)
    offloads = config.train.offload_activations and device.type == "cuda"
    planned = plan_activations(config, train_model, device, offloaded=offloads)
    if stated == "auto":
        number, why = _as_many_as_needed(config, runtime, train_model, planned, len(layers))
    else:
        number = stated if type(stated) is int else len(layers) * bool(stated)
        why = "as the job says"
        if planned is not None:
            why += f", {_gib(planned.peak(number))} for {planned.num_tokens:,} tokens by the plan"
    if stated is True or number:
        recompute_layers(model, None if stated is True else number, config.train.gradient_checkpointing_kwargs.use_reentrant)
    if config.train.offload_activations and not offloads:
        why += "; on a CPU their inputs are in the host's memory anyway"
    if offloads and number:
        inputs = InputsOnHost(device)
        for layer in layers[:number]:
            layer._gradient_checkpointing_func = partial(inputs, layer._gradient_checkpointing_func)
    return Recomputed(number, len(layers), planned, why, offloads and number > 0)


def layers_of(model: nn.Module) -> list[Any]:
    """The layers that transformers can compute again one by one, in the order of a forward pass."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_layers(model: Any, number: int | None, use_reentrant: bool) -> None:
    """Keep the input of each of the first layers alone, and compute what is inside it again in backward. Rank-local.

    Args:
        number: of layers; None for all that there are, also where transformers only knows how to have all of them so.

    Raises:
        ConfigError: the model has not as many layers, or is not made of layers that can be computed again.
    """
    layers = layers_of(model)
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"{type(model).__name__} cannot compute its layers again", place=KEY, next_step="set it to false")
    if number is not None and number > len(layers):
        name = type(model).__name__
        raise ConfigError(
            "there are not as many layers" if layers else f"{name} can compute again all of its layers or none",
            place=KEY,
            found=number,
            wanted=f"at most {len(layers)}, or true" if layers else "true or false",
        )
    # transformers 5.23 has a new name for it and warns of the old one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    for layer in [] if number is None else layers[number:]:
        layer.gradient_checkpointing = False
    # It also lets the embeddings' output ask for a gradient. The reentrant kind needs that, because a layer whose input asks
    # for none gets none; otherwise it is left out, because ZeRO-3 would gather the frozen embeddings in backward for it.
    model.disable_input_require_grads()
    if use_reentrant:
        model.enable_input_require_grads()


def plan_activations(
    config: JobConfig, train_model: TrainModel, device: torch.device, *, offloaded: bool = False
) -> Activations | None:
    """What a micro-step of full rows keeps, from this model's modules; None for an architecture that is not known."""
    model: Any = train_model.model
    layers = layers_of(model)
    if not layers:
        return None
    norms = [m for m in layers[0].modules() if re.search("norm", type(m).__name__, re.IGNORECASE)]
    paths = {module: path for path, module in layers[0].named_modules()}
    widths = [(paths[m], whole_shape(m.weight)[0]) for m in norms if isinstance(getattr(m, "weight", None), nn.Parameter)]
    text = model.config.get_text_config().to_dict()
    shapes = layer_shapes(text, widths, whole_scores=train_model.attention_name == "eager")
    if shapes is None or shapes.num_layers != len(layers):
        return None
    mlps = [m for m in layers[0].modules() if type(m).__name__.upper().endswith("MLP")]
    remade = Remade(all(isinstance(m, FusedNorm) for m in norms), all(isinstance(m, FusedMLP) for m in mlps))
    head = train_model.loss_head
    return activations(
        shapes,
        torch.empty(0, dtype=getattr(torch, config.model.dtype)).element_size(),
        config.train.per_device_train_batch_size,
        config.data.max_length,
        remade=remade,
        offloaded=offloaded,
        head_trains=head is None or any(p.requires_grad for p in head.parameters()),
        device="cuda" if device.type == "cuda" else "cpu",
    )


def _as_many_as_needed(
    config: JobConfig, runtime: Runtime, train_model: TrainModel, planned: Activations | None, num_layers: int
) -> tuple[int, str]:
    """The number of layers that `auto` stands for, and why. Collective."""
    runtime.barrier()  # none counts what is free while another one still loads
    room = room_for_activations(train_model, runtime)
    if not train_model.model.supports_gradient_checkpointing:
        return 0, f"{type(train_model.model).__name__} cannot compute them again"
    if planned is None or room is None:
        why = "what this architecture keeps is not known" if planned is None else "how much memory is free is not known"
        return num_layers * (runtime.device.type == "cuda"), why
    own = torch.tensor([planned.fewest(room), -room], dtype=torch.int64, device=runtime.device)
    number, least = (int(value) for value in runtime.max(own).tolist())
    of_none = f" ({_gib(planned.peak(0))} with none)" if number else ""
    fits = "" if planned.peak(number) <= -least else ", which does not seem to fit"
    free = f"{_gib(max(0, -least))} are free for it"
    return number, f"{_gib(planned.peak(number))} for {planned.num_tokens:,} tokens{of_none}{fits}; {free}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
