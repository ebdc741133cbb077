"""What an arm measures of its own process: time, resident memory, and what autograd keeps."""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path
from typing import Any


def status_bytes(key: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class PeakMemory:
    """The peak of resident memory above the level at which it was started.

    Before that, what is free goes back to the system: what loading used and freed would hide what comes after it.
    """

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.level_bytes = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew

    def above_bytes(self) -> int:
        """The most since the start, above the level."""
        return status_bytes("VmHWM") - self.level_bytes


class StepClock:
    """When each step ended: wall clock and processor seconds of this process."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def tick(self) -> None:
        """A step is over."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def after(self, warmup: int) -> dict[str, float]:
        """Seconds from the end of the last warm-up step to the end of the last step."""
        return {"seconds": self.wall[-1] - self.wall[warmup - 1], "cpu_seconds": self.cpu[-1] - self.cpu[warmup - 1]}


class SavedForBackward:
    """Bytes that a model's blocks keep for backward: distinct storages, its own parameters and buffers left out.

    Two ways in which an autograd function can keep a tensor are looked for: `save_for_backward`, seen by the hooks of
    saved tensors, and an attribute of its context, found among the objects that are alive when the last block is done.
    """

    def __init__(self, model: Any) -> None:
        import torch

        num_layers = model.config.get_text_config().num_hidden_layers
        lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == num_layers)
        self.layers = next(lists)
        self.own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.by_hook: dict[int, int] = {}
        self.alive: dict[int, int] = {}
        self._before: set[int] = set()
        self._open: list[Any] = []
        self._done = False
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(self._enter(index))
            layer.register_forward_hook(self._leave(index), always_call=True)

    def bytes_per_token_and_layer(self, tokens: int) -> float:
        """After a forward pass of so many tokens. Raises RuntimeError where the blocks were not entered as modules."""
        if not self._done:
            raise RuntimeError("no forward pass with gradients went through the blocks")
        return sum((self.alive | self.by_hook).values()) / tokens / len(self.layers)

    def _enter(self, index: int) -> Any:
        import torch

        def enter(module: Any, inputs: Any) -> None:
            if self._done or not torch.is_grad_enabled():
                return
            if index == 0:
                self._before = {key for key, _ in _alive()}
            hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
            hooks.__enter__()
            self._open.append(hooks)

        return enter

    def _keep(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.by_hook[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _leave(self, index: int) -> Any:
        def leave(module: Any, inputs: Any, output: Any) -> None:
            if not self._open:
                return
            self._open.pop().__exit__(None, None, None)
            if index == len(self.layers) - 1:
                last = output[0] if isinstance(output, tuple) else output
                passing = {last.untyped_storage().data_ptr()} | self.own | self._before
                self.alive = {key: size for key, size in _alive() if key not in passing}
                self._done = True

        return leave


def _alive() -> list[tuple[int, int]]:
    """Address and bytes of the storage of every tensor that Python can find."""
    import torch

    found = []
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            found.append((storage.data_ptr(), storage.nbytes()))
    return found
