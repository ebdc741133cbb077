"""Started by a launcher: loads bases in shares and trains a few steps, in worlds of 1 to 4 ranks; each writes what it saw.

As in `several_jobs.py`, a rank imports once and forks for each world. A world of N takes the first N ranks of the launch.

    load_in_shares.py PLAN.json
    {"out": folder, "worlds": [{"size": N, "port": ..., "loads": {name: LOAD}, "trainings": {name: TRAINING}}, ...]}

LOAD is {"base": folder, "dtype": name, "quantization": {...} or null} and, where something is taken out of the weights,
"initial": the LoRA config. TRAINING has these and "lora": {...}, "recompute" (none, plain, reentrant), "steps", "zero": what
is laid over DeepSpeed's configuration, and "spoil": what is done to keep gathered weights alive, or null. Rank r of N writes
OUT/N.r.json, and rank 0 the gradients, OUT/N.NAME.safetensors.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qlora.config.schema import JobConfig, LoraConfig, QuantizationConfig
from qlora.data.batch import Batch, collate_packed
from qlora.distributed.collectives import is_partitioned, whole_parameters
from qlora.distributed.sharding import Sharding
from qlora.lora.from_weights import FromWeights
from qlora.lora.inject import inject_lora
from qlora.lora.kinds import WRAPPERS
from qlora.lora.linear import LoraLinear
from qlora.objective.train_model import LossHead, TrainModel
from qlora.ops import nf4
from qlora.quant.load import load_model
from qlora.quant.shards import TensorEntry
from qlora.quant.source import resolve_base

LEARNING_RATE = 1e-2


def load(plan: dict[str, Any], sharding: Sharding | None = None) -> Any:
    """The base of a LOAD, on the CPU."""
    quantization = None if plan["quantization"] is None else QuantizationConfig(**plan["quantization"])
    source = resolve_base(plan["base"])
    initial = FromWeights(LoraConfig(**plan["initial"]), seed=1) if "initial" in plan else None
    return load_model(
        source, dtype=plan["dtype"], quantization=quantization, device="cpu", sharding=sharding, initial=initial
    )


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Each tensor's dtype, shape and bytes as one hash."""
    found = {}
    for name, tensor in tensors.items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


def build(plan: dict[str, Any], sharding: Sharding | None = None) -> TrainModel:
    """The model of a TRAINING, with its LoRA layers."""
    model = load(plan, sharding)
    inject_lora(model, LoraConfig(**plan["lora"]), seed=1)
    if plan["recompute"] != "none":
        reentrant = plan["recompute"] == "reentrant"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    return TrainModel(model).train()


def batch_of(step: int, rank: int) -> Batch:
    """Two packed documents of random tokens."""
    draw = np.random.default_rng([step, rank])
    return collate_packed([(draw.integers(3, 300, length), np.ones(length, dtype=np.uint8)) for length in (17, 6)])


def num_targets(step: int, world_size: int) -> int:
    """Of all ranks."""
    return sum(batch_of(step, rank).num_target_tokens for rank in range(world_size))


# Loading


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """A list of how many bytes each read of a tensor has read."""
    sizes: list[int] = []
    read = TensorEntry.read

    def counted(self: TensorEntry, start: int = 0, stop: int | None = None) -> Tensor:
        out = read(self, start, stop)
        sizes.append(out.numel() * out.element_size())
        return out

    TensorEntry.read = counted  # type: ignore[method-assign]
    yield sizes
    TensorEntry.read = read  # type: ignore[method-assign]


def load_and_gather(plan: dict[str, Any], runtime: Any) -> dict[str, Any]:
    """What this rank read and keeps of a base, and the hashes of its tensors as wholes."""
    with counted_bytes() as sizes:
        model = load(plan, runtime.sharding())
    parameters = dict(model.named_parameters())
    return {
        "bytes_read": sum(sizes),
        "parameters": {name: facts_of(p) for name, p in parameters.items()},
        "digests": digests(whole_parameters(parameters) | dict(model.named_buffers())),
        "elements_left": sum(p.numel() for p in parameters.values()),
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
    }


def facts_of(parameter: Any) -> dict[str, Any]:
    """Elements of the whole, of this rank's share (0 where nothing is cut), and held beside the share."""
    return {
        "whole": getattr(parameter, "ds_numel", parameter.numel()),
        "share": parameter.ds_tensor.numel() if is_partitioned(parameter) else 0,
        "held": parameter.numel(),
        "itemsize": parameter.element_size(),
        "dtype": str(parameter.dtype),
    }


# Training


class Gathered:
    """The storages in which frozen weights lay while their modules computed.

    Args:
        patience: seconds that are waited for gloo's threads, which let go of what they have gathered a moment later.
    """

    def __init__(self, model: nn.Module, patience: float) -> None:
        self.patience = patience
        self.names = {p: name for name, p in model.named_parameters() if grows_with_the_base(p)}
        self.noted: list[tuple[str, int, StorageWeakRef]] = []
        for module in model.modules():
            # Behind DeepSpeed's own hook, which gathers.
            module.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, _inputs: Any) -> None:
        for parameter in module.parameters(recurse=isinstance(module, (*WRAPPERS, LossHead))):
            if parameter in self.names and parameter.numel() > 0:
                storage = parameter.untyped_storage()
                self.noted.append((self.names[parameter], storage.nbytes(), StorageWeakRef(storage)))

    def seen(self) -> list[str]:
        return sorted({name for name, _, _ in self.noted})

    def held(self) -> dict[str, int]:
        """Elements of the parameters that DeepSpeed has not let go of, or gathers ahead, those on their way included."""
        there = {p for p in self.names if p.numel() > 0 or p.ds_status.name != "NOT_AVAILABLE"}  # type: ignore[attr-defined]
        return {name: p.ds_numel for p, name in self.names.items() if p in there}  # type: ignore[attr-defined]

    def leaked(self) -> dict[str, int]:
        """Bytes that are alive though their parameters have let go of them."""
        owned = {p.untyped_storage()._cdata for p in self.names}
        end = time.monotonic() + self.patience
        while True:
            left = {name: size for name, size, ref in self.noted if ref.cdata not in owned and not ref.expired()}
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.01)


def grows_with_the_base(parameter: Any) -> bool:
    return is_partitioned(parameter) and not parameter.requires_grad and not parameter.ds_persist


@contextmanager
def laid_over(settings: dict[str, Any], own: dict[str, Any]) -> Iterator[None]:
    before = dict(settings)
    settings |= own
    yield
    settings.clear()
    settings |= before


def train(plan: dict[str, Any], runtime: Any, gradients_to: Path) -> dict[str, Any]:
    """A few steps. What is alive is asked between forward and backward, and after each step."""
    from deepspeed.utils import safe_get_full_grad

    from qlora.train.build import prepare_engine

    job = JobConfig.model_validate({"train": {"learning_rate": LEARNING_RATE, "max_grad_norm": 1e9}})
    plugin = runtime.accelerator.state.deepspeed_plugin
    plugin.states_prefetch = "stage3_prefetch_bucket_size" in plan["zero"]  # as where the DeepSpeed JSON says it
    with laid_over(plugin.deepspeed_config["zero_optimization"], plan["zero"]):
        train_model = build(plan, runtime.sharding())
        engine: Any = prepare_engine(job, runtime, train_model)
    gathered = Gathered(train_model, patience=0.0 if plan["spoil"] else 3.0)
    coordinator = engine.model.optimizer.parameter_offload.get_param_coordinator()
    steps, gradients = [], {}
    for step in range(plan["steps"]):
        gathered.noted.clear()
        with engine.micro_step(last=True):
            loss, _ = engine.model(batch_of(step, runtime.rank))
            traced = coordinator.is_complete_trace()
            between = {"seen": gathered.seen(), "leaked": gathered.leaked(), "held": gathered.held()}
            engine.backward(loss * (runtime.world_size / num_targets(step, runtime.world_size)))
        for name, parameter in engine.parameters.items():
            gradients[f"{step}.{name}"] = safe_get_full_grad(parameter).clone()
        engine.step(LEARNING_RATE)
        after = {"leaked": gathered.leaked(), "held": gathered.held()}
        steps.append({"traced": traced, "between": between, "after": after})
    if runtime.is_main:
        save_file(gradients, gradients_to)
    frozen = {name: parameter.ds_numel for parameter, name in gathered.names.items()}
    return {"frozen": frozen, "steps": steps}


@contextmanager
def spoiled(what: str | None) -> Iterator[None]:
    """Take out what lets go of gathered weights, to see that the count finds them."""
    zero: Any = import_module("qlora.distributed.zero")
    before = zero.without_gathered_weights, LoraLinear.forward
    if what == "no look-up":
        zero.without_gathered_weights = lambda gathered: nullcontext()
    elif what == "bitsandbytes":
        LoraLinear.forward = forward_of_bitsandbytes  # type: ignore[method-assign]
    yield
    zero.without_gathered_weights, LoraLinear.forward = before  # type: ignore[method-assign]


def forward_of_bitsandbytes(self: LoraLinear, x: Tensor) -> Tensor:
    """The frozen product by bitsandbytes' own autograd function, and the update beside it."""
    import bitsandbytes

    layer: Any = self.base_layer
    shape, spec = torch.Size((layer.out_features, layer.in_features)), layer.spec
    absmax = nf4.unpack_absmax(layer.statistics.data, spec, shape.numel())
    code = bitsandbytes.functional.get_4bit_type(spec.quant_type, device="cpu")
    state = bitsandbytes.functional.QuantState(absmax, shape, code, spec.block_size, spec.quant_type, layer.compute_dtype)
    update = x @ self.lora_A["default"].T @ self.lora_B["default"].T * self.updates["default"].scaling
    return bitsandbytes.matmul_4bit(x, layer.weight.data, state, bias=layer.bias) + update


# Processes


def run(world: dict[str, Any], out: Path, rank: int) -> None:
    """One rank of one world."""
    from qlora.distributed import runtime as processes

    runtime = processes.start(per_device_batch_size=1, gradient_accumulation_steps=1, max_grad_norm=1e9)
    assert (runtime.mode, runtime.rank, runtime.world_size) == ("zero3", rank, world["size"])
    found: dict[str, Any] = {"loads": {}, "trainings": {}}
    for name, plan in world["loads"].items():
        found["loads"][name] = load_and_gather(plan, runtime)
    for name, plan in world["trainings"].items():
        with spoiled(plan["spoil"]):
            found["trainings"][name] = train(plan, runtime, out / f"{world['size']}.{name}.safetensors")
    (out / f"{world['size']}.{rank}.json").write_text(json.dumps(found))
    runtime.barrier()
    runtime.end()


def run_in_child(world: dict[str, Any], out: Path, rank: int) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        size, port = str(world["size"]), str(world["port"])
        # The launcher's own store knows of one world alone.
        os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
        os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        run(world, out, rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    import_module("qlora.train.build")
    import_module("qlora.distributed.zero")
    for world in plan["worlds"]:
        for load in world["loads"].values():
            kind = json.loads((Path(load["base"]) / "config.json").read_text())["model_type"]
            import_module(f"transformers.models.{kind}.modeling_{kind}")
    # DeepSpeed collects garbage for every model.
    gc.freeze()
    rank = int(os.environ["RANK"])
    codes = [run_in_child(world, Path(plan["out"]), rank) for world in plan["worlds"] if rank < world["size"]]
    sys.exit(max(codes, default=0))


if __name__ == "__main__":
    main()
