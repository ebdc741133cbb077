"""Is there room for this rank's share of a base? Answered from the files' headers, before a weight is read."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from qlora.distributed.sharding import Sharding
from qlora.errors import BaseModelError
from qlora.quant.linear import QuantizedLinear
from qlora.quant.skeleton import Skeleton

CGROUP = Path("/sys/fs/cgroup")


def share_bytes(skeleton: Skeleton, sharding: Sharding) -> tuple[int, int]:
    """(bytes that this rank is to keep of the base, bytes of the largest single tensor on its way). Rank-local."""
    kept = largest = 0
    made = {f"{path}.statistics" for path, module in skeleton.model.named_modules() if isinstance(module, QuantizedLinear)}
    for name, parameter in skeleton.model.named_parameters():
        if name in skeleton.fillings or name in made:
            start, stop = sharding.run(parameter.numel())
            kept += (stop - start) * parameter.element_size()
            largest = max(largest, _bytes_on_its_way(skeleton, name, parameter))
    return kept, largest


def _bytes_on_its_way(skeleton: Skeleton, name: str, parameter: Tensor) -> int:
    """What is allocated while one tensor is read: itself, and its sources where these are not read piece by piece."""
    num_bytes = parameter.numel() * parameter.element_size()
    filling = skeleton.fillings.get(name)
    if filling is None:
        return num_bytes
    owner = skeleton.model.get_submodule(name.rpartition(".")[0])
    if filling.converter is not None and filling.joined is None:
        return num_bytes + sum(entry.num_bytes for entry in filling.entries)
    if isinstance(owner, QuantizedLinear) and owner.transposed_in_files:
        return num_bytes + 2 * filling.entries[-1].num_bytes
    return num_bytes


def free_bytes(device: torch.device) -> int | None:
    """Memory that one rank may still take: of its GPU, or its part of this machine's. None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    found = [int(fields["MemAvailable"].split()[0]) * 1024]
    limit, used = CGROUP / "memory.max", CGROUP / "memory.stat"
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        # Pages of files that were read count as used there, and are given back when they are asked for.
        held = dict(line.split() for line in used.read_text().splitlines())
        found.append(int(limit.read_text()) - int(held["anon"]) - int(held["shmem"]))
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_room(skeleton: Skeleton, sharding: Sharding, device: torch.device) -> None:
    """Refuse a base whose share does not fit into what is free. Rank-local. Raises BaseModelError with the numbers."""
    kept, largest = share_bytes(skeleton, sharding)
    home = sharding.home(device)
    free = None if home is None else free_bytes(home)
    if home is None or free is None or kept + largest <= free:
        return
    gib = 1 << 30
    share = "the base" if sharding.world_size == 1 else f"a rank's share of the base, 1/{sharding.world_size} of it"
    raise BaseModelError(
        f"{share} does not fit into memory",
        place="model.base",
        found=f"{free / gib:.1f} GiB free for this rank on {home.type}",
        wanted=f"{kept / gib:.1f} GiB to keep and {largest / gib:.1f} GiB for its largest tensor on the way",
        next_step="use more ranks under launch/accelerate/zero3.yaml, or zero3_offload.yaml on GPUs, or a smaller base",
    )
