"""A small base, data, and the runs that several tests look at: each is started once.

A world is one launch with a launch file of the project; its jobs run one after another in the same ranks
(`several_jobs.py`). Everything is fp32 and small, but nothing is even: layers have odd widths and an odd r, so that
shards need padding, and an epoch's last batch is short, so that ranks and micro-steps run out of packs.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.places import free_port

ROOT = Path(__file__).parents[2]
TIMEOUT = 240.0

# 4 packs a step in every split; steps 3 and 6 write checkpoints, and the epoch ends within the run.
ACC1 = ["train.per_device_train_batch_size={rows}", "train.gradient_accumulation_steps=1"]
ACC2 = ["train.per_device_train_batch_size={half}", "train.gradient_accumulation_steps=2"]
SAVES = ["checkpoint.every_steps=3", "checkpoint.keep_last=10"]
DROPOUT = ["lora.lora_dropout=0.1", "train.loraplus_lr_ratio=4"]
RECOMPUTE = ["train.gradient_checkpointing=true"]
REENTRANT = [*RECOMPUTE, "train.gradient_checkpointing_kwargs.use_reentrant=true"]
EVALUATES = ["data.eval=[{eval}]", "eval.every_steps=2"]
WHOLLY = ["lora.train_norms=true", "lora.train_embeddings=true", "lora.train_head=true"]
SIX = ["train.gradient_accumulation_steps=1", "train.max_steps=5", *SAVES]


@dataclass(frozen=True)
class Job:
    """One command line. `after` names the run (WORLD.JOB) that it goes on from, as that was after a step."""

    overrides: Sequence[str]
    after: str | None = None
    options: Sequence[str] = ()
    after_step: int = 3


@dataclass(frozen=True)
class World:
    """One launch."""

    config: str
    num_processes: int
    jobs: dict[str, Job]


def _usual(*, after: str) -> dict[str, Job]:
    """What every world does."""
    return {
        "acc1": Job([*ACC1, "data.eval=[{eval}]", "eval.every_steps=2", "checkpoint.every_steps=null"]),
        "acc2": Job([*ACC2, *SAVES]),
        "dropout": Job([*ACC2, *SAVES, *DROPOUT]),
        "resumed": Job([*ACC2, *SAVES, *DROPOUT], after=after),
        "recompute": Job([*ACC2, *DROPOUT, *RECOMPUTE]),
        "reentrant": Job([*ACC2, *DROPOUT, *REENTRANT]),
        "one_layer": Job([*ACC2, *DROPOUT, "train.gradient_checkpointing=1"]),
    }


def _wholly(world: str) -> dict[str, Job]:
    """Norms and the tied embedding and head trained as wholes, beside LoRA."""
    job = [*ACC1, *SAVES, *WHOLLY]
    return {"wholly": Job(job), "wholly_resumed": Job(job, after=f"{world}.wholly")}


def _offload(*, after: str) -> dict[str, Job]:
    """What a base does that is not on the GPU."""
    job = [*ACC2, *SAVES, *DROPOUT, *RECOMPUTE, *EVALUATES]
    tiny = [*ACC1, "model.base=builtin:tiny", "train.max_steps=2"]  # each of its packed weights fills pages
    return {"recompute": Job(job), "resumed": Job(job, after=after), "tiny": Job(tiny)}


# Two steps of every variant, on one process and in shares; a test compares what is saved.
VARIANTS: dict[str, list[str]] = {
    "rslora": ["lora.use_rslora=true", "lora.init_lora_weights=gaussian"],
    "dora": ["lora.use_dora=true", "lora.target_modules=[q_proj, down_proj]"],
    "dora on the tied head": ["lora.use_dora=true", "lora.target_modules=[lm_head, v_proj]"],
    "lora_bias": ["lora.lora_bias=true"],
    "patterns": ["lora.rank_pattern={{q_proj: 5, layers.1.mlp.up_proj: 2}}", "lora.alpha_pattern={{down_proj: 3}}"],
    "some blocks": ["lora.layers_to_transform=[1]", "lora.target_modules=[q_proj, up_proj]"],
    "modules_to_save": ["lora.modules_to_save=[model.norm]"],
    "loraplus": ["train.loraplus_lr_ratio=8"],
    "embedding": ["lora.target_modules=[embed_tokens, q_proj]"],
    "dora on the embedding": ["lora.target_modules=[embed_tokens, q_proj]", "lora.use_dora=true"],
    "token rows": ["lora.trainable_token_indices=[5, 17, 289]"],
    "new tokens": ["lora.new_tokens=[<ping>, <pong>]"],
    "unquantized": ["model.quantization=null", "lora.use_dora=true"],
    "8 bits": ["model.quantization.bits=8"],
    "pissa": ["lora.init_lora_weights=pissa"],
    "fast pissa": ["lora.init_lora_weights=pissa_niter_4"],
    "olora": ["lora.init_lora_weights=olora"],
    "loftq": ["lora.init_lora_weights=loftq", "lora.loftq_iterations=2"],
    "eva": ["lora.init_lora_weights=eva", "lora.eva_batches=2"],
    "experts": [
        "model.base={mixtral}",
        "lora.target_modules=[q_proj]",
        "lora.target_parameters=[experts.gate_up_proj, experts.down_proj]",
    ],
    "experts, recomputed": [
        "model.base={mixtral}",
        "lora.target_modules=[]",
        "lora.target_parameters=[experts.down_proj]",
        *RECOMPUTE,
    ],
    "Conv1D": ["model.base={gpt2}", "model.quantization=null", "lora.use_dora=true"],
}


def _variants() -> dict[str, Job]:
    most = [*ACC1, "train.max_steps=2", "checkpoint.every_steps=null"]
    return {name: Job([*most, *overrides]) for name, overrides in VARIANTS.items()}


# What a run is saved in and gone on with in (test_elastic.py): the world of other tests, a launch file, and its ranks.
PLACES = {
    "single": ("single", 1),
    "zero1": ("zero1", 2),
    "sharded": ("sharded", 3),
    "ddp": ("ddp", 2),
    "four": ("sharded", 4),
    "zero2": ("zero2", 2),
    "zero3": ("zero3", 2),
    "zero3_offload": ("zero3_offload", 2),
    "zero2_offload": ("zero2_offload", 2),
}
# The job file says 2 x 2 at every place: 4 packs on one rank, and 8, 12 and 16 on two, three and four. An epoch has 17.
ELASTIC = ["train.per_device_train_batch_size=2", "train.loraplus_lr_ratio=4", "checkpoint.keep_last=10"]
SIX_STEPS = [*ELASTIC, "train.gradient_accumulation_steps=2", "train.max_steps=6", "checkpoint.every_steps=3"]
BF16 = [*SIX_STEPS, "lora.dtype=bfloat16"]
# 8 packs a step, as one rank has them by this: three ranks cannot share them evenly, and every third step has one.
TEN_STEPS = [*ELASTIC, "lora.lora_dropout=0.1", "train.gradient_accumulation_steps=4", "train.max_steps=10"]


def _leg(world: str) -> dict[str, Job]:
    """A part of one run through all places in turn, of each one step; every leg trains to the end for itself."""
    places = [*PLACES, "again"]
    step = places.index(world)
    before = f"{places[step - 1]}.leg" if step else None
    return {"leg": Job([*TEN_STEPS, f"checkpoint.every_steps={step + 1}"], after=before, after_step=step)}


def _again(name: str, job: list[str], *, world: str) -> dict[str, Job]:
    """A run, and one that goes on from it in the same world."""
    return {name: Job(job), f"{name}_resumed": Job(job, after=f"{world}.{name}")}


def _matrix() -> dict[str, World]:
    """Saved at every place, and gone on with at every place."""
    worlds = {}
    for name, place in PLACES.items():
        jobs = {source: Job(SIX_STEPS, after=f"{source}_saves.whole") for source in PLACES}
        worlds |= {f"{name}_saves": World(*place, {"whole": Job(SIX_STEPS)}), f"{name}_resumes": World(*place, jobs)}
    for world_size in (2, 3, 4):  # what they train, on one process
        steps = f"train.gradient_accumulation_steps={2 * world_size}"
        worlds["single_saves"].jobs[f"as_{world_size}"] = Job([*SIX_STEPS, steps])
    return worlds


LOFTQ = [*ACC1, *SAVES, "lora.init_lora_weights=loftq", "lora.loftq_iterations=2"]
EVA = [*ACC1, *SAVES, "lora.init_lora_weights=eva", "lora.eva_batches=3"]

WORLDS = {
    **_matrix(),
    "initial": World(
        "sharded",
        2,
        {
            "loftq": Job(LOFTQ),
            "loftq_resumed": Job(LOFTQ, after="initial.loftq"),
            "eva": Job(EVA),
            "eva_resumed": Job(EVA, after="initial.eva"),
        },
    ),
    "variants_single": World("single", 1, _variants()),
    "variants_sharded": World("sharded", 2, _variants()),
    "single": World(
        "single",
        1,
        _usual(after="single.dropout")
        | _wholly("single")
        | _leg("single")
        | {"ten": Job(TEN_STEPS), "dry": Job(ACC1, options=["--dry-run"])},
    ),
    "zero1": World(
        "zero1", 2, _usual(after="zero1.dropout") | _leg("zero1") | {"long": Job([*ACC1, "train.max_steps=160"])}
    ),
    "zero2": World("zero2", 2, _usual(after="zero2.dropout") | _leg("zero2") | _again("bf16_lora", BF16, world="zero2")),
    "ddp": World("ddp", 2, _usual(after="ddp.dropout") | _wholly("ddp") | _leg("ddp")),
    "zero3": World(
        "zero3",
        2,
        _usual(after="zero3.dropout")
        | _wholly("zero3")
        | _leg("zero3")
        | _again("bf16_lora", BF16, world="zero3")
        | {
            "bf16": Job([*ACC2, "model.dtype=bfloat16", *RECOMPUTE]),
            "dry": Job(ACC1, options=["--dry-run"]),
            "six": Job([*SIX, "train.per_device_train_batch_size=3"]),
        },
    ),
    # Small layers are kept whole by DeepSpeed unless its threshold is 0, as in the launch file made for this world.
    "sharded": World(
        "sharded",
        3,
        {
            "six": Job([*SIX, "train.per_device_train_batch_size=2", "data.eval=[{eval}]", "eval.every_steps=2"]),
            "six_recompute": Job([*SIX, "train.per_device_train_batch_size=2", *RECOMPUTE]),
            "six_reentrant": Job([*SIX, "train.per_device_train_batch_size=2", *REENTRANT]),
        }
        | _leg("sharded")
        | _again("whole", SIX_STEPS, world="sharded"),
    ),
    "four": World("sharded", 4, _leg("four") | _again("whole", SIX_STEPS, world="four")),
    "zero3_offload": World(
        "zero3_offload",
        2,
        _offload(after="zero3_offload.recompute")
        | {
            "acc1": Job([*ACC1, *SAVES, *EVALUATES]),
            "bf16_lora": Job(BF16, after="zero3.bf16_lora"),
        }
        | _leg("zero3_offload"),
    ),
    "zero2_offload": World(
        "zero2_offload",
        2,
        _leg("zero2_offload")
        | _again("whole", SIX_STEPS, world="zero2_offload")
        | _again("bf16_lora", BF16, world="zero2_offload"),
    ),
    "zero3_nvme": World("zero3_nvme", 2, _offload(after="zero3_nvme.recompute")),
    "again": World("single", 1, _leg("again") | {"bf16_lora": Job(BF16, after="zero3.bf16_lora")}),
}


@dataclass(frozen=True)
class Result:
    """What a job left."""

    run_dir: Path
    codes: list[int]
    logs: list[str]
    started_from: list[str] = field(default_factory=list)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def training(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "loss" in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "eval_loss" in row]

    def values(self, key: str) -> list[float]:
        return [row[key] for row in self.training]

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "status.json").read_text())

    def adapter(self) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(self.run_dir / "adapter" / "adapter_model.safetensors")


def make_small_base(folder: Path, *, vocabulary_rows: int | None = None) -> Path:
    """A Llama of two layers with random weights (bf16, in safetensors) and a byte-level tokenizer with a template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=301, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    tokens.train_from_iterator(["hello world what is this a question and an answer"] * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{m['role']}}\n{% if m['role']=='assistant' %}{% generation %}{{m['content']}}"
        "<|im_end|>{% endgeneration %}{% else %}{{m['content']}}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=vocabulary_rows or len(tokenizer),
        hidden_size=64,
        intermediate_size=129,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_other_base(folder: Path, model_type: str, *, tokenizer_of: Path) -> Path:
    """A small base of another architecture with random weights, fp32, and the tokenizer of another folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    sizes = {
        "mixtral": {"hidden_size": 64, "intermediate_size": 33, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2},
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    }
    arguments = sizes[model_type] | {"vocab_size": len(tokenizer), "initializer_range": 0.1}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **arguments)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, num_rows: int, seed: int) -> Path:
    """Conversations of one question and one answer in random words."""
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "five", "six", "seven"]
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(num_rows):
            turns = [
                {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(2, most)))}
                for role, most in (("user", 12), ("assistant", 10))
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def children_of(pid: int) -> list[int]:
    """All descendants of a process, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        own = parents.get(todo.pop(), [])
        found += own
        todo += own
    return found


class Project:
    """A base, data and job file in one folder, and the ways to start the command with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = make_small_base(folder / "base")
        self.others = {name: folder / name for name in ("mixtral", "gpt2")}
        self.train = write_rows(folder / "train.jsonl", 23, seed=0)  # 17 packs
        self.eval = write_rows(folder / "eval.jsonl", 11, seed=1)
        self.job = folder / "job.yaml"
        job = {
            "model": {"base": str(self.base), "dtype": "float32"},
            "lora": {"r": 3, "lora_alpha": 6},
            "data": {"train": [str(self.train)], "max_length": 128, "cache_dir": str(folder / "cache")},
            "train": {"max_steps": 7, "learning_rate": 1.0e-2, "weight_decay": 0.1, "seed": 1},
        }
        self.job.write_text(yaml.safe_dump(job))
        self._results: dict[str, dict[str, Result]] = {}
        self._started: list[subprocess.Popen[bytes]] = []
        nothing_kept = {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
        self._write_launch_file("sharded", "zero3", nothing_kept)
        self._write_launch_file("zero2_offload", "zero2", {"offload_optimizer": {"device": "cpu"}})

    def _write_launch_file(self, name: str, shipped: str, sharding: dict[str, Any]) -> None:
        """A launch file of the project with other settings of ZeRO, in the project's folder."""
        launch = yaml.safe_load((ROOT / f"launch/accelerate/{shipped}.yaml").read_text())
        zero = json.loads((ROOT / launch["deepspeed_config"]["deepspeed_config_file"]).read_text())
        zero |= {"zero_force_ds_cpu_optimizer": False, "zero_optimization": zero["zero_optimization"] | sharding}
        (self.folder / f"{name}.json").write_text(json.dumps(zero))
        launch["deepspeed_config"]["deepspeed_config_file"] = str(self.folder / f"{name}.json")
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(launch))

    # Starting processes

    def start(self, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a Python command line in the repository root, both its streams into a file."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE"))}
        # bitsandbytes compiles its fallback for odd widths, seconds in every process.
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        self._started.append(process)
        return process

    def launch_arguments(self, config: str, num_processes: int) -> list[str]:
        path = ROOT / f"launch/accelerate/{config}.yaml"
        if not path.exists():
            path = self.folder / f"{config}.yaml"
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(path)]
        return [*launch, "--num_processes", str(num_processes), "--main_process_port", "0"]

    def launch(self, config: str, num_processes: int, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """`accelerate launch ... -m qlora ARGUMENTS`."""
        return self.start([*self.launch_arguments(config, num_processes), "-m", "qlora", *arguments], log)

    @staticmethod
    def wait(process: subprocess.Popen[bytes], log: Path, timeout: float = TIMEOUT) -> int:
        """Wait for the end, for as long as a test may take."""
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            pytest.fail(f"did not end in {timeout:.0f} s:\n{log.read_text(errors='replace')[-4000:]}")

    def end_all(self) -> None:
        for process in self._started:
            if process.poll() is None:
                kill_tree(process.pid)
                process.wait()

    def fill(self, text: str, world_size: int) -> str:
        for name, folder in self.others.items():
            if f"{{{name}}}" in text and not folder.exists():
                make_other_base(folder, name, tokenizer_of=self.base)
        return text.format(rows=4 // world_size, half=2 // world_size, eval=self.eval, **self.others)

    # Runs that tests share

    def result(self, name: str) -> Result:
        """The run WORLD.JOB; its world is launched on the first call."""
        world, job = name.split(".")
        if world not in self._results:
            self._results[world] = self._run_world(world)
        found = self._results[world][job]
        assert not any(found.codes), f"{name}: {found.codes}\n" + "\n".join(text[-3000:] for text in found.logs)
        return found

    def _run_world(self, name: str) -> dict[str, Result]:
        world = WORLDS[name]
        folder = self.folder / name
        folder.mkdir()
        jobs = []
        for job_name, job in world.jobs.items():
            run_dir, prepare = folder / job_name, None
            if job.after is not None:
                own = job.after.startswith(f"{name}.")
                source = folder / job.after.split(".")[1] if own else self.result(job.after).run_dir
                prepare = [str(source), str(run_dir), job.after_step]
            overrides = [self.fill(text, world.num_processes) for text in job.overrides]
            argv = ["train", str(self.job), f"train.output_dir={run_dir}", *overrides, *job.options]
            jobs.append(
                {
                    "argv": argv,
                    "port": free_port(),
                    "log": str(folder / f"{job_name}.log"),
                    "prepare": prepare,
                }
            )
        table = folder / "jobs.json"
        table.write_text(json.dumps(jobs))
        script = str(Path(__file__).with_name("several_jobs.py"))
        log = folder / "launch.log"
        process = self.start([*self.launch_arguments(world.config, world.num_processes), script, str(table)], log)
        assert self.wait(process, log, max(TIMEOUT, 60.0 * len(jobs))) == 0, log.read_text()[-4000:]
        results = {}
        for job_name in world.jobs:
            ranks = range(world.num_processes)
            codes = [int((folder / f"{job_name}.log.{rank}.code").read_text()) for rank in ranks]
            logs = [(folder / f"{job_name}.log.{rank}").read_text(errors="replace") for rank in ranks]
            results[job_name] = Result(folder / job_name, codes, logs)
        return results


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants, which a launcher puts into sessions of their own."""
    for number in [*children_of(pid), pid]:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue


def assert_close_relative(found: Sequence[float], wanted: Sequence[float], relative: float) -> None:
    """Every number within a relative difference of its partner."""
    assert len(found) == len(wanted)
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert math.isclose(a, b, rel_tol=relative), f"at {step}: {a} and {b} differ by {abs(a - b) / abs(b):.2e}"


def wait_until(condition: Callable[[], Any], timeout: float = 120.0) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail("waited in vain")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", VARIANTS)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    project = Project(tmp_path_factory.mktemp("project"))
    yield project
    project.end_all()


@pytest.fixture(autouse=True, scope="module")
def _without_compiling(without_compiling: None) -> None:
    """In every test here."""


@pytest.fixture(scope="session")
def close_relative() -> Callable[[Sequence[float], Sequence[float], float], None]:
    return assert_close_relative


@pytest.fixture(scope="session")
def patiently() -> Callable[..., Any]:
    return wait_until


@pytest.fixture(scope="session")
def descendants() -> Callable[[int], list[int]]:
    return children_of


@pytest.fixture
def finished_run(project: Project, tmp_path: Path) -> Path:
    """A copy of a run of seven steps with checkpoints after 3, 6 and 7, to be resumed or damaged."""
    target = tmp_path / "run"
    shutil.copytree(project.result("single.acc2").run_dir, target)
    return target


@pytest.fixture(scope="session", name="make_small_base")
def make_small_base_fixture() -> Callable[..., Path]:
    return make_small_base


@pytest.fixture(scope="session")
def launched_files() -> set[str]:
    """The launch files of the project that worlds are started with."""
    return {world.config for world in WORLDS.values()} - {"sharded", "zero2_offload"}
