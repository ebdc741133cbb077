"""Job files and overrides: what is read, and how every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.config.load import dump_config, load_config
from qlora.config.problems import OTHER_NAMES, Keys
from qlora.config.schema import JobConfig
from qlora.errors import ConfigError

KEYS = Keys(JobConfig.model_json_schema())


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write job.yaml into an empty working directory and load it."""
    monkeypatch.chdir(tmp_path)

    def load(text: str | bytes, *overrides: str) -> JobConfig:
        Path("job.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config("job.yaml", list(overrides))

    return load


def error_of(job, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        job(text, *overrides)
    return str(caught.value)


def test_an_empty_file_is_all_defaults(job) -> None:
    assert job("") == JobConfig()
    assert job("# nothing\ntrain:\n  # seed: 3\n") == JobConfig()


def test_number_strings_are_numbers(job) -> None:
    config = job("train: {learning_rate: 1e-4, max_steps: 1e3, weight_decay: .5}\n", "train.adam_epsilon=1E-7")
    assert (config.train.learning_rate, config.train.max_steps, config.train.weight_decay) == (1e-4, 1000, 0.5)
    assert config.train.adam_epsilon == 1e-7


def test_words_of_yaml_1_1_stay_text(job) -> None:
    config = job("data: {train: [no, 2024-01-31, 1:30]}\ntrain: {output_dir: on}\n")
    assert config.data.train == ["no", "2024-01-31", "1:30"]
    assert config.train.output_dir == "on"


def test_anchors_and_byte_order_mark(job) -> None:
    config = job(b"\xef\xbb\xbfdata: {train: &rows [a.jsonl], eval: *rows}\n")
    assert config.data.eval == ["a.jsonl"]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=1e-4", "learning_rate", 1e-4),
        ("train.max_steps=7", "max_steps", 7),
        ("train.output_dir=runs/a=b", "output_dir", "runs/a=b"),
        ("train.gradient_checkpointing=false", "gradient_checkpointing", False),
        ("train.gradient_checkpointing=1", "gradient_checkpointing", 1),
        ("train.gradient_checkpointing=auto", "gradient_checkpointing", "auto"),
        ("train={seed: 5}", "seed", 5),
    ],
)
def test_overrides_win_where_the_section_is_absent_too(job, override: str, key: str, value: object) -> None:
    assert getattr(job("", override).train, key) == value
    assert getattr(job("train: {seed: 3, max_steps: 1}\n", override).train, key) == value


def test_a_pattern_may_hold_dots_in_a_file(job) -> None:
    text = "lora: {rank_pattern: {layers.0.q_proj: 8}, alpha_pattern: {'layers\\.0': 1e1}}\n"
    lora = job(text, "lora.rank_pattern.v_proj=4").lora
    assert lora.rank_pattern == {"layers.0.q_proj": 8, "v_proj": 4}
    assert lora.alpha_pattern == {r"layers\.0": 10.0}


def test_overrides_reach_lists_null_and_into_null(job) -> None:
    assert job("", "data.train=[a.jsonl, b.jsonl]").data.train == ["a.jsonl", "b.jsonl"]
    assert job("", "model.quantization=null").model.quantization is None
    quantization = job("model: {quantization: null}\n", "model.quantization.double_quant=false").model.quantization
    assert quantization is not None
    assert not quantization.double_quant
    assert job("", "train.seed=1", "train.seed=2").train.seed == 2


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("train:\n  lr: 1\n", ["job.yaml:2:3: train.lr: unknown key", "did you mean train.learning_rate?"]),
        ("train:\n  learning_rte: 1\n", ["job.yaml:2:3: train.learning_rte", "did you mean train.learning_rate?"]),
        ("learning_rate: 1\n", ["job.yaml:1:1: learning_rate: unknown key", "did you mean train.learning_rate?"]),
        ("model:\n  r: 8\n", ["model.r: unknown key", "did you mean lora.r?"]),
        ("trian: {seed: 1}\n", ["trian: unknown section", "did you mean train?"]),
        ("zero_stage: 3\n", ["zero_stage", "launch configuration"]),
        ("lora:\n  zzz: 1\n", ["lora knows r, lora_alpha"]),
        ("lora:\n  r: abc\n", ["job.yaml:2:6: lora.r", "found: 'abc'", "wanted: a whole number, at least 1"]),
        ("lora: {r: 0}\n", ["found: 0", "at least 1"]),
        ("lora: {r: true}\n", ["job.yaml:1:11: lora.r", "found: true", "a whole number"]),
        ("lora: {r: [1]}\n", ["found: a list, [1"]),
        ("lora: {layers_to_transform: []}\n", ["lora.layers_to_transform", "found: a list, []"]),
        ("lora: {lora_alpha: 0}\n", ["lora.lora_alpha", "found: 0", "a number, above 0"]),
        ("lora: {rank_pattern: {q_proj: 0}}\n", ["job.yaml:1:31: lora.rank_pattern.q_proj", "found: 0", "at least 1"]),
        ("lora: {rank_pattern: {q_proj: true}}\n", ["lora.rank_pattern.q_proj", "found: true", "a whole number"]),
        ("lora: {alpha_pattern: {q_proj: x}}\n", ["lora.alpha_pattern.q_proj", "found: 'x'", "a number, above 0"]),
        ("lora: {lora_dropout: 1}\n", ["a number, at least 0, below 1"]),
        ("data: {train: a.jsonl}\n", ["data.train", "found: 'a.jsonl'", "wanted: a list of text", "write [a.jsonl]"]),
        ("data:\n  train:\n  - a\n  - 5\n", ["job.yaml:4:5: data.train[1]", "found: 5", "quotes: '5'"]),
        ("model: {dtype: fp16}\n", ["one of bfloat16, float16, float32"]),
        ("model: {quantization: {bits: 3}}\n", ["job.yaml:1:30: model.quantization.bits", "wanted: one of 4, 8"]),
        ("model: {quantization: 4}\n", ["a section of `key: value` lines or null"]),
        ("train: {gradient_checkpointing: x}\n", ["auto or true or false or a whole number, at least 0"]),
        ("train: {gradient_checkpointing: -1}\n", ["train.gradient_checkpointing", "found: -1", "at least 0"]),
        ("train: {max_steps: x}\n", ["a whole number, at least 1 or null"]),
        ("checkpoint: {resume: null}\n", ["found: null", "none (the word)"]),
        ("train: 5\n", ["job.yaml:1:8: train", "found: 5"]),
        ("train:\n  seed: 1\n  seed: 2\n", ["job.yaml:3:3: train.seed: given twice, first at job.yaml:2:3"]),
        ("train: {seed: 1}\ntrain: {seed: 1}\n", ["job.yaml:2:1: train: given twice"]),
        ("- a\n", ["job.yaml: not a job", "found: a list"]),
        ("train:\n\tseed: 1\n", ["job.yaml:2:1: not valid YAML", "spaces"]),
        ("train:\n  output_dir: a: b\n", ["job.yaml:2:16: not valid YAML", "quotes"]),
        ("lora:\n  target_modules: *q_proj\n", ["job.yaml:2:19", "undefined alias", "quotes"]),
        ("data: [a\n", ["job.yaml:2:1: not valid YAML"]),
        ("a: 1\n---\nb: 1\n", ["job.yaml:2:1", "one document"]),
        ("? [a]\n: 1\n", ["job.yaml:1:3: a key must be a word"]),
        ("lora: {r: !!int x}\n", ["job.yaml:1:11: lora.r: cannot be read as int"]),
        ("lora: {r: 1\x07}\n", ["job.yaml:1:12: a control character", "0x0007"]),
        (b"lora: {r: 1}\n# \xff\n", ["job.yaml:2: not UTF-8", "byte 0xff at offset 15"]),
        ("data: &a {train: [*a]}\n", ["job.yaml:1:7: expands to more"]),
        ("[" * 5000, ["job.yaml: nested too deeply"]),
    ],
)
def test_a_mistake_is_named(job, text: str | bytes, wanted: list[str]) -> None:
    message = error_of(job, text)
    for part in wanted:
        assert part in message, message
    assert len(message.splitlines()) <= 4


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("lora.rr=3", ["command line: lora.rr: unknown key", "did you mean lora.r?"]),
        ("trian.seed=3", ["command line: trian: unknown section", "did you mean train?"]),
        ("lora.r=x", ["command line: lora.r", "found: 'x'"]),
        ("lora.r", ["command line: not an override", "wanted: key=value"]),
        ("lora..r=3", ["not an override"]),
        ("=3", ["not an override"]),
        ("train.seed.x=1", ["command line: train.seed.x: train.seed is a value, not a section"]),
        ("train.max_steps.x=1", ["command line: train.max_steps: cannot be used", "found: a section with x"]),
        ("data.train=[a,", ["command line: data.train: not valid YAML", "found: '[a,'"]),
        ("data.train=a.jsonl", ["write data.train=[a.jsonl]"]),
        ("model.revision=1234567", ["model.revision", "write model.revision=\"'1234567'\""]),
        ("lora={r: 1, r: 2}", ["command line: r: given twice"]),
        ("lora.r=!!python/name:os.system x", ["command line: lora.r: YAML tags are not allowed"]),
    ],
)
def test_a_mistake_on_the_command_line_is_named(job, override: str, wanted: list[str]) -> None:
    message = error_of(job, "train: {seed: 1}\n", override)
    for part in wanted:
        assert part in message, message


def test_all_mistakes_come_at_once_in_a_line_each(job) -> None:
    message = error_of(job, "lora: {r: x, zzz: 1}\ntrain: {seed: -1, seed: 2}\n", "model.dtype=x", "oops")
    lines = message.splitlines()
    assert lines[0] == "6 errors in job.yaml"
    assert len(lines) == 7
    many = error_of(job, "".join(f"unknown_{i}: 1\n" for i in range(50)))
    assert many.splitlines()[-1] == "  and 30 more"


def test_tags_never_run(job, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    message = error_of(job, f"train: {{output_dir: !!python/object/apply:os.system ['touch {canary}']}}\n")
    assert "YAML tags are not allowed" in message
    assert "!!python/object/apply:os.system" in message
    assert not canary.exists()


def test_a_bomb_is_stopped(job) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "expands to more than a job file can hold" in error_of(job, "\n".join(lines))
    assert "too large for a job file" in error_of(job, "#" * (1 << 21))


def test_a_missing_file_names_its_neighbours(job, tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("")
    cases = {
        "quikstart.yaml": "did you mean quickstart.yaml?",
        "zzz": ". holds quickstart.yaml",
        "config/a.yaml": "the folder config does not exist",
        "train.max_steps=3": "the job file comes first",
        ".": "this is a folder",
    }
    for path, wanted in cases.items():
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert wanted in str(caught.value)


def test_every_foreign_name_leads_to_a_key() -> None:
    assert {name: target for name, target in OTHER_NAMES.items() if KEYS.node(tuple(target.split("."))) is None} == {}


def test_dump_names_every_value_and_the_versions() -> None:
    text = dump_config(JobConfig(), {"torch": "2.13", "odd\nname: [": "1"})
    assert "# torch: 2.13\n" in text
    assert yaml.safe_load(text) == JobConfig().model_dump(mode="json")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
tricky = st.sampled_from(
    [
        "",
        "null",
        "~",
        "1e3",
        "0o17",
        "010",
        "1_0",
        "yes",
        "no",
        ".inf",
        "- a",
        "a: b",
        "#x",
        "!!str",
        "*a",
        "\x85",
        "\u2028x",
        "\t",
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(texts, tricky),
    names=st.lists(st.one_of(texts, tricky), max_size=3),
    number=st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False),
    whole=st.integers(min_value=1),
)
def test_dump_and_load_give_the_same_job(tmp_path_factory, text: str, names: list[str], number: float, whole: int) -> None:
    config = JobConfig.model_validate(
        {
            "model": {"base": text, "revision": text, "quantization": None if whole % 2 else {}},
            "data": {"train": names},
            "lora": {"target_modules": names if whole % 3 else text},
            "train": {"learning_rate": number, "max_steps": whole, "output_dir": text},
        }
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump_config(config, {"torch": text}), encoding="utf-8", newline="")
    assert load_config(path) == config
