"""Answers and evaluations of several ranks, each of which keeps a share of the base, against one process's."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora
from qlora.cli.main import main
from tests.e2e.places import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.long]

PROMPTS = ["one", "what is this", "alpha beta " * 9, "two three four", "a", "seven six five four three", "hello world " * 4]
NUM_ROWS = 7
JOBS = ("answers", "wholly", "one", "eval", "eval_wholly")
MISTAKES = ("damaged", "other", "prompts")
# Launch file, processes and jobs of one launch.
WORLDS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "zero3": ("zero3", 2, (*JOBS, *MISTAKES)),
    # Threshold 0: nothing stays whole on a rank.
    "sharded": ("sharded", 3, ("answers", "one", "eval", "eval_wholly")),
    "zero2": ("zero2", 2, ("answers", "one", "eval")),
}
Ranks = dict[str, list[tuple[int, str]]]  # exit code and output of each rank, by job
# Starts `several_jobs.py` with {rank} filled in, so that a rank can be given something else than the others.
START = """
import os, sys
from pathlib import Path
table = Path(sys.argv[1])
own = table.with_name(f"jobs.{os.environ['RANK']}.json")
own.write_text(table.read_text().replace("{rank}", os.environ["RANK"]))
sys.argv[1] = str(own)
sys.path.insert(0, SCRIPTS)
import several_jobs
several_jobs.main()
"""


@dataclass(frozen=True)
class Files:
    """What the jobs of this module read.

    Attributes:
        base: of which many tokens end an answer, so that answers differ in length.
        adapter, wholly: LoRA alone, and with norms, embeddings and head trained as wholes.
        damaged, other: rank 0's folder is `adapter`; rank 1 has half a file, or other values.
    """

    base: Path
    adapter: Path
    wholly: Path
    damaged: Path
    other: Path


def make_adapter(base: Path, folder: Path, config: qlora.LoraConfig) -> Path:
    model, _ = qlora.load_base(str(base), dtype="float32")
    qlora.inject_lora(model, config)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return qlora.save_adapter(model, folder)


@pytest.fixture(scope="module")
def files(project: Any, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("shared_use")
    base = folder / "base"
    shutil.copytree(project.base, base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 301, 11))}))
    adapter = make_adapter(base, folder / "adapter", qlora.LoraConfig(r=3))
    all_of_it = qlora.LoraConfig(r=3, train_norms=True, train_embeddings=True, train_head=True)
    wholly = make_adapter(base, folder / "wholly", all_of_it)
    for name in ("damaged", "other"):
        for rank in "01":
            shutil.copytree(adapter, folder / f"{name}.{rank}")
    weights = folder / "damaged.1/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    weights = folder / "other.1/adapter_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    rows = project.eval.read_text().splitlines()[:NUM_ROWS]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return Files(base, adapter, wholly, folder / "damaged.{rank}", folder / "other.{rank}")


def generate(files: Files, *options: object, adapter: Path | None = None) -> list[str]:
    argv = ["generate", "--adapter", adapter or files.adapter, "--max-new-tokens", 24, *options]
    return [str(word) for word in argv]


def evaluate(project: Any, files: Files, *options: object) -> list[str]:
    data = [f"model.base={files.base}", f"data.eval=[{files.base.parent}/rows.jsonl]", "data.max_length=48"]
    return [str(word) for word in ("eval", project.job, *data, "train.per_device_train_batch_size=1", "--json", *options)]


def jobs_of(project: Any, files: Files) -> dict[str, list[str]]:
    """The command lines that one process and several ranks do."""
    return {
        "answers": generate(files, "--prompts", files.base.parent / "prompts.jsonl"),
        "wholly": generate(files, "--prompts", files.base.parent / "prompts.jsonl", adapter=files.wholly),
        "one": generate(files, "--prompt", PROMPTS[1]),
        "eval": evaluate(project, files, "--adapter", files.adapter),
        "eval_wholly": evaluate(project, files, "--adapter", files.wholly, "data.packing=false"),
    }


def mistakes_of(project: Any, files: Files) -> dict[str, list[str]]:
    """Command lines that are wrong on one rank."""
    return {
        "damaged": generate(files, "--prompt", "one", adapter=files.damaged),
        "other": evaluate(project, files, "--adapter", files.other),
        "prompts": generate(files, "--prompt", "one", "--prompt", "two {rank}"),
    }


@pytest.fixture(scope="module")
def alone(project: Any, files: Files) -> dict[str, str]:
    """What one process prints."""
    printed = {}
    for name, argv in jobs_of(project, files).items():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(argv) == 0
        printed[name] = out.getvalue()
    return printed


def launch(project: Any, folder: Path, config: str, num_processes: int, jobs: dict[str, list[str]]) -> Ranks:
    """Do jobs in one launch."""
    table = []
    for name, argv in jobs.items():
        table.append({"argv": argv, "port": free_port(), "log": str(folder / name), "prepare": None})
    (folder / "jobs.json").write_text(json.dumps(table))
    (folder / "start.py").write_text(START.replace("SCRIPTS", repr(str(Path(__file__).parent))))
    log = folder / "launch.log"
    command = [*project.launch_arguments(config, num_processes), str(folder / "start.py"), str(folder / "jobs.json")]
    process = project.start(command, log)
    assert project.wait(process, log, timeout=120) == 0, log.read_text()[-4000:]
    return {
        name: [
            (int((folder / f"{name}.{rank}.code").read_text()), (folder / f"{name}.{rank}").read_text())
            for rank in range(num_processes)
        ]
        for name in jobs
    }


def without_notes(output: str) -> str:
    """What a rank printed, without the lines that libraries write beside it."""
    return "".join(line for line in output.splitlines(keepends=True) if not line.startswith("["))


@pytest.fixture(scope="module")
def done(project: Any, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ranks]:
    """What the ranks of a world printed; it is launched on the first call."""
    found: dict[str, Ranks] = {}

    def of(world: str) -> Ranks:
        if world not in found:
            config, num_processes, names = WORLDS[world]
            jobs = jobs_of(project, files) | mistakes_of(project, files)
            folder = tmp_path_factory.mktemp(world)
            found[world] = launch(project, folder, config, num_processes, {name: jobs[name] for name in names})
        return found[world]

    return of


@pytest.mark.parametrize(
    ("world", "name"), [(w, name) for w, (*_, names) in WORLDS.items() for name in names if name in JOBS]
)
def test_ranks_answer_like_one_process(
    done: Callable[[str], Ranks], alone: dict[str, str], close_relative: Any, world: str, name: str
) -> None:
    ranks = done(world)[name]
    assert [code for code, _ in ranks] == [0] * len(ranks), ranks
    printed = [without_notes(output) for _, output in ranks]
    assert printed[1:] == [""] * (len(ranks) - 1)
    if not name.startswith("eval"):
        assert printed[0] == alone[name]
        return
    found, wanted = json.loads(printed[0]), json.loads(alone[name])
    assert list(found) == list(wanted) == ["base", "adapter"]
    for kind in wanted:
        close_relative(list(found[kind].values()), list(wanted[kind].values()), 1e-5)


def test_one_process_answers_at_different_lengths(files: Files, alone: dict[str, str]) -> None:
    """Or the comparison would not show that ranks which are done go on."""
    from qlora.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(files.base))
    lines = alone["answers"].split("\n")
    lengths = {len(tokenizer(lines[n + 1])["input_ids"]) for n, line in enumerate(lines) if line.startswith("> ")}
    assert len(lengths) >= 4
    values = {name: json.loads(alone[name]) for name in ("eval", "eval_wholly")}
    close = {round(result["base"]["eval_loss"], 4) for result in values.values()}
    assert len(close) == 1  # packing and a second load change nothing
    assert len({round(result["adapter"]["eval_loss"], 2) for result in values.values()} | close) == 3


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("damaged", "adapter_model.safetensors"),
        ("other", "the ranks do not hold the same adapter"),
        ("prompts", "the ranks do not hold the same prompts"),
    ],
)
def test_an_error_of_one_rank_is_everybodys(done: Callable[[str], Ranks], name: str, wanted: str) -> None:
    for rank, (code, output) in enumerate(done("zero3")[name]):
        assert code == 2, output
        assert f"error{f' (rank {rank})' if rank else ''}: " in output
        assert wanted in output
        assert "Traceback" not in output
