"""DeepSpeed ZeRO: filling its configuration, whole tensors out of shares, optimizer state by name.

The only file that imports deepspeed. Its bf16 and fp16 modes stay off, because they cast every parameter, adapters
included; dtypes are ours.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.utils import safe_get_full_optimizer_state, set_z3_leaf_modules
from torch import Tensor, nn

from qlora.distributed.collectives import is_partitioned
from qlora.distributed.mapped import move_to_file
from qlora.distributed.offload import device_of, refuse_bad_offload, take_share_folder
from qlora.distributed.saved import without_gathered_weights
from qlora.distributed.sharding import Sharding, Together
from qlora.errors import LaunchError

# What a DeepSpeed JSON leaves open at stage 3. Sizes are in elements; a packed 4-bit element is a byte of two weights.
STAGE3 = {
    # Gathers run ahead of the computation until so much is on its way.
    "stage3_prefetch_bucket_size": 50_000_000,
    # Nothing that was gathered is kept because it will be needed again soon. DeepSpeed's own 1e9 would hold a gigabyte of
    # packed weights from forward to backward.
    "stage3_max_reuse_distance": 0,
    # Norms and biases, and A and B up to a width of 62,500 at r = 16, stay whole on every rank, together up to 400 MB.
    "stage3_param_persistence_threshold": 1_000_000,
    "stage3_model_persistence_threshold": 100_000_000,
    # It would replace torch's linear function for the whole process, to do what `distributed.saved` does.
    "memory_efficient_linear": False,
}


def prepare_environment() -> None:
    """Quieten DeepSpeed's per-rank chatter, and let it compile nothing on CPUs. Rank-local."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 warns of, at every call.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    if not torch.cuda.is_available():
        # At start DeepSpeed 0.19.8 compiles shared-memory collectives for CPUs, which needs a compiler and fails where the
        # environment's path has a space in it. It goes on with gloo where it finds them not compatible.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def fill_config(
    plugin: Any,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    gradient_clipping: float,
    world_size: int,
    optimizer: str = "adamw",
    trains: bool = True,
) -> int:
    """Put the job's numbers where the DeepSpeed JSON says `auto`. Rank-local. Returns the ZeRO stage.

    Args:
        trains: False puts them over what the JSON says: where nothing is trained they mean nothing.

    Raises:
        LaunchError: the JSON states a number that contradicts the job file, turns on a dtype mode, or offloads what cannot
            be offloaded.
    """
    config = plugin.deepspeed_config
    zero = config["zero_optimization"]
    refuse_bad_offload(config, optimizer)
    plugin.share_folder = take_share_folder(zero)
    for mode in ("bf16", "fp16"):
        if config.get(mode, {}).get("enabled"):
            raise LaunchError(
                f"{mode}.enabled would cast the adapters",
                place="DeepSpeed JSON",
                next_step=f"remove {mode}: the job file's model.dtype decides",
            )
    values: dict[str, float] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": gradient_clipping,
        "train_batch_size": micro_batch_size * gradient_accumulation_steps * world_size,
    }
    for key, value in values.items():
        stated = config.get(key, "auto")
        if trains and stated != "auto" and float(stated) != float(value):
            raise LaunchError(
                f"{key} contradicts the job file",
                place="DeepSpeed JSON",
                found=stated,
                wanted=f"auto, or {value}",
                next_step="say `auto` in the JSON; the job file decides",
            )
        config[key] = value
    # Accelerate tells transformers of ZeRO-3 through this object, and transformers then builds every model by its own
    # zero.Init, weights included (transformers 5.23). Loading is ours.
    plugin.dschf = None
    if zero["stage"] == 3:
        zero |= {key: value for key, value in STAGE3.items() if zero.get(key, "auto") == "auto"}
    return int(zero["stage"])


def mark_leaves(model: nn.Module, classes: Sequence[type], plugin: Any) -> None:
    """Let ZeRO-3 gather each module of these classes by one hook, with all that is inside it. Rank-local.

    It also bounds what is gathered at once. DeepSpeed adds a bucket of prefetched parameters at every module that it
    enters, until as much is live as the configuration allows, which by default is 1e9 elements (0.19.8). Where it says
    nothing, the largest module and one bucket may be live: what is computed with, and what is on its way.

    DeepSpeed reduces a leaf's gradients in the module's backward hook, which torch fires when the gradient of the
    module's input is there. Where no input needs one, as in the first layer over a frozen embedding, it fires before
    the parameters' gradients exist, and the step fails on a gradient of size 0 (DeepSpeed 0.19.8). So the input of a
    leaf always asks for a gradient.
    """
    for leaf in set_z3_leaf_modules(model, list(classes), raise_if_not_found=False):
        leaf.register_forward_pre_hook(_ask_for_input_gradient)
    stated = plugin.deepspeed_config["zero_optimization"]
    if stated["stage"] == 3 and stated.get("stage3_max_live_parameters", "auto") == "auto":
        stated["stage3_max_live_parameters"] = _largest_gather(model, tuple(classes)) + stated["stage3_prefetch_bucket_size"]


def _largest_gather(model: nn.Module, leaves: tuple[type, ...]) -> int:
    """Elements of the module with most parameters, of those that are gathered as one."""
    return max(
        sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters(recurse=isinstance(module, leaves)))
        for module in model.modules()
    )


def _ask_for_input_gradient(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    tensors = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    if not torch.is_grad_enabled() or any(x.requires_grad for x in tensors):
        return None
    return tuple(x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Parameters are whole inside the context, for reading. Collective where any of them is partitioned."""
    partitioned = [p for p in parameters if is_partitioned(p)]
    return deepspeed.zero.GatheredParameters(partitioned) if partitioned else nullcontext()


class ZeroSharding(Sharding):
    """ZeRO-3's cut: each rank keeps a run of every parameter, on the device that the configuration says."""

    def __init__(self, rank: int, world_size: int, together: Together, plugin: Any) -> None:
        super().__init__(rank, world_size, together)
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
    config = _without_training(plugin.deepspeed_config)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    _keep_resident(engine.optimizer)
    try:
        with without_gathered_weights(lambda p: gathered([p])):
            yield
    finally:
        engine.destroy()
        # DeepSpeed keeps the model in a cache for as long as the process lives (0.19.8); its shares need not stay.
        for parameter in model.parameters():
            for tensor in (parameter, parameter.ds_tensor):  # type: ignore[attr-defined]
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _without_training(stated: dict[str, Any]) -> dict[str, Any]:
    """What a DeepSpeed configuration says of anything but training."""
    needed = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config: dict[str, Any] = {key: stated[key] for key in needed if key in stated}
    sharding = stated["zero_optimization"]
    config["zero_optimization"] = {key: value for key, value in sharding.items() if key != "offload_optimizer"}
    return config


class ZeroEngine:
    """A DeepSpeed engine of stage 1, 2 or 3. Implements `runtime.Engine`."""

    skips_overflow = False

    def __init__(self, model: Any, parameters: dict[str, nn.Parameter]) -> None:
        self.model, self.parameters = model, parameters
        self._is_sharded = any(is_partitioned(p) for p in model.module.parameters())
        if self._is_sharded:
            _keep_resident(model.optimizer)

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
            group["lr"] = learning_rate
        self.model.step()
        norm = float(self.model.get_global_grad_norm())
        # DeepSpeed says -1 of a norm that is infinite or not a number (0.19.8).
        return torch.tensor(norm if norm >= 0 else float("nan"))

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        inner = self.model.optimizer.optimizer
        if not any("exp_avg" in state for state in inner.state.values()):
            return {}
        shape = getattr(self.parameters[name], "ds_shape", self.parameters[name].shape)
        state = {}
        for key in ("exp_avg", "exp_avg_sq"):
            value = safe_get_full_optimizer_state(self.parameters[name], key)
            state[key] = value.detach().reshape(shape).clone()
        return state

    def load_optimizer_state(self, states: dict[str, dict[str, Tensor]], step: int) -> None:
        self._materialize(step)
        for name, state in states.items():
            for key, value in state.items():
                _set_share(self.parameters[name], key, value)

    def _materialize(self, step: int) -> None:
        """Create the state that DeepSpeed's inner optimizer would create at its first step."""
        zero = self.model.optimizer
        inner = zero.optimizer
        flats = (
            zero.fp32_partitioned_groups_flat
            if hasattr(zero, "fp32_partitioned_groups_flat")
            else zero.single_partition_of_fp32_groups
        )
        counter: Any = torch.tensor(float(step)) if type(inner).__module__.startswith("torch.") else step
        for flat in flats:
            inner.state[flat] = {
                "step": counter.clone() if isinstance(counter, Tensor) else counter,
                "exp_avg": torch.zeros_like(flat.data),
                "exp_avg_sq": torch.zeros_like(flat.data),
            }
        # Stages 1 and 2 link parameters to their fragments of the state only after a first step (DeepSpeed 0.19.8).
        link = getattr(zero, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()


def _keep_resident(optimizer: Any) -> None:
    """Keep what is small and hardly grows with the base whole on every rank, where DeepSpeed goes by size alone.

    Norms and biases stay, whose gathers would cost more than they weigh, and then what trains, as far as the budget goes.
    The scales of 4-bit weights do not: they are a 64th of the base.
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
    offload.persistent_parameters = optimizer.persistent_parameters = chosen


def _set_share(parameter: nn.Parameter, key: str, whole: Tensor) -> None:
    """Write this rank's share of a whole optimizer state tensor."""
    if not is_partitioned(parameter):
        parameter.set_full_hp_param(whole, key)  # type: ignore[attr-defined]
        return
    # DeepSpeed's own setter for whole tensors cuts past the end on the last rank where the number of elements is no
    # multiple of the number of ranks (0.19.8), so the padded share is cut here and set locally.
    share = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    padded = torch.zeros(share * world_size, dtype=torch.float32)
    padded[: whole.numel()] = whole.reshape(-1)
    own = padded[share * rank : share * (rank + 1)]
    parameter._z3_optimizer.set_local_hp_param(own.to(whole.device), parameter, key)  # type: ignore[attr-defined]
