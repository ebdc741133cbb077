"""Choosing the checkpoint to go on from, making sure that it is whole and that it belongs to this job."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor, nn

from qlora.adapter.files import adapter_parameters, open_adapter
from qlora.checkpoint import state
from qlora.checkpoint.reading import is_listed, read_bytes
from qlora.checkpoint.state import Identity, TrainerState
from qlora.config.rules import changed_keys, global_batch_rows, same_batch_keys
from qlora.config.schema import JobConfig, QuantizationConfig
from qlora.distributed.collectives import set_whole, whole_shape
from qlora.distributed.engine import Engine
from qlora.errors import CheckpointError
from qlora.quant import shards
from qlora.quant.source import fingerprints_of


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole."""

    folder: Path
    trainer: TrainerState
    identity: Identity


def find_checkpoint(run_dir: Path, resume: str) -> Found | None:
    """The checkpoint that `checkpoint.resume` means, verified; None for a new run. Rank-local, read-only.

    Args:
        resume: "auto" (the newest committed one that is whole), "none", or a path.

    Raises:
        CheckpointError: a named checkpoint is missing, not committed or damaged; or all of the run's are damaged.
    """
    if resume == "none":
        return None
    if resume != "auto":
        folder = Path(resume)
        if not is_listed(folder / state.COMMITTED):
            raise CheckpointError(
                "not a committed checkpoint", place=str(folder), wanted="a folder such as RUN_DIR/checkpoints/step-00000100"
            )
        return _open(folder)
    candidates = state.committed(run_dir)
    for folder in reversed(candidates):
        try:
            return _open(folder)
        except CheckpointError as error:
            print(f"warning: {error}\n  trying the checkpoint before it", file=sys.stderr, flush=True)
    if candidates:
        raise CheckpointError(
            "every checkpoint of this run is damaged",
            place=str(run_dir / state.FOLDER),
            next_step="set checkpoint.resume to none and choose a new train.output_dir to start again",
        )
    return None


def _open(folder: Path) -> Found:
    """Verify sizes and checksums and read the small files."""
    manifest = state.read_manifest(folder)
    for name, recorded in manifest.files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink():
            raise CheckpointError(f"the manifest names a file outside its folder: {name}", place=str(folder))
        try:
            content = read_bytes(path)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read ({error.strerror})", place=str(folder)) from error
        if len(content) != recorded["size"]:
            raise CheckpointError(
                f"{name} is cut short or too long", place=str(folder), found=f"{len(content)} bytes",
                wanted=f"{recorded['size']} bytes",
            )  # fmt: skip
        if state.sha256_of(content) != recorded["sha256"]:
            raise CheckpointError(f"{name} does not match its checksum", place=str(folder))
    try:
        trainer = TrainerState(**json.loads(read_bytes(folder / state.STATE_NAME)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{state.STATE_NAME} is of another version of qlora ({manifest.identity.versions.get('qlora')})",
            place=str(folder),
            found=str(error),
            next_step="resume with that version; as an adapter the checkpoint can still be loaded",
        ) from error
    return Found(folder, trainer, manifest.identity)


def global_batch_of(found: Found | None, config: JobConfig, world_size: int) -> int:
    """Packs of an optimizer step. Raises CheckpointError where the checkpoint's job is of another version.

    A job that says the same of micro-batches as the checkpoint's keeps its global batch, whatever the number of ranks.
    """
    if found is not None and same_batch_keys(before := _config_of(found), config):
        return _global_batch(found.identity, before)
    return global_batch_rows(config, world_size)


def _global_batch(identity: Identity, config: JobConfig) -> int:
    return identity.global_batch_size or global_batch_rows(config, identity.world_size)


def check_identity(found: Found, job: Identity, *, force: bool) -> list[str]:
    """Compare a checkpoint with the job that wants to go on from it. Returns what `force` overrode, for the log.

    A base and what `qlora prepare` made of it count as one where they are quantized alike.

    Args:
        job: with the global batch that `global_batch_of` says.

    Raises:
        CheckpointError: another base, other data, another global batch, or a changed key that alters the training.
    """
    old, new = found.identity, job
    problems = []
    before, after = fingerprints_of(old.base), fingerprints_of(new.base)
    if before != after and not before & after:
        problems.append(f"base: {old.base.get('name')} then, {new.base.get('name')} now, and their weights differ")
    if old.data != new.data:
        problems.append(f"data: the token rows differ ({old.data[:12]} then, {new.data[:12]} now)")
    elif old.plan != new.plan:
        problems.append(f"packing: the plans differ ({old.plan[:12]} then, {new.plan[:12]} now)")
    old_config, new_config = _config_of(found), JobConfig.model_validate(new.config)
    old_batch, new_batch = _global_batch(old, old_config), _global_batch(new, new_config)
    changes = changed_keys(old_config, new_config, old_global_batch=old_batch, new_global_batch=new_batch)
    if old_batch != new_batch:
        problems.append(
            f"global batch: {old_batch} packs then ({old.world_size} ranks), {new_batch} now ({new.world_size} ranks); with "
            "per_device_train_batch_size and gradient_accumulation_steps as they were, any number of ranks keeps the "
            f"{old_batch}"
        )
    # A prepared base is as it is, whatever the job asks for; what counts is how the weights are held.
    prepared = "origin" in {*old.base, *new.base} and bool(before & after)
    free = ("model.base", "model.revision", "model.quantization") if prepared else ()
    problems += [
        f"{change.key}: {change.old} then, {change.new} now"
        for change in changes
        if not change.safe and not change.key.startswith(free)
    ]
    if prepared and (held := _held(old, old_config)) != (now := _held(new, new_config)):
        problems.append(f"quantized base: {held} then, {now} now")
    if problems and not force:
        raise CheckpointError(
            "the checkpoint belongs to a job that differs from this one",
            place=str(found.folder),
            found="\n         ".join(problems),
            next_step="undo the change, choose a new train.output_dir, or give --force: the run is then no longer exact",
        )
    return problems


def _config_of(found: Found) -> JobConfig:
    """The job of a checkpoint. Raises CheckpointError where it is of another version."""
    try:
        return JobConfig.model_validate(found.identity.config)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise CheckpointError(
            f"the checkpoint's job is of another version of qlora ({found.identity.versions.get('qlora')})",
            place=str(found.folder),
            found=f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}",
            next_step="resume with that version; as an adapter the checkpoint can still be loaded",
        ) from error


def _held(identity: Identity, config: JobConfig) -> str:
    """How the base of a job is held in memory: as it was prepared, or as the job asks for."""
    origin = identity.base.get("origin")
    if origin is None:
        return f"{config.model.quantization}, rounded to {config.model.dtype} before"
    return f"{QuantizationConfig.model_validate(origin['quantization'])}, rounded to {origin['dtype']} before"


def changed_versions(found: Found, job: Identity) -> str | None:
    """What differs in the stack between a checkpoint and this job, in words; None where nothing does."""
    old, new = found.identity.versions, job.versions
    changes = [
        f"{name} {old.get(name)} -> {new.get(name)}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)
    ]
    return ", ".join(changes) or None


def load_parameters(found: Found, model: nn.Module) -> None:
    """Set what trains to the checkpoint's values. Rank-local; before the model is prepared, so that master copies follow.

    Raises:
        CheckpointError: the tensors do not have the names and shapes of what this job trains.
    """
    own = adapter_parameters(model)
    entries = {key.in_file(): entry for key, entry in open_adapter(found.folder).entries.items()}
    _check_names(found, "adapter", {key: whole_shape(p) for key, p in own.items()}, entries)
    for key, parameter in own.items():
        set_whole(parameter, entries[key].read_whole())


def load_optimizer(found: Found, model: nn.Module, engine: Engine) -> None:
    """Set the optimizer's state, the fp32 copies and the loss scale. Collective; after the model was prepared."""
    names = {id(parameter): name for name, parameter in engine.parameters.items()}
    own = {key: names[id(parameter)] for key, parameter in adapter_parameters(model).items()}
    entries = shards.read_header(found.folder / state.OPTIMIZER_NAME)
    states: dict[str, dict[str, Tensor]] = {name: {} for name in own.values()}
    for entry_name, entry in entries.items():
        key, _, part = entry_name.rpartition("/")
        if key not in own:
            raise CheckpointError(f"the optimizer state of {key} has no parameter here", place=str(found.folder))
        states[own[key]][part] = entry.read_whole()
    # A parameter that no gradient has reached yet, in a layer that the data does not use, has no moments anywhere.
    empty = [key for key, name in own.items() if not states[name]]
    num_updates = found.trainer.step - found.trainer.num_skipped
    if len(empty) == len(own) and num_updates > 0:
        raise CheckpointError(
            f"{len(empty)} parameters have no optimizer state", place=str(found.folder), found=", ".join(empty[:5])
        )
    if any(states.values()):
        engine.load_optimizer_state(states, num_updates)
    if found.trainer.loss_scale is not None:
        engine.load_loss_scale(found.trainer.loss_scale)


def _check_names(
    found: Found, what: str, wanted: dict[str, tuple[int, ...]], entries: dict[str, shards.TensorEntry]
) -> None:
    wrong = [f"{key} is missing" for key in wanted if key not in entries]
    wrong += [f"{key} is not trained here" for key in entries if key not in wanted]
    wrong += [
        f"{key} has shape {entries[key].shape}, this job trains {shape}"
        for key, shape in wanted.items()
        if key in entries and entries[key].shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors of the {what} do not fit this job",
            place=str(found.folder),
            found="\n         ".join(wrong[:5]),
            next_step="undo what changed these tensors, or start a new run in another train.output_dir",
        )
