"""What a DeepSpeed JSON leaves open or must not say: the job's numbers filled in, our own defaults, what is refused.

DeepSpeed's bf16 and fp16 modes stay off, because they cast every parameter, adapters included; dtypes are ours. Torch-free,
DeepSpeed-free.
"""

from __future__ import annotations

from typing import Any

from qlora.distributed.offload import refuse_bad_offload, take_share_folder
from qlora.errors import LaunchError

PREFETCH_BUCKET = 50_000_000
# Layers of a model are gathered as one up to so many bytes: one of 70B has 0.46 GB. Larger ones take long enough to compute
# for a hook at each of their modules.
LAYER_BYTES = 1 << 29
# Larger tensors, such as most heads and embeddings, are not gathered together with others, which would copy them.
ALONE_BYTES = 1 << 29

# What a DeepSpeed JSON leaves open at stage 3. Sizes are in elements; a packed 4-bit element is a byte of two weights.
STAGE3 = {
    # Gathers run ahead of the computation until so much is on its way, or all of a layer that is gathered as one.
    "stage3_prefetch_bucket_size": PREFETCH_BUCKET,
    # Nothing that was gathered is kept because it will be needed again soon. DeepSpeed's own 1e9 would hold a gigabyte of
    # packed weights from forward to backward.
    "stage3_max_reuse_distance": 0,
    # Norms and biases, and A and B up to a width of 62,500 at r = 16, stay whole on every rank, together up to 400 MB.
    "stage3_param_persistence_threshold": 1_000_000,
    "stage3_model_persistence_threshold": 100_000_000,
    # It would replace torch's linear function for the whole process, to do what `distributed.saved` does.
    "memory_efficient_linear": False,
    # DeepSpeed 0.19.8 takes blocks of experts for leaves, as `zero.mark_leaves` does ours, but does not see to it that their
    # inputs ask for a gradient. Nothing in them is entered by some ranks alone.
    "leaf_module": {"classes": []},
}


# What DeepSpeed would do to the base at stage 3 beyond cutting it, and why it cannot (0.19.8).
REFUSED_OF_A_SHARED_BASE = {
    "zero_hpz_partition_size": "a copy inside each node would be cut from weights of which a rank reads its share alone",
    "zero_quantized_weights": "it would quantize packed 4-bit weights once more",
    "zero_quantized_nontrainable_weights": "it would quantize packed 4-bit weights once more",
}


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
        LaunchError: the JSON states a number that contradicts the job file, turns on a dtype mode, copies or quantizes a
            base in shares, or offloads what cannot be offloaded.
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
    for key, why in REFUSED_OF_A_SHARED_BASE.items():
        if zero["stage"] == 3 and int(zero.get(key, 0)) > (key == "zero_hpz_partition_size"):
            raise LaunchError(
                why, place="DeepSpeed JSON", found=f"{key}: {zero[key]}", next_step=f"remove {key}"
            )  # fmt: skip
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
    plugin.states_prefetch = zero.get("stage3_prefetch_bucket_size", "auto") != "auto"
    if zero["stage"] == 3:
        zero |= {key: value for key, value in STAGE3.items() if zero.get(key, "auto") == "auto"}
    return int(zero["stage"])


def without_training(stated: dict[str, Any]) -> dict[str, Any]:
    """What a DeepSpeed configuration says of anything but training."""
    needed = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config: dict[str, Any] = {key: stated[key] for key in needed if key in stated}
    sharding = stated["zero_optimization"]
    config["zero_optimization"] = {key: value for key, value in sharding.items() if key != "offload_optimizer"}
    return config
