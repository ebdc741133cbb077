"""The optimizer's state that ZeRO cuts: whole tensors for a checkpoint, and shares of them.

DeepSpeed's functions for it only look for what it has put on each parameter, which is asked here itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora.distributed.collectives import GATHER_BYTES, is_partitioned, whole_shape
from qlora.distributed.engine import MASTER

MOMENTS = ("exp_avg", "exp_avg_sq")


def whole_states(parameters: dict[str, nn.Parameter]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each parameter's moments, and its fp32 copy where it is none itself, whole. Collective, in one order on all ranks.

    Many come by one collective; DeepSpeed's own getters start one for each. At most `GATHER_BYTES` and one parameter's
    state are made whole at once; what is yielded lies in them, and keeps them as long as it is kept.
    """
    make_whole = _gathered if any(is_partitioned(p) for p in parameters.values()) else _summed
    batch: dict[str, Any] = {}
    size = 0
    for name, parameter in parameters.items():
        batch[name] = parameter
        size += math.prod(whole_shape(parameter)) * 4 * len(_state_keys(parameter))
        if size >= GATHER_BYTES:
            yield from make_whole(batch)
            batch, size = {}, 0
    if batch:
        yield from make_whole(batch)


def _gathered(parameters: dict[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Under ZeRO-3 every rank has a padded piece of each tensor."""
    own: Tensor | None = None
    num_own, at = sum(p.ds_tensor.numel() * len(_state_keys(p)) for p in parameters.values()), 0
    for parameter in parameters.values():
        for key in _state_keys(parameter):
            share = parameter._z3_optimizer.get_local_fp32_param(parameter, _of_deepspeed(key))
            if own is None:
                own = torch.empty(num_own, dtype=share.dtype, device=share.device)
            # Now: a share that was read from a disk lies where the next one will.
            own[at : at + share.numel()].copy_(share.detach())
            at += share.numel()
    assert own is not None
    world_size = torch.distributed.get_world_size()
    of_all = torch.empty(world_size * own.numel(), dtype=own.dtype, device=own.device)
    torch.distributed.all_gather_into_tensor(of_all, own)
    by_rank, at = of_all.view(world_size, -1), 0
    for name, parameter in parameters.items():
        found, length = {}, parameter.ds_tensor.numel()
        for key in _state_keys(parameter):
            whole = by_rank[:, at : at + length].reshape(-1)[: parameter.ds_numel]
            found[key] = whole.view(parameter.ds_shape)
            at += length
        yield name, found


def _summed(parameters: dict[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Under ZeRO-1 and 2 every rank has a run of all tensors laid end to end, which may begin and end within one."""
    some = next(iter(parameters.values()))
    flat = torch.zeros(
        sum(p.numel() * len(_state_keys(p)) for p in parameters.values()), dtype=torch.float32, device=some.device
    )
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    at = 0
    for name, parameter in parameters.items():
        for key in _state_keys(parameter):
            whole = states[name][key] = flat[at : at + parameter.numel()].view(parameter.shape)
            at += parameter.numel()
            if (here := parameter._hp_mapping) is not None:
                run = here.lp_fragment_address
                whole.view(-1)[run.start : run.start + run.numel].copy_(here.get_hp_fragment(_of_deepspeed(key)).detach())
    torch.distributed.all_reduce(flat, group=some._dp_group)
    yield from states.items()


def _state_keys(parameter: nn.Parameter) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, MASTER)


def _of_deepspeed(key: str) -> str | None:
    """DeepSpeed's name for the fp32 copy is None."""
    return None if key == MASTER else key


def set_share(parameter: Any, key: str, whole: Tensor) -> None:
    """Write this rank's share of a whole tensor of `whole_states`. Rank-local."""
    if not is_partitioned(parameter):
        parameter.set_full_hp_param(whole, _of_deepspeed(key))
        return
    # DeepSpeed's own setter for whole tensors cuts past the end on the last rank where the number of elements is no
    # multiple of the number of ranks (0.19.8), so the padded share is cut here and set locally.
    share = parameter.ds_tensor.numel()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    padded = torch.zeros(share * world_size, dtype=torch.float32)
    padded[: whole.numel()] = whole.reshape(-1)
    own = padded[share * rank : share * (rank + 1)]
    parameter._z3_optimizer.set_local_hp_param(own.to(whole.device), parameter, _of_deepspeed(key))
