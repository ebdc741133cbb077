"""EVA's start: A is what a layer's inputs are made of, found from a little of the data that will be trained on.

The base stays as it is, and B is zero, so this can be done when the model is there. The rank of each layer stays what the
config says: EVA's redistribution of ranks over layers (its rho) is left at 1, at which there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora.distributed.collectives import gathered
from qlora.distributed.sharding import Sharding
from qlora.errors import ConfigError
from qlora.lora.initial import InputDirections
from qlora.lora.layer import LoraLayer, generator_of, lora_layers
from qlora.lora.starts import refuse_other_kinds

# Few rows at a time would each be cut down to r directions: so many times r are taken in together.
ROWS_AT_ONCE = 4
Run = tuple[Callable[[], object], Tensor]


def start_from_inputs(
    model: nn.Module,
    runs: Iterable[Run],
    *,
    seed: int = 0,
    name: str = "default",
    sharding: Sharding | None = None,
    leaves: tuple[type[nn.Module], ...] = (LoraLayer,),
) -> list[str]:
    """Set each adapted layer's A to the main directions of its inputs. Collective where there are several ranks.

    Before the model is prepared, whole or in shares: shares are gathered module by module while it computes.

    Args:
        runs: what makes the model compute on a batch, and which of its places (B, T) count (True), as in PEFT those that a
            loss is computed at. All ranks run the same ones.
        sharding: the one that the base was loaded with; A is the first rank's everywhere.
        leaves: module classes whose parameters are gathered as one.

    Returns:
        Paths of the layers that were not used by any run, and keep their A.

    Raises:
        ConfigError: a layer of another kind than linear is adapted, or the runs have fewer places than r.
    """
    layers = {path: layer for path, layer in lora_layers(model) if name in layer.updates}
    refuse_other_kinds(model, layers, "eva")
    seen = _Seen({path: InputDirections(layer.updates[name].r, generator_of(path, seed)) for path, layer in layers.items()})
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), gathered_in_turn(model, leaves), seen.watching(layers):
            for run, counts_BT in runs:
                seen.counts_BT = counts_BT
                run()
    finally:
        model.train(was_training)
    with torch.no_grad():
        short = seen.take_in_the_rest()
    if short:
        raise ConfigError(
            f"{len(short)} layers have seen fewer tokens than r directions need",
            place="lora.eva_batches",
            found=f"{short[0]}, {seen.of(short[0]).r} directions",
            next_step="raise lora.eva_batches, or lower lora.r",
        )
    unused = []
    for path, layer in layers.items():
        directions = seen.of(path).directions
        if directions is None:
            unused.append(path)
            continue
        directions = (sharding or Sharding()).broadcast(directions.contiguous(), 0)
        A: nn.Parameter = layer.lora_A[name]
        A.data.copy_(directions)
    return unused


class _Seen:
    """The directions of the layers' inputs so far. Layers that are given one tensor, as q, k and v are, share theirs."""

    def __init__(self, directions: dict[str, InputDirections]) -> None:
        self._directions, self._same = directions, dict.fromkeys(directions, "")
        self.pending: dict[str, list[Tensor]] = {}
        self.counts_BT = torch.empty(0)
        self._last: tuple[str, Tensor] | None = None

    def of(self, path: str) -> InputDirections:
        """What was found for a layer."""
        return self._directions[self._same[path] or path]

    @contextmanager
    def watching(self, layers: dict[str, Any]) -> Iterator[None]:
        """Take in whatever the layers are given."""
        with ExitStack() as handles:
            for path, layer in layers.items():
                handles.callback(layer.register_forward_pre_hook(self._hook(path)).remove)
            yield
            self._last = None

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x: Tensor = inputs[0]
            if self._same[path]:
                return
            first_time = path not in self.pending
            if first_time and self._last is not None and self._last[1] is x and self._fits(self._last[0], path):
                self._same[path] = self._last[0]
                return
            self._last = (path, x)
            counts = self.counts_BT.to(x.device)
            rows = x[counts] if x.shape[:-1] == counts.shape else x.reshape(-1, x.shape[-1])
            waiting = self.pending.setdefault(path, [])
            waiting.append(rows.float())
            if sum(map(len, waiting)) >= ROWS_AT_ONCE * self._directions[path].r:
                self._take_in(path)

        return take

    def take_in_the_rest(self) -> list[str]:
        """Take in what is waiting. Returns the layers that have seen inputs, and fewer than r."""
        short = []
        for path, waiting in self.pending.items():
            if self._directions[path].directions is None and sum(map(len, waiting)) < self._directions[path].r:
                short.append(path)
            elif sum(map(len, waiting)) > 0:
                self._take_in(path)
        return short

    def _take_in(self, path: str) -> None:
        self._directions[path].update(torch.cat(self.pending[path]))
        self.pending[path].clear()

    def _fits(self, other: str, path: str) -> bool:
        return self._directions[other].r == self._directions[path].r


@contextmanager
def gathered_in_turn(model: nn.Module, leaves: tuple[type[nn.Module], ...]) -> Iterator[None]:
    """Have each module's own parameters whole while it computes, and no longer. For forward passes without gradients.

    This is what ZeRO-3's hooks do, which a model has only once it is prepared. Collective inside, where shares are kept.
    """
    entered: dict[nn.Module, list[AbstractContextManager[None]]] = {}

    def enter(module: nn.Module, _: Any) -> None:
        context = gathered(list(module.parameters(recurse=isinstance(module, leaves))))
        context.__enter__()
        entered.setdefault(module, []).append(context)

    def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
        entered[module].pop().__exit__(None, None, None)

    with ExitStack() as handles:
        inside: set[nn.Module] = set()
        for module in model.modules():
            if module in inside:
                continue
            if isinstance(module, leaves):
                inside |= set(module.modules())
            elif not any(True for _ in module.parameters(recurse=False)):
                continue
            # Before all others: what looks at a module's weight in a hook finds it whole.
            handles.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            handles.callback(module.register_forward_hook(leave).remove)
        yield
