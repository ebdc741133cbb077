"""Cross-field checks, paths, and which keys a resume may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.config.problems import Keys, dotted
from qlora.config.rules import changed_keys, check_job, global_batch_rows, same_batch_keys
from qlora.config.schema import JobConfig
from qlora.errors import ConfigError


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows, a base, an adapter, and a run with one complete and one torn checkpoint."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "base/config.json", "adapter/adapter_config.json", "template.jinja"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    for step, committed in ((10, True), (20, False)):
        folder = tmp_path / f"run/checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        if committed:
            (folder / "COMMITTED").touch()
    return tmp_path


def job(**sections: dict) -> JobConfig:
    return JobConfig.model_validate({"data": {"train": ["rows.jsonl"]}, **sections})


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"base": "base"}},
        {"model": {"base": "./base/"}},
        {"model": {"base": "owner/name", "revision": "main"}},
        {"model": {"base": "gpt2"}},
        {
            "data": {"train": ["owner/name", "owner/name:train", "./rows.jsonl"], "eval": ["rows.jsonl"]},
            "eval": {"every_steps": 5},
        },
        {"data": {"train": ["rows.jsonl"], "chat_template": "template.jinja"}},
        {"train": {"offload_activations": True}},
        {"train": {"offload_activations": True, "gradient_checkpointing": 7}},
        {"checkpoint": {"resume": "none"}},
        {"checkpoint": {"resume": "run/checkpoints/step-00000010"}},
        {"train": {"warmup_steps": 5, "max_steps": 5, "output_dir": "new/deep/folder"}},
        {"lora": {"target_modules": r".*\.(q|v)_proj"}},
        {"lora": {"target_modules": [], "train_norms": True}},
        {"lora": {"target_modules": [], "modules_to_save": ["lm_head"]}},
        {"lora": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}},
        {"lora": {"target_modules": [], "new_tokens": [" "]}},
        {"lora": {"layers_to_transform": [0, 3], "layers_pattern": ["layers"]}},
        {"lora": {"rank_pattern": {r"layers\.0\..*": 8}, "alpha_pattern": {"q_proj": 8}, "use_dora": True}},
        # A residual that is kept in full precision is exact.
        {"lora": {"init_lora_weights": "pissa"}, "model": {"quantization": None}},
        {"lora": {"init_lora_weights": "olora", "use_dora": True}, "model": {"quantization": None}},
        {"lora": {"init_lora_weights": "loftq", "loftq_iterations": 5}},
        {"lora": {"init_lora_weights": "eva", "eva_batches": 5}},
        {"model": {"quantization": {"bits": 8, "quant_type": "nf4", "skip_modules": ["q_proj"]}}},
    ],
)
def test_what_can_work_passes(sections: dict) -> None:
    check_job(job(**sections), "train")


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"data": {}}, ["data.train: no data to train on", "data.train=[my_rows.jsonl]"]),
        ({"data": {"train": ["rows.json"]}}, ["data.train[0]: no such file", "did you mean rows.jsonl?"]),
        ({"data": {"train": ["rows.jsonl", "./x"]}}, ["data.train[1]: no such file"]),
        ({"data": {"train": ["nope/x/y"]}}, ["the folder nope does not exist"]),
        ({"data": {"train": ["imdb"]}}, ["data.train[0]: no such file", "user/name"]),
        ({"data": {"train": [" "]}}, ["data.train[0]: empty"]),
        ({"data": {"train": ["~/rows.jsonl"]}}, ["~ is not expanded"]),
        ({"data": {"train": ["a\0.jsonl"]}}, ["data.train[0]: no such file"]),
        ({"data": {"train": ["rows.jsonl"], "eval": ["evil.jsonl"]}}, ["data.eval[0]: no such file"]),
        ({"data": {"train": ["rows.jsonl"], "chat_template": "templat.jinja"}}, ["did you mean template.jinja?"]),
        ({"model": {"base": "./bas"}}, ["model.base: no such folder", "did you mean base?"]),
        ({"model": {"base": "rows.jsonl"}}, ["model.base: a folder is wanted, this is a file"]),
        ({"model": {"base": "run"}}, ["holds no config.json"]),
        ({"model": {"base": "adapter"}}, ["holds an adapter, not a base"]),
        ({"model": {"base": "builtin:huge"}}, ["no such built-in base", "builtin:tiny"]),
        ({"model": {"base": ""}}, ["model.base: empty"]),
        ({"model": {"base": "base", "revision": "main"}}, ["model.revision", "hub ids"]),
        ({"model": {"attention": "flash_attention_2", "dtype": "float32"}}, ["does not compute in float32"]),
        ({"model": {"quantization": {"bits": 8, "quant_type": "fp4"}}}, ["quant_type: in 8 bits", "fp4"]),
        ({"model": {"quantization": {"bits": 8, "double_quant": False}}}, ["double_quant: in 8 bits"]),
        ({"model": {"quantization": {"bits": 8, "block_size": 32}}}, ["block_size: in 8 bits", "32"]),
        ({"model": {"quantization": {"bits": 8, "quant_storage": "float16"}}}, ["quant_storage: in 8 bits", "bits: 4"]),
        ({"train": {"warmup_steps": 6, "max_steps": 5}}, ["train.warmup_steps", "6 warm-up steps of 5"]),
        (
            {"train": {"offload_activations": True, "gradient_checkpointing": 0}},
            ["train.offload_activations", "no layer is recomputed", "found: train.gradient_checkpointing is 0"],
        ),
        ({"train": {"output_dir": "rows.jsonl/run"}}, ["train.output_dir: a folder is wanted, there is a file"]),
        ({"train": {"output_dir": "base"}, "model": {"base": "base"}}, ["the base's own folder"]),
        ({"eval": {"every_steps": 5}}, ["eval.every_steps: there is nothing to evaluate on"]),
        ({"lora": {"target_modules": "(q"}}, ["lora.target_modules: not a regular expression", "position 0"]),
        ({"lora": {"target_modules": []}}, ["nothing would be trained"]),
        ({"lora": {"target_modules": [""]}}, ["a name is empty"]),
        ({"lora": {"target_modules": ["q"], "exclude_modules": ["q"]}}, ["nothing would be trained"]),
        ({"lora": {"modules_to_save": ["lm_head", " "]}}, ["lora.modules_to_save: a name is empty"]),
        ({"lora": {"new_tokens": [""]}}, ["lora.new_tokens: a name is empty"]),
        ({"lora": {"rank_pattern": {"q": 4, "(": 2}}}, ["lora.rank_pattern: not a regular expression", "'('"]),
        ({"lora": {"alpha_pattern": {"*": 2}}}, ["lora.alpha_pattern: not a regular expression", "'*'"]),
        ({"lora": {"layers_to_transform": [0], "layers_pattern": ["["]}}, ["lora.layers_pattern: not a regular"]),
        ({"lora": {"layers_pattern": ["h"]}}, ["lora.layers_pattern: says where the numbers", "layers_to_transform"]),
        ({"lora": {"layers_to_transform": [0], "target_modules": ".*q"}}, ["says of itself which blocks it means"]),
        ({"lora": {"use_dora": True, "lora_bias": True}}, ["lora.lora_bias: DoRA scales directions"]),
        (
            {"lora": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}},
            ["lora.modules_to_save: a module is either adapted or trained fully", "lm_head"],
        ),
        (
            {"lora": {"init_lora_weights": "loftq"}, "model": {"quantization": None}},
            ["lora.init_lora_weights: loftq starts from what quantization loses", "or take pissa"],
        ),
        ({"lora": {"loftq_iterations": 5}}, ["lora.loftq_iterations: belongs to loftq"]),
        ({"lora": {"eva_batches": 5, "init_lora_weights": "pissa"}}, ["lora.eva_batches: belongs to eva"]),
        ({"checkpoint": {"resume": "latest"}}, ["no such checkpoint", "did you mean auto?"]),
        ({"checkpoint": {"resume": "None"}}, ["did you mean none?"]),
        ({"checkpoint": {"resume": "run"}}, ["a run directory", "checkpoint.resume: run/checkpoints/step-00000010"]),
        ({"checkpoint": {"resume": "run/checkpoints/step-00000020"}}, ["it has no file COMMITTED"]),
        ({"logging": {"trackers": ["aim"]}}, ["aim is not installed", "pip install aim"]),
    ],
)
def test_what_cannot_work_is_refused(sections: dict, wanted: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_job(job(**sections), "train", "job.yaml")
    message = str(caught.value)
    assert message.startswith("job.yaml: ")
    for part in wanted:
        assert part in message, message


def test_refusals_come_at_once() -> None:
    with pytest.raises(ConfigError, match="3 errors in"):
        check_job(job(data={}, model={"base": "./x"}, lora={"target_modules": []}), "train", "job.yaml")


def test_a_verb_looks_at_what_it_reads() -> None:
    with pytest.raises(ConfigError, match="no data to evaluate on"):
        check_job(job(), "eval")
    check_job(job(data={"train": ["gone.jsonl"], "eval": ["rows.jsonl"]}), "eval")
    check_job(job(data={}, model={"base": "./gone"}), "plan")


# Another value of each kind of key, so that every key of the schema is tried, those that come later too.
OTHER_VALUES: dict[str, object] = {
    "model.quantization.bits": 8,
    "model.quantization.block_size": 128,
    "model.quantization.quant_type": "fp4",
    "model.quantization.quant_storage": "float32",
    "model.dtype": "float32",
    "model.attention": "eager",
    "lora.dtype": "bfloat16",
    "lora.rank_pattern": {"q_proj": 8},
    "lora.alpha_pattern": {"q_proj": 8.0},
    "lora.trainable_token_indices": [3],
    "lora.init_lora_weights": "gaussian",
    "data.format": "text",
    "data.train_on": "all",
    "data.over_long": "drop",
    "train.lr_scheduler_type": "linear",
    "train.optimizer": "adamw_8bit",
    "train.gradient_checkpointing": True,
    "logging.trackers": ["wandb"],
}
SECTIONS = {"model.quantization", "train.gradient_checkpointing_kwargs"}
ALL_KEYS = [dotted(path) for path in Keys(JobConfig.model_json_schema()).all if len(path) > 1]


def with_value(key: str, value: object) -> JobConfig:
    values = JobConfig().model_dump()
    *parents, last = key.split(".")
    section = values
    for part in parents:
        section = section[part]
    section[last] = value
    return JobConfig.model_validate(values)


def another(key: str) -> object:
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    value: object = JobConfig().model_dump()
    for part in key.split("."):
        value = value[part]  # type: ignore[index]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.25
    if isinstance(value, list):
        return [*value, "another"]
    if isinstance(value, str):
        return value + "-another"
    for guess in (3, "another", [3], ["another"]):  # null: whatever the key takes
        try:
            with_value(key, guess)
        except ValueError:
            continue
        return guess
    raise AssertionError(f"no other value for {key}")


@pytest.mark.parametrize("key", [key for key in ALL_KEYS if key not in SECTIONS])
def test_each_key_is_classed(key: str) -> None:
    """The contract: output_dir, what is borne, logging, eval and checkpoint may change; the rest is refused."""
    (change,) = changed_keys(JobConfig(), with_value(key, another(key)), old_global_batch=2, new_global_batch=3)
    assert change.key == key
    borne = ("max_nonfinite_steps", "silent_rank_seconds", "stalled_rank_seconds")
    borne += ("gradient_checkpointing", "offload_activations")
    alone = ("train.output_dir", *(f"train.{name}" for name in borne))
    assert change.safe == (key in alone or key.split(".")[0] in ("logging", "eval", "checkpoint"))
    assert key in str(change)
    assert "->" in str(change)


def test_quantization_can_vanish() -> None:
    changes = changed_keys(JobConfig(), with_value("model.quantization", None), old_global_batch=1, new_global_batch=1)
    assert changes
    assert not any(change.safe for change in changes)


@pytest.mark.parametrize(
    ("old", "new", "safe"),
    [
        ((2, 4, 1), (4, 2, 1), {"train.gradient_accumulation_steps": True}),
        ((2, 4, 1), (1, 4, 2), {"train.per_device_train_batch_size": True}),
        ((2, 4, 1), (1, 4, 1), {}),
        ((2, 4, 1), (2, 2, 1), {"train.gradient_accumulation_steps": False}),
        (
            (2, 4, 1),
            (2, 2, 2),
            {"train.gradient_accumulation_steps": True, "train.per_device_train_batch_size": True},
        ),
    ],
)
def test_the_global_batch_decides_about_its_factors(old: tuple, new: tuple, safe: dict[str, bool]) -> None:
    before, after = with_batch(*old), with_batch(*new)
    changes = changed_keys(
        before,
        after,
        old_global_batch=global_batch_rows(before, old[0]),
        new_global_batch=global_batch_rows(after, new[0]),
    )
    assert {change.key: change.safe for change in changes} == safe
    assert same_batch_keys(before, after) == (not safe)


def with_batch(world_size: int, accumulation: int, rows: int) -> JobConfig:
    train = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": rows}
    return JobConfig.model_validate({"train": train})
