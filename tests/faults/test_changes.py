"""What a job may change before it goes on from a checkpoint: every key of the schema is in one of the lists below."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora.checkpoint.resume import Found, check_identity, find_checkpoint
from qlora.checkpoint.state import Identity
from qlora.config.problems import Keys, dotted
from qlora.config.schema import JobConfig
from qlora.errors import CheckpointError
from tests.faults.children import EVERY_TWO, Ended, Jobs

# A key that is new belongs into one of these, and into docs/failures.md where it is the first. With another value of it.
MAY_CHANGE: dict[str, Any] = {
    "train.output_dir": "elsewhere",
    "train.max_nonfinite_steps": 9,
    "train.silent_rank_seconds": 9.0,
    "train.stalled_rank_seconds": 9.0,
    "train.gradient_checkpointing": 1,
    "train.offload_activations": True,
    "eval.every_steps": 3,
    "eval.per_device_eval_batch_size": 3,
    "checkpoint.every_steps": 3,
    "checkpoint.keep_last": 3,
    "checkpoint.resume": "none",
    "logging.trackers": ["wandb"],
    "logging.log_every_steps": 3,
}
# Only together, so that their product with the number of ranks stays.
MAY_CHANGE_TOGETHER: dict[str, Any] = {
    "train.per_device_train_batch_size": 3,
    "train.gradient_accumulation_steps": 3,
}
MAY_NOT_CHANGE: dict[str, Any] = {
    "model.base": "another",
    "model.revision": "main",
    "model.dtype": "float32",
    "model.attention": "eager",
    "model.quantization.bits": 8,
    "model.quantization.quant_type": "fp4",
    "model.quantization.double_quant": False,
    "model.quantization.block_size": 128,
    "model.quantization.quant_storage": "float32",
    "model.quantization.skip_modules": ["up_proj"],
    "model.quantization": None,
    "model.allow_pickle": True,
    "lora.r": 3,
    "lora.lora_alpha": 3.0,
    "lora.lora_dropout": 0.5,
    "lora.target_modules": ["q_proj"],
    "lora.exclude_modules": ["q_proj"],
    "lora.dtype": "bfloat16",
    "lora.use_rslora": True,
    "lora.use_dora": True,
    "lora.lora_bias": True,
    "lora.rank_pattern": {"q_proj": 3},
    "lora.alpha_pattern": {"q_proj": 3.0},
    "lora.layers_to_transform": [0],
    "lora.layers_pattern": ["layers"],
    "lora.target_parameters": ["experts.down_proj"],
    "lora.modules_to_save": ["norm"],
    "lora.trainable_token_indices": [3],
    "lora.new_tokens": ["<new>"],
    "lora.init_lora_weights": "pissa",
    "lora.loftq_iterations": 3,
    "lora.eva_batches": 3,
    "lora.train_norms": True,
    "lora.train_embeddings": True,
    "lora.train_head": True,
    "data.train": ["another.jsonl"],
    "data.eval": ["another.jsonl"],
    "data.format": "text",
    "data.train_on": "all",
    "data.max_length": 99,
    "data.over_long": "drop",
    "data.packing": False,
    "data.chat_template": "another.jinja",
    "data.cache_dir": "elsewhere",
    "train.num_train_epochs": 3.0,
    "train.max_steps": 3,
    "train.learning_rate": 3.0,
    "train.lr_scheduler_type": "linear",
    "train.warmup_ratio": 0.5,
    "train.warmup_steps": 3,
    "train.max_grad_norm": 3.0,
    "train.optimizer": "adamw_8bit",
    "train.adam_beta1": 0.5,
    "train.adam_beta2": 0.5,
    "train.adam_epsilon": 0.5,
    "train.weight_decay": 0.5,
    "train.loraplus_lr_ratio": 3.0,
    "train.z_loss": 3.0,
    "train.gradient_checkpointing_kwargs.use_reentrant": True,
    "train.seed": 3,
}
LISTS = (MAY_CHANGE, MAY_CHANGE_TOGETHER, MAY_NOT_CHANGE)


def with_value(key: str, value: Any) -> dict[str, Any]:
    """A job's values, of which one is another."""
    values = JobConfig().model_dump(mode="json")
    *parents, last = key.split(".")
    section = values
    for part in parents:
        section = section[part]
    assert section[last] != value
    section[last] = value
    return JobConfig.model_validate(values).model_dump(mode="json")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A checkpoint as far as a job is compared with it."""
    from qlora.checkpoint.state import TrainerState

    config = JobConfig().model_dump(mode="json")
    base = {"name": "base", "revision": None, "fingerprint": "f"}
    identity = Identity(base, "data", "plan", config, 2, "ddp", {"torch": "2"}, 2)
    return Found(tmp_path_factory.mktemp("checkpoint"), TrainerState(3, 6, 0, 0), identity)


def test_every_key_is_in_one_list() -> None:
    keys = {dotted(path) for path in Keys(JobConfig.model_json_schema()).all if len(path) > 1}
    keys -= {"train.gradient_checkpointing_kwargs"}  # its keys are there
    listed = [key for one in LISTS for key in one]
    assert sorted(listed) == sorted(keys)


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_these_may_change(found: Found, key: str) -> None:
    job = replace(found.identity, config=with_value(key, MAY_CHANGE[key]))
    assert check_identity(found, job, force=False) == []


@pytest.mark.parametrize("key", MAY_NOT_CHANGE)
def test_these_are_refused_by_name_and_force_says_them(found: Found, key: str) -> None:
    job = replace(found.identity, config=with_value(key, MAY_NOT_CHANGE[key]))
    with pytest.raises(CheckpointError, match="belongs to a job that differs") as raised:
        check_identity(found, job, force=False)
    assert f"{key}" in str(raised.value.found)
    assert "then" in str(raised.value.found)
    assert "--force" in str(raised.value.next_step)
    forced = check_identity(found, job, force=True)
    assert forced
    assert all(line.startswith(key) for line in forced)


@pytest.mark.parametrize("key", MAY_CHANGE_TOGETHER)
def test_these_are_refused_where_their_product_changes(found: Found, key: str) -> None:
    config = with_value(key, MAY_CHANGE_TOGETHER[key])
    with pytest.raises(CheckpointError, match=rf"global batch: 2 packs then(?s:.)*{key}"):
        check_identity(found, replace(found.identity, config=config, global_batch_size=6), force=False)
    assert check_identity(found, replace(found.identity, config=config, world_size=1), force=False) == []


# With real runs


@pytest.fixture
def after_4(whole: Ended, tmp_path: Path) -> Path:
    """A copy of the run as it was after step 4."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole.run_dir, run_dir, ignore=shutil.ignore_patterns("adapter", "step-00000006", "step-00000007"))
    return run_dir


def forge(run_dir: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the newest manifest, as if it had been written so."""
    folder = sorted((run_dir / "checkpoints").iterdir())[-1]
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["identity"])
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "COMMITTED").write_text(hashlib.sha256(content).hexdigest())


def test_force_names_each_thing_that_is_given_up_and_keeps_a_record(jobs: Jobs, after_4: Path, tmp_path: Path) -> None:
    """Other data, and two keys at once."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(jobs.project.train.read_text().splitlines(keepends=True)[:-1]))
    changes = (f"data.train=[{rows}]", "train.learning_rate=5e-3", "lora.lora_alpha=7", "logging.log_every_steps=1")
    refused = jobs.train(after_4, *EVERY_TWO, *changes)
    keys = ["train.learning_rate: 0.01 then, 0.005 now", "lora.lora_alpha: 6.0 then, 7.0 now"]
    lines = ["data: the token rows differ (", *keys]
    refused.is_one_error(*lines, "data.train:", "--force")
    assert find_step(after_4) == 4
    forced = jobs.train(after_4, *EVERY_TWO, *changes, "--force")
    assert forced.code == 0, forced.log
    assert forced.log.count("warning: --force: ") == len(lines) + 1  # data.train itself
    for line in lines:
        assert f"warning: --force: {line}" in forced.log
    assert "no longer continues exactly" in forced.log
    record = [json.loads(line) for line in (after_4 / "forced.jsonl").read_text().splitlines()]
    assert [row["step"] for row in record] == [4]
    assert all(any(given_up.startswith(line) for given_up in record[0]["given_up"]) for line in lines)
    # From its next checkpoint on it is the job that it has become.
    again = jobs.train(after_4, *EVERY_TWO, *changes)
    assert again.code == 0, again.log
    assert "--force" not in again.log


def find_step(run_dir: Path) -> int:
    found = find_checkpoint(run_dir, "auto")
    assert found is not None
    return found.trainer.step


def test_other_versions_are_warned_of_and_withdraw_the_claim(jobs: Jobs, whole: Ended, after_4: Path) -> None:
    forge(after_4, lambda identity: identity["versions"].update(torch="1.0", deepspeed="0.1"))
    ended = jobs.train(after_4, *EVERY_TWO)
    assert ended.code == 0, ended.log
    assert "the run may not continue to the last bit" in ended.log
    for version in ("torch 1.0 -> ", "deepspeed 0.1 -> "):
        assert version in ended.log
    assert ended.adapter == whole.adapter  # they are not other versions


def test_a_checkpoint_of_a_schema_that_is_gone_is_refused_in_words(jobs: Jobs, after_4: Path) -> None:
    forge(after_4, lambda identity: identity["config"]["train"].update(gone=1))
    jobs.train(after_4, *EVERY_TWO).is_one_error("another version of qlora", "train.gone")


def test_what_is_safe_changes_nothing_of_the_run(jobs: Jobs, whole: Ended, after_4: Path) -> None:
    more = ("logging.log_every_steps=2", "checkpoint.every_steps=null", f"data.eval=[{jobs.project.eval}]", "--force")
    refused = jobs.train(after_4, *more[:-1])
    refused.is_one_error("data.eval: [] then")
    ended = jobs.train(after_4, *more[:2], "train.max_nonfinite_steps=1")
    assert ended.code == 0, ended.log
    assert ended.adapter == whole.adapter
