"""What ZeRO-3 gathers of the parameters that training holds: by one hook, ahead, at one time, in a micro-step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from qlora.distributed.zero_config import ALONE_BYTES, PREFETCH_BUCKET
from qlora.plan.parameters import Stored, ZeroSettings


def largest_gather(stored: Iterable[Stored]) -> int:
    """Bytes of the most that ZeRO-3 gathers by one hook: a layer, a LoRA layer with its A and B, embedding or head."""
    modules: dict[str, int] = defaultdict(int)
    for parameter in stored:
        modules[parameter.gathered_with] += 0 if parameter.stays_whole else parameter.num_bytes
    return max(modules.values(), default=0)


def prefetch_bucket(stored: Iterable[Stored], zero: ZeroSettings) -> int:
    """Elements that DeepSpeed gathers ahead at each hook."""
    if zero.prefetch_bucket_size is not None:
        return zero.prefetch_bucket_size
    layers: dict[str, int] = defaultdict(int)
    for parameter in stored:
        if parameter.gathered_with != parameter.module:
            layers[parameter.gathered_with] += parameter.elements
    return max(PREFETCH_BUCKET, *layers.values(), 0)


def max_live(stored: Sequence[Stored], zero: ZeroSettings) -> int:
    """Elements that DeepSpeed lets be there before it stops gathering ahead."""
    modules: dict[str, int] = defaultdict(int)
    for parameter in stored:
        modules[parameter.gathered_with] += parameter.elements
    stated, largest = zero.max_live_parameters, max(modules.values(), default=0)
    return largest + prefetch_bucket(stored, zero) if stated is None else stated


def gathered_at_once(stored: Sequence[Stored], zero: ZeroSettings) -> int:
    """Bytes of gathered parameters that one rank holds at one time, at most.

    DeepSpeed starts another bucket of gathers at every module, in the order of use, as long as less than `max_live`
    elements are there; the last tensor may pass the limit. Buckets are unpacked by copying, but for what comes alone,
    and the one before is still there while one is unpacked.
    """
    cut = [p for p in stored if not p.stays_whole]
    now, bucket = largest_gather(cut), prefetch_bucket(stored, zero)
    ahead = largest_run(cut, max_live(stored, zero)) if bucket else 0
    copied = [p for p in cut if p.num_bytes <= ALONE_BYTES]
    return max(now, ahead) + 2 * max(largest_gather(copied), largest_run(copied, bucket))


def largest_run(stored: Sequence[Stored], elements: int) -> int:
    """Bytes of neighbouring parameters, of which one more is taken as long as there are less than `elements`, at most."""
    most = 0
    for run in (stored, stored[::-1]):  # the forward and the backward pass
        first = held = num_bytes = 0
        for parameter in run:
            while held >= elements > 0:
                held, num_bytes, first = held - run[first].elements, num_bytes - run[first].num_bytes, first + 1
            held, num_bytes = held + parameter.elements, num_bytes + parameter.num_bytes
            most = max(most, num_bytes if elements > 0 else 0)
    return most


def gathered_bytes(stored: Iterable[Stored], *, recompute: float) -> int:
    """Bytes of all gathers of a micro-step, own pieces included, at most: forward, backward, and recomputed layers.

    A layer that is gathered as one is there for its recomputation and its backward pass together.

    Args:
        recompute: share of the layers that are computed again; True is all of them.
    """
    cut = [p for p in stored if not p.stays_whole]
    return sum(int(p.num_bytes * (p.uses + (p.in_layer and p.gathered_with == p.module) * recompute)) for p in cut)
