"""DeepSpeed ZeRO: a base in shares, whole tensors out of them, the engine.

The only file that imports deepspeed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import MultipleAllGatherHandles
from deepspeed.utils import nvtx, set_z3_leaf_module
from torch import Tensor, nn

from qlora.distributed.collectives import is_partitioned
from qlora.distributed.gathers import gathered_as_one, gathers, hand_over_hidden_states, num_bytes, prefetched_elements
from qlora.distributed.mapped import move_to_file
from qlora.distributed.offload import device_of
from qlora.distributed.optimizer_shares import set_share, whole_states
from qlora.distributed.resident import gather_resident, keep_resident
from qlora.distributed.saved import without_gathered_weights
from qlora.distributed.sharding import Sharding, Together
from qlora.distributed.zero_config import ALONE_BYTES, without_training


def prepare_environment() -> None:
    """Quieten DeepSpeed's per-rank chatter, and let it compile nothing on CPUs. Rank-local."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 warns of, at every call.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    if not torch.cuda.is_available():
        # At start DeepSpeed 0.19.8 compiles shared-memory collectives for CPUs, which needs a compiler and fails where the
        # environment's path has a space in it. It goes on with gloo where it finds them not compatible.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Every function of its hooks opens a range of NVIDIA's profiler, ten thousand a step here, which CPUs have not.
        nvtx.enable_nvtx = False


def mark_leaves(model: nn.Module, classes: Sequence[type[nn.Module]], plugin: Any) -> None:
    """Let ZeRO-3 gather by one hook what `distributed.gathers` says: modules of these classes, and layers. Rank-local.

    It also bounds what is gathered at once. DeepSpeed adds a bucket of prefetched parameters at every module that it
    enters, until as much is live as the configuration allows, which by default is 1e9 elements (0.19.8). Where it says
    nothing, the largest gather and one bucket may be live: what is computed with, and what is on its way.

    DeepSpeed reduces a leaf's gradients in the module's backward hook, which torch fires when the gradient of the
    module's input is there. Where no input needs one, as in the first layer over a frozen embedding, it fires before
    the parameters' gradients exist, and the step fails on a gradient of size 0 (DeepSpeed 0.19.8). So the input of a
    leaf in which something trains always asks for a gradient.
    """
    stated = plugin.deepspeed_config["zero_optimization"]
    if stated["stage"] != 3:
        return
    for leaf in gathered_as_one(model, classes):
        set_z3_leaf_module(leaf, True)
        if not isinstance(leaf, tuple(classes)):
            leaf.register_forward_pre_hook(hand_over_hidden_states, with_kwargs=True)
        if any(p.requires_grad for p in leaf.parameters()):
            leaf.register_forward_pre_hook(_ask_for_input_gradient)
        for borrowed in (p for module in leaf.modules() for p in getattr(module, "borrowed_parameters", ())):
            deepspeed.zero.register_external_parameter(leaf, borrowed)
    if not plugin.states_prefetch:
        bucket = prefetched_elements(model, classes, stated["stage3_prefetch_bucket_size"])
        stated["stage3_prefetch_bucket_size"] = bucket
    if stated.get("stage3_max_live_parameters", "auto") == "auto":
        largest = max(sum(getattr(p, "ds_numel", p.numel()) for p in together) for together in gathers(model, classes))
        stated["stage3_max_live_parameters"] = largest + stated["stage3_prefetch_bucket_size"]


def gather_large_alone(model: nn.Module) -> None:
    """Let no tensor above `ALONE_BYTES` come together with others. Rank-local, and the same on all ranks.

    DeepSpeed (0.19.8) lays what it gathers at one time side by side and unpacks it by copying, so that a head is there twice
    for a moment. A tensor that comes by itself is received where it is used. After `deepspeed.initialize`, which takes the
    last parameters over.
    """
    partitioned: list[Any] = [p for p in model.parameters() if is_partitioned(p)]
    large = {p.ds_id for p in partitioned if num_bytes([p]) > ALONE_BYTES}
    for parameter in partitioned if large else ():
        parameter.all_gather_coalesced = partial(_gather_large_alone, parameter.all_gather_coalesced, large)


def _gather_large_alone(gather: Callable[..., Any], large: set[int], parameters: Iterable[Any], **kwargs: Any) -> Any:
    in_order = sorted(parameters, key=lambda p: p.ds_id)  # DeepSpeed hands over sets
    others = [p for p in in_order if p.ds_id not in large]
    together = [others, *([p] for p in in_order if p.ds_id in large)]
    handles = [gather(some, **kwargs) for some in together if some]
    return handles[0] if len(handles) == 1 else MultipleAllGatherHandles(handles)


def _ask_for_input_gradient(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    tensors = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    if not torch.is_grad_enabled() or any(x.requires_grad for x in tensors):
        return None
    if not tensors and getattr(module, "asks_for_anchor", False):
        # What looks up token ids has no input that could have a gradient: it gets one more.
        return (*inputs, torch.zeros((), device=inputs[0].device, requires_grad=True))
    return tuple(x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Parameters are whole inside the context, for reading. Collective where any of them is partitioned."""
    partitioned = [p for p in parameters if is_partitioned(p)]
    return deepspeed.zero.GatheredParameters(partitioned) if partitioned else nullcontext()


class ZeroSharding(Sharding):
    """ZeRO-3's cut: each rank keeps a run of every parameter, on the device that the configuration says."""

    def __init__(self, rank: int, world_size: int, together: Together, plugin: Any) -> None:
        super().__init__(rank, world_size, together, worker=rank, num_workers=world_size)
        stated = plugin.deepspeed_config
        needed = ("zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu")
        self._offload = device_of(stated["zero_optimization"], "offload_param")
        self._folder: Path | None = plugin.share_folder
        # Without a module, which would replace torch's linear function for the whole process.
        self._init = deepspeed.zero.Init(
            config_dict_or_path={key: stated[key] for key in needed if key in stated},
            remote_device=None if self._offload == "none" else self._offload,
        )

    def exchange(self, own: Tensor) -> Tensor:
        gathered = torch.empty(self.world_size * own.numel(), dtype=own.dtype, device=own.device)
        torch.distributed.all_gather_into_tensor(gathered, own)
        return gathered

    def keep(self, parameter: nn.Parameter) -> None:
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        if self._folder is not None:
            self.together(partial(move_to_file, parameter.ds_tensor, self._folder))  # type: ignore[attr-defined]

    def home(self, device: torch.device) -> torch.device | None:
        if self._folder is not None:
            return None
        return torch.device("cpu") if self._offload == "cpu" else device


@contextmanager
def for_inference(model: nn.Module, plugin: Any, leaves: Sequence[type]) -> Iterator[None]:
    """Inside the context a model of which ranks keep shares is whole wherever it computes; after it, it is empty.

    Every forward pass inside is a collective. There is no optimizer, which DeepSpeed allows at stage 3 alone.
    """
    mark_leaves(model, leaves, plugin)
    config = without_training(plugin.deepspeed_config)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    gather_large_alone(model)
    keep_resident(engine.optimizer)
    try:
        with without_gathered_weights(lambda p: gathered([p])):
            yield
    finally:
        engine.destroy()
        # DeepSpeed keeps the model in a cache for as long as the process lives (0.19.8); its shares need not stay.
        for parameter in model.parameters():
            for tensor in (parameter, parameter.ds_tensor):  # type: ignore[attr-defined]
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


class ZeroEngine:
    """A DeepSpeed engine of stage 1, 2 or 3. Implements `engine.Engine`."""

    skips_overflow = False

    def __init__(self, model: Any, parameters: dict[str, nn.Parameter]) -> None:
        self.model, self.parameters = model, parameters
        self._is_sharded = any(is_partitioned(p) for p in model.module.parameters())
        self._state_is_linked = False
        # Stages 1 and 2 skip a gradient that is not finite, but where adapters are bfloat16 only when told (0.19.8).
        if hasattr(model.optimizer, "check_grad_overflow"):
            model.optimizer.check_grad_overflow = model.optimizer.dtype == torch.bfloat16
        gather_large_alone(model.module)
        self._resident = keep_resident(model.optimizer) if self._is_sharded else []

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        with without_gathered_weights(lambda p: gathered([p])) if self._is_sharded else nullcontext():
            yield
        # Recomputation that stops early leaves modules in DeepSpeed's stack of those that compute, two a block (0.19.8).
        del FWD_MODULE_STACK[1:]

    def backward(self, loss: Tensor) -> None:
        # The loss is already divided by the step's global token count: dividing by the accumulation count as well
        # would make the gradients too small by that factor.
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> Tensor:
        for group in self.model.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
        self.model.step()
        gather_resident(self._resident)
        norm = float(self.model.get_global_grad_norm())
        # DeepSpeed says infinite, or -1, of a norm that is not finite, and has skipped the update then (0.19.8).
        return torch.tensor(norm if norm >= 0 else float("nan"))

    def optimizer_states(self, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        inner = self.model.optimizer.optimizer
        if not any("exp_avg" in state for state in inner.state.values()):
            return
        if not self._state_is_linked:
            _link_state(self.model.optimizer)
            self._state_is_linked = True
        yield from whole_states({name: self.parameters[name] for name in names})

    def load_optimizer_state(self, states: dict[str, dict[str, Tensor]], step: int) -> None:
        self._materialize(step)
        for name, state in states.items():
            for key, value in state.items():
                set_share(self.parameters[name], key, value)

    def loss_scale(self) -> dict[str, float] | None:
        return None

    def load_loss_scale(self, state: dict[str, float]) -> None:
        return  # fp16, which alone has one, is refused under DeepSpeed

    def _materialize(self, step: int) -> None:
        """Create the state that DeepSpeed's inner optimizer would create at its first step."""
        zero = self.model.optimizer
        inner = zero.optimizer
        flats = (
            zero.fp32_partitioned_groups_flat
            if hasattr(zero, "fp32_partitioned_groups_flat")
            else zero.single_partition_of_fp32_groups
        )
        counts_in_tensors = type(inner).__module__.startswith("torch.")
        is_fused = any(group.get("fused") for group in inner.param_groups)
        for flat in flats:
            inner.state[flat] = {
                "step": torch.tensor(float(step), device=flat.device if is_fused else "cpu") if counts_in_tensors else step,
                "exp_avg": torch.zeros_like(flat.data),
                "exp_avg_sq": torch.zeros_like(flat.data),
            }
        _link_state(zero)


def _link_state(zero: Any) -> None:
    """Link parameters to their fragments of the optimizer's state, which stages 1 and 2 do by themselves after a first step.

    DeepSpeed 0.19.8 does so after the step of the first parameter group, when the others have no state yet, and never again.
    """
    link = getattr(zero, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        zero._hp_optimizer_states_linked = False
        link()
