"""Bases that cannot be loaded in shares: every rank says the same, ends at once with exit code 2, and nothing is left.

All jobs run in one launch of two ranks (`jobs_with_faults.py`), through the command itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.places import free_port, launch

pytestmark = [pytest.mark.e2e, pytest.mark.long]
SECONDS_TO_END = 20
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Refused:
    """What a job left."""

    run_dir: Path
    codes: list[int]
    logs: list[str]
    seconds_to_end: float

    def error_of(self, rank: int) -> str:
        """The one error in a rank's log, to the end of the log."""
        label = r"^error: " if rank == 0 else rf"^error \(rank {rank}\): "
        _, *errors = re.split(label, self.logs[rank], flags=re.MULTILINE)
        assert len(errors) == 1, self.logs[rank]
        return errors[0]


@dataclass(frozen=True)
class Fault:
    """A base that cannot be loaded.

    Attributes:
        make: makes a rank's copy of the base such that it cannot be used. Args: the copy, the rank.
        parts: what the error says.
        own_copies: each rank has a copy of its own, by a relative path.
        on_rank_1: what `jobs_with_faults.py` brings about there.
    """

    parts: list[str]
    make: Callable[[Path, int], None] = lambda base, rank: None
    own_copies: bool = False
    on_rank_1: str | None = None


def cut_a_file(base: Path, rank: int) -> None:
    file = base / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def name_a_tensor_too_many(base: Path, rank: int) -> None:
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00003.safetensors"
    (base / INDEX).write_text(json.dumps(index))


def remove_a_file(base: Path, rank: int) -> None:
    (base / "model-00003-of-00003.safetensors").unlink()


def change_the_config(base: Path, rank: int) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 130}))


def change_a_weight_on_rank_1(base: Path, rank: int) -> None:
    if rank == 1:
        file = base / "model-00003-of-00003.safetensors"
        tensors = load_file(file)
        name = sorted(tensors)[0]
        tensors[name].view(-1)[0] += 1
        save_file(tensors, file, {"format": "pt"})


def make_enormous(base: Path, rank: int) -> None:
    """Eight layers of files that are 15 terabytes long and take no place on the disk."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for file in base.glob("model*"):
        file.unlink()
    config = AutoConfig.from_pretrained(base)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1 << 18, 1 << 20, 8
    config.head_dim, config.num_attention_heads = 128, 2048
    config.save_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        part = re.search(r"layers\.(\d+)\.", name)
        files.setdefault(f"model-{part[1] if part else 'rest'}.safetensors", {})[name] = tuple(parameter.shape)
    for name, shapes in files.items():
        header, size = {}, 0
        for key, shape in shapes.items():
            num_bytes = 2 * torch.Size(shape).numel()
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, size + num_bytes]}
            size += num_bytes
        raw = json.dumps(header).encode()
        with (base / name).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + size)
    (base / INDEX).write_text(json.dumps({"weight_map": {key: name for name, keys in files.items() for key in keys}}))


FAULTS = {
    # Found on every rank alike.
    "a file that is cut short": Fault(["model-00002-of-00003.safetensors: the file is cut short inside"], cut_a_file),
    "a tensor in no file": Fault(["names 1 tensors that no file holds", "model.layers.9.mlp"], name_a_tensor_too_many),
    "a file that is missing": Fault(["names files that are not there", "model-00003-of-00003"], remove_a_file),
    "another shape": Fault(["has another shape than config.json says", "(64, 129)", "(64, 130)"], change_the_config),
    "too little memory": Fault(
        ["a rank's share of the base, 1/2 of it does not fit into memory", "GiB free", "GiB to keep", "zero3"], make_enormous
    ),
    # Found on one rank alone, or by comparing.
    "ranks with other files": Fault(["the ranks do not hold the same base"], change_a_weight_on_rank_1, own_copies=True),
    "a file that cannot be read": Fault(["model.safetensors: cannot be read (Input/output error)"], on_rank_1="unreadable"),
    "a file that becomes shorter": Fault(["the file ends inside"], own_copies=True, on_rank_1="cut short"),
    "a file that is gone when the base is opened": Fault(
        ["names files that are not there"], own_copies=True, on_rank_1="gone early"
    ),
    "a file that goes away": Fault(["cannot be read (No such file or directory)"], own_copies=True, on_rank_1="gone"),
    "a bug": Fault([], on_rank_1="bug"),
}  # fmt: skip
MENDABLE = [name for name in FAULTS if name != "a bug"]


@pytest.fixture(scope="module")
def base_in_three_files(project: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's base once more, in shards."""
    folder = tmp_path_factory.mktemp("sharded") / "base"
    shutil.copytree(project.base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(project.base / "model.safetensors")
    files = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    places = {name: files[number % 3] for number, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def copies(base: Path, folder: Path, fault: Fault) -> Iterator[str]:
    """Make a job's base, or each rank's. Gives what the job calls it."""
    for rank in range(2) if fault.own_copies else (0,):
        target = folder / str(rank) / "base" if fault.own_copies else folder / "base"
        shutil.copytree(base, target)
        fault.make(target, rank)
        yield "./base" if fault.own_copies else str(target)


@pytest.fixture(scope="module")
def refused(project: Any, base_in_three_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Refused]:
    """Every job, done."""
    out = tmp_path_factory.mktemp("refused")
    jobs = []
    for number, fault in enumerate(FAULTS.values()):
        folder = out / str(number)
        *_, base = copies(base_in_three_files, folder, fault)
        argv = ["train", str(project.job), f"train.output_dir={out}/runs/{number}", f"model.base={base}"]
        jobs.append(
            {
                "argv": argv,
                "port": free_port(),
                "log": str(folder / "log"),
                "folder": str(folder) if fault.own_copies else None,
                "fault": fault.on_rank_1,
            }
        )
    launch(project, out, "zero3", "jobs_with_faults.py", jobs)
    for file in out.rglob("*.safetensors"):  # some are terabytes long to whoever copies this folder
        file.unlink()
    return {name: collect(out / str(number) / "log", out / f"runs/{number}") for number, name in enumerate(FAULTS)}


def collect(log: Path, run_dir: Path) -> Refused:
    logs = [log.with_name(f"log.{rank}") for rank in (0, 1)]
    ends = [json.loads(log.with_name(f"log.{rank}.end").read_text()) for rank in (0, 1)]
    first_error = min(file.stat().st_mtime for file in logs)
    texts = [file.read_text(errors="replace") for file in logs]
    return Refused(run_dir, [code for code, _ in ends], texts, max(time for _, time in ends) - first_error)


@pytest.mark.parametrize("name", MENDABLE)
def test_every_rank_says_the_same_and_ends(refused: dict[str, Refused], name: str) -> None:
    found = refused[name]
    assert found.codes == [2, 2], found.logs
    whole, line = found.error_of(0), found.error_of(1)
    for part in FAULTS[name].parts:
        assert part in whole
    assert line.rstrip("\n") == whole.splitlines()[0]
    assert "Traceback" not in "".join(found.logs)
    assert found.seconds_to_end < SECONDS_TO_END


@pytest.mark.parametrize("name", MENDABLE)
def test_a_refused_base_leaves_nothing_behind(refused: dict[str, Refused], name: str) -> None:
    assert not refused[name].run_dir.exists()


def test_a_base_that_does_not_fit_is_refused_with_numbers(refused: dict[str, Refused]) -> None:
    error = refused["too little memory"].error_of(0)
    free, kept, largest = (float(number) for number in re.findall(r"([\d.]+) GiB", error))
    # Eight layers, half a byte for each of their weights and an eighth more for scales, over two ranks.
    weights = 8 * (2 * (1 << 36) + 2 * (1 << 18) * 256 + 3 * (1 << 38))
    assert kept == pytest.approx(weights / 2 * (1 / 2 + 1 / 64) / (1 << 30), rel=0.01)
    assert largest == pytest.approx((1 << 37) / (1 << 30))
    assert 0 < free < kept


def test_a_bug_on_one_rank_ends_all(refused: dict[str, Refused]) -> None:
    found = refused["a bug"]
    assert found.codes == [1, 1]
    assert found.logs[0].rstrip().endswith("RuntimeError: rank 1 failed: ValueError: a bug of ours")
    assert found.logs[1].rstrip().endswith("ValueError: a bug of ours")
    assert all(log.count("Traceback") == 1 for log in found.logs)
    assert found.seconds_to_end < SECONDS_TO_END
    # Unlike a refused job, it leaves what is known of it.
    status = json.loads((found.run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["resumable"]) == ("failed", 1, False)
    assert "a bug of ours" in status["reason"]
