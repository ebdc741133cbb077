"""Whether Triton's kernels can be used, found out once a process, by running one.

Triton comes with torch's wheels for GPUs. That it can be imported does not say that it works: it needs a compiler for the
host's side of a launch, and a folder to write to. So the first kernel that is wanted is preceded by the smallest one there
is; where that fails torch's own operations are used, and a warning says why.

Importing this module imports no Triton.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_use_triton(*tensors: Tensor) -> bool:
    """Whether a kernel can take these tensors: on a GPU, in a dtype of at most 32 bits, outside torch.compile. Rank-local.

    Inside torch.compile torch's own operations are used, which it fuses by itself.
    """
    first = tensors[0]
    if first.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    if not all(tensor.device == first.device and tensor.dtype in DTYPES for tensor in tensors):
        return False
    # A kernel is launched on the current device, wherever its tensors are.
    return first.numel() > 0 and first.device.index == torch.cuda.current_device() and works_on(first.device.index)


@functools.cache
def works_on(device_index: int) -> bool:
    """Whether a kernel runs on this GPU. Tried once a process; a failure is warned of."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from qlora.ops.triton.probe import doubled

        device = torch.device("cuda", device_index)
        good = doubled(torch.full((8,), 3.0, device=device)).tolist() == [6.0] * 8
        reason = "a kernel returned wrong numbers"
    except Exception as error:  # whatever it is, torch can do the work
        good, reason = False, f"{type(error).__name__}: {error}"
    if not good:
        logger.warning("Triton is installed but does not work here, so torch's own operations are used: %s", reason)
    return good
