"""Whole tensors out of parameters that ZeRO-3 may have cut up. Light: imports DeepSpeed only where it is at work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

GATHER_BYTES = 64 << 20


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has charge of a parameter."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape a parameter has when it is not cut up."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def set_whole(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter its value (whole shape), of which a rank that keeps a run takes its run. Rank-local."""
    with torch.no_grad():
        if not is_partitioned(parameter):
            parameter.copy_(value)
            return
        share: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        flat = value.reshape(-1)
        start = min(torch.distributed.get_rank() * share.numel(), flat.numel())
        own = flat[start : start + share.numel()]
        share[: own.numel()].copy_(own)


def widen(parameter: nn.Parameter) -> None:
    """Make a parameter fp32, whole or cut. Rank-local."""
    parameter.data = parameter.data.float()
    if is_partitioned(parameter):
        share: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        share.data = share.data.float()


def whole_parameters(parameters: dict[str, nn.Parameter], *, keep: bool = True) -> dict[str, Tensor]:
    """Copies on the CPU of parameters as wholes, by the same keys. Collective under ZeRO-3, rank-local otherwise.

    Args:
        keep: False takes part in the gathering and returns {}; what ranks other than the writer want.
    """
    out: dict[str, Tensor] = {}
    batch: dict[str, nn.Parameter] = {}
    size = 0
    for key, parameter in parameters.items():
        batch[key] = parameter
        size += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if size >= GATHER_BYTES:
            _copy(batch, out, keep)
            batch, size = {}, 0
    _copy(batch, out, keep)
    return out


def _copy(batch: dict[str, nn.Parameter], out: dict[str, Tensor], keep: bool) -> None:
    with gathered(batch.values()):
        if keep:
            out.update({key: p.detach().to("cpu", copy=True).contiguous() for key, p in batch.items()})


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Have these parameters whole inside. Collective where ZeRO-3 has charge of any of them, rank-local otherwise."""
    own = list(parameters)
    if not any(is_partitioned(p) for p in own):
        yield
        return
    from qlora.distributed import zero

    with torch.no_grad(), zero.gathered(own):
        yield
