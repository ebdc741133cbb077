"""What stays whole on every rank under ZeRO-3, and which modules then need none of DeepSpeed's hooks."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

# What stays whole is gathered after a step by so many elements at once; twice their bytes for a moment.
RESIDENT_BUCKET = 50_000_000


def keep_resident(optimizer: Any) -> list[Any]:
    """Keep what is small and hardly grows with the base whole on every rank, where DeepSpeed goes by size alone.

    Norms and biases stay, whose gathers would cost more than they weigh, and then what trains, as far as the budget goes.
    The scales of 4-bit weights do not: they are a 64th of the base.

    Returns:
        What stays, whole from now on; a step cuts it all the same, and is to be followed by `gather_resident`.
    """
    offload = getattr(optimizer, "parameter_offload", optimizer)
    limit, budget = offload.param_numel_persistence_threshold, offload.model_persistence_threshold
    for parameter in offload.persistent_parameters:
        parameter.ds_persist = False
    small: list[Any] = [p for p in offload.module.parameters() if p.ds_numel <= limit]
    vectors = [p for p in small if not p.requires_grad and len(p.ds_shape) == 1 and p.is_floating_point()]
    chosen = []
    for parameter in [*vectors, *(p for p in small if p.requires_grad)]:
        if parameter.ds_numel <= budget:
            budget -= parameter.ds_numel
            parameter.ds_persist = True
            chosen.append(parameter)
    offload.persistent_parameters = chosen
    optimizer.persistent_parameters = []
    gather_resident(chosen)
    _leave_alone(offload)
    return chosen


def _leave_alone(offload: Any) -> None:
    """Take DeepSpeed's hooks off every module that has nothing to gather: attention, MLPs, norms that stay whole.

    Four hooks and two autograd functions at each of them take the host's time and do nothing (0.19.8). Layers keep theirs,
    because what recomputation gathers is on the account of the module whose backward is under way, until that is over; and
    the outermost module: what a module reaches for that is not its own is gathered for the innermost hook.
    """
    idle = set()
    for module in offload.module.modules():
        own = [
            *module.parameters(recurse=getattr(module, "_z3_leaf", False)),
            *(p for _, p in module.ds_external_parameters()),
        ]
        keeps = module is offload.module or isinstance(module, GradientCheckpointingLayer)
        if not keeps and all(p.ds_persist and not p.requires_grad for p in own):
            idle |= {id(module._forward_pre_hooks), id(module._forward_hooks)}
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        if id(handle.hooks_dict_ref()) in idle:
            handle.remove()


@torch.no_grad()
def gather_resident(parameters: list[Any]) -> None:
    """Make whole what is cut. Collective where anything is, and it is on all ranks alike.

    DeepSpeed 0.19.8 would do it by one collective for every parameter, two for each adapted layer and one for each norm.
    """
    waiting = [p for p in parameters if p.ds_status.name == "NOT_AVAILABLE"]
    while waiting:
        together, num_elements = 0, 0
        while together < len(waiting) and (not together or num_elements + waiting[together].ds_numel <= RESIDENT_BUCKET):
            num_elements += waiting[together].ds_numel
            together += 1
        waiting[0].all_gather_coalesced(waiting[:together]).wait()
        del waiting[:together]
